"""Lesson 04: retries, timeouts, priorities, and a worker that is killed.

python main.py            all of that
python main.py --freeze   a worker freezes, loses its task, and comes back
python main.py --breaks   an order whose three steps are one function is killed in the third
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from psycopg.types.json import Jsonb

from errors import NonRetryableError
from models import Task
from shared import Pool, Queries, database_url, load_queries, open_pool, run
from shared.demo import show, wait_until
from worker import Worker

LESSON = Path(__file__).parent
QUEUE = f"demo-{os.getpid()}"  # its own for each run, so that two at once do not mix

calls: Counter[str] = Counter()
order_of_start: list[str] = []


async def flaky(input: Any) -> Any:
    calls["flaky"] += 1
    if calls["flaky"] == 1:
        raise ConnectionError("the mail server hung up")
    return "sent"


async def hopeless(input: Any) -> Any:
    raise ConnectionError("the mail server hung up")


async def malformed(input: Any) -> Any:
    raise NonRetryableError(f"{input!r} is not an address")


async def slow(input: Any) -> Any:
    await asyncio.sleep(input)
    return "done"


async def ranked(input: Any) -> Any:
    order_of_start.append(input)


class Shop:
    """The world outside: it takes payments, sends emails and writes reports, slowly."""

    def __init__(self, pool: Pool, queries: Queries, seconds: float) -> None:
        self.pool = pool  # not the worker's: whatever a function does to a connection stays here
        self.queries = queries
        self.seconds = seconds

    async def write_report(self, input: Any) -> Any:
        await asyncio.sleep(self.seconds)
        return f"written by process {os.getpid()}"

    async def process_order(self, input: Any) -> Any:
        await self.charge_payment(input)
        await self.reserve_stock(input)
        await self.send_confirmation_email(input)
        return "done"

    async def charge_payment(self, order: Any) -> None:
        print(f"process {os.getpid()}: charging {order['amount']}", flush=True)
        async with self.pool.connection() as conn:
            await self.queries.create_payment(conn, **order)

    async def reserve_stock(self, order: Any) -> None:
        print(f"process {os.getpid()}: reserving the goods", flush=True)

    async def send_confirmation_email(self, order: Any) -> None:
        print(f"process {os.getpid()}: sending an email", flush=True)
        await asyncio.sleep(self.seconds)


async def enqueue(
    pool: Pool, queries: Queries, task_name: str, input: Any = None, **options: Any
) -> None:
    defaults = {"max_retries": 0, "timeout": None, "schedule_timeout": None, "priority": 1}
    async with pool.connection() as conn:
        await queries.create_task(
            conn, queue=QUEUE, task_name=task_name, input=Jsonb(input), **(defaults | options)
        )


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


def make_worker(pool: Pool, queries: Queries, shop: Shop) -> Worker:
    worker = Worker(pool, queries)
    functions = (flaky, hopeless, malformed, slow, ranked, shop.write_report, shop.process_order)
    for function in functions:
        worker.register(function.__name__, function)
    return worker


@contextmanager
def worker_process(queue: str) -> Iterator[subprocess.Popen[bytes]]:
    """This program again, as a worker and nothing else. It is killed at the end of the block."""
    environment = os.environ | {"DATABASE_URL": database_url()}
    process = subprocess.Popen([sys.executable, __file__, "--worker", queue], env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def kill_a_worker(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Let another process claim what is queued, and kill it in the middle of that."""
    with worker_process(QUEUE) as process:
        await wait_until(condition, what, seconds=30)
    print(f"killed process {process.pid} as soon as {what}", flush=True)


def reached(
    pool: Pool, queries: Queries, attempt: int, status: str
) -> Callable[[], Awaitable[bool]]:
    """The condition that the only task is in this attempt and status, and that this is logged."""

    async def condition() -> bool:
        (task,) = await read_tasks(pool, queries)
        if (task.attempt, task.status) != (attempt, status):
            return False
        await asyncio.sleep(0.5)  # the other process still has to log it
        return True

    return condition


async def everything(pool: Pool, queries: Queries, shop: Shop) -> None:
    await enqueue(pool, queries, "write_report")
    await kill_a_worker(reached(pool, queries, 1, "RUNNING"), "it was writing the report")
    await enqueue(pool, queries, "flaky", max_retries=3)
    await enqueue(pool, queries, "hopeless", max_retries=2)
    await enqueue(pool, queries, "malformed", "nobody", max_retries=5)
    await enqueue(pool, queries, "slow", 60, timeout=timedelta(milliseconds=300))
    await enqueue(pool, queries, "slow", 60, schedule_timeout=timedelta(0))
    for priority, name in [(1, "low"), (3, "high"), (2, "middle")]:
        await enqueue(pool, queries, "ranked", name, priority=priority)
    async with working(make_worker(pool, queries, shop)):
        tasks = await finished_tasks(pool, queries)
    show("the tasks:", tasks, "id task_name priority status attempt retry_count output")
    print(f"started in the order of their priorities: {', '.join(order_of_start)}")


async def freeze(pool: Pool, queries: Queries) -> None:
    await enqueue(pool, queries, "slow", 10)
    with worker_process(QUEUE) as first:
        await wait_until(reached(pool, queries, 1, "RUNNING"), "the task runs", seconds=30)
        first.send_signal(signal.SIGSTOP)
        print(f"process {first.pid} is frozen", flush=True)
        with worker_process(QUEUE):
            await wait_until(reached(pool, queries, 2, "RUNNING"), "it runs again", seconds=30)
            first.send_signal(signal.SIGCONT)
            print(f"process {first.pid} goes on", flush=True)
            await wait_until(reached(pool, queries, 2, "COMPLETED"), "it is completed", seconds=60)
    tasks = await read_tasks(pool, queries)
    show("the task:", tasks, "id task_name status attempt retry_count output")


async def breaks(pool: Pool, queries: Queries, shop: Shop) -> None:
    order = {"order_id": f"order-{uuid4().hex[:8]}", "amount": 42}
    await enqueue(pool, queries, "process_order", order)

    async def payments() -> list[Any]:
        async with pool.connection() as conn:
            rows = queries.get_payments(conn, order_id=order["order_id"])
            return [row async for row in rows]

    async def is_in_the_third_step() -> bool:
        if not await payments():
            return False
        await asyncio.sleep(0.5)  # the second step takes less
        return True

    await kill_a_worker(is_in_the_third_step, "it was sending the email")
    async with working(make_worker(pool, queries, shop)):
        tasks = await finished_tasks(pool, queries)
    show("the task:", tasks, "id task_name status attempt retry_count output")
    show("the payments:", await payments())
    print("Charged twice. The next attempt cannot know how far the one before has come.")


async def main(flags: argparse.Namespace) -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool, open_pool(LESSON) as shop_pool:
        # The other process is slow, so that it cannot be done before it is killed.
        shop = Shop(shop_pool, queries, seconds=60 if flags.worker else 1)
        if flags.worker:
            await make_worker(pool, queries, shop).start(flags.worker)
        elif flags.freeze:
            await freeze(pool, queries)
        elif flags.breaks:
            await breaks(pool, queries, shop)
        else:
            await everything(pool, queries, shop)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--freeze", action="store_true", help="freeze a worker for a while")
    parser.add_argument("--breaks", action="store_true", help="kill a worker in mid-order")
    parser.add_argument("--worker", metavar="QUEUE", help="be a worker and nothing else")
    run(main(parser.parse_args()))
