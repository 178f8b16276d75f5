"""The measurements that do not take long. Each adds what it has found to a Book."""

import asyncio
import random
import time

from benchmarks import CONNECTIONS, MANY_TASKS, QUEUE, SLOTS, scaled
from benchmarks.book import FLOOR, Book
from benchmarks.floor import Floor
from benchmarks.pgbench import pgbench
from benchmarks.race import Run, begin, check, contestant, end, race
from benchmarks.stage import Stage


def slots(stage: Stage) -> dict[str, int]:
    """Lesson 02 has no slots: it claims all that there is."""
    return {"concurrency": SLOTS} if stage.number >= 3 else {}


async def measure_floor(book: Book, stage: Stage) -> None:
    """The floor, which is measured anew before each rate that is compared with it."""
    run = await floor_race(stage, connections=CONNECTIONS, keep=False)
    book.rate(FLOOR, run.per_s)
    book.costs("floor", run.costs, "task")


async def measure_variants(book: Book, stage: Stage) -> None:
    """The floor with one connection, with connections that are kept, and driven by pgbench."""
    run = await floor_race(stage, connections=1, keep=False)
    book.rate("floor.noop_1_connection_per_s", run.per_s)
    run = await floor_race(stage, connections=CONNECTIONS, keep=True)
    book.rate("floor.noop_kept_per_s", run.per_s)
    await stage.clear()
    await stage.fill(MANY_TASKS)
    if per_s := await pgbench(stage, MANY_TASKS):
        book.rate("floor.pgbench_per_s", per_s)


async def floor_race(stage: Stage, **settings: int) -> Run:
    await stage.clear()
    await stage.fill(MANY_TASKS)
    return await race(stage, MANY_TASKS, settings, "floor")


async def measure_single(book: Book, stage: Stage) -> None:
    """The floor of latencies: enqueue, claim and complete one task, then the next."""
    await stage.clear()
    floor = Floor(stage.path, QUEUE)
    for _ in range(scaled(10)):
        start = time.perf_counter()
        await stage.create("noop")
        (row,) = await (await stage.conn.execute(floor.claim_sql, floor.claim)).fetchall()
        await stage.conn.execute(floor.complete_sql, floor.outcome | {"id": row["id"]})
        book["floor.single_ms"].append((time.perf_counter() - start) * 1000)
    await stage.flush()


async def measure_noop(
    book: Book, prefix: str, stage: Stage, tasks: int, text: str = "", processes: int = 1
) -> None:
    """No-op tasks that are queued already: how quickly workers run them."""
    await stage.fill(tasks, "echo" if text else "noop", text)
    run = await race(stage, tasks, slots(stage), number=processes)
    book.rate(f"{prefix}.noop_per_s", run.per_s)
    book.costs(prefix, run.costs, "task")


async def measure_orders(book: Book, prefix: str, stage: Stage, orders: int) -> None:
    """Durable orders of two no-op steps that are queued already: how quickly one runs them."""
    await stage.fill(orders, "order")
    run = await race(stage, orders, slots(stage))
    book.rate(f"{prefix}.orders_per_s", run.per_s)
    book.costs(prefix, run.costs, "order")


async def measure_enqueue(book: Book, prefix: str, stage: Stage, tasks: int) -> None:
    """Enqueue with the lesson's own query: one by one, and all in one transaction."""
    start = time.perf_counter()
    for _ in range(tasks):
        await stage.create("noop")
    book.rate(f"{prefix}.enqueue_per_s", tasks / (time.perf_counter() - start))
    start = time.perf_counter()
    async with stage.conn.transaction():
        for _ in range(tasks):
            await stage.create("noop")
    book.rate(f"{prefix}.enqueue_many_per_s", tasks / (time.perf_counter() - start))
    await stage.flush()


async def measure_idle(book: Book, prefix: str, stage: Stage, tasks: int, task_name: str) -> None:
    """An idle worker gets one task, or order, after the other, with random gaps between them."""
    chance = random.Random(prefix)
    await stage.clear()
    sent: list[int] = []
    async with contestant(stage, "worker", slots(stage)) as process:
        await begin(process)
        for _ in range(tasks):
            await asyncio.sleep(chance.uniform(0.05, 1.1))
            sent.append(time.monotonic_ns())
            await stage.create(task_name)
        await stage.wait_until_done(lambda: check([process]))
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
        book[f"{prefix}.order_ms"] += [row["ms"] for row in rows]
    else:
        times = zip(rows, sent, strict=True)
        book[f"{prefix}.start_ms"] += [(row["output"] - at) / 1e6 for row, at in times]
