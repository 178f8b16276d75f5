"""The measurements, each of which is repeated and adds its figures to a Book."""

import asyncio
import random
import time
from collections import defaultdict

from psycopg.types.json import Jsonb

from benchmarks.contestant import QUEUE
from benchmarks.stage import SLOTS, Run, Stage, begin, contestant, end, race

Book = defaultdict[str, list[float]]


def slots(stage: Stage) -> dict[str, int]:
    """Lesson 02 has no slots: it claims all that there is."""
    return {"concurrency": SLOTS} if stage.number >= 3 else {}


def note(book: Book, prefix: str, run: Run, of: str) -> None:
    """Write down what a run has cost, per task or per order."""
    book[f"{prefix}.tx_per_{of}"].append(run.transactions)
    book[f"{prefix}.statements_per_{of}"].append(run.statements)
    book[f"{prefix}.wal_bytes_per_{of}"].append(run.wal_bytes)


async def measure_floor(book: Book, stage: Stage, count: int, name: str, connections: int) -> None:
    await stage.clear()
    await stage.fill(count)
    run = await race(stage, count, {"connections": connections}, "floor")
    book[f"floor.{name}"].append(run.per_s)


async def measure_noop(book: Book, stage: Stage, count: int) -> None:
    """No-op tasks: all queued, then one worker."""
    await stage.clear()
    await stage.fill(count)
    run = await race(stage, count, slots(stage))
    prefix = f"lessons.{stage.number:02}"
    book[f"{prefix}.noop_per_s"].append(run.per_s)
    note(book, prefix, run, "task")


async def measure_orders(book: Book, stage: Stage, count: int) -> None:
    """Durable orders of two steps: all queued, then one worker."""
    await stage.clear()
    await stage.fill(count, "order")
    run = await race(stage, count, slots(stage))
    prefix = f"lessons.{stage.number:02}"
    book[f"{prefix}.orders_per_s"].append(run.per_s)
    note(book, prefix, run, "order")


async def create(stage: Stage, task_name: str) -> None:
    """Enqueue one task with the lesson's own query."""
    options = {
        "max_retries": 0,
        "timeout": None,
        "schedule_timeout": None,
        "priority": 1,
        "is_durable": task_name == "order",
    }
    known = {
        name: options[name] for name in options if name in stage.queries.create_task.parameters
    }
    await stage.queries.create_task(
        stage.conn,
        queue=QUEUE,
        task_name=task_name,
        input=Jsonb({}),
        **{k: options[k] for k in known},
    )


async def measure_enqueue(book: Book, stage: Stage, count: int) -> None:
    """Enqueue with the lesson's own query: one by one, and all in one transaction."""
    prefix = f"lessons.{stage.number:02}"
    await stage.clear()
    start = time.perf_counter()
    for _ in range(count):
        await create(stage, "noop")
    book[f"{prefix}.enqueue_per_s"].append(count / (time.perf_counter() - start))
    start = time.perf_counter()
    async with stage.conn.transaction():
        for _ in range(count):
            await create(stage, "noop")
    book[f"{prefix}.enqueue_many_per_s"].append(count / (time.perf_counter() - start))
    await stage.flush()


async def measure_idle(book: Book, stage: Stage, count: int, task_name: str, seed: int) -> None:
    """An idle worker gets one task, or order, at a time, with random gaps between them."""
    chance = random.Random(seed)
    await stage.clear()
    sent: list[int] = []
    async with contestant(stage, "worker", slots(stage)) as process:
        await begin(process)
        for _ in range(count):
            await asyncio.sleep(chance.uniform(0.05, 1.1))
            await create(stage, task_name)
            sent.append(time.monotonic_ns())
        await stage.wait_until_done()
        await end(process)
    rows = await stage.rows(
        """
        SELECT output, extract(epoch FROM finished_at - inserted_at)::FLOAT * 1000 AS ms
        FROM tasks
        WHERE task_name = %s
        ORDER BY id
        """,
        task_name,
    )
    if task_name == "order":
        book[f"lessons.{stage.number:02}.order_ms"] += [row["ms"] for row in rows]
    else:
        book[f"lessons.{stage.number:02}.start_ms"] += [
            (row["output"] - at) / 1e6 for row, at in zip(rows, sent, strict=True)
        ]
