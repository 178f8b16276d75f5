"""Lesson 07: an order that is processed to its end, whatever happens on the way.

python main.py            one order; stop it half-way, run it again, and it goes on
python main.py --crash    two worker processes, of which one is killed after the charge
python main.py --retry    an order fails, is mended, and goes on where it failed
python main.py --replay   an order is completed, and then processed anew
"""

import argparse
import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

from psycopg.types.json import Jsonb

from durable_context import DurableContext
from models import DurableEvent, Task
from rerun import replay_task, retry_task
from shared import Pool, Queries, database_url, load_queries, open_pool, run
from shared.demo import show, wait_until
from worker import Worker, current_task

LESSON = Path(__file__).parent


async def process_order(context: DurableContext, input: Any) -> Any:
    """The durable task: each step is a child task, and what has completed is not run again."""
    charge = await context.run_task("charge_payment", input)
    email = await context.run_task("send_confirmation_email", input)
    return {"charge": charge, "email": email}


class Shop:
    """The world outside: it takes payments and sends emails, slowly, and not always."""

    def __init__(self, pool: Pool, queries: Queries) -> None:
        self.pool = pool
        self.queries = queries
        self.mail_server_is_up = True

    async def charge_payment(self, input: Any) -> Any:
        key = current_task.get().id  # the same in every attempt: nobody is charged twice
        # In a transaction, so that the line is out when --crash sees the row and kills us.
        async with self.pool.connection() as conn, conn.transaction():
            payment = await self.queries.create_payment(conn, idempotency_key=key, **input)
            outcome = "charged" if payment else "has been charged before"
            print(f"payment {key}: {outcome}", flush=True)
        await asyncio.sleep(1)  # time to be killed in, between the charge and its record
        return {"payment": key}

    async def send_confirmation_email(self, input: Any) -> Any:
        if not self.mail_server_is_up:
            raise ConnectionError("the mail server is down")
        await asyncio.sleep(1)
        print(f"email: {input['order_id']} is confirmed", flush=True)
        return "sent"


class Demo:
    """A worker, a shop, and one order."""

    def __init__(self, pool: Pool, queries: Queries, queue: str) -> None:
        self.pool = pool
        self.queries = queries
        self.queue = queue
        self.shop = Shop(pool, queries)
        self.worker = Worker(pool, queries)
        self.worker.register("process_order", process_order)
        self.worker.register("charge_payment", self.shop.charge_payment)
        self.worker.register("send_confirmation_email", self.shop.send_confirmation_email)

    async def find_or_enqueue(self) -> None:
        """Go on with the order that an earlier run of this program has left, or take a new one."""
        async with self.pool.connection() as conn:
            row = await self.queries.get_open_order(conn, queue=self.queue)
            verb = "going on with"
            if row is None:
                verb = "enqueued"
                row = await self.queries.create_task(
                    conn,
                    queue=self.queue,
                    task_name="process_order",
                    input=Jsonb({"order_id": f"order-{uuid4().hex[:8]}", "amount": 42}),
                    max_retries=0,
                    timeout=None,
                    schedule_timeout=None,
                    priority=1,
                    is_durable=True,
                )
        self.order = Task(**row)
        print(f"{verb} task {self.order.id}, {self.order.input['order_id']}", flush=True)

    async def read_order(self) -> Task:
        async with self.pool.connection() as conn:
            return Task(**await self.queries.get_task(conn, id=self.order.id))

    async def payments(self) -> list[dict[str, Any]]:
        order_id = self.order.input["order_id"]
        async with self.pool.connection() as conn:
            return [row async for row in self.queries.get_payments(conn, order_id=order_id)]

    async def wait_for(self, status: str) -> None:
        async def has_status() -> bool:
            return (await self.read_order()).status == status

        await wait_until(has_status, f"task {self.order.id} is {status}", seconds=15)

    async def show(self) -> None:
        async with self.pool.connection() as conn:
            rows = self.queries.get_events(conn, task_id=self.order.id)
            events = [DurableEvent(**row) async for row in rows]
            ids = [self.order.id, *(event.child_task_id for event in events)]
            tasks = [Task(**await self.queries.get_task(conn, id=id)) for id in ids]
        show("the order and its child tasks:", tasks, "id task_name status attempt retry_count")
        show("the event log of the order:", events, "task_id event_id kind child_task_id")
        show("the charges made:", await self.payments(), "idempotency_key order_id amount")


async def simple(demo: Demo) -> None:
    await demo.wait_for("COMPLETED")
    await demo.show()


async def retry(demo: Demo) -> None:
    demo.shop.mail_server_is_up = False
    await demo.wait_for("FAILED")
    await demo.show()
    demo.shop.mail_server_is_up = True
    print("\nthe mail server is up again: retry_task", flush=True)
    await retry_task(demo.pool, demo.queries, demo.order.id)
    await demo.wait_for("COMPLETED")
    await demo.show()
    print("one charge: the step that had completed was not run again")


async def replay(demo: Demo) -> None:
    await demo.wait_for("COMPLETED")
    await demo.show()
    print("\neverything anew: replay_task", flush=True)
    await replay_task(demo.pool, demo.queries, demo.order.id)
    await demo.wait_for("COMPLETED")
    await demo.show()
    print("two charges: the log was deleted, so every step was run again as a new child task")


def start_process(queue: str) -> subprocess.Popen[bytes]:
    """Start this program again, as a worker and nothing else."""
    environment = os.environ | {"DATABASE_URL": database_url()}
    return subprocess.Popen([sys.executable, __file__, "--worker", queue], env=environment)


async def crash(demo: Demo) -> None:
    """The work is done by two other processes: kill the one that has the order."""
    processes = [start_process(demo.queue)]

    async def is_charged() -> bool:
        return bool(await demo.payments())

    try:
        await wait_until(is_charged, "the customer is charged", seconds=10)
        # The second one starts only now: before, it might have claimed the charge.
        processes.append(start_process(demo.queue))
        processes[0].kill()
        print(f"killed process {processes[0].pid}, which had the order", flush=True)
        await demo.wait_for("COMPLETED")
        await demo.show()
        print("one charge, although the worker died before it could write down that it was made")
    finally:
        for process in processes:
            process.terminate()
            process.wait()


async def main(flags: argparse.Namespace) -> None:
    queries = load_queries(LESSON)
    has_own_queue = flags.crash or flags.retry or flags.replay
    queue = flags.worker or (f"demo-{os.getpid()}" if has_own_queue else "orders")
    async with open_pool(LESSON) as pool:
        demo = Demo(pool, queries, queue)
        if flags.worker:
            await demo.worker.start(queue)
            return
        await demo.find_or_enqueue()
        if flags.crash:
            await crash(demo)
            return

        async def play() -> None:
            await (retry(demo) if flags.retry else replay(demo) if flags.replay else simple(demo))
            demo.worker.stop()

        async with asyncio.TaskGroup() as group:
            playing = group.create_task(play())
            await demo.worker.start(queue)
            playing.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--crash", action="store_true", help="kill a worker after the charge")
    choice.add_argument("--retry", action="store_true", help="go on with an order that failed")
    choice.add_argument("--replay", action="store_true", help="process an order anew")
    choice.add_argument("--worker", metavar="QUEUE", help="be a worker and nothing else")
    run(main(parser.parse_args()))
