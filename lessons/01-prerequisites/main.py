"""Lesson 01: see that Python, psycopg, aiosql and Postgres work together."""

import platform
from importlib.metadata import version
from pathlib import Path

from psycopg.types.json import Jsonb

from shared import load_queries, open_pool, run

LESSON = Path(__file__).parent


async def main() -> None:
    queries = load_queries(LESSON)
    async with open_pool(LESSON) as pool, pool.connection() as conn:
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


if __name__ == "__main__":
    run(main())
