"""Lesson 04: retries, timeouts, priorities, and a worker that is killed."""

import asyncio
import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from errors import NonRetryableError
from models import Task
from shared import Pool, Queries, database_url, load_queries, open_pool, run
from shared.demo import show, wait_until
from worker import Worker

LESSON = Path(__file__).parent
QUEUE = f"demo-{os.getpid()}"  # its own for each run, so that two at once do not mix

calls: Counter[str] = Counter()
order_of_start: list[str] = []


async def flaky(input: Any) -> Any:
    calls["flaky"] += 1
    if calls["flaky"] == 1:
        raise ConnectionError("the mail server hung up")
    return "sent"


async def hopeless(input: Any) -> Any:
    raise ConnectionError("the mail server hung up")


async def malformed(input: Any) -> Any:
    raise NonRetryableError(f"{input!r} is not an address")


async def slow(input: Any) -> Any:
    await asyncio.sleep(60)


async def ranked(input: Any) -> Any:
    order_of_start.append(input)


async def report(input: Any) -> Any:
    await asyncio.sleep(1)
    return f"by process {os.getpid()}"


def make_worker(pool: Pool, queries: Queries) -> Worker:
    worker = Worker(pool, queries)
    for function in (flaky, hopeless, malformed, slow, ranked, report):
        worker.register(function.__name__, function)
    return worker


def start_process(queue: str) -> subprocess.Popen[bytes]:
    """Start this program again, as a worker and nothing else."""
    environment = os.environ | {"DATABASE_URL": database_url()}
    return subprocess.Popen([sys.executable, __file__, queue], env=environment)


async def enqueue(
    pool: Pool, queries: Queries, task_name: str, input: Any = None, **options: Any
) -> None:
    defaults = {"max_retries": 0, "timeout": None, "schedule_timeout": None, "priority": 1}
    async with pool.connection() as conn:
        await queries.create_task(
            conn, queue=QUEUE, task_name=task_name, input=Jsonb(input), **(defaults | options)
        )


async def show_everything(pool: Pool, queries: Queries, worker: Worker) -> None:
    async def tasks() -> list[Task]:
        async with pool.connection() as conn:
            return [Task(**row) async for row in queries.get_tasks(conn, queue=QUEUE)]

    async def all_finished() -> bool:
        return all(task.finished_at for task in await tasks())

    await wait_until(all_finished, "all tasks have finished", seconds=15)
    show(
        "the tasks, as Postgres has them:",
        await tasks(),
        "id task_name status attempt retry_count lost_count output",
    )
    print(f"started in the order of their priorities: {', '.join(order_of_start)}")
    worker.stop()


async def kill_a_worker(pool: Pool, queries: Queries) -> None:
    """Let another process claim a task, and kill it."""
    await enqueue(pool, queries, "report")

    async def is_running() -> bool:
        async with pool.connection() as conn:
            rows = [row async for row in queries.get_tasks(conn, queue=QUEUE)]
        return Task(**rows[0]).status == "RUNNING"

    process = start_process(QUEUE)
    try:
        await wait_until(is_running, "the other process has claimed the report", seconds=10)
    finally:
        process.kill()
        process.wait()
    print(f"killed process {process.pid}, which was running the report", flush=True)


async def main() -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool:
        worker = make_worker(pool, queries)
        if len(sys.argv) > 1:
            await worker.start(sys.argv[1])
            return
        await kill_a_worker(pool, queries)
        await enqueue(pool, queries, "flaky", max_retries=3)
        await enqueue(pool, queries, "hopeless", max_retries=2)
        await enqueue(pool, queries, "malformed", "nobody", max_retries=5)
        await enqueue(pool, queries, "slow", timeout=timedelta(milliseconds=300))
        await enqueue(pool, queries, "slow", schedule_timeout=timedelta(0))
        for priority, name in [(1, "low"), (3, "high"), (2, "middle")]:
            await enqueue(pool, queries, "ranked", name, priority=priority)
        async with asyncio.TaskGroup() as group:
            demo = group.create_task(show_everything(pool, queries, worker))
            await worker.start(QUEUE)
            demo.cancel()


if __name__ == "__main__":
    run(main())
