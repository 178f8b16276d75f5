"""Does a worker of lesson 10 grow? Run tens of thousands of tasks and watch its memory.

Not a test, since it takes a minute: `python tests/soak.py [TASKS [ORDERS]]` from the root of the
repository, on the database of the lessons. It ends with status 1 if the process grew too much.
"""

import asyncio
import logging
import sys
from typing import Any

import psutil  # type: ignore[import-untyped]

from helpers import execute, wait_for
from lesson_loader import LESSONS, Lesson
from shared import Pool, load_queries, open_pool, run

QUEUE = "soak"
MEGABYTE = 2**20
MAX_GROWTH = 20 * MEGABYTE
WARM_UP = 10  # per cent


async def noop(input: Any) -> Any:
    return input


async def order(context: Any, input: Any) -> Any:
    return [await context.run_task("noop", {"step": step}) for step in (1, 2)]


async def do(pool: Pool, task_name: str, count: int, is_durable: bool) -> int:
    """Enqueue tasks and wait until they have ended; return the memory of this process in bytes."""
    await execute(
        pool,
        """
        INSERT INTO tasks (queue, task_name, input, is_durable)
        SELECT %s, %s, '{}', %s
        FROM generate_series(1, %s)
        """,
        *(QUEUE, task_name, is_durable, count),
    )
    open_tasks = "SELECT id FROM tasks WHERE queue = %s AND status IN ('QUEUED', 'RUNNING') LIMIT 1"

    async def all_ended() -> bool:
        return not await execute(pool, open_tasks, QUEUE)

    await wait_for(all_ended, "all have ended", seconds=600)
    return int(psutil.Process().memory_info().rss)


async def main() -> None:
    logging.getLogger("worker").setLevel(logging.WARNING)
    counts = [int(argument) for argument in sys.argv[1:]] or [50_000, 2_000]
    (path,) = LESSONS.glob("10-*")
    async with open_pool(path) as pool:
        worker = Lesson(path).worker.Worker(pool, load_queries(path))
        worker.register("noop", noop)
        worker.register("order", order)
        start = asyncio.create_task(worker.start(QUEUE))
        growth = 0
        for task_name, count in zip(["noop", "order"], counts, strict=False):
            is_durable = task_name == "order"
            before = await do(pool, task_name, count * WARM_UP // 100, is_durable)
            after = await do(pool, task_name, count - count * WARM_UP // 100, is_durable)
            growth = max(growth, after - before)
            print(f"{count} x {task_name}: {before // MEGABYTE} MB after the first {WARM_UP} %,")
            print(f"    {after // MEGABYTE} MB at the end", flush=True)
        worker.stop()
        await start
    if growth > MAX_GROWTH:
        raise SystemExit(f"the worker grew by {growth // MEGABYTE} MB")


if __name__ == "__main__":
    run(main())
