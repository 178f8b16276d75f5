"""The floor: a lesson's own statements with nothing around them.

Tasks are claimed in batches of 100 and completed one by one, like by a worker with 100 slots, over
as many connections of the same pool. But there are no workers and no tasks in Python, no aiosql, no
dataclasses, no log. Each statement takes a connection from the pool and gives it back, as the
lessons do, unless `keep` is true: then each connection is kept from start to end, as no worker can.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from pathlib import Path
from uuid import uuid4

from psycopg.types.json import Jsonb

from benchmarks import SLOTS
from shared import Connection, Pool, load_queries

Connect = Callable[[], AbstractAsyncContextManager[Connection]]


class Floor:
    """What the connections share: the tasks that are claimed and not yet completed."""

    def __init__(self, path: Path, queue: str) -> None:
        queries = load_queries(path)
        self.claim_sql = queries.poll_tasks.sql.encode()
        self.complete_sql = queries.complete_task.sql.encode()
        owner = {"worker_id": uuid4(), "attempt": 1, "is_durable": False, "inactive_after": 3600}
        self.claim = owner | {"queue": queue, "task_names": ["noop"], "limit": SLOTS}
        self.outcome = owner | {"output": Jsonb(None)}
        self.claimed: deque[int] = deque()
        self.claiming = asyncio.Lock()
        self.is_empty = False

    async def drive(self, connect: Connect) -> None:
        """Complete tasks one after the other until there are none; claim when none are at hand."""
        while not self.is_empty:
            while self.claimed:
                outcome = self.outcome | {"id": self.claimed.popleft()}
                async with connect() as conn:
                    await conn.execute(self.complete_sql, outcome)
            async with self.claiming:
                if not self.claimed and not self.is_empty:
                    async with connect() as conn:
                        cursor = await conn.execute(self.claim_sql, self.claim)
                        self.claimed.extend([row["id"] async for row in cursor])
                    self.is_empty = not self.claimed


def always(conn: Connection) -> Connect:
    """Like pool.connection, but it always gives this one."""
    return lambda: nullcontext(conn)


async def work(
    path: Path,
    pool: Pool,
    queue: str,
    begin: Callable[[Pool], Awaitable[None]],
    connections: int,
    keep: bool,
) -> None:
    """Complete all tasks of the queue over that many connections, then wait for SIGTERM."""
    floor = Floor(path, queue)
    await begin(pool)
    async with AsyncExitStack() as stack:
        connects: list[Connect] = [pool.connection] * connections
        if keep:
            conns = [await stack.enter_async_context(pool.connection()) for _ in connects]
            connects = [always(conn) for conn in conns]
        await asyncio.gather(*map(floor.drive, connects))
    await asyncio.Event().wait()
