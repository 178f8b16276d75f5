"""Absurd. The variant is CLIENTS x CONCURRENCY: each client is a worker with a connection.

An order is a task with two steps, each a checkpoint. Absurd's SQL is installed by `absurdctl init`.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
from absurd_sdk import AsyncAbsurd  # type: ignore[import-not-found, unused-ignore]

from benchmarks.peer.race import Race, race
from shared.embedded import programs

FILL = b"""
SELECT count(*)
FROM generate_series(1, %s) AS n, LATERAL absurd.spawn_task('peers', %s, to_jsonb(n), '{}')
"""
OPEN = "SELECT count(*) FROM absurd.t_peers WHERE state <> 'completed'"


async def nothing() -> None:
    pass


def install(url: str) -> None:
    """It runs psql, which a machine without Postgres has from the embedded one only."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(programs())])
    environment = os.environ | {"PATH": path, "ABSURD_DATABASE_URL": url}
    program = Path(sys.executable).with_name("absurdctl")
    subprocess.run([program, "init"], env=environment, check=True, stdout=subprocess.DEVNULL)


async def main(peer: Race) -> None:
    clients, concurrency = map(int, peer.variant.split("x"))
    workers = [AsyncAbsurd(peer.url, queue_name="peers") for _ in range(clients)]
    await workers[0].create_queue("peers")
    async with await psycopg.AsyncConnection.connect(peer.url, autocommit=True) as conn:
        await conn.execute(FILL, [peer.count, peer.kind])

    async def noop(params: Any, ctx: Any) -> None:
        peer.start()
        peer.end()

    async def order(params: Any, ctx: Any) -> None:
        peer.start()
        await ctx.step("one", nothing)
        await ctx.step("two", nothing)
        peer.end()

    async with asyncio.TaskGroup() as group:
        for worker in workers:
            worker.register_task("noop")(noop)
            worker.register_task("order")(order)
            group.create_task(worker.start_worker(concurrency=concurrency))
        await peer.finish(OPEN)


if __name__ == "__main__":
    peer = race()
    install(peer.url)
    asyncio.run(main(peer))
