"""A person who has to do with orders: python clerk.py LESSON_DIRECTORY QUEUE (approve | reconsider)

One who approves sends each order the signal that it waits for: early, late, now and then twice. One
who reconsiders forks orders that have finished, from an event chosen at random. Until it is ended.
"""

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

from shared import keep_trying, load_queries, open_pool, run, surviving_outage

ROUND = 0.2  # seconds between two looks at the orders

ORDERS = """
    SELECT id, branch, (
        SELECT max(event_id)
        FROM durable_events
        WHERE task_id = id AND to_jsonb(durable_events) ->> 'abandoned_in' IS NULL
    ) AS last_event
    FROM tasks, coalesce((to_jsonb(tasks) ->> 'branch_id')::INT, 1) AS branch
    WHERE task_name = 'process_order' AND queue = %s AND (finished_at IS NULL) = %s
"""


class Clerk:
    """Who does something to orders, again and again, whatever happens to the database."""

    def __init__(self, pool: Any, queries: Any, queue: str) -> None:
        self.pool = pool
        self.queries = queries
        self.queue = queue
        self.approved: set[tuple[int, int]] = set()

    async def orders(self, is_open: bool) -> list[Any]:
        async with self.pool.connection() as conn:
            cursor = await conn.execute(ORDERS, (self.queue, is_open))
            return list(await cursor.fetchall())

    async def approve(self) -> None:
        """One signal for each branch of an order. Its key lets us send it as often as we like."""
        from signals import send_signal  # type: ignore[import-not-found, unused-ignore]

        for order in await keep_trying(lambda: self.orders(True)):
            branch = order["id"], order["branch"]
            if random.random() > (0.05 if branch in self.approved else 0.3):
                continue

            async def send(id: int = order["id"], key: str = f"branch {order['branch']}") -> None:
                async with self.pool.connection() as conn:
                    await send_signal(conn, self.queries, id, "approval", key, key)

            try:
                await keep_trying(send)
            except ValueError as error:  # a branch that has kept its approval may end at any time
                print(error, flush=True)
            self.approved.add(branch)

    async def reconsider(self) -> None:
        """Go on from one of the events of a finished order, or from after the last."""
        from rerun import fork_task  # type: ignore[import-not-found, unused-ignore]

        orders = await keep_trying(lambda: self.orders(False))
        if orders and random.random() < 0.5:
            order = random.choice(orders)
            event_id = random.randint(1, order["last_event"] + 1)
            with surviving_outage(f"is task {order['id']} forked?"):  # we never ask
                await fork_task(self.pool, self.queries, order["id"], event_id)
                print(f"task {order['id']} goes on from event {event_id}", flush=True)


async def main() -> None:
    path, queue, work = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    sys.path.insert(0, str(path))
    async with open_pool(path) as pool:
        clerk = Clerk(pool, load_queries(path), queue)
        print("ready", flush=True)
        while True:
            await {"approve": clerk.approve, "reconsider": clerk.reconsider}[work]()
            await asyncio.sleep(ROUND)


if __name__ == "__main__":
    run(main())
