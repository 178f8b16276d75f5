"""DBOS. The variant is the queue's polling interval in seconds, of which the default is 1.

A task is a workflow without steps, an order one with two, both async. The queue has no limit of
concurrency: with one, it starts no more than that many in each poll.
"""

import asyncio

import sqlalchemy  # type: ignore[import-not-found, unused-ignore]
from dbos import DBOS, DBOSClient  # type: ignore[import-not-found, unused-ignore]

from benchmarks.peer.race import Race, race

OPEN = "SELECT count(*) FROM dbos.workflow_status WHERE status <> 'SUCCESS'"


def queue_all(peer: Race) -> None:
    """Enqueue everything in one transaction, before a worker can begin."""
    client = DBOSClient(system_database_url=peer.url)
    engine = sqlalchemy.create_engine(peer.url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as conn:
        for _ in range(peer.count):
            options = {"queue_name": "peers", "workflow_name": peer.kind}
            client.enqueue_in_transaction(conn, options)


def main() -> None:
    peer = race()
    DBOS(config={"name": "peers", "system_database_url": peer.url, "log_level": "ERROR"})

    @DBOS.step()  # type: ignore[untyped-decorator, unused-ignore]
    async def step() -> None:
        pass

    @DBOS.workflow(name="noop")  # type: ignore[untyped-decorator, unused-ignore]
    async def noop() -> None:
        peer.start()
        peer.end()

    @DBOS.workflow(name="order")  # type: ignore[untyped-decorator, unused-ignore]
    async def order() -> None:
        peer.start()
        await step()
        await step()
        peer.end()

    DBOS.launch()
    queue_all(peer)
    DBOS.register_queue("peers", polling_interval_sec=float(peer.variant))
    asyncio.run(peer.finish(OPEN))


if __name__ == "__main__":
    main()
