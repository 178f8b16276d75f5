"""Lesson 01: see that Python, psycopg, aiosql and Postgres work together.

python main.py            their versions, and a query that goes to Postgres and back
python main.py --breaks   a process that has five jobs in its memory is killed after the second
"""

import argparse
import asyncio
import os
import platform
import subprocess
import sys
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from shared import Pool, Queries, database_url, load_queries, open_pool, run
from shared.demo import show, wait_until

LESSON = Path(__file__).parent
NAMES = ["Ada", "Barbara", "Frances", "Grace", "Radia"]


async def round_trip(pool: Pool, queries: Queries) -> None:
    async with pool.connection() as conn:
        postgres = await queries.get_postgres_version(conn)
        print(f"Python    {platform.python_version()}")
        print(f"psycopg   {version('psycopg')}")
        print(f"aiosql    {version('aiosql')}")
        print(f"Postgres  {postgres['version']}")

        created = await queries.create_greeting(conn, message=Jsonb({"hello": "Postgres"}))
        read = await queries.get_greeting(conn, id=created["id"])
        print()
        print(f"written   {created}")
        print(f"read      {read}")
        if read != created:
            raise SystemExit("the row came back changed: something is wrong with this setup")


async def greet_everybody(pool: Pool, queries: Queries, sender: str) -> None:
    """Five jobs, in a queue that is nowhere but in the memory of this process."""
    queue = deque(NAMES)
    print(f"process {os.getpid()} has {len(queue)} jobs in its queue", flush=True)
    while queue:
        message = {"hello": queue.popleft(), "from": sender}
        print(f"process {os.getpid()} greets {message['hello']}", flush=True)
        async with pool.connection() as conn:
            await queries.create_greeting(conn, message=Jsonb(message))
        await asyncio.sleep(1)


def start_process(sender: str) -> subprocess.Popen[bytes]:
    """Start this program again, as a process that greets everybody and does nothing else."""
    environment = os.environ | {"DATABASE_URL": database_url()}
    return subprocess.Popen([sys.executable, __file__, "--sender", sender], env=environment)


async def breaks(pool: Pool, queries: Queries) -> None:
    sender = f"demo-{os.getpid()}"  # another one for each run, so that two at once do not mix

    async def read_greetings() -> list[dict[str, Any]]:
        async with pool.connection() as conn:
            return [row async for row in queries.get_greetings(conn, sender=sender)]

    async def two_are_done() -> bool:
        return len(await read_greetings()) >= 2

    process = start_process(sender)
    try:
        await wait_until(two_are_done, "two jobs are done", seconds=30)
    finally:
        process.kill()
        process.wait()
    print(f"killed process {process.pid}", flush=True)

    greetings = await read_greetings()
    show("what the process has written to Postgres is there:", greetings)
    print(f"The other {len(NAMES) - len(greetings)} jobs are gone: nobody knows of them any more.")


async def main(flags: argparse.Namespace) -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool:
        if flags.sender:
            await greet_everybody(pool, queries, flags.sender)
        elif flags.breaks:
            await breaks(pool, queries)
        else:
            await round_trip(pool, queries)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--breaks", action="store_true", help="kill a process that has jobs left")
    parser.add_argument("--sender", metavar="NAME", help="greet everybody and nothing else")
    run(main(parser.parse_args()))
