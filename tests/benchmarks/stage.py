"""Where it is measured: a database, and the lessons' tables in it."""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from benchmarks import QUEUE
from server import new_database
from shared import Connection, EmbeddedPostgres, Queries, load_queries, open_pool
from shared.database import conninfo, explain
from shared.schema import schema_name

# Looks at few rows, however many have finished.
OPEN_TASKS = """
SELECT EXISTS (
    SELECT
    FROM tasks
    WHERE queue = %s AND status = 'QUEUED'
) OR (
    SELECT id
    FROM tasks
    WHERE status = 'RUNNING'
    ORDER BY id DESC
    LIMIT 1
) IS NOT NULL AS is_open
"""


@contextmanager
def database() -> Iterator[None]:
    """Make a database of its own the DATABASE_URL within this block."""
    given = os.environ.get("DATABASE_URL")
    with ExitStack() as stack:
        if given:
            conninfo("public")  # ends the program with one line if the URL is malformed
            url = given
        else:
            place = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            server = EmbeddedPostgres(Path(place))
            url = server.start()
            stack.callback(server.stop)
        try:
            own = stack.enter_context(new_database(url))
        except psycopg.errors.InsufficientPrivilege as error:
            raise SystemExit(f"Cannot create a database for the benchmark: {error}") from None
        except psycopg.OperationalError as error:
            raise SystemExit(explain(error)) from None
        os.environ["DATABASE_URL"] = own
        try:
            yield
        finally:
            os.environ.pop("DATABASE_URL")
            if given:
                os.environ["DATABASE_URL"] = given


@dataclass
class Stage:
    """One lesson, with a connection to its tables."""

    number: int
    path: Path
    conn: Connection
    queries: Queries

    async def rows(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        cursor = await self.conn.execute(statement.encode(), parameters or None)
        return await cursor.fetchall() if cursor.description else []

    async def clear(self) -> None:
        """Leave no task behind."""
        await self.rows("TRUNCATE tasks RESTART IDENTITY CASCADE")

    async def fill(self, count: int, task_name: str = "noop", text: str = "") -> None:
        """Queue that many tasks in one statement."""
        is_durable = task_name in ("order", "nap")
        column, value = ("is_durable, ", "true, ") if is_durable else ("", "")
        await self.rows(
            f"""
            INSERT INTO tasks ({column}queue, task_name, input)
            SELECT {value}%s, %s, jsonb_build_object('n', n, 'text', %s::TEXT)
            FROM generate_series(1, %s) AS n
            """,
            *(QUEUE, task_name, text, count),
        )

    async def create(self, task_name: str) -> int:
        """Enqueue one task with the lesson's own query; return its id."""
        options = {
            "max_retries": 0,
            "timeout": None,
            "schedule_timeout": None,
            "priority": 1,
            "is_durable": task_name == "order",
        }
        known = options.keys() & set(self.queries.create_task.parameters)
        row = await self.queries.create_task(
            self.conn,
            queue=QUEUE,
            task_name=task_name,
            input=Jsonb({}),
            **{name: options[name] for name in known},
        )
        return int(row["id"])

    async def wait_until_done(self, check: Callable[[], None]) -> None:
        """Wait until no task of the queue waits or runs; `check` raises if that will never be.

        In one transaction, since transactions are counted, and mostly asleep.
        """
        async with self.conn.transaction():
            await self.rows("SET LOCAL enable_seqscan = off")  # there may be many finished tasks
            while True:
                start = time.monotonic()
                (row,) = await self.rows(OPEN_TASKS, QUEUE)
                if not row["is_open"]:
                    return
                check()
                await asyncio.sleep(max(0.05, 20 * (time.monotonic() - start)))

    async def used(self) -> dict[str, int]:
        """What Postgres has done so far, all the connections of others being closed."""
        await self.rows("SELECT pg_stat_force_next_flush()")  # or it may count us later
        (row,) = await self.rows(
            """
            SELECT xact_commit + xact_rollback AS transactions,
                (pg_current_wal_insert_lsn() - '0/0')::BIGINT AS wal_bytes
            FROM pg_stat_database
            WHERE datname = current_database()
            """
        )
        return row

    async def wait_until_closed(self, pids: list[int]) -> None:
        """Wait until Postgres has noticed that these processes have ended: it counts only then."""
        names = [f"{schema_name(self.path)}:{pid}" for pid in pids]
        connected = "SELECT pid FROM pg_stat_activity WHERE application_name = ANY (%s)"
        while await self.rows(connected, names):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@asynccontextmanager
async def open_stage(number: int, path: Path) -> AsyncIterator[Stage]:
    async with open_pool(path) as pool, pool.connection() as conn:
        yield Stage(number, path, conn, load_queries(path))
