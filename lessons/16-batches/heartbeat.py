"""Heartbeats: how a worker says that it is alive."""

import asyncio
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from shared import Pool, Queries, open_connection, surviving_outage

HEARTBEAT_INTERVAL = 1.0  # seconds between two heartbeats
INACTIVE_AFTER = 5.0  # seconds without a heartbeat until inactive; more than two intervals


@dataclass(frozen=True)
class Beat:
    """A heartbeat of ours that Postgres has answered."""

    at: datetime  # by the clock of Postgres
    in_touch: int  # how many beats in a row, up to this one, came in time after another


class Heartbeat:
    """The heartbeat of one worker, on a connection of its own: the pool may be busy."""

    def __init__(self, pool: Pool, queries: Queries, worker_id: UUID, display_name: str) -> None:
        self.pool = pool
        self.queries = queries
        self.worker_id = worker_id
        self.display_name = display_name
        self.last: Beat | None = None

    async def keep_beating(self) -> None:
        """Beat every HEARTBEAT_INTERVAL, whatever happens, and do nothing else. Never returns."""
        while True:
            with surviving_outage(f"worker {self.display_name}: no heartbeat"):
                async with await open_connection(self.pool) as conn:
                    while True:
                        row = await self.queries.heartbeat(
                            conn,
                            id=self.worker_id,
                            display_name=self.display_name,
                            max_silence=INACTIVE_AFTER / 2,
                        )
                        if row is not None:  # else somebody holds our row: a beat does not wait
                            before = self.last.in_touch if self.last else 0
                            in_touch = before + 1 if row["was_in_touch"] else 0
                            self.last = Beat(row["last_heartbeat_at"], in_touch)
                        await asyncio.sleep(HEARTBEAT_INTERVAL)
            await asyncio.sleep(HEARTBEAT_INTERVAL)
