"""PgQueuer. The variant is the batch size, of which the default is 10.

As its documentation advises: asyncpg, one connection for the worker, `pgq autovac` after the
installation; and on uvloop, as `pgq run` does. A job that is done is deleted.
"""

import asyncio
from datetime import timedelta

import asyncpg  # type: ignore[import-not-found, unused-ignore]
import uvloop  # type: ignore[import-not-found, unused-ignore]
from pgqueuer import PgQueuer  # type: ignore[import-not-found, unused-ignore]
from pgqueuer.db import AsyncpgDriver  # type: ignore[import-not-found, unused-ignore]
from pgqueuer.models import Job  # type: ignore[import-not-found, unused-ignore]
from pgqueuer.queries import Queries  # type: ignore[import-not-found, unused-ignore]

from benchmarks.peer.race import race

OPEN = "SELECT count(*) FROM pgqueuer"


async def main() -> None:
    peer = race()
    driver = AsyncpgDriver(await asyncpg.connect(peer.url))
    queries = Queries(driver)
    await queries.install()
    await queries.optimize_autovacuum()
    count = peer.count
    await queries.enqueue(["noop"] * count, [None] * count, [0] * count)
    worker = PgQueuer(driver)

    @worker.entrypoint("noop")  # type: ignore[untyped-decorator, unused-ignore]
    async def noop(job: Job) -> None:
        peer.start()
        peer.end()

    async with asyncio.TaskGroup() as group:
        group.create_task(
            worker.run(batch_size=int(peer.variant), dequeue_timeout=timedelta(seconds=30))
        )
        await peer.finish(OPEN)


if __name__ == "__main__":
    uvloop.run(main())
