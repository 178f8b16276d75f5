"""One process whose speed is measured: a worker of a lesson, or bare statements.

python -m benchmarks.contestant KIND LESSON_DIRECTORY CONCURRENCY

KIND is worker, or what floor.py has: one_by_one, batched. It writes "ready" and waits for a line on
stdin, so that starting Python is not part of what is measured. Then it writes Postgres's time and
begins.
To each further line it answers with the number of statements that it has sent. After SIGTERM it
writes what it has used. Workers log from level WARNING on: it is not the terminal that is to be
measured.

Statements are counted here, as psycopg is told to send them, with BEGIN and COMMIT: Postgres itself
counts them only with an extension that may not be there.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from psycopg import AsyncConnection, AsyncCursor

from benchmarks import QUEUE, floor
from shared import Pool, load_queries, open_pool, run

statements = 0
cpu_before = 0.0


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


async def nap(context: Any, input: Any) -> None:
    """A durable task that is suspended for as long as this may take."""
    await context.sleep(timedelta(days=1))


async def work(path: Path, pool: Pool, concurrency: int) -> None:
    """Run a lesson's worker, with so many slots for plain tasks."""
    sys.path.insert(0, str(path))
    import worker as lesson_worker  # type: ignore[import-not-found, unused-ignore]

    queries = load_queries(path)
    if concurrency:
        worker = lesson_worker.Worker(pool, queries, concurrency)
    else:  # lesson 02
        worker = lesson_worker.Worker(pool, queries)
    for function in (noop, echo, moment, order, nap):
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
    threading.Thread(target=answer, daemon=True).start()


def answer() -> None:
    """Say how many statements were sent, whenever asked."""
    for _ in sys.stdin:
        print(statements, flush=True)


async def main() -> None:
    kind, path, concurrency = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    count_statements()
    logging.getLogger().setLevel(logging.WARNING)
    async with open_pool(path) as pool:
        try:
            if kind == "worker":
                await work(path, pool, concurrency)
            else:
                await floor.work(path, pool, begin, kind)
        finally:
            cpu_us = (time.process_time() - cpu_before) * 1e6
            print(json.dumps({"statements": statements, "cpu_us": cpu_us}), flush=True)


if __name__ == "__main__":
    run(main())
