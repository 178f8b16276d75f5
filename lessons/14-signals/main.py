"""Lesson 14: something outside can finish a wait.

python main.py            an approval is sent before its order waits, after that, twice, and never
python main.py --crash    two worker processes, of which one is killed after the charge
python main.py --retry    an order fails, is mended, and goes on where it failed
python main.py --replay   an order is completed, and then processed anew
python main.py --breaks   an order is processed but for a wrong email, and all there is is a replay
"""

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from durable_context import DurableContext
from errors import SignalTimeoutError
from models import DurableEvent, Task
from rerun import replay_task, retry_task
from shared import Pool, Queries, database_url, load_queries, open_pool, run
from shared.demo import show, wait_until
from signals import send_signal
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
        self.pool = pool  # not the worker's: whatever a function does to a connection stays here
        self.queries = queries
        self.mail_server_is_up = True
        self.news = "is confirmed"

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
        print(f"email: {input['order_id']} {self.news}", flush=True)
        return "sent"

    async def pack_parcel(self, input: Any) -> Any:
        await asyncio.sleep(input["seconds"])
        return "packed"


class Demo:
    """A queue, a worker, a shop, and what the demos want to know of them."""

    def __init__(self, pool: Pool, shop: Shop, queries: Queries, queue: str) -> None:
        self.pool = pool
        self.shop = shop
        self.queries = queries
        self.queue = queue
        self.worker = Worker(pool, queries)
        self.worker.register("process_order", process_order)
        for function in (shop.charge_payment, shop.send_confirmation_email, shop.pack_parcel):
            self.worker.register(function.__name__, function)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Let the worker run, in this process, as long as this block does."""
        demo = asyncio.current_task()
        assert demo is not None
        async with asyncio.TaskGroup() as group:
            working = group.create_task(self.worker.start(self.queue))
            working.add_done_callback(demo.cancel)  # Ctrl-C stops the worker, and thereby us
            yield
            working.remove_done_callback(demo.cancel)
            self.worker.stop()

    async def enqueue(
        self,
        task_name: str,
        input: Any,
        timeout: timedelta | None = None,
        is_durable: bool = False,
    ) -> Task:
        async with self.pool.connection() as conn:
            row = await self.queries.create_task(
                conn,
                queue=self.queue,
                task_name=task_name,
                input=Jsonb(input),
                max_retries=0,
                timeout=timeout,
                schedule_timeout=None,
                priority=1,
                is_durable=is_durable,
            )
        return Task(**row)

    async def enqueue_order(self) -> Task:
        input = {"order_id": f"order-{uuid4().hex[:8]}", "amount": 42}
        order = await self.enqueue("process_order", input, is_durable=True)
        print(f"enqueued task {order.id}, {input['order_id']}", flush=True)
        return order

    async def tasks(self) -> list[Task]:
        async with self.pool.connection() as conn:
            return [Task(**row) async for row in self.queries.get_tasks(conn, queue=self.queue)]

    async def payments(self, order: Task) -> list[dict[str, Any]]:
        async with self.pool.connection() as conn:
            rows = self.queries.get_payments(conn, order_id=order.input["order_id"])
            return [row async for row in rows]

    async def wait_until(self, condition: Callable[[list[Task]], bool], what: str) -> None:
        """Wait until this is true of the queue's tasks."""

        async def is_true() -> bool:
            return condition(await self.tasks())

        await wait_until(is_true, what, seconds=60)

    async def wait_for(self, order: Task, status: str) -> None:
        def has_status(tasks: list[Task]) -> bool:
            return any(task.id == order.id and task.status == status for task in tasks)

        await self.wait_until(has_status, f"task {order.id} is {status}")

    async def follow(self) -> None:
        """Print each change of the tasks' rows, with its second, until all have finished."""
        logging.getLogger("worker").setLevel(logging.WARNING)  # its lines would say the same
        start = time.monotonic()
        seen: dict[int, str] = {}

        def print_changes(tasks: list[Task]) -> bool:
            for task in tasks:
                state = f"task {task.id}, {task.task_name}: {task.status}, attempt {task.attempt}"
                if seen.get(task.id) != state:
                    seen[task.id] = state
                    print(f"{time.monotonic() - start:5.1f} s  {state}", flush=True)
            return all_finished(tasks)

        await self.wait_until(print_changes, "all tasks have finished")

    async def show(self, order: Task) -> None:
        async with self.pool.connection() as conn:
            rows = self.queries.get_events(conn, task_id=order.id)
            events = [DurableEvent(**row) async for row in rows]
            ids = [order.id, *(event.child_task_id for event in events)]
            tasks = [Task(**await self.queries.get_task(conn, id=id)) for id in ids]
        show("the order and its child tasks:", tasks, "id task_name status attempt output")
        show("the event log of the order:", events, "task_id event_id kind child_task_id")
        show("the charges made:", await self.payments(order), "idempotency_key order_id amount")


def all_finished(tasks: list[Task]) -> bool:
    return all(task.finished_at for task in tasks)


@contextmanager
def worker_process(queue: str) -> Iterator[subprocess.Popen[bytes]]:
    """This program again, as a worker and nothing else. It is killed at the end of the block."""
    # Its connections are named after the queue, by which --breaks finds them.
    url = make_conninfo(database_url(), application_name=queue)
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker", queue], env=os.environ | {"DATABASE_URL": url}
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def crash(demo: Demo) -> None:
    """Kill the worker process that has an order, after the charge: another one finishes it."""
    order = await demo.enqueue_order()

    async def is_charged() -> bool:
        return bool(await demo.payments(order))

    with worker_process(demo.queue) as first:
        await wait_until(is_charged, "the customer is charged", seconds=60)
        # The second one starts only now: before, it might have claimed the charge.
        with worker_process(demo.queue):
            first.kill()
            print(f"killed process {first.pid}, which had the order", flush=True)
            await demo.follow()
    await demo.show(order)
    print("one charge, although the worker died before it could write down that it was made")


async def retry(demo: Demo) -> None:
    """Let an order fail, mend the cause, and go on where it failed."""
    order = await demo.enqueue_order()
    async with demo.working():
        demo.shop.mail_server_is_up = False
        await demo.wait_for(order, "FAILED")
        await demo.show(order)
        demo.shop.mail_server_is_up = True
        print("\nthe mail server is up again: retry_task", flush=True)
        await retry_task(demo.pool, demo.queries, order.id)
        await demo.wait_for(order, "COMPLETED")
    await demo.show(order)
    print("one charge: the step that had completed was not run again")


async def replay(demo: Demo) -> None:
    """Process an order that is completed anew, from the start."""
    order = await demo.enqueue_order()
    async with demo.working():
        await demo.wait_for(order, "COMPLETED")
        await demo.show(order)
        print("\neverything anew: replay_task", flush=True)
        await replay_task(demo.pool, demo.queries, order.id)
        await demo.wait_for(order, "COMPLETED")
    await demo.show(order)
    print("two charges: the log was deleted, so every step was run again as a new child task")


async def ask_for_approval(context: DurableContext, input: Any) -> Any:
    """An order that somebody has to approve before it is charged, which may take days."""
    try:
        approval = await context.wait_for_signal("approval", timeout=timedelta(days=3))
    except SignalTimeoutError:
        return "cancelled: nobody has answered"
    await context.run_task("charge_payment", input)
    return f"approved by {approval['by']}"


async def enqueue_orders(demo: Demo, number: int) -> list[Task]:
    """In one transaction. The first of them is approved in it, too: no worker can be earlier."""
    orders = []
    async with demo.pool.connection() as conn, conn.transaction():
        for _ in range(number):
            row = await demo.queries.create_task(
                conn,
                queue=demo.queue,
                task_name="ask_for_approval",
                input=Jsonb({"order_id": f"order-{uuid4().hex[:8]}", "amount": 42}),
                max_retries=0,
                timeout=None,
                schedule_timeout=None,
                priority=1,
                is_durable=True,
            )
            orders.append(Task(**row))
        await send_signal(conn, demo.queries, orders[0].id, "approval", {"by": "Ann"})
    return orders


async def approve(demo: Demo, order: Task, by: str, idempotency_key: str | None = None) -> None:
    """What somebody's click in a browser ends up as."""
    async with demo.pool.connection() as conn:
        await send_signal(conn, demo.queries, order.id, "approval", {"by": by}, idempotency_key)


async def counts(demo: Demo) -> list[dict[str, Any]]:
    """How many tasks of the queue have which name and status."""
    async with demo.pool.connection() as conn:
        return [row async for row in demo.queries.count_tasks(conn, queue=demo.queue)]


async def wait_for_count(demo: Demo, task_name: str, status: str, number: int) -> None:
    """Wait until so many tasks of that name have that status."""
    row = {"task_name": task_name, "status": status, "tasks": number}

    async def is_true() -> bool:
        return row in await counts(demo)

    await wait_until(is_true, f"{number} tasks {task_name} are {status}", seconds=60)


async def approvals(demo: Demo) -> None:
    """Send an approval before its order waits, after that, twice, and never."""
    logging.getLogger("worker").setLevel(logging.WARNING)  # else it says hundreds of lines
    demo.worker.register("ask_for_approval", ask_for_approval)

    async def has_let_go() -> bool:  # the rows are written first, and then the functions end
        return not any(slots.running for slots in demo.worker.slots.values())

    orders = await enqueue_orders(demo, 103)
    async with demo.working():
        await demo.wait_for(orders[0], "COMPLETED")
        await wait_for_count(demo, "ask_for_approval", "SUSPENDED", 102)
        await wait_until(has_let_go, "the worker has let go of them", seconds=60)
        show("who waits:", await counts(demo))
        for is_durable, slots in demo.worker.slots.items():
            kind = "durable" if is_durable else "plain"
            print(f"{kind} slots taken: {slots.limit - slots.free} of {slots.limit}", flush=True)
        await approve(demo, orders[1], "Bob")
        for _ in range(2):  # somebody clicks twice
            await approve(demo, orders[2], "Cem", idempotency_key="the form of Monday")
        for order in orders[1:3]:
            await demo.wait_for(order, "COMPLETED")
        async with demo.pool.connection() as conn:
            await demo.queries.end_sleeps(conn, queue=demo.queue)
        print("3 days pass: wake_at is set to now", flush=True)
        await demo.wait_until(all_finished, "all orders are processed")
    await show_approvals(demo, orders)


async def show_approvals(demo: Demo, orders: list[Task]) -> None:
    sent = ["before", "after", "twice", "never"]
    ends = {task.id: task for task in await demo.tasks()}
    rows = [
        {
            "sent": how,
            "id": order.id,
            "output": ends[order.id].output,
            "charges": len(await demo.payments(order)),
        }
        for how, order in zip(sent, orders, strict=False)
    ]
    show("four of the orders:", rows)
    async with demo.pool.connection() as conn:
        signals = [row async for row in demo.queries.get_signals(conn, queue=demo.queue)]
    show("the signals:", signals, "task_id name payload idempotency_key received_by_event")
    outputs = [ends[order.id].output for order in orders]
    print(f"cancelled, as nobody has answered: {sum('nobody' in each for each in outputs)}")


async def breaks(demo: Demo) -> None:
    """Complete an order with a wrong email, and try to send the right one."""
    order = await demo.enqueue_order()
    async with demo.working():
        demo.shop.news = "is out of stock"  # which is not true
        await demo.wait_for(order, "COMPLETED")
        demo.shop.news = "is confirmed"
        print("\nthe email was wrong: retry_task", flush=True)
        try:
            await retry_task(demo.pool, demo.queries, order.id)
        except ValueError as error:
            print(error, flush=True)
        print("replay_task", flush=True)
        await replay_task(demo.pool, demo.queries, order.id)
        await demo.wait_for(order, "COMPLETED")
    await demo.show(order)
    print("the customer has the right email, and was charged twice")


async def work(functions: tuple[Any, ...]) -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool:
        demo = Demo(pool, Shop(pool, queries), queries, functions[0].__name__)
        for function in functions:
            demo.worker.register(function.__name__, function)
        await demo.enqueue(functions[0].__name__, None, is_durable=True)
        async with demo.working():
            await demo.wait_until(all_finished, "all tasks have finished")


def experiment(*functions: Any) -> None:
    """For trials: let a worker run the first as a durable task, until all has finished."""
    run(work(functions))


async def main(flags: argparse.Namespace) -> None:
    queue = flags.worker or f"demo-{os.getpid()}"  # its own for each run: two do not mix
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool, open_pool(LESSON) as shop_pool:
        demo = Demo(pool, Shop(shop_pool, queries), queries, queue)
        if flags.worker:
            logging.getLogger("worker").setLevel(logging.WARNING)  # the demo says what happens
            await demo.worker.start(queue)
        else:
            await flags.play(demo)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.set_defaults(play=approvals)
    choice = parser.add_mutually_exclusive_group()
    for play in (crash, retry, replay, breaks):
        name, help = f"--{play.__name__}", play.__doc__
        choice.add_argument(name, dest="play", action="store_const", const=play, help=help)
    choice.add_argument("--worker", metavar="QUEUE", help="be a worker and nothing else")
    run(main(parser.parse_args()))
