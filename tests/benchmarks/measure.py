"""The measurements of one lesson. Each adds what it has found to the book.

The book has all values that were measured by the name of their figure, one for each round.
"""

import asyncio
import random
import time
from collections import defaultdict
from contextlib import AsyncExitStack

from benchmarks import ORDERS, SCALE, TASKS
from benchmarks.race import Run, ask, check, contestant, end, race
from benchmarks.stage import Stage

Book = defaultdict[str, list[float]]

FIRST_DURABLE = 7
FIRST_BATCHED = 16


def costs(book: Book, prefix: str, run: Run, unit: str) -> None:
    """Write down what a run has cost, per task or per order."""
    for name, cost in run.costs.items():
        book[f"{prefix}{name}_per_{unit}"].append(cost)


def times(stage: Stage) -> int:
    """How many times as many tasks a lesson gets, so that a race takes about a second."""
    return 4 if stage.number >= FIRST_BATCHED else 1


async def measure_floors(book: Book, third: Stage, last: Stage, share: int) -> None:
    """The statements alone: lesson 03's one by one, and the last lesson's in batches of 100."""
    for name, kind, stage, tasks in [
        ("noop_", "one_by_one", third, TASKS // share),
        ("batched_", "batched", last, 4 * TASKS // share),
    ]:
        await stage.clear()
        await stage.fill(tasks)
        run = await race(stage, tasks, kind)
        book[f"floor.{name}per_s"].append(run.per_s)
        costs(book, f"floor.{name}", run, "task")


async def measure_rates(book: Book, prefix: str, stage: Stage, share: int = 1) -> None:
    """How quickly a worker does what is queued already: no-op tasks, and orders."""
    await measure_noop(book, prefix, stage, times(stage) * TASKS // share)
    if stage.number >= FIRST_DURABLE:
        orders = times(stage) * ORDERS // share
        await stage.fill(orders, "order")
        run = await race(stage, orders)
        book[f"{prefix}.orders_per_s"].append(run.per_s)
        costs(book, f"{prefix}.", run, "order")


async def measure_noop(
    book: Book, prefix: str, stage: Stage, tasks: int, text: str = "", processes: int = 1
) -> None:
    """No-op tasks; if there is a text, it is their input and their output."""
    await stage.fill(tasks, "echo" if text else "noop", text)
    run = await race(stage, tasks, processes=processes)
    book[f"{prefix}.noop_per_s"].append(run.per_s)
    costs(book, f"{prefix}.", run, "task")


async def measure_latency(book: Book, prefix: str, stage: Stage, count: int) -> None:
    """How soon an idle worker starts a task, and has completed an order. One at a time."""
    chance = random.Random(prefix)
    await stage.clear()
    async with contestant(stage) as process:
        await ask(process)
        await asyncio.sleep(1)  # it looks for lost tasks, and listens
        for task_name in ["moment", "order"] if stage.number >= FIRST_DURABLE else ["moment"]:
            for _ in range(count):
                sent = time.monotonic_ns()
                id = await stage.create(task_name)
                await stage.wait_until_done(lambda: check([process]))
                row = await stage.queries.get_task(stage.conn, id=id)
                if task_name == "moment":
                    book[f"{prefix}.start_ms"].append((row["output"] - sent) / 1e6)
                else:
                    took = row["finished_at"] - row["inserted_at"]
                    book[f"{prefix}.order_ms"].append(took.total_seconds() * 1000)
                # Up to as long as there is between two polls, so that it meets them anywhere.
                await asyncio.sleep(chance.uniform(0.05, 0.15))
        await end(process)


async def measure_idle(book: Book, stages: dict[str, Stage]) -> None:
    """How many statements a second an idle worker sends; all at once, since they have time."""
    async with AsyncExitStack() as stack:
        idle = {}
        for prefix, stage in stages.items():
            await stage.clear()
            idle[prefix] = await stack.enter_async_context(contestant(stage))
            await ask(idle[prefix])
        await asyncio.sleep(2)
        before = {prefix: await ask(process) for prefix, process in idle.items()}
        since = time.monotonic()
        await asyncio.sleep(8 * SCALE)
        for prefix, process in idle.items():
            statements = await ask(process) - before[prefix]
            name = f"{prefix}.idle_statements_per_s"
            book[name].append(statements / (time.monotonic() - since))
        for process in idle.values():
            await end(process)
