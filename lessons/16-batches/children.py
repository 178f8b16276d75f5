"""Waiting for child tasks: one question to the database for all who wait, however many they are."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from models import Task
from shared import Pool, Queries, surviving_outage
from steps import Steps


class Children:
    """The child tasks that durable tasks of this worker wait for, whoever runs them."""

    def __init__(self, pool: Pool, queries: Queries, on_queued: Callable[[Task], None]) -> None:
        self.pool = pool
        self.queries = queries
        self.on_queued = on_queued
        self.steps = Steps(pool, queries)
        self._waiting: dict[asyncio.Future[Task], int] = {}  # who waits for which task's end
        self._news_of: set[int] = set()  # tasks that may have ended
        self._news = asyncio.Event()

    async def wait_for(self, child: Task) -> Task:
        """Wait until a child has finished; returns it with its outcome."""
        finished: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        self._waiting[finished] = child.id
        self.may_have_ended(child.id)  # since we have read its row: nobody told us then
        if child.status == "QUEUED":
            self.on_queued(child)  # somebody has to run it
        try:
            return await finished
        finally:
            del self._waiting[finished]

    def may_have_ended(self, id: int) -> None:
        """Have this task asked for at once, if anybody waits for it."""
        self._news_of.add(id)
        self._news.set()

    def any_may_have_ended(self) -> None:
        """Have all of them asked for at once."""
        self._news_of.update(self._waiting.values())
        self._news.set()

    async def keep_asking(self, interval: float) -> None:
        """Ask for those there is news of, and every `interval` seconds for all. Never returns."""
        clock = asyncio.get_running_loop().time
        all_at = clock() + interval
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(all_at):
                    await self._news.wait()
            if clock() >= all_at:
                self.any_may_have_ended()
                all_at = clock() + interval
            self._news.clear()
            with surviving_outage("cannot ask for child tasks"):
                await self._ask()

    async def _ask(self) -> None:
        # Who comes while the answer is on its way has to wait for the next one: this answer may be
        # from before a retry_task that has queued the child again.
        news_of, self._news_of = self._news_of, set()
        waiting = {finished: id for finished, id in self._waiting.items() if id in news_of}
        if not waiting:
            return
        async with self.pool.connection() as conn:
            rows = self.queries.get_finished_tasks(conn, ids=list(set(waiting.values())))
            finished_tasks = {row["id"]: Task(**row) async for row in rows}
        for finished, id in waiting.items():
            if id in finished_tasks and not finished.done():
                finished.set_result(finished_tasks[id])
