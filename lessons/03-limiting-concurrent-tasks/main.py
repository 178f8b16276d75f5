"""Lesson 03: 1,000 tasks and 100 slots: never more than 100 at once, each exactly once.

python main.py            1,000 tasks
python main.py --breaks   a worker is killed, and another one does not care about its tasks
"""

import argparse
import asyncio
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

from psycopg.types.json import Jsonb

from models import Task
from shared import Pool, Queries, database_url, load_queries, open_pool, run
from shared.demo import show, wait_until
from worker import Worker

LESSON = Path(__file__).parent
QUEUE = f"demo-{os.getpid()}"  # its own for each run, so that two at once do not mix
TASKS = 1000
SLOTS = 100

running = 0
most_at_once = 0
runs: Counter[int] = Counter()  # how often each image was resized


def open_image(image: int) -> IO[bytes]:
    return open(os.devnull, "rb")  # no image, but just as open


async def resize_image(input: Any) -> Any:
    global running, most_at_once
    running += 1
    most_at_once = max(most_at_once, running)
    runs[input["image"]] += 1
    try:
        with open_image(input["image"]):
            await asyncio.sleep(0.05)
    finally:
        running -= 1
    return {"resized": input["image"]}


async def write_report(input: Any) -> Any:
    await asyncio.sleep(input["seconds"])
    return f"written by process {os.getpid()}"


async def enqueue(pool: Pool, queries: Queries, task_name: str, inputs: list[Any]) -> None:
    async with pool.connection() as conn, conn.transaction():
        for input in inputs:
            await queries.create_task(conn, queue=QUEUE, task_name=task_name, input=Jsonb(input))


async def read_tasks(pool: Pool, queries: Queries) -> list[Task]:
    async with pool.connection() as conn:
        return [Task(**row) async for row in queries.get_tasks(conn, queue=QUEUE)]


async def finished_tasks(pool: Pool, queries: Queries) -> list[Task]:
    """Wait until every task of this run has finished; return them."""

    async def all_finished() -> bool:
        return all(task.finished_at for task in await read_tasks(pool, queries))

    await wait_until(all_finished, "all tasks have finished", seconds=60)
    return await read_tasks(pool, queries)


@asynccontextmanager
async def working(worker: Worker) -> AsyncIterator[None]:
    """Let a worker work for as long as this block takes."""
    async with asyncio.TaskGroup() as group:
        start = group.create_task(worker.start(QUEUE))
        yield
        start.cancel()


def make_worker(pool: Pool, queries: Queries) -> Worker:
    worker = Worker(pool, queries, concurrency=SLOTS)
    for function in (resize_image, write_report):
        worker.register(function.__name__, function)
    return worker


def start_process(queue: str) -> subprocess.Popen[bytes]:
    """Start this program again, as a worker and nothing else."""
    environment = os.environ | {"DATABASE_URL": database_url()}
    return subprocess.Popen([sys.executable, __file__, "--worker", queue], env=environment)


async def a_thousand_tasks(pool: Pool, queries: Queries) -> None:
    logging.getLogger("worker").setLevel(logging.WARNING)  # else it says 2,000 lines
    await enqueue(pool, queries, "resize_image", [{"image": image} for image in range(TASKS)])
    print(f"enqueued {TASKS} tasks", flush=True)
    async with working(make_worker(pool, queries)):
        tasks = await finished_tasks(pool, queries)
    print(f"at most {most_at_once} of them ran at once, on {SLOTS} slots")
    again = sum(times > 1 for times in runs.values())
    print(f"{len(runs)} different ones were run, {again} of them more than once")
    counts = Counter(task.status for task in tasks)
    show("the tasks by status:", [{"status": s, "tasks": n} for s, n in counts.items()])


async def breaks(pool: Pool, queries: Queries) -> None:
    await enqueue(pool, queries, "write_report", [{"seconds": 5}] * 3)

    async def all_are_running() -> bool:
        if any(task.status != "RUNNING" for task in await read_tasks(pool, queries)):
            return False
        await asyncio.sleep(0.5)  # the other process still has to log it
        return True

    process = start_process(QUEUE)
    try:
        await wait_until(all_are_running, "the other process runs all reports", seconds=30)
    finally:
        process.kill()
        process.wait()
    print(f"killed process {process.pid}, which was running three reports", flush=True)

    await enqueue(pool, queries, "write_report", [{"seconds": 6}])

    async def the_last_is_written() -> bool:
        return (await read_tasks(pool, queries))[-1].status == "COMPLETED"

    async with working(make_worker(pool, queries)):
        await wait_until(the_last_is_written, "a second worker has written a report", seconds=30)
    tasks = await read_tasks(pool, queries)
    show("6 seconds later; a second worker has free slots:", tasks, "id input status output")

    async with pool.connection() as conn:
        for task in tasks[:-1]:
            await queries.fail_task(conn, id=task.id, output=Jsonb({"error": "set by hand"}))
    print("They would stay RUNNING for ever. This demo sets them FAILED by hand.")


async def main(flags: argparse.Namespace) -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool:
        if flags.worker:
            await make_worker(pool, queries).start(flags.worker)
        elif flags.breaks:
            await breaks(pool, queries)
        else:
            await a_thousand_tasks(pool, queries)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--breaks", action="store_true", help="kill a worker with three tasks")
    parser.add_argument("--worker", metavar="QUEUE", help="be a worker and nothing else")
    run(main(parser.parse_args()))
