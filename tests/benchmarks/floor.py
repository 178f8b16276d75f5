"""The floor: a lesson's own statements with nothing around them.

Tasks are claimed in batches of 100 and completed one by one, like by a worker with 100 slots, over
as many connections of the same pool. But there are no workers and no tasks in Python, no aiosql, no
dataclasses, no log, and each connection is taken from the pool once and kept. No worker that
completes its tasks one by one can be much faster.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

from psycopg.types.json import Jsonb

from shared import Connection, Pool, load_queries

BATCH_SIZE = 100


class Floor:
    """What the connections share: the tasks that are claimed and not yet completed."""

    def __init__(self, path: Path, queue: str) -> None:
        queries = load_queries(path)
        self.claim_sql = queries.poll_tasks.sql.encode()
        self.complete_sql = queries.complete_task.sql.encode()
        self.worker_id = uuid4()
        self.claim = {
            "queue": queue,
            "limit": BATCH_SIZE,
            "worker_id": self.worker_id,
            "is_durable": False,
        }
        self.claimed: deque[int] = deque()
        self.claiming = asyncio.Lock()
        self.is_empty = False

    async def drive(self, conn: Connection) -> None:
        """Complete tasks on one connection until there are none; claim when none are at hand."""
        cursor = conn.cursor()
        outcome = {"worker_id": self.worker_id, "attempt": 1, "output": Jsonb(None)}
        while not self.is_empty:
            while self.claimed:
                outcome["id"] = self.claimed.popleft()
                await cursor.execute(self.complete_sql, outcome)
            async with self.claiming:
                if not self.claimed and not self.is_empty:
                    await cursor.execute(self.claim_sql, self.claim)
                    self.claimed.extend([row["id"] async for row in cursor])
                    self.is_empty = not self.claimed


async def work(
    path: Path,
    pool: Pool,
    queue: str,
    begin: Callable[[Pool], Awaitable[None]],
    connections: int,
) -> None:
    """Complete all tasks of the queue over that many connections, then wait for SIGTERM."""
    floor = Floor(path, queue)
    async with AsyncExitStack() as stack:
        await begin(pool)
        conns = [await stack.enter_async_context(pool.connection()) for _ in range(connections)]
        await asyncio.gather(*map(floor.drive, conns))
    await asyncio.Event().wait()
