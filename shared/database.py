"""The lessons' database: where it is, connections to it, and the queries of a lesson."""

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any, cast
from urllib.parse import quote, unquote

import aiosql
import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from shared import jsonb
from shared.embedded import EmbeddedPostgres, forget_other_servers
from shared.schema import apply_schema, schema_name
from shared.session import NO_POOLER, FreshConnection, check_session, settings

Connection = AsyncConnection[DictRow]
Pool = AsyncConnectionPool[Connection]
# aiosql makes a method of each query when it loads the file, so there is nothing to check.
Queries = Any

START_TIMEOUT = 6.0  # seconds, for the first connection of a program
POOL_TIMEOUT = 10.0  # seconds
# A dead network is noticed after about 5 + 3 * 3 seconds, whether or not data is on its way.
NETWORK = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 14_000,
}
# libpq sends what it finds in these after our own settings, which would then be overridden.
OVERRIDING = ["PGTZ", "PGDATESTYLE"]

# Every error reaches the caller as an exception; the pool's own lines would only repeat it.
logging.getLogger("psycopg").setLevel(logging.CRITICAL)


def database_url() -> str:
    """The URL of the database in use: DATABASE_URL if set, else that of the embedded Postgres,
    which is started if need be and stops when the last program that asked for it has ended.

    A program that starts others passes it on to them as their DATABASE_URL.
    """
    return os.environ.get("DATABASE_URL") or embedded_url()


@cache
def embedded_url() -> str:
    """Start the embedded Postgres in .postgres/ at the repository root, once per process."""
    forget_other_servers()
    return embedded().start()


@cache
def embedded() -> EmbeddedPostgres:
    """The embedded Postgres of this process."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").exists():
        root = Path.cwd()  # installed without the repository
    return EmbeddedPostgres(root / ".postgres")


class CancellablePool(AsyncConnectionPool[Connection]):
    """A pool whose clients can be cancelled at any time, also on Python 3.11, and wait cheaply."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        # A hundred slots share ten connections, so nearly every client waits. In the pool's own
        # line that takes an asyncio task and a timer each, half as long as the statement itself.
        self._line = asyncio.Semaphore(self.max_size)

    async def getconn(self, timeout: float | None = None) -> Connection:
        """Wait for one's turn, then for a connection.

        Without a `timeout` of the caller the first has no limit, since overload is not an outage.
        The second has POOL_TIMEOUT, and then raises PoolTimeout, which is one.
        """
        deadline = None if timeout is None else monotonic() + timeout
        try:
            async with asyncio.timeout(timeout):
                await self._line.acquire()
        except TimeoutError:
            raise PoolTimeout(f"couldn't get a connection after {timeout} s") from None
        client = asyncio.current_task()
        assert client is not None
        requests = client.cancelling()
        try:
            conn = await super().getconn(None if deadline is None else deadline - monotonic())
            # The asyncio.wait_for of 3.11 forgets a cancellation that comes with a connection.
            if client.cancelling() > requests:
                await super().putconn(conn)
                raise asyncio.CancelledError
        except BaseException:
            self._line.release()
            raise
        return conn

    async def putconn(self, conn: Connection) -> None:
        try:
            await super().putconn(conn)
        finally:
            self._line.release()


@asynccontextmanager
async def open_pool(lesson_dir: str | Path) -> AsyncIterator[Pool]:
    """A pool of connections that see a lesson's schema, after its schema.sql has been applied.

    The connections are in autocommit mode and return rows as dicts. Raises SystemExit with one line
    if there is no database to be had or schema.sql is faulty.

    A worker's pool is for the worker. Functions that need the database get a pool of their own: one
    that leaves a connection with another search_path, role, row factory or JSON loader harms the
    next one who borrows it, and one that keeps ten of them keeps the worker waiting.
    """
    schema = schema_name(lesson_dir)
    async with await connect(schema) as conn:
        await apply_schema(conn, schema, Path(lesson_dir) / "schema.sql")

    async def check(conn: Connection) -> None:
        # Costs no round trip: it reads what has already come, which may be the server's farewell.
        try:
            conn.pgconn.consume_input()
            conn.pgconn.consume_input()  # the end comes after the farewell
        except psycopg.OperationalError:
            await pool.check()  # then the other idle connections are probably lost too
            raise

    # The pool's own reconnecting waits twice as long after each failure, up to minutes, and gives
    # up in the end. So let it give up after a second, and begin again.
    pool = CancellablePool(
        conninfo(schema),
        connection_class=FreshConnection,
        kwargs={"autocommit": True, "row_factory": dict_row},
        min_size=1,
        max_size=10,
        open=False,
        configure=use_strict_json,
        check=check,
        timeout=POOL_TIMEOUT,
        reconnect_timeout=1.0,
        reconnect_failed=AsyncConnectionPool.check,
    )
    async with pool:
        yield pool


async def open_connection(pool: Pool) -> Connection:
    """A new connection just like the pool's, but not of the pool. The caller closes it."""
    return await new_connection(cast(str, pool.conninfo))


def load_queries(lesson_dir: str | Path) -> Queries:
    """The queries of a lesson's queries.sql, each a method that takes a connection and keywords.

    Raises SystemExit with one line if the file is missing or faulty.
    """
    path = Path(lesson_dir) / "queries.sql"
    try:
        return aiosql.from_path(path, "apsycopg", kwargs_only=True, encoding="utf-8")
    except Exception as error:
        # aiosql raises several kinds, which are all the fault of the file.
        raise SystemExit(f"{path}: {' '.join(str(error).split())}") from None


async def connect(schema: str) -> Connection:
    """A program's first connection.

    Raises SystemExit with one line if there is no database, or none that the lessons can work with.
    """
    parameters = conninfo(schema)
    try:
        async with asyncio.timeout(START_TIMEOUT):
            conn = await new_connection(parameters)
            try:
                await check_session(conn, schema, parameters)
            except BaseException:
                await conn.close()
                raise
            return conn
    except (TimeoutError, psycopg.Error) as error:
        raise SystemExit(explain(error)) from None


async def new_connection(parameters: str) -> Connection:
    """Connect with a connection string made by conninfo."""
    conn = await FreshConnection.connect(parameters, autocommit=True, row_factory=dict_row)
    await use_strict_json(conn)
    return conn


async def use_strict_json(conn: Connection) -> None:
    """Make a connection read and write JSON as shared.jsonb does."""
    set_json_dumps(jsonb.dumps, conn)
    set_json_loads(jsonb.loads, conn)


def conninfo(schema: str) -> str:
    """The connection string for one lesson's schema; raise SystemExit if the URL is malformed."""
    try:
        given = conninfo_to_dict(database_url())
    except (psycopg.Error, UnicodeError) as error:
        # libpq quotes what it did not understand, which may well be the password.
        reason = re.sub('".*"', '"..."', " ".join(str(error).split()))
        raise SystemExit(
            f"DATABASE_URL is not a valid connection string: {reason}. "
            "It should look like postgresql://user:password@host:5432/database"
        ) from None
    for name in OVERRIDING:
        os.environ.pop(name, None)
    escaped = {name: value.replace(" ", r"\ ") for name, value in settings(schema).items()}
    ours = " ".join(f"-c {name}={value}" for name, value in escaped.items())
    parameters: dict[str, Any] = {
        **NETWORK,
        "application_name": f"{schema}:{os.getpid()}",
        # After a failover the address may lead to a standby for a while.
        "target_session_attrs": "read-write",
        # The host of the URL, not that of PGHOSTADDR.
        **({"hostaddr": ""} if "host" in given else {}),
        **given,
        "options": f"{given.get('options', '')} {ours}",
        "client_encoding": "UTF8",
    }
    return make_conninfo("", **parameters)


def explain(error: Exception) -> str:
    """One line on why the first connection failed, without the password."""
    if isinstance(error, TimeoutError):
        reason = f"no answer within {START_TIMEOUT:g} seconds"
    else:
        message, _, _ = str(error).partition("Multiple connection attempts failed")
        lines = message.removeprefix("connection failed: ").splitlines()
        reason = "; ".join(line.strip() for line in lines if line.strip())
        if "unsupported startup parameter" in reason:
            reason += f". {NO_POOLER}"
    return f"Cannot connect to the database in DATABASE_URL: {without_password(reason)}"


def without_password(text: str) -> str:
    """Replace what is, or may be, part of the password of DATABASE_URL."""
    url = database_url()
    password = str(conninfo_to_dict(url).get("password") or "")
    # In a URL with an unescaped "@" or "/" libpq takes part of the password for host or port.
    credentials = url.partition("://")[2].rpartition("@")[0]
    raw = credentials.partition(":")[2]
    if raw and unquote(raw) != password:
        return (
            "it cannot be read as meant. In its password, @ / : ? # % must be written "
            "as %40 %2F %3A %3F %23 %25"
        )
    for secret in {password, raw, quote(password, safe="")} - {""}:
        text = text.replace(secret, "***")
    return text
