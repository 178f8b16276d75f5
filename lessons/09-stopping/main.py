"""Lesson 09: a worker that is told to stop leaves nothing for others to wait for.

python main.py            a worker is told to stop, and another one has its work at once
python main.py --crash    two worker processes, of which one is killed after the charge
python main.py --retry    an order fails, is mended, and goes on where it failed
python main.py --replay   an order is completed, and then processed anew
python main.py --breaks   functions that ignore their cancellation, or end their process
"""

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

import worker
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


def claimed(number: int) -> Callable[[list[Task]], bool]:
    """The condition that so many tasks have been claimed."""
    return lambda tasks: sum(task.attempt > 0 for task in tasks) >= number


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


GRACE = 2.0  # seconds, in place of 5, so that the demos are over sooner


async def stopping(demo: Demo) -> None:
    """Tell a worker to stop: it ends what it can in time, and another one has the rest at once."""
    for seconds in (1.5, 5):
        await demo.enqueue("pack_parcel", {"seconds": seconds})
    await demo.enqueue_order()
    with worker_process(demo.queue) as first:
        await demo.wait_until(claimed(4), "the parcels, the order and its first step are claimed")
        async with demo.working():  # another worker, in this process
            first.terminate()
            print(f"SIGTERM to worker process {first.pid}", flush=True)
            await demo.follow()
        print(f"process {first.pid} has ended, with status {await status_of(first)}")
    show("the tasks:", await demo.tasks(), "id task_name input status attempt retry_count")


async def ignore_cancellation(input: Any) -> Any:
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)


async def end_process(input: Any) -> Any:
    os._exit(1)  # as a crash of a library would, or the kernel when the memory is used up


async def breaks(demo: Demo) -> None:
    """Functions that ignore their cancellation keep a worker; one that ends its process, all."""
    for _ in range(100):
        await demo.enqueue("ignore_cancellation", None, timeout=timedelta(seconds=1))
    with worker_process(demo.queue) as first:
        await demo.wait_until(claimed(100), "100 tasks are claimed")
        print(f"100 functions with a timeout of 1 s run in process {first.pid}", flush=True)
        await demo.enqueue("end_process", None)
        for _ in range(2):
            with worker_process(demo.queue) as other:
                await status_of(other)
                print(f"process {other.pid} has claimed a function that ends it", flush=True)
        counts = Counter((task.task_name, task.status) for task in await demo.tasks())
        rows = [{"task_name": name, "status": s, "tasks": n} for (name, s), n in counts.items()]
        show("the tasks, far more than 1 s later:", rows)
        first.terminate()
        await asyncio.sleep(5)  # it may take twice its grace
        state = "is still there" if first.poll() is None else "has ended"
        print(f"5 s after SIGTERM process {first.pid} {state}")
    async with demo.pool.connection() as conn:
        await demo.queries.delete_tasks(conn, queue=demo.queue)
    print("the next worker that claims one of these would be the next to be lost; they are deleted")


async def main(flags: argparse.Namespace) -> None:
    queue = flags.worker or f"demo-{os.getpid()}"  # its own for each run: two do not mix
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool, open_pool(LESSON) as shop_pool:
        demo = Demo(pool, Shop(shop_pool, queries), queries, queue)
        if flags.worker:
            worker.SHUTDOWN_GRACE = GRACE
            grace = f"a SHUTDOWN_GRACE of {worker.SHUTDOWN_GRACE:g} seconds"
            print(f"worker process {os.getpid()} has {grace}", flush=True)
            demo.worker.register("ignore_cancellation", ignore_cancellation)
            demo.worker.register("end_process", end_process)
            logging.getLogger("worker").setLevel(logging.WARNING)  # the demo says what happens
            await demo.worker.start(queue)
        else:
            await flags.play(demo)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.set_defaults(play=stopping)
    choice = parser.add_mutually_exclusive_group()
    for play in (crash, retry, replay, breaks):
        name, help = f"--{play.__name__}", play.__doc__
        choice.add_argument(name, dest="play", action="store_const", const=play, help=help)
    choice.add_argument("--worker", metavar="QUEUE", help="be a worker and nothing else")
    run(main(parser.parse_args()))
