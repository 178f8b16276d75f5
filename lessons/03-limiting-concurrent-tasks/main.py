"""Lesson 03: 1,000 tasks and 100 slots: never more than 100 at once, each exactly once."""

import asyncio
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from models import Task
from shared import load_queries, open_pool, run
from shared.demo import show, wait_until
from worker import Worker

LESSON = Path(__file__).parent
QUEUE = f"demo-{os.getpid()}"  # its own for each run, so that two at once do not mix
TASKS = 1000
SLOTS = 100

running = 0
most_at_once = 0
runs: Counter[int] = Counter()  # how often each image was resized


async def resize_image(input: Any) -> Any:
    global running, most_at_once
    running += 1
    most_at_once = max(most_at_once, running)
    runs[input["image"]] += 1
    try:
        await asyncio.sleep(0.05)
    finally:
        running -= 1
    return {"resized": input["image"]}


async def main() -> None:
    logging.getLogger("worker").setLevel(logging.WARNING)  # else it says 2,000 lines
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool:
        async with pool.connection() as conn, conn.transaction():
            for image in range(TASKS):
                input = Jsonb({"image": image})
                await queries.create_task(conn, queue=QUEUE, task_name="resize_image", input=input)
        print(f"enqueued {TASKS} tasks", flush=True)

        async def tasks() -> list[Task]:
            async with pool.connection() as conn:
                return [Task(**row) async for row in queries.get_tasks(conn, queue=QUEUE)]

        async def all_finished() -> bool:
            return all(task.finished_at for task in await tasks())

        worker = Worker(pool, queries, concurrency=SLOTS)
        worker.register("resize_image", resize_image)
        async with asyncio.TaskGroup() as group:
            working = group.create_task(worker.start(QUEUE))
            await wait_until(all_finished, "all tasks have finished", seconds=9)
            working.cancel()

        print(f"at most {most_at_once} of them ran at once, on {SLOTS} slots")
        print(
            f"{len(runs)} different ones were run, none more often than {max(runs.values())} time"
        )
        counts = Counter(task.status for task in await tasks())
        show("the tasks by status:", [{"status": s, "tasks": n} for s, n in counts.items()])


if __name__ == "__main__":
    run(main())
