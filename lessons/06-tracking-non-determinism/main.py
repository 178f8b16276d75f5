"""Lesson 06: a function that has changed between two attempts is caught.

python main.py            the second worker has a function that has changed
python main.py --breaks   a worker is killed between an event and the task that the event is about
"""

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from psycopg.types.json import Jsonb

from errors import NonDeterminismError
from event_log import EventLog
from heartbeat import Heartbeat
from models import DurableEvent, Task
from shared import (
    Pool,
    Queries,
    database_url,
    error_text,
    load_queries,
    open_connection,
    open_pool,
    run,
)
from shared.demo import show, wait_until

LESSON = Path(__file__).parent
QUEUE = f"demo-{os.getpid()}"  # its own for each run, so that two at once do not mix


class Demo:
    """A queue with one order, and what a worker would do that knows the log: ours does not yet."""

    def __init__(self, pool: Pool, shop: Pool, queries: Queries, queue: str) -> None:
        self.pool = pool
        self.shop = shop  # what the steps do to a connection stays here
        self.queries = queries
        self.queue = queue
        self.log = EventLog(queries)

    async def enqueue(self, task_name: str, input: Any) -> None:
        async with self.pool.connection() as conn:
            await self.queries.create_task(
                conn,
                queue=self.queue,
                task_name=task_name,
                input=Jsonb(input),
                max_retries=0,
                timeout=None,
                schedule_timeout=None,
                priority=1,
            )

    async def claim(self, worker_id: UUID) -> Task:
        """Claim the order as a worker does, after a beat."""
        async with self.pool.connection() as conn:
            name = f"demo:{os.getpid()}"
            await self.queries.heartbeat(conn, id=worker_id, display_name=name)
            rows = self.queries.poll_tasks(
                conn, queue=self.queue, task_names=["process_order"], limit=1, worker_id=worker_id
            )
            (task,) = [Task(**row) async for row in rows]
        print(f"attempt {task.attempt} begins", flush=True)
        return task

    async def take_over(self, worker_id: UUID) -> Task:
        """Claim the order as soon as it has been taken from a worker that is silent."""

        async def is_queued() -> bool:
            return (await self.read_tasks())[0].status == "QUEUED"

        print("its worker is silent from now on, which is noticed after 5 s", flush=True)
        await wait_until(is_queued, "the order is in the queue again", seconds=30)
        return await self.claim(worker_id)

    async def begin(self, task: Task, event_id: int, name: str) -> bool:
        """Record that a step begins. Returns whether an earlier attempt has begun it already."""
        async with self.pool.connection() as conn, conn.transaction():
            _, already_recorded = await self.log.append(
                conn, task, event_id, "TASK_STARTED", name, task.input
            )
            # Before the commit, so that the line is out when --breaks sees the event and kills us.
            what = f"found: {name} has begun" if already_recorded else f"appended: {name} begins"
            print(f"attempt {task.attempt}, event {event_id} is {what}", flush=True)
        return already_recorded

    async def step(self, task: Task, event_id: int, name: str) -> None:
        """Take a step, unless an earlier attempt has begun it. Only a charge does anything here."""
        already_begun = await self.begin(task, event_id, name)
        if name == "charge_payment" and not already_begun:
            async with self.shop.connection() as conn:
                await self.queries.create_payment(conn, **task.input)

    async def run_task(self, task: Task, event_id: int, name: str) -> None:
        """Let a task of its own take a step: first the event, then the task, then wait for it."""
        already_begun = await self.begin(task, event_id, name)
        if not already_begun:
            await asyncio.sleep(60)  # time to be killed in
            await self.enqueue(name, task.input)
        print(f"waiting for the task {name}", flush=True)
        finished = False
        while not finished:
            await asyncio.sleep(0.1)
            tasks = await self.read_tasks()
            finished = any(task.task_name == name and task.finished_at for task in tasks)

    async def fail(self, task: Task, error: str) -> None:
        async with self.pool.connection() as conn:
            await self.queries.fail_task(
                conn,
                id=task.id,
                worker_id=task.worker_id,
                attempt=task.attempt,
                output=Jsonb({"error": error}),
            )

    async def read_tasks(self) -> list[Task]:
        async with self.pool.connection() as conn:
            return [Task(**row) async for row in self.queries.get_tasks(conn, queue=self.queue)]

    async def read_events(self) -> list[DurableEvent]:
        order = (await self.read_tasks())[0]
        async with self.pool.connection() as conn:
            rows = self.queries.get_events(conn, task_id=order.id)
            return [DurableEvent(**row) async for row in rows]

    async def show(self) -> None:
        tasks = await self.read_tasks()
        order_id = tasks[0].input["order_id"]
        async with self.pool.connection() as conn:
            payments = [row async for row in self.queries.get_payments(conn, order_id=order_id)]
        show("the tasks:", tasks, "id task_name status attempt output")
        show("the event log of the order:", await self.read_events())
        show("the charges made:", payments, "order_id amount inserted_at")


async def process_order_changed(demo: Demo, task: Task) -> None:
    """process_order after a release: the goods are reserved first. (The charge was event 1.)"""
    await demo.step(task, 1, "reserve_stock")
    await demo.step(task, 2, "charge_payment")
    await demo.step(task, 3, "send_confirmation_email")


@asynccontextmanager
async def beating(demo: Demo) -> AsyncIterator[UUID]:
    """Be alive for as long as this block takes, and take the tasks of workers that are not."""
    async with await open_connection(demo.pool) as conn, asyncio.TaskGroup() as group:
        worker = Heartbeat(conn, demo.queries, uuid4(), f"demo:{os.getpid()}", log)
        keep_beating = group.create_task(worker.keep_beating())
        yield worker.worker_id
        keep_beating.cancel()


def log(task: Task, what: str) -> None:
    print(f"task {task.id}: {what}", flush=True)


def start_process(queue: str) -> subprocess.Popen[bytes]:
    """Start this program again, as a worker and nothing else."""
    environment = os.environ | {"DATABASE_URL": database_url()}
    return subprocess.Popen([sys.executable, __file__, "--worker", queue], env=environment)


async def a_changed_function(demo: Demo) -> None:
    first = await demo.claim(uuid4())
    await demo.step(first, 1, "charge_payment")
    async with beating(demo) as second_worker:
        second = await demo.take_over(second_worker)
        try:
            await process_order_changed(demo, second)
        except NonDeterminismError as error:
            print(f"refused: {error}", flush=True)
            await demo.fail(second, error_text(error))
    await demo.show()


async def breaks(demo: Demo) -> None:
    async def is_logged() -> bool:
        return bool(await demo.read_events())

    process = start_process(QUEUE)
    try:
        await wait_until(is_logged, "the other process has appended an event", seconds=30)
    finally:
        process.kill()
        process.wait()
    print(f"killed process {process.pid}, before it could create the task", flush=True)

    async with beating(demo) as second_worker:
        second = await demo.take_over(second_worker)
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                await demo.run_task(second, 1, "charge_payment")
        await demo.show()
        await demo.fail(second, "waited for a task that does not exist")
    print("The order would wait for ever. This demo sets it FAILED after 3 s.")


async def main(flags: argparse.Namespace) -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool, open_pool(LESSON) as shop:
        demo = Demo(pool, shop, queries, flags.worker or QUEUE)
        if flags.worker:
            order = await demo.claim(uuid4())
            await demo.run_task(order, 1, "charge_payment")
            return
        await demo.enqueue("process_order", {"order_id": f"order-{uuid4().hex[:8]}", "amount": 42})
        await (breaks(demo) if flags.breaks else a_changed_function(demo))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--breaks", action="store_true", help="kill a worker behind an event")
    parser.add_argument("--worker", metavar="QUEUE", help="be a worker and nothing else")
    run(main(parser.parse_args()))
