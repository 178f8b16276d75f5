"""Being told in place of asking: LISTEN and NOTIFY.

Whatever is told is only a reason to look. A notification that gets lost costs POLL_INTERVAL.
"""

import asyncio
from uuid import UUID

import psycopg

from children import Children
from models import Task
from shared import Pool, Queries, open_connection, surviving_outage
from slots import Slots

TELL_INTERVAL = 0.01  # seconds: what comes meanwhile is told together
LISTEN_AGAIN = 1.0  # seconds after a lost connection


class Notifications:
    """What one worker is told, and what it tells the others."""

    def __init__(
        self,
        pool: Pool,
        queries: Queries,
        worker_id: UUID,
        slots: list[Slots],
        children: Children,
    ) -> None:
        self.pool = pool
        self.queries = queries
        self.worker_id = worker_id
        self.slots = slots
        self.children = children
        self._queues: set[str] = set()  # where tasks have become available
        self._finished: set[int] = set()  # tasks that parents on other workers may wait for
        self._to_tell = asyncio.Event()

    async def keep_listening(self, queue: str) -> None:
        """Have tasks claimed, and children asked for, as soon as we are told. Never returns."""
        while True:
            with surviving_outage("cannot listen"):
                # A connection of its own: `notifies` keeps it busy for as long as we listen.
                async with await open_connection(self.pool) as conn:
                    await self.queries.listen(conn)
                    topic = await self.queries.get_topic(conn, queue=queue)
                    # After LISTEN: what commits from now on we are told; this look finds the rest.
                    self._look_for_tasks()
                    self.children.any_may_have_ended()
                    async for notification in conn.notifies():
                        if notification.payload == topic["topic"]:
                            self._look_for_tasks()
                        elif notification.payload == str(self.worker_id):
                            self.children.any_may_have_ended()
            await asyncio.sleep(LISTEN_AGAIN)

    def _look_for_tasks(self) -> None:
        for slots in self.slots:
            slots.news()

    def changed(self, task: Task) -> None:
        """Tell of a task that housekeeping has queued again, or ended."""
        if task.status == "QUEUED":
            self.available(task.queue)
        else:
            self.ended(task)

    def available(self, queue: str) -> None:
        """Tell everybody, soon, that there are tasks to claim."""
        self._queues.add(queue)
        self._to_tell.set()

    def ended(self, task: Task) -> None:
        """Tell this task's parent, if it has one, here or elsewhere."""
        self.children.may_have_ended(task.id)
        self._finished.add(task.id)
        self._to_tell.set()

    async def keep_telling(self) -> None:
        """Tell what there is to tell, together. Never returns."""
        while True:
            await self._to_tell.wait()
            await self.tell()
            await asyncio.sleep(TELL_INTERVAL)

    async def tell(self) -> None:
        """Send all of it in a transaction that writes nothing: one that writes would hold up every
        other notifying transaction of the server during its flush. If it fails, the polls help."""
        queues, self._queues = self._queues, set()
        finished, self._finished = self._finished, set()
        self._to_tell.clear()
        with surviving_outage("cannot notify", psycopg.Error):  # NOTIFY's queue may be full
            async with self.pool.connection() as conn:
                await self.queries.notify(
                    conn, queues=list(queues), ids=list(finished), worker_id=self.worker_id
                )


async def tell_queue(pool: Pool, queries: Queries, queue: str) -> None:
    """Tell the workers of a queue, after a commit: if that fails, nothing else has failed."""
    with surviving_outage("cannot notify", psycopg.Error):  # NOTIFY's queue may be full
        async with pool.connection() as conn:
            await queries.notify(conn, queues=[queue], ids=[], worker_id=None)
