"""Looking after the others: sleepers, what runs on inactive workers, what nobody claimed in time.

In a loop of its own, so that no heartbeat has to wait for it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

import heartbeat
from heartbeat import Heartbeat
from models import Task
from shared import Pool, Queries, surviving_outage

MAX_LOST_WORKERS = 20  # a task that lost so many workers fails: it may be what kills them
BATCH_SIZE = 1000  # rows of one statement: more would keep others waiting for their locks


class Housekeeping:
    """What a worker does for a queue that has lost a worker, or has none."""

    def __init__(
        self,
        pool: Pool,
        queries: Queries,
        own_heartbeat: Heartbeat,
        log: Callable[[Task, str], None],
        changed: Callable[[Task], None],
    ) -> None:
        self.pool = pool
        self.queries = queries
        self.own_heartbeat = own_heartbeat
        self.log = log
        self.changed = changed

    async def keep_house(self) -> None:
        """Look after the others every HEARTBEAT_INTERVAL. Never returns."""
        while True:
            await asyncio.sleep(heartbeat.HEARTBEAT_INTERVAL)
            with surviving_outage(f"worker {self.own_heartbeat.display_name}: cannot keep house"):
                await self._repeat(self.queries.wake_tasks)
                # One value, read once: the next beat may come at any await.
                beat = self.own_heartbeat.last
                # After an outage everybody's heartbeat is old, not only that of the dead: who was
                # out of touch lets the others beat before it judges them.
                if (
                    beat
                    and beat.in_touch * heartbeat.HEARTBEAT_INTERVAL >= heartbeat.INACTIVE_AFTER
                ):
                    await self._take_from_inactive_workers(beat.at)
                await self._repeat(self.queries.expire_tasks)

    async def _take_from_inactive_workers(self, our_beat: datetime) -> None:
        """Queue again what runs on workers without a heartbeat: they are dead, or as good as.

        They are judged by our own last heartbeat: if that was held up, so were theirs.
        """
        judgement = {"our_beat": our_beat, "inactive_after": heartbeat.INACTIVE_AFTER}
        await self._repeat(
            self.queries.requeue_lost_tasks, max_lost_workers=MAX_LOST_WORKERS, **judgement
        )
        async with self.pool.connection() as conn:
            await self.queries.delete_inactive_workers(conn, **judgement)

    async def _repeat(self, query: Callable[..., AsyncIterator[Any]], **parameters: Any) -> None:
        """Run a query that changes tasks, again at once while it finds as many as it may."""
        while True:
            async with self.pool.connection() as conn:
                rows = query(conn, limit=BATCH_SIZE, **parameters)
                tasks = [Task(**row) async for row in rows]
            for task in tasks:
                if task.status == "FAILED":
                    self.log(task, f"FAILED, {task.output['error']}")
                elif task.status == "QUEUED":
                    self.log(task, "QUEUED, its worker is inactive")
                else:
                    self.log(task, "COMPLETED, it has slept long enough")
                self.changed(task)
            if len(tasks) < BATCH_SIZE:
                return
