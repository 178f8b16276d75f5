"""Lesson 02: enqueue one task, let a worker run it, read its output back."""

import asyncio
import os
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from models import Task
from shared import load_queries, open_pool, run
from shared.demo import show, wait_until
from worker import Worker

LESSON = Path(__file__).parent
QUEUE = f"demo-{os.getpid()}"  # its own for each run, so that two at once do not mix


async def send_email(input: Any) -> Any:
    print(f"sending an email to {input['to']}", flush=True)
    return {"sent_to": input["to"]}


async def main() -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool:
        async with pool.connection() as conn:
            email = Jsonb({"to": "ada@example.com"})
            await queries.create_task(conn, queue=QUEUE, task_name="send_email", input=email)

        async def tasks() -> list[Task]:
            async with pool.connection() as conn:
                return [Task(**row) async for row in queries.get_tasks(conn, queue=QUEUE)]

        async def all_finished() -> bool:
            return all(task.finished_at for task in await tasks())

        show("enqueued:", await tasks(), "id queue task_name input status output")

        worker = Worker(pool, queries)
        worker.register("send_email", send_email)
        async with asyncio.TaskGroup() as group:
            working = group.create_task(worker.start(QUEUE))
            await wait_until(all_finished, "the task has finished", seconds=5)
            working.cancel()

        show("finished:", await tasks(), "id queue task_name input status output")


if __name__ == "__main__":
    run(main())
