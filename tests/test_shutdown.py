"""How a worker ends: signals, the grace, and what becomes of its tasks."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    DEADLINE,
    QUEUE,
    QUICK,
    ended,
    enqueue,
    execute,
    finished,
    get_task,
    make_worker,
    set_globals,
    wait_for,
    wait_for_status,
    worker_process,
    working,
)
from lesson_loader import LAST
from shared import Pool

pytestmark = [
    pytest.mark.since(9),
    pytest.mark.only(9, LAST),
    pytest.mark.skipif(sys.platform == "win32", reason="no such signals and subprocesses"),
]

DURABLE = Path(__file__).parent / "durable_process.py"
FOR_EVER = 3600.0
# What a worker does when the grace is over has as long, so it may stand still for a while.
GRACE = 5.0


async def enqueue_and_start(
    pool: Pool, file: Path, name: str, seconds: float, **columns: Any
) -> int:
    """Enqueue a task of worker_process.py, and wait until it has started."""
    id = await enqueue(pool, name, {"file": str(file), "seconds": seconds}, **columns)
    await wait_for(file.exists, "the task has started")
    return id


async def check_put_back(pool: Pool, id: int) -> None:
    """The task is queued, nothing is held against it, and no worker is left."""
    row = await get_task(pool, id)
    assert (row["status"], row["worker_id"], row["finished_at"]) == ("QUEUED", None, None)
    assert (row["attempt"], row["retry_count"], row.get("lost_count", 0)) == (1, 0, 0)
    assert await execute(pool, "SELECT id FROM workers") == []


@pytest.mark.flaw(
    8, reason="a worker that is told to stop cuts its tasks off, and leaves them RUNNING"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_the_claims_and_lets_a_running_task_end(
    lesson: Any, pool: Pool, tmp_path: Path, number: signal.Signals
) -> None:
    async with worker_process(lesson, concurrency=1, SHUTDOWN_GRACE=DEADLINE) as process:
        running = await enqueue_and_start(pool, tmp_path / "notes", "sleep", 1)
        process.send_signal(number)
        # Only now: were this process slow, the one task might end and the other begin before.
        waiting = await enqueue(pool, "sleep", {"file": str(tmp_path / "no"), "seconds": 0})
        assert await ended(process) == 0
    row = await get_task(pool, running)
    assert (row["status"], row["output"]) == ("COMPLETED", process.pid)
    assert (await get_task(pool, waiting))["attempt"] == 0
    assert await execute(pool, "SELECT id FROM workers") == []


async def test_a_task_that_outlives_the_grace_goes_back_to_the_queue(
    lesson: Any, pool: Pool, tmp_path: Path
) -> None:
    async with worker_process(lesson, SHUTDOWN_GRACE=GRACE) as process:
        id = await enqueue_and_start(pool, tmp_path / "notes", "sleep", FOR_EVER)
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0
    await check_put_back(pool, id)


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.flaw(
    9, reason="a function that ignores its cancellation keeps its worker from stopping"
)
async def test_a_task_that_ignores_its_cancellation_cannot_keep_its_worker_from_stopping(
    lesson: Any, pool: Pool, tmp_path: Path
) -> None:
    file = tmp_path / "notes"
    async with worker_process(lesson, SHUTDOWN_GRACE=GRACE) as process:
        id = await enqueue_and_start(pool, file, "stubborn", FOR_EVER)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE if lesson.number >= 10 else 3 * GRACE):
            assert await process.wait() == 0
    assert "ignores" in file.read_text()
    await check_put_back(pool, id)


@pytest.mark.only(LAST)
async def test_the_heart_beats_on_during_the_grace(
    lesson: Any, pool: Pool, queries: Any, tmp_path: Path
) -> None:
    """Else another worker would take the tasks that have not ended yet."""
    # In QUICK it is 1 s, and the process may stand still for as long.
    inactive: dict[str, Any] = {"INACTIVE_AFTER": 5.0}
    other = make_worker(lesson, pool, queries, **QUICK | inactive)
    queue = "of the process"
    settings = inactive | {"SHUTDOWN_GRACE": DEADLINE}
    async with worker_process(lesson, queue=queue, **settings) as process, working(other):
        grace = 2.5 * settings["INACTIVE_AFTER"]
        id = await enqueue_and_start(pool, tmp_path / "notes", "sleep", grace, queue=queue)
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0
        row = await get_task(pool, id)
    assert (row["status"], row["output"]) == ("COMPLETED", process.pid)
    assert row["attempt"] == 1


async def test_a_second_signal_ends_the_grace(lesson: Any, pool: Pool, tmp_path: Path) -> None:
    """It is sent when the worker has the first one, or the two would be one."""
    file = tmp_path / "notes"
    file.touch()
    input = {"file": str(file), "gate": str(tmp_path / "gate")}
    plain = await enqueue(pool, "busy", input | {"stop": "busy"})
    begins = input | {"stop": "before-the-first-event"}
    durable = await enqueue(pool, "process_order", begins, is_durable=True)
    async with worker_process(lesson, script=DURABLE, SHUTDOWN_GRACE=FOR_EVER) as process:
        await wait_for(lambda: len(file.read_text().splitlines()) == 2, "both have started")
        process.send_signal(signal.SIGTERM)
        await wait_for_status(pool, durable, "QUEUED")  # which gets no grace
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        await ended(process)
    await check_put_back(pool, plain)


async def test_an_idle_worker_ends_on_a_signal(lesson: Any, pool: Pool) -> None:
    async with worker_process(lesson) as process:

        async def registered() -> bool:
            return bool(await execute(pool, "SELECT id FROM workers"))

        await wait_for(registered, "the worker is at work")
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0
    assert not await registered()


async def test_cancelling_start_puts_tasks_back_without_a_grace(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """But not before the function has tidied up."""
    started = asyncio.Event()
    tidied_up = 0

    async def endless(input: Any) -> Any:
        nonlocal tidied_up
        started.set()
        try:
            await asyncio.sleep(FOR_EVER)
        finally:
            await asyncio.sleep(0.1)
            tidied_up += 1

    id = await enqueue(pool, "endless")
    worker = make_worker(lesson, pool, queries, endless, SHUTDOWN_GRACE=FOR_EVER)
    async with working(worker):
        await started.wait()
    assert tidied_up == 1
    await check_put_back(pool, id)


async def test_a_second_cancellation_while_functions_tidy_up_puts_their_tasks_back_all_the_same(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """As with a second signal that comes when the grace is over."""
    started, tidying, end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def tidy(input: Any) -> None:
        try:
            started.set()
            await asyncio.sleep(FOR_EVER)
        finally:
            tidying.set()
            await end.wait()

    id = await enqueue(pool, "tidy")
    worker = make_worker(lesson, pool, queries, tidy, SHUTDOWN_GRACE=DEADLINE)
    start = asyncio.create_task(worker.start(QUEUE))
    await started.wait()
    # Not in the middle of a claim, which a second cancellation does not wait for: if it takes the
    # task that has just been put back, others have to take that over.
    set_globals(lesson, {"POLL_INTERVAL": FOR_EVER, "HEARTBEAT_INTERVAL": FOR_EVER})
    for _ in range(15):  # not at one go: who stands still begins the claim only afterwards
        await asyncio.sleep(0.1)
    for _ in range(2):
        start.cancel()
        await tidying.wait()
    await asyncio.wait({start}, timeout=DEADLINE)
    assert start.done()
    await check_put_back(pool, id)
    end.set()


@pytest.mark.parametrize("is_durable", [False, True])
async def test_the_heart_beats_on_while_functions_tidy_up(
    is_durable: bool, lesson: Any, pool: Pool, queries: Any
) -> None:
    """Also after a cancellation, which gives no grace."""
    started, tidying, end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def tidy(*arguments: Any) -> None:
        try:
            started.set()
            await asyncio.sleep(FOR_EVER)
        finally:
            tidying.set()
            await end.wait()

    async def last_heartbeat() -> Any:
        (row,) = await execute(pool, "SELECT last_heartbeat_at FROM workers")
        return row["last_heartbeat_at"]

    id = await enqueue(pool, "tidy", is_durable=is_durable)
    worker = make_worker(lesson, pool, queries, tidy, **QUICK, SHUTDOWN_GRACE=DEADLINE)
    start = asyncio.create_task(worker.start(QUEUE))
    await started.wait()
    start.cancel()
    await tidying.wait()
    before = await last_heartbeat()

    async def has_beaten() -> bool:
        return bool(await last_heartbeat() > before)

    await wait_for(has_beaten, "another heartbeat", DEADLINE / 2)
    end.set()
    await asyncio.wait({start}, timeout=DEADLINE)
    await check_put_back(pool, id)


async def test_a_signal_lets_start_return(lesson: Any, pool: Pool, queries: Any) -> None:
    """At once, not after the next poll. And the handlers of before are back."""

    async def echo(input: Any) -> Any:
        return input

    before = signal.getsignal(signal.SIGTERM)
    id = await enqueue(pool, "echo")
    worker = make_worker(lesson, pool, queries, echo, POLL_INTERVAL=FOR_EVER)
    start = asyncio.create_task(worker.start(QUEUE))
    await finished(pool, id)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(start, DEADLINE) is None
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.only(LAST)
async def test_cancelling_one_who_waits_for_a_connection_is_never_in_vain(pool: Pool) -> None:
    """Else a worker that is cancelled just then goes on for ever."""
    users = [asyncio.create_task(use_connections(pool)) for _ in range(2 * pool.max_size)]
    try:
        for n in range(200):
            user = asyncio.create_task(use_connections(pool))
            for _ in range(n % 50):
                await asyncio.sleep(0)
            user.cancel()
            _, pending = await asyncio.wait({user}, timeout=DEADLINE)
            users.extend(pending)
            assert not pending
    finally:
        while users:
            for user in users:
                user.cancel()
            _, pending = await asyncio.wait(users, timeout=1)
            users = list(pending)


async def use_connections(pool: Pool) -> None:
    while True:
        async with pool.connection() as conn:
            await conn.execute("SELECT 1")
