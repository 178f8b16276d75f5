"""Where it is measured: a database, the lessons' tables in it, and processes that work there."""

import asyncio
import json
import os
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.contestant import QUEUE
from lesson_loader import lesson_number
from server import new_database
from shared import Connection, EmbeddedPostgres, Queries, load_queries, open_pool
from shared.database import conninfo, explain
from shared.schema import schema_name

TESTS = Path(__file__).parents[1]
SLOTS = 100
CONNECTIONS = 10  # as many as the lessons' pool has at most


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
class Used:
    """What Postgres has done so far."""

    transactions: int
    wal_bytes: int


@dataclass
class Run:
    """What processes have done in one run, and what that took."""

    per_s: float
    transactions: float
    statements: float
    wal_bytes: float
    rss: int


@dataclass
class Stage:
    """One lesson, with a connection to its tables."""

    path: Path
    conn: Connection
    queries: Queries

    @property
    def number(self) -> int:
        return lesson_number(self.path)

    async def rows(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        cursor = await self.conn.execute(statement.encode(), parameters or None)
        return await cursor.fetchall() if cursor.description else []

    async def clear(self) -> None:
        await self.rows("TRUNCATE tasks RESTART IDENTITY CASCADE")

    async def fill(self, count: int, task_name: str = "noop", size: int = 0) -> None:
        """Queue that many tasks with an input of about `size` bytes."""
        durable = ("is_durable, ", "true, ") if task_name == "order" else ("", "")
        await self.rows(
            f"""
            INSERT INTO tasks ({durable[0]}queue, task_name, input)
            SELECT {durable[1]}%s, %s, jsonb_build_object('n', n, 'text', repeat('x', %s))
            FROM generate_series(1, %s) AS n
            """,
            *(QUEUE, task_name, size, count),
        )

    async def wait_until_done(self) -> None:
        """Wait until no task of the queue waits or runs.

        In one transaction, since transactions are counted, and mostly asleep.
        """
        async with self.conn.transaction():
            await self.rows("SET LOCAL enable_seqscan = off")  # there may be many finished tasks
            is_open, pause = True, 0.0
            while is_open:
                await asyncio.sleep(pause)
                start = time.monotonic()
                (row,) = await self.rows(
                    """
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
                    """,
                    QUEUE,
                )
                is_open = row["is_open"]
                pause = max(0.05, 20 * (time.monotonic() - start))

    async def flush(self) -> None:
        """Let Postgres count what has been done on this connection; else it may do so later."""
        await self.rows("SELECT pg_stat_force_next_flush()")

    async def used(self) -> Used:
        """Ask for what Postgres has done, all the connections of others being closed."""
        await self.flush()
        (row,) = await self.rows(
            """
            SELECT xact_commit + xact_rollback AS transactions,
                (pg_current_wal_insert_lsn() - '0/0')::BIGINT AS wal_bytes
            FROM pg_stat_database
            WHERE datname = current_database()
            """
        )
        return Used(**row)

    async def wait_until_closed(self, pids: list[int]) -> None:
        """Wait until Postgres has noticed that these processes have ended: it counts only then."""
        names = [f"{schema_name(self.path)}:{pid}" for pid in pids]
        connected = "SELECT pid FROM pg_stat_activity WHERE application_name = ANY (%s)"
        while await self.rows(connected, names):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@asynccontextmanager
async def open_stage(path: Path) -> AsyncIterator[Stage]:
    async with open_pool(path) as pool, pool.connection() as conn:
        yield Stage(path, conn, load_queries(path))


@asynccontextmanager
async def contestant(stage: Stage, kind: str, settings: dict[str, Any]) -> AsyncIterator[Process]:
    """A process of contestant.py that is ready; killed at the end if it has not ended."""
    arguments = ["-m", "benchmarks.contestant", kind, str(stage.path), json.dumps(settings)]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, stdin=PIPE, stdout=PIPE
    )
    try:
        await line(process)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def line(process: Process) -> str:
    """The next line that a contestant writes."""
    assert process.stdout is not None
    text = (await process.stdout.readline()).decode()
    if not text:
        raise SystemExit("a process that was measured has ended before its time, see above")
    return text


async def begin(process: Process) -> float:
    """Let a contestant begin; return when it did so, by the clock of Postgres."""
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    return float(await line(process))


async def end(process: Process) -> dict[str, int]:
    """Let a contestant end; return what it has used."""
    process.terminate()
    used: dict[str, int] = json.loads(await line(process))
    await process.wait()
    return used


async def race(
    stage: Stage, count: int, settings: dict[str, int], kind: str = "worker", number: int = 1
) -> Run:
    """Let some processes do what is queued; figures are per one of `count`."""
    before = await stage.used()
    async with AsyncExitStack() as stack:
        contestants = [
            await stack.enter_async_context(contestant(stage, kind, settings))
            for _ in range(number)
        ]
        starts = await asyncio.gather(*map(begin, contestants))
        await stage.wait_until_done()
        ends = [await end(process) for process in contestants]
    await stage.wait_until_closed([process.pid for process in contestants])
    after = await stage.used()
    (row,) = await stage.rows(
        "SELECT extract(epoch FROM max(finished_at))::FLOAT AS at FROM tasks WHERE queue = %s",
        QUEUE,
    )
    return Run(
        per_s=count / (row["at"] - min(starts)),
        transactions=(after.transactions - before.transactions) / count,
        statements=sum(used["statements"] for used in ends) / count,
        wal_bytes=(after.wal_bytes - before.wal_bytes) / count,
        rss=max(used["rss"] for used in ends),
    )
