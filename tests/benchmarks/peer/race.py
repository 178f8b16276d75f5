"""What the peers have in common: when a race begins, and when it is over.

python -m benchmarks.peer.NAME KIND COUNT VARIANT

PEER_URL is an empty database, KIND noop or order. The module queues COUNT of them and starts a
worker. It writes how many a second were done: from the first call of a function to when nothing is
left in the database. So how long an engine takes to start, and for its first claim, does not count.
"""

import asyncio
import os
import sys
import time
from dataclasses import dataclass, field

import psycopg


@dataclass
class Race:
    url: str
    kind: str
    count: int
    variant: str
    started: int = field(default=0, init=False)
    ended: int = field(default=0, init=False)
    first_call: float = field(default=0.0, init=False)

    def start(self) -> None:
        """To be called first of all by each task, and each order."""
        if not self.started:
            self.first_call = time.perf_counter()
        self.started += 1

    def end(self) -> None:
        """To be called last."""
        self.ended += 1

    async def finish(self, open_sql: str) -> None:
        """Wait for the end, write the rate, and end the process, whatever still runs in it.

        `open_sql` counts what is not done yet. It is not asked before all functions have ended.
        """
        while self.ended < self.count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as conn:
            while await is_open(conn, open_sql):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        print(self.count / (time.perf_counter() - self.first_call), flush=True)
        os._exit(0)  # some would take seconds to say goodbye


async def is_open(conn: psycopg.AsyncConnection, open_sql: str) -> bool:
    row = await (await conn.execute(open_sql.encode())).fetchone()
    return bool(row and row[0])


def race() -> Race:
    """The race of this process, as its command line and its environment say."""
    kind, count, variant = sys.argv[1:]
    return Race(os.environ["PEER_URL"], kind, int(count), variant)
