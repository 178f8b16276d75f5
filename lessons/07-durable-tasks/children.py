"""Waiting for child tasks: one question to the database for all who wait, however many they are."""

import asyncio

from models import Task
from shared import Pool, Queries


class Children:
    """The child tasks that durable tasks of this worker wait for, whoever runs them."""

    def __init__(self, pool: Pool, queries: Queries) -> None:
        self.pool = pool
        self.queries = queries
        self._waiting: dict[asyncio.Future[Task], int] = {}  # who waits for which task's end

    async def wait_for(self, child: Task) -> Task:
        """Wait until a child has finished; returns it with its outcome."""
        finished: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        self._waiting[finished] = child.id
        try:
            return await finished
        finally:
            del self._waiting[finished]

    async def keep_asking(self, interval: float) -> None:
        """Ask for all of them, every `interval` seconds. Never returns."""
        while True:
            await asyncio.sleep(interval)
            if self._waiting:
                await self._ask()

    async def _ask(self) -> None:
        # Who comes while the answer is on its way has to wait for the next one: this answer may be
        # from before a retry_task that has queued the child again.
        waiting = dict(self._waiting)
        async with self.pool.connection() as conn:
            rows = self.queries.get_finished_tasks(conn, ids=list(set(waiting.values())))
            finished_tasks = {row["id"]: Task(**row) async for row in rows}
        for finished, id in waiting.items():
            if id in finished_tasks and not finished.done():
                finished.set_result(finished_tasks[id])
