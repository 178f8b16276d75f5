"""Workers watch each other: heartbeats, lost tasks, and workers that are killed or stalled."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from helpers import (
    DEADLINE,
    QUICK,
    enqueue,
    execute,
    finished,
    get_task,
    make_worker,
    set_globals,
    statuses,
    wait_for,
    wait_for_status,
    worker_process,
    working,
)
from lesson_loader import LAST, Lesson
from shared import Pool, load_queries, open_connection, open_pool

# The heartbeat of lessons 05 to 07 is that of 04, and that of 09 is that of 08; see test_tables.py.
pytestmark = [pytest.mark.since(4), pytest.mark.only(4, 8, LAST)]

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="no such signals and subprocesses")

INACTIVE_AFTER = QUICK["INACTIVE_AFTER"]
LONG_AGO = "2000-01-01"
AN_HOUR = 3600.0  # seconds
NO_TICK = 3600.0  # seconds, for an interval that must not matter


async def echo(input: Any) -> Any:
    return input


def patient(lesson: Any) -> dict[str, float]:
    """QUICK, but none of several workers in this process is inactive because that has stood still.

    Who beats first then takes the others for dead, up to lesson 07. So there only those are who
    have been silent for half an hour.
    """
    return QUICK if lesson.number >= 8 else QUICK | {"INACTIVE_AFTER": AN_HOUR / 2}


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


async def wait_for_beats(pool: Pool, beats: int = 3, seconds: float = DEADLINE) -> None:
    """Wait until the one worker's heartbeat has changed that often, each within so long."""
    for _ in range(beats):
        before = await heartbeats(pool)

        async def changed(before: Sequence[Any] = before) -> bool:
            return await heartbeats(pool) not in ([], before)

        await wait_for(changed, "the heart beats again", seconds)


@asynccontextmanager
async def alive(pool: Pool, worker_id: Any) -> AsyncIterator[None]:
    """Beat for a worker that exists in the table only, within this block."""

    async def beat() -> None:
        async with await open_connection(pool) as conn:
            while True:
                await conn.execute(
                    "UPDATE workers SET last_heartbeat_at = now() WHERE id = %s", [worker_id]
                )
                await asyncio.sleep(QUICK["HEARTBEAT_INTERVAL"])

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait({beating})


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
    inactive = await add_worker(pool, seconds_ago=AN_HOUR)
    lost = await add_running_task(pool, inactive)
    expired = await enqueue(pool, "echo", queue="other", schedule_timeout_at=LONG_AGO)
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
    async with working(make_worker(lesson, pool, queries, hold, **patient(lesson))):
        await wait_for(lambda: holding == pool.max_size, "all connections are held")
        await wait_for_beats(pool, beats=12)
        release.set()
        rows = [await finished(pool, id) for id in ids]
    assert {(row["status"], row["attempt"]) for row in rows} == {("COMPLETED", 1)}


@pytest.mark.since(8)
@pytest.mark.flaw(7, reason="a heartbeat has to wait while others are looked after")
async def test_the_heart_beats_on_while_others_are_looked_after(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """However long that takes: here for as long as somebody holds a lock."""
    await execute(
        pool,
        """
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_advisory_xact_lock(1);
            RETURN NEW;
        END $$
        """,
    )
    await execute(
        pool,
        """
        CREATE TRIGGER wait BEFORE UPDATE ON tasks FOR EACH ROW
        WHEN (NEW.queue = 'slow') EXECUTE FUNCTION wait()
        """,
    )
    lost = await add_running_task(pool, await add_worker(pool, seconds_ago=60), queue="slow")
    expired = await enqueue(pool, "echo", queue="slow", schedule_timeout_at=LONG_AGO)
    async with AsyncExitStack() as stack:
        async with await open_connection(pool) as conn, conn.transaction():
            await conn.execute("SELECT pg_advisory_xact_lock(1)")
            await stack.enter_async_context(
                working(make_worker(lesson, pool, queries, echo, **QUICK))
            )
            await wait_for_beats(pool, 25, seconds=DEADLINE if lesson.number >= 8 else 2)
            assert await statuses(pool) == {"RUNNING": 1, "QUEUED": 1}
        await wait_for_status(pool, lost, "QUEUED")
        await wait_for_status(pool, expired, "FAILED")


@pytest.mark.since(8)
@pytest.mark.flaw(7, reason="a heartbeat waits for whoever has locked its row")
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT FROM workers FOR NO KEY UPDATE",
        "UPDATE workers SET display_name = display_name",
        "DELETE FROM workers",
    ],
    ids=["select", "update", "delete"],
)
async def test_a_beat_does_not_wait_for_a_lock_on_its_own_row(
    lesson: Any, pool: Pool, queries: Any, statement: str
) -> None:
    """Nor by trying to register again, which waits for whoever is writing the row."""
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        await wait_for_beats(pool)
        async with pool.connection() as conn, conn.transaction():
            await conn.execute(statement)
            for _ in range(20 if lesson.number >= 8 else 1000):  # it has to beat meanwhile
                await asyncio.sleep(0.02)
                assert await sessions_that_wait_for_a_lock(pool) == []
        await wait_for_beats(pool)


async def sessions_that_wait_for_a_lock(pool: Pool) -> list[str]:
    """Their queries."""
    rows = await execute(
        pool,
        """
        SELECT query
        FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'
        """,
    )
    return [row["query"] for row in rows]


@pytest.mark.since(8)
@pytest.mark.flaw(
    7, reason="a worker that cannot beat goes on claiming, for others to take it away"
)
async def test_a_worker_that_cannot_beat_claims_nothing(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        await wait_for_beats(pool)
        async with pool.connection() as conn, conn.transaction():
            await conn.execute("SELECT FROM workers FOR NO KEY UPDATE")
            await asyncio.sleep(1.5 * INACTIVE_AFTER)
            id = await enqueue(pool, "echo")
            for _ in range(25):  # so that it polls meanwhile, whoever stands still for a while
                await asyncio.sleep(0.02)
                assert (await get_task(pool, id))["attempt"] == 0
        row = await finished(pool, id)
    assert (row["status"], row["attempt"]) == ("COMPLETED", 1)


@POSIX
@pytest.mark.only(4, 7, 8, LAST)
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
        seconds = 3 if lesson.number == 3 else DEADLINE
        await wait_for(lambda: is_completed(pool, id), "the task is completed", seconds)
        row = await get_task(pool, id)

        await wait_for(lambda: is_alone(pool), "the row of the killed worker is deleted")
    assert row["output"] == "by another"
    assert (row["attempt"], row["retry_count"], row.get("lost_count", 1)) == (2, 0, 1)


async def is_completed(pool: Pool, id: int) -> bool:
    return bool((await get_task(pool, id))["status"] == "COMPLETED")


async def is_alone(pool: Pool) -> bool:
    """Whether there is only one worker in the table."""
    return len(await execute(pool, "SELECT id FROM workers")) == 1


async def test_a_lost_task_is_requeued_once_though_several_workers_notice(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    inactive = await add_worker(pool, seconds_ago=AN_HOUR)
    ids = [await add_running_task(pool, inactive) for _ in range(20)]
    workers = [make_worker(lesson, pool, queries, echo, **patient(lesson)) for _ in range(3)]
    async with working(*workers):
        rows = [await finished(pool, id) for id in ids]
    assert {(row.get("lost_count", 1), row["attempt"]) for row in rows} == {(1, 2)}


@pytest.mark.parametrize("worker_id", [uuid4(), None], ids=["unknown", "none"])
async def test_a_running_task_of_nobody_is_requeued(
    lesson: Any, pool: Pool, queries: Any, worker_id: Any
) -> None:
    id = await add_running_task(pool, worker_id)
    async with working(make_worker(lesson, pool, queries, echo, **patient(lesson))):
        assert (await finished(pool, id))["attempt"] == 2


@pytest.mark.since(8)
@pytest.mark.flaw(7, reason="a heartbeat from the future, of a clock set back, is valid for ever")
async def test_a_worker_whose_heartbeat_lies_in_the_future_is_inactive(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    lost = await add_running_task(pool, await add_worker(pool, seconds_ago=-3600))
    other = await add_running_task(pool, await add_worker(pool, seconds_ago=3600))
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        await finished(pool, other)
        # The same statement has looked at it.
        row = await get_task(pool, lost)
        assert row["attempt"] == 2 or row["status"] == "QUEUED"
        await finished(pool, lost)
        await wait_for(lambda: is_alone(pool), "the rows of the two are deleted")


@pytest.mark.since(8)
async def test_a_worker_whose_own_heartbeat_lies_in_the_future_beats_and_works_on(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """The clock of the server was set back: the next beat is of the time that it has now."""
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        await wait_for_beats(pool)
        await execute(pool, "UPDATE workers SET last_heartbeat_at = now() + INTERVAL '1 hour'")
        row = await finished(pool, await enqueue(pool, "echo"))
    assert (row["status"], row["attempt"]) == ("COMPLETED", 1)


async def test_tasks_of_active_workers_are_left_alone(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    other_worker = await add_worker(pool, seconds_ago=0)
    others = await add_running_task(pool, other_worker)
    lost = await add_running_task(pool, await add_worker(pool, seconds_ago=AN_HOUR))
    before = await get_task(pool, others)
    async with (
        alive(pool, other_worker),
        working(make_worker(lesson, pool, queries, echo, **patient(lesson))),
    ):
        await finished(pool, lost)
        await wait_for_beats(pool)
        assert await get_task(pool, others) == before
        assert len(await execute(pool, "SELECT id FROM workers")) == 2


# Housekeeping: in batches, and again at once while there are more


BATCH_SIZE = 1000


async def enqueue_many(pool: Pool, count: int, **columns: Any) -> None:
    """Enqueue many tasks in a queue that has no worker."""
    await execute(
        pool,
        f"""
        INSERT INTO tasks (queue, task_name, input, {", ".join(columns)})
        SELECT 'other', 'echo', '1', {", ".join(["%s"] * len(columns))}
        FROM generate_series(1, %s)
        """,
        *columns.values(),
        count,
    )


async def batches(pool: Pool) -> list[int]:
    """How many tasks each transaction has changed last, beginning with the lowest ids."""
    rows = await execute(
        pool, "SELECT count(*) AS n FROM tasks GROUP BY xmin::text ORDER BY min(id)"
    )
    return [row["n"] for row in rows]


@pytest.mark.since(8)
async def test_expired_tasks_fail_a_thousand_at_a_time_without_a_pause(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    await enqueue_many(pool, 2 * BATCH_SIZE + 1, schedule_timeout_at=LONG_AGO)
    settings = QUICK | {"HEARTBEAT_INTERVAL": 0.5}
    async with working(make_worker(lesson, pool, queries, echo, **settings)):
        await asyncio.sleep(0.1)
        set_globals(lesson, {"HEARTBEAT_INTERVAL": NO_TICK})  # the first round is the last one

        async def all_failed() -> bool:
            return await statuses(pool) == {"FAILED": 2 * BATCH_SIZE + 1}

        await wait_for(all_failed, "all have failed")
    assert await batches(pool) == [BATCH_SIZE, BATCH_SIZE, 1]


@pytest.mark.since(8)
@pytest.mark.flaw(7, reason="one statement takes all tasks of the dead, however many they are")
async def test_lost_tasks_are_queued_a_thousand_at_a_time(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    inactive = await add_worker(pool, seconds_ago=60)
    columns = {"status": "RUNNING", "attempt": 1, "worker_id": inactive}
    await enqueue_many(pool, BATCH_SIZE + 1, **columns)
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):

        async def all_queued() -> bool:
            return await statuses(pool) == {"QUEUED": BATCH_SIZE + 1}

        await wait_for(all_queued, "all are queued")
    assert await batches(pool) == [BATCH_SIZE, 1]


# Nobody takes an outage for everybody's death


@pytest.mark.since(8)
@pytest.mark.flaw(7, reason="after an outage, who is back first takes all others for dead")
async def test_a_worker_that_has_just_started_gives_others_time_to_beat(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """After an outage everybody's heartbeat is old."""
    id = await add_running_task(pool, await add_worker(pool, seconds_ago=AN_HOUR))
    began = time.monotonic()
    time_to_beat = 2.0 if lesson.number >= 8 else 60.0  # a busy machine must not look patient
    settings = QUICK | {"INACTIVE_AFTER": time_to_beat}
    async with working(make_worker(lesson, pool, queries, echo, **settings)):
        await finished(pool, id)
    assert time.monotonic() - began >= 0.9 * time_to_beat


@pytest.mark.since(8)
@pytest.mark.only(LAST)
async def test_a_worker_that_was_out_of_touch_gives_others_time_to_beat(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """It was not silent long enough to be inactive, but others may have been."""
    other_worker = await add_worker(pool, seconds_ago=0)
    others = await add_running_task(pool, other_worker)
    inactive_after = 3.0  # time for `alive` to connect, before the worker judges again
    settings = QUICK | {"INACTIVE_AFTER": inactive_after}
    async with working(make_worker(lesson, pool, queries, echo, **settings)):
        async with alive(pool, other_worker):
            lost = await add_running_task(pool, await add_worker(pool, seconds_ago=60))
            await finished(pool, lost)  # by now it judges others
        async with pool.connection() as conn, conn.transaction():
            await conn.execute("LOCK TABLE workers IN EXCLUSIVE MODE")
            await asyncio.sleep(0.75 * inactive_after)
        await asyncio.sleep(0.6 * inactive_after)
        async with alive(pool, other_worker):
            await wait_for_beats(pool, beats=15)
            assert (await get_task(pool, others))["status"] == "RUNNING"


@pytest.mark.since(8)
@pytest.mark.only(LAST)
async def test_a_clock_that_is_set_back_costs_nobody_a_task(
    lesson: Any, database: str, tmp_path: Path
) -> None:
    """The clock of Postgres, or that of the server that takes over from it."""
    lesson = with_a_clock(lesson.path, tmp_path)
    inactive_after = 2.0  # time for the first one to beat again, before the other one judges
    settings = QUICK | {"INACTIVE_AFTER": inactive_after}
    release = asyncio.Event()
    calls = 0

    async def gated(input: Any) -> None:
        nonlocal calls
        calls += 1
        await release.wait()

    async with open_pool(lesson.path) as pool:
        queries = load_queries(lesson.path)
        ids = [await enqueue(pool, "gated") for _ in range(4)]
        workers = [
            make_worker(lesson, pool, queries, gated, concurrency=2, **settings) for _ in range(2)
        ]
        async with working(*workers):
            await wait_for(lambda: calls == 4, "all have started")
            await asyncio.sleep(2 * inactive_after)  # by now they judge each other
            async with pool.connection() as conn, conn.transaction():
                # The first one judges for a while by a beat of before, the other beats again.
                lock = "SELECT FROM workers WHERE id = %s FOR NO KEY UPDATE"
                await conn.execute(lock, [workers[0].id])
                await execute(pool, "UPDATE clock_offset SET seconds = '-1 hour'")
                await asyncio.sleep(0.5 * inactive_after)
            await asyncio.sleep(1.5 * inactive_after)
            release.set()
            rows = [await finished(pool, id) for id in ids]
    assert {row["attempt"] for row in rows} == {1}
    assert calls == 4


def with_a_clock(path: Path, place: Path) -> Lesson:
    """A copy of a lesson whose now() is a clock that can be set."""
    copy = place / path.name
    shutil.copytree(path, copy)
    for name in ("schema.sql", "queries.sql"):
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace("now()", "clock()"))
    clock = """
        CREATE TABLE clock_offset (seconds INTERVAL NOT NULL);
        INSERT INTO clock_offset VALUES ('0');
        CREATE FUNCTION clock() RETURNS TIMESTAMPTZ STABLE LANGUAGE sql
            AS 'SELECT now() + seconds FROM clock_offset';
    """
    (copy / "schema.sql").write_text(clock + (copy / "schema.sql").read_text())
    return Lesson(copy)


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.flaw(9, reason="a task that kills its worker goes on to kill worker after worker")
async def test_a_task_that_has_lost_too_many_workers_fails(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """It may be what kills them."""
    inactive = await add_worker(pool, seconds_ago=60)
    before = {"lost_count": 17} if lesson.number >= 10 else {}
    deadly = await add_running_task(pool, inactive, queue="other", **before)
    unlucky = await add_running_task(pool, inactive)
    worker = make_worker(lesson, pool, queries, echo, **QUICK)
    seen = []
    async with working(worker):
        for times in range(3):
            if times:
                again = "UPDATE tasks SET status = 'RUNNING', attempt = 1 WHERE id = %s"
                await execute(pool, again, deadly)
            row = await wait_for_status(pool, deadly, "QUEUED", "FAILED")
            seen.append(row["status"])
        other = await finished(pool, unlucky)
    assert seen == ["QUEUED", "QUEUED", "FAILED"]
    assert (row["lost_count"], row["attempt"], row["retry_count"]) == (20, 1, 0)
    assert "worker" in row["output"]["error"]
    assert row["finished_at"] is not None
    assert (other["status"], other["lost_count"]) == ("COMPLETED", 1)


@POSIX
@pytest.mark.only(4, 7, 8, LAST)
async def test_a_worker_that_was_stopped_and_comes_back_changes_nothing(
    lesson: Any, pool: Pool, queries: Any, tmp_path: Path
) -> None:
    """SIGSTOP is what a stall of the machine, or of its disk, looks like to the others."""
    file = tmp_path / "notes"
    # Long enough to be stopped in, although this process may stand still first.
    id = await enqueue(pool, "sleep", {"file": str(file), "seconds": 5})

    async def sleep(input: Any) -> Any:
        return "by another"

    async with worker_process(lesson) as process:
        await wait_for(file.exists, "the task has started")
        process.send_signal(signal.SIGSTOP)
        async with working(make_worker(lesson, pool, queries, sleep, **QUICK)):
            row = await finished(pool, id)
        assert (row["output"], row["attempt"]) == ("by another", 2)

        process.send_signal(signal.SIGCONT)
        await wait_for(lambda: "ends" in file.read_text(), "the stopped function has ended")
        # It has a row again and works on; by then it has dealt with the old task's outcome.
        again = tmp_path / "again"
        next_id = await enqueue(pool, "sleep", {"file": str(again), "seconds": 0})
        assert (await finished(pool, next_id))["output"] == process.pid
    assert await get_task(pool, id) == row


async def test_a_worker_whose_row_was_deleted_registers_again_and_claims(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        await wait_for_beats(pool)
        await execute(pool, "DELETE FROM workers")
        await wait_for_beats(pool, beats=1)
        row = await finished(pool, await enqueue(pool, "echo"))
    assert row["attempt"] == 1


@pytest.mark.since(8)
@pytest.mark.only(LAST)
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
    assert row["attempt"] == 1
