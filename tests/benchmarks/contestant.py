"""One process whose speed is measured: a worker of a lesson, or the floor.

python -m benchmarks.contestant worker LESSON_DIRECTORY SETTINGS
python -m benchmarks.contestant floor LESSON_DIRECTORY SETTINGS

SETTINGS is a JSON object, see `work` and floor.work. It writes "ready" and waits for a line on
stdin, so that starting Python is not part of what is measured; then it writes Postgres's time, and
begins. Until SIGTERM, then it writes what it has used. Workers log from level WARNING on: it is not
the terminal that is to be measured. Statements are counted here, as psycopg is told to send them,
with BEGIN and COMMIT: Postgres itself counts them only with an extension that may not be there.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from psycopg import AsyncConnection, AsyncCursor

from benchmarks import MANY_TASKS, QUEUE, floor
from shared import Pool, load_queries, open_pool, run

statements = 0
cpu_before = 0.0
calls = 0
first_rss = 0


def rss() -> int:
    """The memory of this process that is in use, in bytes."""
    return int(psutil.Process().memory_info().rss)


def count_statements() -> None:
    """Make psycopg count the statements that it sends."""
    execute, transaction = AsyncCursor.execute, AsyncConnection.transaction

    def counting(number: int, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            global statements
            statements += number
            return method(*arguments, **keywords)

        return counted

    AsyncCursor.execute = counting(1, execute)  # type: ignore[method-assign]
    AsyncConnection.transaction = counting(2, transaction)  # type: ignore[method-assign]


async def noop(input: Any) -> None:
    """A task that does nothing."""
    global calls, first_rss
    calls += 1
    if calls == MANY_TASKS:
        first_rss = rss()


async def echo(input: Any) -> Any:
    """A task whose output is its input."""
    return input


async def moment(input: Any) -> int:
    """When its first line was reached, on the clock that all processes of the machine share."""
    return time.monotonic_ns()


async def order(context: Any, input: Any) -> None:
    """A durable order of two steps that do nothing."""
    await context.run_task("noop", {"step": 1})
    await context.run_task("noop", {"step": 2})


async def work(path: Path, pool: Pool, **settings: Any) -> None:
    """Run a lesson's worker; settings are arguments of Worker."""
    sys.path.insert(0, str(path))
    import worker as lesson_worker  # type: ignore[import-not-found, unused-ignore]

    worker = lesson_worker.Worker(pool, load_queries(path), **settings)
    for function in (noop, echo, moment, order):
        worker.register(function.__name__, function)
    await begin(pool)
    if hasattr(worker, "heartbeat"):
        await beat(worker)
    await worker.start(QUEUE)


async def beat(worker: Any) -> None:
    """Beat once, as the workers of lessons 04 to 07 do before they claim.

    From lesson 08 on `start` does not wait for the first beat. A claim that comes before it gets
    nothing, and the next one comes a poll later: a tenth of what the whole race takes.
    """
    async with worker.pool.connection() as conn:
        await worker.queries.heartbeat(
            conn, id=worker.id, display_name=worker.display_name, max_silence=1
        )


async def begin(pool: Pool) -> None:
    """Wait until told to begin, and say when that was."""
    print("ready", flush=True)
    sys.stdin.readline()
    async with pool.connection() as conn:
        cursor = await conn.execute("SELECT extract(epoch FROM clock_timestamp())::FLOAT AS now")
        row = await cursor.fetchone()
    assert row
    global statements, cpu_before
    statements = 0
    cpu_before = time.process_time()
    print(row["now"], flush=True)


async def main() -> None:
    kind, path, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    count_statements()
    logging.getLogger().setLevel(logging.WARNING)
    async with open_pool(path) as pool:
        try:
            if kind == "floor":
                await floor.work(path, pool, QUEUE, begin, **settings)
            else:
                await work(path, pool, **settings)
        finally:
            used = {
                "statements": statements,
                "cpu_us": (time.process_time() - cpu_before) * 1e6,
                "first_rss": first_rss,
                "rss": rss(),
            }
            print(json.dumps(used), flush=True)


if __name__ == "__main__":
    run(main())
