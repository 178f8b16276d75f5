"""Heartbeats: how a worker says that it is alive, and what it does about those that do not.

One loop does both, so a beat has to wait while others are looked after (lesson 08).
"""

import asyncio
from collections.abc import Callable
from uuid import UUID

from models import Task
from shared import Connection, Queries

HEARTBEAT_INTERVAL = 1.0  # seconds between two heartbeats
INACTIVE_AFTER = 5.0  # seconds without a heartbeat until inactive; more than two intervals


class Heartbeat:
    """The heartbeat of one worker, on a connection of its own: the pool may be busy."""

    def __init__(
        self,
        conn: Connection,
        queries: Queries,
        worker_id: UUID,
        display_name: str,
        log: Callable[[Task, str], None],
    ) -> None:
        self.conn = conn
        self.queries = queries
        self.worker_id = worker_id
        self.display_name = display_name
        self.log = log

    async def beat(self) -> None:
        """Say that this worker is alive."""
        await self.queries.heartbeat(self.conn, id=self.worker_id, display_name=self.display_name)

    async def keep_beating(self) -> None:
        """Beat every HEARTBEAT_INTERVAL, and look after the others. Never returns."""
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL)
            await self.beat()
            await self._take_from_inactive_workers()
            await self._expire_tasks()

    async def _take_from_inactive_workers(self) -> None:
        """Queue again what runs on workers without a heartbeat: they are dead, or as good as."""
        rows = self.queries.requeue_lost_tasks(self.conn, inactive_after=INACTIVE_AFTER)
        async for row in rows:
            self.log(Task(**row), "QUEUED, its worker is inactive")
        await self.queries.delete_inactive_workers(self.conn, inactive_after=INACTIVE_AFTER)

    async def _expire_tasks(self) -> None:
        """Fail what nobody claimed in time."""
        async for row in self.queries.expire_tasks(self.conn):
            self.log(Task(**row), f"FAILED, {row['output']['error']}")
