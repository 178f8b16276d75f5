"""What enqueueing costs, with 1, 8 and 32 producers, and what it costs to tell the workers too."""

import asyncio
import time
from contextlib import AsyncExitStack

from psycopg import AsyncConnection
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from benchmarks import QUEUE, SCALE
from benchmarks.measure import Book
from benchmarks.stage import Stage
from shared.database import conninfo
from shared.schema import schema_name

PRODUCERS = [1, 8, 32]
FIRST_TELLING = 11

SILENT = b"""
INSERT INTO tasks (queue, task_name, input)
VALUES (%s, 'noop', %s)
RETURNING *
"""
# The same, and what create_task does since lesson 11.
TELLING = b"""
WITH created AS (
    INSERT INTO tasks (queue, task_name, input)
    VALUES (%s, 'noop', %s)
    RETURNING *
)
SELECT created.*
FROM created, pg_notify('tasks', md5(current_schema() || ' ' || queue)) AS told
"""


async def measure_enqueue(book: Book, stage: Stage) -> None:
    """One statement a task, each a commit of its own, on a connection for each producer."""
    async with AsyncExitStack() as stack:
        url = conninfo(schema_name(stage.path))
        conns = []
        for _ in range(max(PRODUCERS)):
            conn = await AsyncConnection.connect(url, autocommit=True, row_factory=dict_row)
            conns.append(await stack.enter_async_context(conn))
        for count in PRODUCERS:
            for name, statement in {"silent": SILENT, "telling": TELLING}.items():
                await stage.clear()
                per_s = await rate(conns[:count], statement)
                book[f"enqueue.producers_{count}.{name}_per_s"].append(per_s)


async def rate(conns: list[AsyncConnection[DictRow]], statement: bytes) -> float:
    """Tasks a second that these connections enqueue, for a second."""
    start = time.perf_counter()
    made = 0

    async def produce(conn: AsyncConnection[DictRow]) -> None:
        nonlocal made
        while time.perf_counter() < start + SCALE:
            await conn.execute(statement, [QUEUE, Jsonb({"n": made})])
            made += 1

    await asyncio.gather(*map(produce, conns))
    return made / (time.perf_counter() - start)
