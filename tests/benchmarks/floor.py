"""The bare statements of a lesson, with nothing around them; the figures call them the floor.

There are no workers and no functions here, no asyncio task for each task, no aiosql, no log. What
is left is Postgres, psycopg, and the pool, from which each statement takes its connection as in the
lessons. Tasks are claimed in batches of 100, like by a worker with 100 slots.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from psycopg.types.json import Jsonb

from benchmarks import CONNECTIONS, QUEUE, SLOTS
from shared import Pool, load_queries

# All outcomes of a claim at once, as lesson 16 writes them.
WRITE_OUTCOMES = b"""
WITH owned AS (
    SELECT id, outcome.status, outcome.output
    FROM jsonb_to_recordset(%(outcomes)s)
        AS outcome (id BIGINT, attempt INT, status task_status, output JSONB)
    JOIN tasks USING (id, attempt)
    WHERE tasks.worker_id = %(worker_id)s
      AND tasks.status = 'RUNNING'
    ORDER BY id
    FOR NO KEY UPDATE OF tasks
)
UPDATE tasks
SET status = owned.status,
    output = coalesce(owned.output, 'null'),
    finished_at = now()
FROM owned
WHERE tasks.id = owned.id
RETURNING tasks.id
"""


class Floor:
    """The statements of one lesson, and the tasks that are claimed and not yet completed."""

    def __init__(self, path: Path, pool: Pool) -> None:
        self.pool = pool
        self.queries = load_queries(path)
        self.claim_sql = self.queries.poll_tasks.sql.encode()
        self.worker_id = uuid4()
        self.claimed: deque[int] = deque()
        self.claiming = asyncio.Lock()
        self.is_empty = False

    async def execute(self, sql: bytes, **parameters: Any) -> list[dict[str, Any]]:
        async with self.pool.connection() as conn:
            cursor = await conn.execute(sql, parameters)
            return await cursor.fetchall() if cursor.description else []

    async def claim(self) -> list[dict[str, Any]]:
        return await self.execute(
            self.claim_sql,
            queue=QUEUE,
            task_names=["noop"],
            limit=SLOTS,
            worker_id=self.worker_id,
            is_durable=False,
            inactive_after=3600,
        )

    async def one_by_one(self) -> None:
        """Complete tasks until there are none; claim when none are at hand. For lesson 03."""
        complete_sql = self.queries.complete_task.sql.encode()
        while not self.is_empty:
            while self.claimed:
                await self.execute(complete_sql, id=self.claimed.popleft(), output=Jsonb(None))
            async with self.claiming:
                if not self.claimed:
                    self.claimed.extend(row["id"] for row in await self.claim())
                    self.is_empty = not self.claimed

    async def batched(self) -> None:
        """Claim a hundred and complete the hundred. From lesson 04 on, where tasks have owners."""
        while rows := await self.claim():
            outcomes = [
                {"id": row["id"], "attempt": row["attempt"], "status": "COMPLETED", "output": None}
                for row in rows
            ]
            await self.execute(WRITE_OUTCOMES, outcomes=Jsonb(outcomes), worker_id=self.worker_id)

    async def beat(self) -> None:
        """From lesson 08 on only a worker that has beaten claims."""
        async with self.pool.connection() as conn:
            await self.queries.heartbeat(
                conn, id=self.worker_id, display_name="floor", max_silence=1
            )


async def work(path: Path, pool: Pool, begin: Callable[[Pool], Awaitable[None]], kind: str) -> None:
    """Complete all tasks of the queue over ten connections, then wait for SIGTERM."""
    floor = Floor(path, pool)
    if kind == "batched":
        await floor.beat()
    drive = floor.batched if kind == "batched" else floor.one_by_one
    await begin(pool)
    await asyncio.gather(*(drive() for _ in range(CONNECTIONS)))
    await asyncio.Event().wait()
