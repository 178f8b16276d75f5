"""How cost grows: with rows, with processes, with payloads, and the memory of a worker."""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from psycopg.errors import InsufficientPrivilege

from benchmarks import MANY_TASKS, QUEUE, scaled
from benchmarks.book import Book
from benchmarks.floor import Floor
from benchmarks.measure import (
    measure_enqueue,
    measure_floor,
    measure_noop,
    measure_orders,
    measure_single,
    slots,
)
from benchmarks.race import race
from benchmarks.stage import Stage

FINISHED = [0, 100_000, 1_000_000]
QUEUED = 100_000
PROCESSES = [1, 2, 4]
PAYLOADS = {"100_B": (100, 5000), "10_kB": (10_000, 2000), "1_MB": (1_000_000, 50)}
MEGABYTE = 2**20
CLAIMS = 5

INSERT_FINISHED = """
INSERT INTO tasks (queue, task_name, input, output, status, inserted_at, finished_at)
SELECT %s, 'noop', jsonb_build_object('n', n), 'null', 'COMPLETED', past, past
FROM generate_series(1, %s) AS n, (SELECT now() - INTERVAL '1 hour' AS past)
"""


async def measure_growth(book: Book, floor: Stage, stage: Stage) -> None:
    """All of it, once, for one lesson."""
    lesson = f"{stage.number:02}"
    await measure_single(book, floor)
    for finished in FINISHED * 2:  # by turns: the machine is not equally quick all the time
        await with_finished(book, f"{lesson}.finished_{finished}", floor, stage, finished)
    await measure_floor(book, floor)
    await with_queued(book, f"{lesson}.queued_{QUEUED}", stage)
    for number in PROCESSES * 2:
        await measure_floor(book, floor)
        await stage.clear()
        prefix = f"{lesson}.processes_{number}"
        await measure_noop(book, prefix, stage, 2 * MANY_TASKS, processes=number)
    for name, (size, tasks) in PAYLOADS.items():
        await measure_floor(book, floor)
        await stage.clear()
        # Digits of chance, since Postgres would compress anything else.
        text = os.urandom(size // 2).hex()
        await measure_noop(book, f"{lesson}.payload_{name}", stage, scaled(tasks), text)
    await stage.clear()


async def with_finished(book: Book, prefix: str, floor: Stage, stage: Stage, finished: int) -> None:
    """All rates while that many finished tasks lie about."""
    await stage.clear()
    await stage.rows(INSERT_FINISHED, QUEUE, scaled(finished))
    # What autovacuum and the checkpointer have done long before where tasks finish one by one.
    await stage.rows("VACUUM (ANALYZE) tasks")
    with suppress(InsufficientPrivilege):
        await stage.rows("CHECKPOINT")
    await measure_floor(book, floor)
    await measure_noop(book, prefix, stage, MANY_TASKS)
    if stage.number >= 7:
        await measure_orders(book, prefix, stage, scaled(1000))
    await stage.fill(MANY_TASKS)
    await measure_claim(book, prefix, stage)
    await measure_enqueue(book, prefix, stage, scaled(500))


async def with_queued(book: Book, prefix: str, stage: Stage) -> None:
    """Rate and claim while many tasks wait, and the memory of the worker that runs them all."""
    await stage.clear()
    await stage.fill(scaled(QUEUED))
    await measure_claim(book, prefix, stage)
    run = await race(stage, scaled(QUEUED), slots(stage))
    book.rate(f"{prefix}.noop_per_s", run.per_s)
    book[f"{prefix}.rss_mb_after_5000"].append(run.first_rss / MEGABYTE)
    book[f"{prefix}.rss_mb_after_{QUEUED}"].append(run.rss / MEGABYTE)


async def measure_claim(book: Book, prefix: str, stage: Stage) -> None:
    """Claim 100 tasks, look at the plan, and undo it."""
    floor = Floor(stage.path, QUEUE)
    if "inactive_after" in stage.queries.poll_tasks.parameters:
        # Only a worker that has beaten claims; this one counts as active for an hour.
        await stage.queries.heartbeat(
            stage.conn, id=floor.claim["worker_id"], display_name="floor", max_silence=1
        )
    explain = b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + floor.claim_sql
    for _ in range(CLAIMS):
        async with stage.conn.transaction(force_rollback=True):
            (row,) = await (await stage.conn.execute(explain, floor.claim)).fetchall()
        (plan,) = row["QUERY PLAN"]
        limit = find_limit(plan["Plan"])
        below = list(nodes(limit))
        book[f"{prefix}.claim_ms"].append(plan["Execution Time"])
        book[f"{prefix}.claim_index"].append(below[-1].get("Index Name", "none"))
        book[f"{prefix}.claim_rows_read"].append(max(map(rows_read, below)))
        book[f"{prefix}.claim_rows"].append(limit["Actual Rows"])


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A node of a plan and all below it."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def find_limit(plan: dict[str, Any]) -> dict[str, Any]:
    """The node that gives the tasks to claim, as many as there are slots."""
    return next(node for node in nodes(plan) if node["Node Type"] == "Limit")


def rows_read(node: dict[str, Any]) -> float:
    return float(node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
