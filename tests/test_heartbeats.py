"""Workers watch each other: heartbeats, lost tasks, and workers that are killed or stalled."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from helpers import (
    QUEUE,
    QUICK,
    ended,
    enqueue,
    execute,
    finished,
    get_task,
    make_worker,
    statuses,
    wait_for,
    worker_process,
    working,
)
from shared import Pool, open_connection

# The worker of lessons 05 and 06 is that of 04; see test_tables.py.
pytestmark = [pytest.mark.since(4), pytest.mark.only(4, 7)]

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="no such signals and subprocesses")

INACTIVE_AFTER = QUICK["INACTIVE_AFTER"]


async def echo(input: Any) -> Any:
    return input


async def add_worker(pool: Pool, seconds_ago: float) -> Any:
    """A worker that exists in the table only, with a heartbeat of so long ago; its id."""
    id = uuid4()
    await execute(
        pool,
        """
        INSERT INTO workers (id, display_name, last_heartbeat_at)
        VALUES (%s, 'of old', now() - make_interval(secs => %s))
        """,
        id,
        seconds_ago,
    )
    return id


async def add_running_task(pool: Pool, worker_id: Any, **columns: Any) -> int:
    """A task that this worker claimed once."""
    columns = {"status": "RUNNING", "attempt": 1, "worker_id": worker_id, **columns}
    return await enqueue(pool, "echo", **columns)


async def heartbeats(pool: Pool) -> list[Any]:
    """The time of the one worker's last heartbeat, asked for on a connection not of the pool."""
    async with await open_connection(pool) as conn:
        cursor = await conn.execute(
            "SELECT last_heartbeat_at FROM workers WHERE display_name <> 'of old'"
        )
        return [row["last_heartbeat_at"] for row in await cursor.fetchall()]


async def wait_for_beats(pool: Pool, beats: int = 3) -> None:
    """Wait until the one worker's heartbeat has changed that often."""
    for _ in range(beats):
        before = await heartbeats(pool)

        async def changed(before: Sequence[Any] = before) -> bool:
            return await heartbeats(pool) not in ([], before)

        await wait_for(changed, "the heart beats again")


async def test_a_worker_is_registered_before_it_claims(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Else its first tasks would be those of a worker nobody knows."""
    id = await enqueue(pool, "echo")
    async with AsyncExitStack() as stack:
        async with pool.connection() as conn, conn.transaction():
            await conn.execute("LOCK TABLE workers IN EXCLUSIVE MODE")
            worker = make_worker(lesson, pool, queries, echo, **QUICK)
            await stack.enter_async_context(working(worker))
            await asyncio.sleep(0.5)
            assert (await get_task(pool, id))["status"] == "QUEUED"
        assert (await finished(pool, id))["status"] == "COMPLETED"
        (row,) = await execute(pool, "SELECT * FROM workers")
    assert row["id"] == (await get_task(pool, id))["worker_id"]
    assert row["display_name"] == f"{socket.gethostname()}:{os.getpid()}"


async def test_the_heart_beats_on_while_rows_are_locked(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    inactive = await add_worker(pool, seconds_ago=60)
    lost = await add_running_task(pool, inactive)
    expired = await enqueue(pool, "echo", queue="other", schedule_timeout_at="2000-01-01")
    async with AsyncExitStack() as stack:
        async with pool.connection() as conn, conn.transaction():
            await conn.execute("SELECT FROM tasks FOR UPDATE")
            await conn.execute("SELECT FROM workers FOR UPDATE")
            await stack.enter_async_context(
                working(make_worker(lesson, pool, queries, echo, **QUICK))
            )
            # Long enough for it to look after the inactive worker's task.
            await wait_for_beats(pool, beats=15)
            assert await statuses(pool) == {"RUNNING": 1, "QUEUED": 1}
        assert (await finished(pool, lost))["status"] == "COMPLETED"
        assert (await finished(pool, expired))["status"] == "FAILED"


async def test_the_heart_beats_on_while_tasks_hold_all_connections_of_the_pool(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    release = asyncio.Event()
    holding = 0

    async def hold(input: Any) -> Any:
        nonlocal holding
        async with pool.connection():
            holding += 1
            await release.wait()

    ids = [await enqueue(pool, "hold") for _ in range(pool.max_size)]
    async with working(make_worker(lesson, pool, queries, hold, **QUICK)):
        await wait_for(lambda: holding == pool.max_size, "all connections are held")
        await wait_for_beats(pool, beats=12)
        release.set()
        rows = [await finished(pool, id) for id in ids]
    assert {(row["status"], row["attempt"]) for row in rows} == {("COMPLETED", 1)}


@POSIX
@pytest.mark.flaw(3, reason="a task whose worker is killed stays RUNNING for ever")
async def test_the_task_of_a_killed_worker_is_finished_by_another(
    lesson: Any, pool: Pool, queries: Any, tmp_path: Path
) -> None:
    file = tmp_path / "notes"
    id = await enqueue(pool, "sleep", {"file": str(file), "seconds": 3600})
    async with worker_process(lesson) as process:
        await wait_for(file.exists, "the task has started")
        process.kill()
        await process.wait()

    async def sleep(input: Any) -> Any:
        return "by another"

    async with working(make_worker(lesson, pool, queries, sleep, **QUICK)):
        seconds = 3 if lesson.number == 3 else 20
        await wait_for(lambda: is_completed(pool, id), "the task is completed", seconds)
        row = await get_task(pool, id)

        async def only_one_worker() -> bool:
            return len(await execute(pool, "SELECT id FROM workers")) == 1

        await wait_for(only_one_worker, "the row of the killed worker is deleted")
    assert row["output"] == "by another"
    assert (row["attempt"], row["lost_count"], row["retry_count"]) == (2, 1, 0)


async def is_completed(pool: Pool, id: int) -> bool:
    return bool((await get_task(pool, id))["status"] == "COMPLETED")


async def test_a_lost_task_is_requeued_once_though_several_workers_notice(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    inactive = await add_worker(pool, seconds_ago=60)
    ids = [await add_running_task(pool, inactive) for _ in range(20)]
    workers = [make_worker(lesson, pool, queries, echo, **QUICK) for _ in range(3)]
    async with working(*workers):
        rows = [await finished(pool, id) for id in ids]
    assert {(row["lost_count"], row["attempt"]) for row in rows} == {(1, 2)}


@pytest.mark.parametrize("worker_id", [uuid4(), None], ids=["unknown", "none"])
async def test_a_running_task_of_nobody_is_requeued(
    lesson: Any, pool: Pool, queries: Any, worker_id: Any
) -> None:
    id = await add_running_task(pool, worker_id)
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        assert (await finished(pool, id))["lost_count"] == 1


async def test_tasks_of_active_workers_are_left_alone(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    others = await add_running_task(pool, await add_worker(pool, seconds_ago=-3600))
    lost = await add_running_task(pool, await add_worker(pool, seconds_ago=3600))
    before = await get_task(pool, others)
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        await finished(pool, lost)
        await wait_for_beats(pool)
        assert await get_task(pool, others) == before
        assert len(await execute(pool, "SELECT id FROM workers")) == 2


async def test_a_worker_that_has_just_started_gives_others_time_to_beat(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """After an outage everybody's heartbeat is old."""
    id = await add_running_task(pool, await add_worker(pool, seconds_ago=60))
    began = time.monotonic()
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        await finished(pool, id)
    assert time.monotonic() - began >= 0.9 * INACTIVE_AFTER


async def age_all_heartbeats(pool: Pool, seconds: float) -> int | None:
    """While no heart can beat, make all heartbeats old, and add a running task of nobody: its id.

    None, and nothing is done, if a worker has beaten just now and is about to judge.
    """
    async with pool.connection() as conn, conn.transaction():
        await conn.execute("LOCK TABLE workers IN ACCESS EXCLUSIVE MODE")
        waiting: list[Any] = []
        while not waiting:
            # From outside: within a transaction pg_stat_activity stands still.
            waiting = await execute(
                pool,
                """
                SELECT query
                FROM pg_stat_activity
                WHERE datname = current_database() AND wait_event_type = 'Lock'
                """,
            )
        if "was_out_of_touch" not in waiting[0]["query"]:
            return None
        await conn.execute(
            "UPDATE workers SET last_heartbeat_at = now() - make_interval(secs => %s)", [seconds]
        )
        cursor = await conn.execute(
            """
            INSERT INTO tasks (queue, task_name, input, status, attempt, worker_id)
            VALUES (%s, 'echo', '1', 'RUNNING', 1, %s)
            RETURNING id
            """,
            [QUEUE, uuid4()],
        )
        (row,) = await cursor.fetchall()
        return int(row["id"])


@pytest.mark.only(7)
@pytest.mark.parametrize("silence", [0.75 * INACTIVE_AFTER, 3600])
async def test_a_worker_that_was_out_of_touch_gives_others_time_to_beat(
    lesson: Any, pool: Pool, queries: Any, silence: float
) -> None:
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        first = await add_running_task(pool, await add_worker(pool, seconds_ago=60))
        await finished(pool, first)  # by now it judges others
        while (id := await age_all_heartbeats(pool, silence)) is None:
            pass
        began = time.monotonic()
        await finished(pool, id)
    assert time.monotonic() - began >= 0.9 * INACTIVE_AFTER


async def test_a_task_that_has_lost_too_many_workers_fails(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """It may be what kills them."""
    inactive = await add_worker(pool, seconds_ago=60)
    deadly = await add_running_task(pool, inactive, lost_count=2)
    unlucky = await add_running_task(pool, inactive, lost_count=1)
    worker = make_worker(lesson, pool, queries, echo, **QUICK, MAX_LOST_WORKERS=3)
    async with working(worker):
        row = await finished(pool, deadly)
        other = await finished(pool, unlucky)
    assert (row["status"], row["lost_count"], row["attempt"]) == ("FAILED", 3, 1)
    assert "worker" in row["output"]["error"]
    assert row["finished_at"] is not None
    assert (other["status"], other["lost_count"]) == ("COMPLETED", 2)


@POSIX
async def test_a_worker_that_was_stopped_and_comes_back_changes_nothing(
    lesson: Any, pool: Pool, queries: Any, tmp_path: Path
) -> None:
    """SIGSTOP is what a stall of the machine, or of its disk, looks like to the others."""
    file = tmp_path / "notes"
    id = await enqueue(pool, "sleep", {"file": str(file), "seconds": 0.5})

    async def sleep(input: Any) -> Any:
        return "by another"

    async with worker_process(lesson) as process:
        await wait_for(file.exists, "the task has started")
        process.send_signal(signal.SIGSTOP)
        async with working(make_worker(lesson, pool, queries, sleep, **QUICK)):
            row = await finished(pool, id)
        assert (row["output"], row["attempt"], row["lost_count"]) == ("by another", 2, 1)

        process.send_signal(signal.SIGCONT)
        await wait_for(lambda: "ends" in file.read_text(), "the stopped function has ended")
        # It works on; by then it has dealt with the old task's outcome.
        again = tmp_path / "again"
        next_id = await enqueue(pool, "sleep", {"file": str(again), "seconds": 0})
        assert (await finished(pool, next_id))["output"] == process.pid

        async def it_alone_is_registered() -> bool:
            return len(await execute(pool, "SELECT id FROM workers")) == 1

        # If it was stopped in the middle of a beat, its row comes with the next one only.
        await wait_for(it_alone_is_registered, "the stopped worker is registered again")
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0
    assert await get_task(pool, id) == row


async def test_a_worker_whose_row_was_deleted_registers_again_and_claims(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        await wait_for_beats(pool)
        await execute(pool, "DELETE FROM workers")
        await wait_for_beats(pool, beats=1)
        row = await finished(pool, await enqueue(pool, "echo"))
    assert (row["attempt"], row["lost_count"]) == (1, 0)


@pytest.mark.only(7)
async def test_nobody_loses_a_task_because_no_heartbeat_could_be_written(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """The first one whose heartbeat comes through must not judge those whose did not yet."""
    started, release = asyncio.Event(), asyncio.Event()

    async def gated(input: Any) -> Any:
        started.set()
        await release.wait()

    id = await enqueue(pool, "gated")
    workers = [make_worker(lesson, pool, queries, gated, **QUICK) for _ in range(3)]
    async with working(*workers):
        await started.wait()
        await asyncio.sleep(2 * INACTIVE_AFTER)  # by now they judge each other
        async with pool.connection() as conn, conn.transaction():
            await conn.execute("LOCK TABLE workers IN EXCLUSIVE MODE")
            await asyncio.sleep(2 * INACTIVE_AFTER)
        await asyncio.sleep(0.5)
        release.set()
        row = await finished(pool, id)
    assert (row["attempt"], row["lost_count"]) == (1, 0)
