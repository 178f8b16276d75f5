"""A lesson of this course. The variant is its directory."""

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.peer.race import race
from shared import load_queries, open_pool, run
from shared.schema import schema_name

FILL = b"""
INSERT INTO tasks (queue, task_name, input, is_durable)
SELECT 'peers', %s, 'null', %s
FROM generate_series(1, %s)
"""
OPEN = "SELECT count(*) FROM {}.tasks WHERE status <> 'COMPLETED'"


async def main() -> None:
    peer = race()
    path = Path(peer.variant)
    sys.path.insert(0, str(path))
    import worker as lesson_worker  # type: ignore[import-not-found, unused-ignore]

    os.environ["DATABASE_URL"] = peer.url
    logging.getLogger().setLevel(logging.WARNING)

    async def noop(input: Any) -> None:
        if peer.kind == "noop":
            peer.start()
            peer.end()

    async def order(context: Any, input: Any) -> None:
        peer.start()
        await context.run_task("noop", {"step": 1})
        await context.run_task("noop", {"step": 2})
        peer.end()

    async with open_pool(path) as pool:
        async with pool.connection() as conn:
            await conn.execute(FILL, [peer.kind, peer.kind == "order", peer.count])
        worker = lesson_worker.Worker(pool, load_queries(path))
        worker.register("noop", noop)
        worker.register("order", order)
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.start("peers"))
            await peer.finish(OPEN.format(schema_name(path)))


if __name__ == "__main__":
    run(main())
