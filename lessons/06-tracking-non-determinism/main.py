"""Lesson 06: a function that has changed between two attempts is caught."""

import os
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from psycopg.types.json import Jsonb

from errors import NonDeterminismError
from event_log import EventLog
from models import DurableEvent, Task
from shared import Pool, Queries, load_queries, open_pool, run
from shared.demo import show

LESSON = Path(__file__).parent
QUEUE = f"demo-{os.getpid()}"  # its own for each run, so that two at once do not mix


async def enqueue(pool: Pool, queries: Queries) -> None:
    async with pool.connection() as conn:
        await queries.create_task(
            conn,
            queue=QUEUE,
            task_name="process_order",
            input=Jsonb({"order": "A-1"}),
            max_retries=0,
            timeout=None,
            schedule_timeout=None,
            priority=1,
            is_durable=True,
        )


async def claim(pool: Pool, queries: Queries, worker_id: UUID) -> Task:
    """Claim the task as a worker would: the worker itself does not know the log yet."""
    async with pool.connection() as conn:
        rows = queries.poll_tasks(conn, queue=QUEUE, limit=1, worker_id=worker_id)
        [task] = [Task(**row) async for row in rows]
    print(f"\nattempt {task.attempt} begins", flush=True)
    return task


async def append(
    pool: Pool, log: EventLog, task: Task, event_id: int, task_name: str, input: Any
) -> None:
    async with pool.connection() as conn, conn.transaction():
        _, already_recorded = await log.append(
            conn, task, event_id, "TASK_STARTED", task_name, input
        )
    found = "found, an earlier attempt has appended it" if already_recorded else "appended"
    print(f"attempt {task.attempt}, event {event_id}, {task_name}: {found}", flush=True)


async def process_order(pool: Pool, log: EventLog, task: Task) -> None:
    await append(pool, log, task, 1, "charge_payment", {"order": "A-1", "amount": 42})
    await append(pool, log, task, 2, "send_confirmation_email", {"order": "A-1"})


async def process_order_changed(pool: Pool, log: EventLog, task: Task) -> None:
    """The same function after a release: there is a new step in the middle."""
    await append(pool, log, task, 1, "charge_payment", {"order": "A-1", "amount": 42})
    await append(pool, log, task, 2, "reserve_stock", {"order": "A-1"})
    await append(pool, log, task, 3, "send_confirmation_email", {"order": "A-1"})


async def main() -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool:
        log = EventLog(queries)
        await enqueue(pool, queries)

        first_worker = uuid4()
        first = await claim(pool, queries, first_worker)
        await process_order(pool, log, first)

        # The first worker stalls, and its task is given to another.
        async with pool.connection() as conn:
            rows = queries.requeue_own_tasks(conn, worker_id=first_worker, ids=[], attempts=[])
            assert [row["id"] async for row in rows] == [first.id]

        second = await claim(pool, queries, uuid4())
        failure = "the change was not noticed"
        try:
            await process_order_changed(pool, log, second)
        except NonDeterminismError as error:
            failure = f"NonDeterminismError: {error}"
            print(f"refused: {failure}", flush=True)

        async with pool.connection() as conn:
            await queries.fail_task(
                conn,
                id=second.id,
                worker_id=second.worker_id,
                attempt=second.attempt,
                output=Jsonb({"error": failure}),
            )
            events = [
                DurableEvent(**row) async for row in queries.get_events(conn, task_id=first.id)
            ]
            task = Task(**await queries.get_task(conn, id=first.id))
        show("the log:", events)
        show("the task:", [task], "id task_name status attempt output")


if __name__ == "__main__":
    run(main())
