"""What the tests share: tasks, workers in this process and in others, and waiting for a state."""

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from psycopg import sql
from psycopg.types.json import Jsonb

from shared import Connection, Pool

QUEUE = "q"
DEADLINE = 60.0  # seconds; generous, since it is only ever reached by a test that fails
WORKER_PROCESS = Path(__file__).parent / "worker_process.py"

# For worker_process and monkeypatch: quick, and still far enough apart on a busy machine.
QUICK = {"HEARTBEAT_INTERVAL": 0.1, "INACTIVE_AFTER": 1.0, "POLL_INTERVAL": 0.05}


async def execute(pool: Pool, statement: str, *parameters: Any) -> list[dict[str, Any]]:
    """Execute one statement; return its rows, if it is one that has rows."""
    async with pool.connection() as conn:
        cursor = await conn.execute(statement.encode(), parameters or None)
        return await cursor.fetchall() if cursor.description else []


async def enqueue(pool: Pool, task_name: str, input: Any = None, **columns: Any) -> int:
    """Insert a task in QUEUE with plain SQL, and other columns as given; return its id."""
    values = {"queue": QUEUE, "task_name": task_name, "input": Jsonb(input), **columns}
    statement = sql.SQL("INSERT INTO tasks ({}) VALUES ({}) RETURNING id").format(
        sql.SQL(", ").join(map(sql.Identifier, values)),
        sql.SQL(", ").join(sql.Placeholder() * len(values)),
    )
    async with pool.connection() as conn:
        row = await (await conn.execute(statement, list(values.values()))).fetchone()
    assert row
    return int(row["id"])


async def get_task(pool: Pool, id: int) -> dict[str, Any]:
    """The row of one task."""
    (row,) = await execute(pool, "SELECT * FROM tasks WHERE id = %s", id)
    return row


async def statuses(pool: Pool) -> dict[str, int]:
    """How many tasks have which status."""
    rows = await execute(pool, "SELECT status, count(*) AS n FROM tasks GROUP BY status")
    return {row["status"]: row["n"] for row in rows}


async def wait_for(
    condition: Callable[[], Awaitable[Any] | Any], what: str, seconds: float = DEADLINE
) -> Any:
    """Return the condition's value as soon as it is true; fail the test if that takes too long.

    The condition may be a plain or an async function.
    """
    start = time.monotonic()
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        waited = time.monotonic() - start
        assert waited < seconds, f"waited in vain for {seconds:g} s until {what}"
        # Often at first and then seldom: it is a query, and there are other tests.
        await asyncio.sleep(min(0.01 + waited / 10, 0.1))


async def wait_for_status(pool: Pool, id: int, *wanted: str) -> dict[str, Any]:
    """Wait until a task has one of these statuses; return its row."""

    async def row_with_status() -> dict[str, Any] | None:
        row = await get_task(pool, id)
        return row if row["status"] in wanted else None

    row: dict[str, Any] = await wait_for(row_with_status, f"task {id} is {' or '.join(wanted)}")
    return row


async def finished(pool: Pool, id: int) -> dict[str, Any]:
    """Wait until a task has COMPLETED or FAILED; return its row."""
    return await wait_for_status(pool, id, "COMPLETED", "FAILED")


async def write_outcome(
    queries: Any, conn: Connection, id: int, worker_id: UUID, attempt: int, status: str, output: Any
) -> int:
    """Write how an attempt ended, with the lesson's own statement; return how many rows match."""
    if hasattr(queries, "write_outcomes"):
        row = {"id": id, "worker_id": str(worker_id), "attempt": attempt}
        rows = json.dumps([row | {"status": status, "output": output}])
        return len([row async for row in queries.write_outcomes(conn, rows=rows)])
    query = {
        "COMPLETED": queries.complete_task,
        "FAILED": queries.fail_task,
        "QUEUED": queries.requeue_failed_task,
    }[status]
    output = Jsonb(output)
    return int(await query(conn, id=id, worker_id=worker_id, attempt=attempt, output=output))


def set_globals(lesson: Any, settings: dict[str, Any]) -> None:
    """Set constants in whichever of the lesson's modules has them: worker, heartbeat, ...

    Those that a lesson does not have yet are left out.
    """
    for module in lesson.modules.values():
        for name, value in settings.items():
            if hasattr(module, name):
                setattr(module, name, value)


def make_worker(lesson: Any, pool: Pool, queries: Any, *functions: Any, **settings: Any) -> Any:
    """A worker with these functions registered under their own names.

    Settings in upper case are globals of the lesson's modules, others are arguments of Worker.
    It polls as often as in lesson 02: `enqueue` and plain SQL tell nobody what they have done.
    """
    settings = {"POLL_INTERVAL": 0.1} | settings
    set_globals(lesson, {name: value for name, value in settings.items() if name.isupper()})
    arguments = {name: value for name, value in settings.items() if not name.isupper()}
    worker = lesson.worker.Worker(pool, queries, **arguments)
    for function in functions:
        worker.register(function.__name__, function)
    return worker


@asynccontextmanager
async def working(*workers: Any, queue: str = QUEUE) -> AsyncIterator[asyncio.Task[None]]:
    """Run workers within this block; yields the `start` of the first.

    At the end they are cancelled and waited for. What one of them raised by itself is raised here.
    """
    # Workers that overlap would put back each other's handlers, not those of before.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    starts = [asyncio.create_task(worker.start(queue)) for worker in workers]
    try:
        yield starts[0]
    finally:
        for start in starts:
            # Again after a while: Python 3.11 may lose a cancellation, see test_shutdown.py.
            for seconds in (10, DEADLINE):
                start.cancel()
                await asyncio.wait({start}, timeout=seconds)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for start in starts:
            assert start.done(), "a worker did not end when it was cancelled"
            with suppress(asyncio.CancelledError):
                start.result()


@asynccontextmanager
async def worker_process(
    lesson: Any,
    *,
    script: Path = WORKER_PROCESS,
    queue: str = QUEUE,
    log: Path | None = None,
    **settings: Any,
) -> AsyncIterator[Process]:
    """A worker in a process of its own within this block; see worker_process.py.

    Settings are QUICK, `concurrency`, and globals of the lesson's modules by their names. What it
    writes to stderr ends up in `log`, or else in that of the test. Is it still alive at the end, it
    is killed.
    """
    arguments = [str(lesson.path), queue, json.dumps(QUICK | settings)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    with log.open("wb") if log else nullcontext() as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), *arguments, env=environment, stderr=stderr
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def kill(pool: Pool, process: Process) -> None:
    """Kill a worker process, and wait until Postgres has executed what it had sent by then."""
    process.kill()
    await process.wait()
    sessions = """
        SELECT pid
        FROM pg_stat_activity
        WHERE datname = current_database()
          AND application_name LIKE %s
    """

    async def all_have_ended() -> bool:
        return not await execute(pool, sessions, f"%:{process.pid}")

    await wait_for(all_have_ended, "its sessions have ended")


async def ended(process: Process) -> int:
    """Wait until a process has ended by itself; return its exit status."""
    async with asyncio.timeout(DEADLINE):
        return await process.wait()
