"""Lesson 11: a worker is told of its tasks, and asks now and then all the same.

python main.py            orders on an idle worker that is told, and on one that can only ask
python main.py --crash    two worker processes, of which one is killed after the charge
python main.py --retry    an order fails, is mended, and goes on where it failed
python main.py --replay   an order is completed, and then processed anew
python main.py --breaks   an order sleeps for three seconds, and begins anew with each worker
"""

import argparse
import asyncio
import logging
import os
import random
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

import notifications
import worker
from durable_context import DurableContext
from models import DurableEvent, Task
from rerun import replay_task, retry_task
from shared import Pool, Queries, database_url, load_queries, open_pool, run
from shared.demo import show, wait_until
from worker import Worker, current_task

LESSON = Path(__file__).parent
ORDERS = 10  # that are measured


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


async def status_of(process: subprocess.Popen[bytes]) -> int | None:
    """Wait until a process has ended; return its exit status, -9 if it was killed."""

    async def has_ended() -> bool:
        return process.poll() is not None

    await wait_until(has_ended, f"process {process.pid} has ended", seconds=60)
    return process.returncode


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


async def do_nothing(input: Any) -> Any:
    return None


async def order_nothing(context: DurableContext, input: Any) -> Any:
    await context.run_task("do_nothing", "first")
    await context.run_task("do_nothing", "second")


async def run_orders(demo: Demo) -> dict[str, float]:
    """Run orders of nothing; return for what they waited, in milliseconds."""
    ids = []
    for _ in range(ORDERS + 1):
        order = await demo.enqueue("order_nothing", None, is_durable=True)
        await demo.wait_for(order, "COMPLETED")
        ids.append(order.id)
        await asyncio.sleep(random.uniform(0, 0.1))  # orders come any time
    async with demo.pool.connection() as conn:
        # Without the first one: the worker may still have been busy with something else.
        waits = await demo.queries.get_waits(conn, ids=ids[1:])
    return {what: wait / timedelta(milliseconds=1) for what, wait in waits.items()}


async def run_task(demo: Demo) -> str:
    """Run one task that does nothing; return how long that took."""
    task = await demo.enqueue("do_nothing", None)
    await demo.wait_for(task, "COMPLETED")
    async with demo.pool.connection() as conn:
        task = Task(**await demo.queries.get_task(conn, id=task.id))
    assert task.finished_at is not None
    return f"{(task.finished_at - task.inserted_at) / timedelta(milliseconds=1):.0f} ms"


async def listener(demo: Demo) -> int | None:
    """The process of the server that has the worker's listening connection, if there is one."""
    async with demo.pool.connection() as conn:
        row = await demo.queries.get_listener(conn)
    return row["pid"] if row else None


async def wait_for_listener(demo: Demo) -> None:
    async def is_there() -> bool:
        return await listener(demo) is not None

    await wait_until(is_there, "the worker listens", seconds=60)


async def cut_listener(demo: Demo) -> None:
    pid = await listener(demo)
    async with demo.pool.connection() as conn:
        await demo.queries.cut_connection(conn, pid=pid)

    async def is_cut() -> bool:
        return await listener(demo) != pid

    await wait_until(is_cut, "the listener is cut", seconds=60)


async def told(demo: Demo) -> None:
    """Measure orders whose steps do nothing, on a worker that listens and on one that does not."""
    logging.getLogger("worker").setLevel(logging.WARNING)  # else it says 200 lines
    demo.worker.register("do_nothing", do_nothing)
    demo.worker.register("order_nothing", order_nothing)
    took = {}
    async with demo.working():
        await wait_for_listener(demo)
        being_told = await run_orders(demo)
        took["is there"] = await run_task(demo)
        await cut_listener(demo)
        took["has been cut"] = await run_task(demo)
        await wait_for_listener(demo)
        took["is there again"] = await run_task(demo)
        show(
            "a task that does nothing, with a POLL_INTERVAL of 1 second:",
            [{"when the listener": when, "it takes": ms} for when, ms in took.items()],
        )
        notifications.LISTEN_AGAIN, worker.POLL_INTERVAL = 3600.0, 0.1
        await cut_listener(demo)
        print("now it is cut and stays away, and POLL_INTERVAL is 0.1 seconds", flush=True)
        deaf = await run_orders(demo)
    show(
        f"an order of two steps that do nothing, on average of {ORDERS}:",
        [
            {"it waits": what, "not listening": f"{deaf[what]:.0f} ms", "told": f"{told:.0f} ms"}
            for what, told in being_told.items()
        ],
    )


async def confirm_later(context: DurableContext, input: Any) -> Any:
    await context.run_task("charge_payment", input)
    print(f"{input['order_id']} sleeps for 3 seconds in process {os.getpid()}", flush=True)
    await asyncio.sleep(3)
    await context.run_task("send_confirmation_email", input)


async def breaks(demo: Demo) -> None:
    """Stop two workers while an order sleeps: its sleep begins anew with each worker."""
    input = {"order_id": f"order-{uuid4().hex[:8]}", "amount": 42}
    order = await demo.enqueue("confirm_later", input, is_durable=True)

    def sleeps_in_attempt(attempt: int) -> Callable[[list[Task]], bool]:
        """The condition that it has been claimed so often, and its first step is done."""
        return lambda tasks: (
            max(task.attempt for task in tasks) == attempt
            and any(task.task_name == "charge_payment" and task.finished_at for task in tasks)
        )

    for attempt in (1, 2):
        with worker_process(demo.queue) as process:
            await demo.wait_until(sleeps_in_attempt(attempt), "the order sleeps")
            await asyncio.sleep(2)
            process.terminate()
            await status_of(process)
            print(f"2 seconds later: SIGTERM, and process {process.pid} has ended", flush=True)
    with worker_process(demo.queue):
        await demo.wait_for(order, "COMPLETED")
    await demo.show(order)
    charge, email = sorted(
        (task for task in await demo.tasks() if not task.is_durable), key=lambda task: task.id
    )
    assert charge.finished_at is not None
    slept = (email.inserted_at - charge.finished_at).total_seconds()
    print(f"between the two steps lies a sleep of 3 seconds: it took {slept:.1f} s")


async def main(flags: argparse.Namespace) -> None:
    queue = flags.worker or f"demo-{os.getpid()}"  # its own for each run: two do not mix
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool, open_pool(LESSON) as shop_pool:
        demo = Demo(pool, Shop(shop_pool, queries), queries, queue)
        demo.worker.register("confirm_later", confirm_later)
        if flags.worker:
            logging.getLogger("worker").setLevel(logging.WARNING)  # the demo says what happens
            await demo.worker.start(queue)
        else:
            await flags.play(demo)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.set_defaults(play=told)
    choice = parser.add_mutually_exclusive_group()
    for play in (crash, retry, replay, breaks):
        name, help = f"--{play.__name__}", play.__doc__
        choice.add_argument(name, dest="play", action="store_const", const=play, help=help)
    choice.add_argument("--worker", metavar="QUEUE", help="be a worker and nothing else")
    run(main(parser.parse_args()))
