"""Procrastinate. The variant is the worker's concurrency, of which the default is 1."""

import asyncio
import logging

import procrastinate  # type: ignore[import-not-found, unused-ignore]

from benchmarks.peer.race import race

OPEN = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"


async def main() -> None:
    peer = race()
    logging.getLogger("procrastinate").setLevel(logging.ERROR)  # it warns of an app in __main__
    connector = procrastinate.PsycopgConnector(conninfo=peer.url, min_size=1, max_size=10)
    app = procrastinate.App(connector=connector)

    @app.task(name="noop")  # type: ignore[untyped-decorator, unused-ignore]
    async def noop() -> None:
        peer.start()
        peer.end()

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        await noop.batch_defer_async(*({} for _ in range(peer.count)))
        async with asyncio.TaskGroup() as group:
            group.create_task(app.run_worker_async(concurrency=int(peer.variant)))
            await peer.finish(OPEN)


if __name__ == "__main__":
    asyncio.run(main())
