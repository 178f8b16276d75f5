"""Lesson 02: enqueue one task, let a worker run it, read its output back.

python main.py            one task
python main.py --breaks   400 tasks at once, each with an open file: more than a process may have
"""

import argparse
import asyncio
import logging
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

from psycopg.types.json import Jsonb

from models import Task
from shared import Pool, Queries, load_queries, open_pool, run
from shared.demo import show, wait_until
from worker import Worker

LESSON = Path(__file__).parent
QUEUE = f"demo-{os.getpid()}"  # its own for each run, so that two at once do not mix
TASKS = 400
FILES = 100


async def send_email(input: Any) -> Any:
    print(f"sending an email to {input['to']}", flush=True)
    return {"sent_to": input["to"]}


def open_image(image: int) -> IO[bytes]:
    return open(os.devnull, "rb")  # no image, but just as open


async def resize_image(input: Any) -> Any:
    with open_image(input["image"]):
        await asyncio.sleep(1)
    return {"resized": input["image"]}


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
    worker = Worker(pool, queries)
    for function in (send_email, resize_image):
        worker.register(function.__name__, function)
    return worker


async def one_task(pool: Pool, queries: Queries) -> None:
    await enqueue(pool, queries, "send_email", [{"to": "ada@example.com"}])
    show("enqueued:", await read_tasks(pool, queries), "id queue task_name input status output")
    async with working(make_worker(pool, queries)):
        tasks = await finished_tasks(pool, queries)
    show("finished:", tasks, "id queue task_name input status output")


async def breaks(pool: Pool, queries: Queries) -> None:
    logging.getLogger("worker").setLevel(logging.WARNING)  # else it says 800 lines
    # A connection is an open file, too. Open all of them now: the limit is for the tasks' files.
    await pool.resize(pool.max_size)
    await pool.wait()
    limit_open_files()
    await enqueue(pool, queries, "resize_image", [{"image": image} for image in range(TASKS)])
    print(f"enqueued {TASKS} tasks; this process may open about {FILES} files more", flush=True)
    async with working(make_worker(pool, queries)):
        tasks = await finished_tasks(pool, queries)
    counts = Counter(task.status for task in tasks)
    show("the tasks by status:", [{"status": s, "tasks": n} for s, n in counts.items()])
    failed = [task for task in tasks if task.status == "FAILED"]
    show("the last that failed:", failed[-1:], "id task_name input status output")


def limit_open_files() -> None:
    """Allow this process FILES open files more than it has. Systems allow 256, 1,024 or so."""
    if sys.platform == "win32":
        raise SystemExit("--breaks limits the open files of its process: not possible on Windows")
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + FILES, most))


async def main(flags: argparse.Namespace) -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool:
        if flags.breaks:
            await breaks(pool, queries)
        else:
            await one_task(pool, queries)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--breaks", action="store_true", help="run 400 tasks at once")
    run(main(parser.parse_args()))
