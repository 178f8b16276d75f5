"""Lesson 15: keep the log up to an event, and go on from there.

python main.py            an order sends a wrong email, and goes back to that step (also: --fork)
python main.py --crash    two worker processes, of which one is killed after the charge
python main.py --retry    an order fails, is mended, and goes on where it failed
python main.py --replay   an order is completed, and then processed anew
python main.py --breaks   5,000 tasks that do nothing, and the transactions that this takes
"""

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from durable_context import DurableContext
from models import Task
from rerun import fork_task, replay_task, retry_task
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
        self.news = "confirmed"

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
        print(f"email: {input['order_id']} is {self.news}", flush=True)
        return self.news

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
            rows = self.queries.get_branches(conn, task_id=order.id)
            branches = [row async for row in rows]
            ids = [order.id, *sorted({row["child_task_id"] for row in branches})]
            tasks = [Task(**await self.queries.get_task(conn, id=id)) for id in ids]
        show("the order and its child tasks:", tasks, "id task_name status attempt output")
        columns = "branch_id output event_id child_task_id task_name"
        show("the branches of its log, and what they led to:", branches, columns)
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
    print("two charges: branch 2 shares no event, so every step was run again as a new child task")


async def fork(demo: Demo) -> None:
    """Complete an order with a wrong email, and go back to the event that sent it."""
    order = await demo.enqueue_order()
    async with demo.working():
        demo.shop.news = "sold out"  # which is not true
        await demo.wait_for(order, "COMPLETED")
        demo.shop.news = "confirmed"
        await demo.show(order)
        print("\nthe email was wrong: fork_task at event 2", flush=True)
        await fork_task(demo.pool, demo.queries, order.id, from_event=2)
        await demo.wait_for(order, "COMPLETED")
    await demo.show(order)
    print("one charge and two emails: event 1 is shared, and each branch has an event 2")


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


async def nothing(input: Any) -> None:
    """A task that takes no time but the engine's."""


async def enqueue_tasks(demo: Demo, number: int) -> None:
    """In one transaction."""
    async with demo.pool.connection() as conn, conn.transaction():
        for _ in range(number):
            await demo.queries.create_task(
                conn,
                queue=demo.queue,
                task_name="nothing",
                input=Jsonb(None),
                max_retries=0,
                timeout=None,
                schedule_timeout=None,
                priority=1,
                is_durable=False,
            )


async def outcomes(demo: Demo, how: str, start: float) -> dict[str, Any]:
    """What it took to write the outcomes that are in the table now."""
    seconds = time.monotonic() - start
    async with demo.pool.connection() as conn:
        row = await demo.queries.count_transactions(conn, queue=demo.queue)
    return {"written": how, **row, "seconds": f"{seconds:.2f}"}


async def breaks(demo: Demo) -> None:
    """Run 5,000 tasks that do nothing, and count the transactions that wrote their outcomes."""
    logging.getLogger("worker").setLevel(logging.WARNING)  # else it says 10,000 lines
    demo.worker.register("nothing", nothing)
    await enqueue_tasks(demo, 5000)
    start = time.monotonic()
    async with demo.working():
        await wait_for_count(demo, "nothing", "COMPLETED", 5000)
    rows = [await outcomes(demo, "by the worker, which also claimed the tasks", start)]
    start = time.monotonic()
    async with demo.pool.connection() as conn:
        await demo.queries.write_outcomes_again(conn, queue=demo.queue)
    rows.append(await outcomes(demo, "once more, by one statement", start))
    show("5,000 outcomes:", rows)
    print("each outcome is a transaction: the worker spends its time talking to the database")


async def work(functions: tuple[Any, ...], fork: Sequence[int]) -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool:
        demo = Demo(pool, Shop(pool, queries), queries, functions[0].__name__)
        for function in functions:
            demo.worker.register(function.__name__, function)
        if fork:
            await fork_task(pool, queries, *fork)
        else:
            await demo.enqueue(functions[0].__name__, None, is_durable=True)
        async with demo.working():
            await demo.wait_until(all_finished, "all tasks have finished")


def experiment(*functions: Any, fork: Sequence[int] = ()) -> None:
    """For trials: let a worker run the first as a durable task, until all has finished.

    With the id of a task that has been run, and an event, that one is forked there instead.
    """
    run(work(functions, fork))


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
    parser.set_defaults(play=fork)
    choice = parser.add_mutually_exclusive_group()
    for play in (crash, retry, replay, fork, breaks):
        name, help = f"--{play.__name__}", play.__doc__
        choice.add_argument(name, dest="play", action="store_const", const=play, help=help)
    choice.add_argument("--worker", metavar="QUEUE", help="be a worker and nothing else")
    run(main(parser.parse_args()))
