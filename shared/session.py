"""What each session must be like for the lessons' statements: its settings, and a look at them."""

from types import TracebackType
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import DictRow

from shared.outages import is_stale_plan

# A program that is frozen inside a transaction must not keep its row locks for ever.
TRANSACTION_LIMIT = "15s"
# What the lessons' statements rely on. Server, database and role may have these set otherwise.
SETTINGS = {
    # In a zone with daylight saving a day may have 23 or 25 hours, and one hour comes twice.
    "TimeZone": "UTC",
    # psycopg reads times in no other style.
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "standard_conforming_strings": "on",
    "default_transaction_isolation": "read committed",
    "idle_in_transaction_session_timeout": TRANSACTION_LIMIT,
    # A commit that a crash of the server undoes may have been acted upon: a customer was charged.
    "synchronous_commit": "on",
}
# What a server tells by itself when it changes (search_path from Postgres 18 on).
REPORTED = [
    b"in_hot_standby",
    b"default_transaction_read_only",
    b"search_path",
    b"session_authorization",
    b"is_superuser",
    b"client_encoding",
    b"TimeZone",
    b"DateStyle",
    b"IntervalStyle",
    b"standard_conforming_strings",
]
NO_POOLER = "Let DATABASE_URL lead to Postgres itself, not to a connection pooler"


def settings(schema: str) -> dict[str, str]:
    """The settings of every connection."""
    return {"search_path": schema, **SETTINGS}


class FreshConnection(AsyncConnection[DictRow]):
    """A connection that is not kept when it is no longer as it was made.

    `async with` closes it then, and its pool replaces it: the next one who borrows it must not find
    a server that has become a standby, nor a time zone that a function has set. That costs no round
    trip, and sees no more than REPORTED.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._as_made = self._reported()

    def _reported(self) -> list[bytes | None]:
        return [self.pgconn.parameter_status(name) for name in REPORTED]

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await super().__aexit__(exc_type, exc_val, exc_tb)
        # Before Postgres 14 only the error tells of a standby.
        is_spent = isinstance(exc_val, psycopg.errors.ReadOnlySqlTransaction) or (
            exc_val is not None and is_stale_plan(exc_val)
        )
        if not self.closed and (is_spent or self._reported() != self._as_made):
            await self.close()


async def check_session(conn: AsyncConnection[DictRow], schema: str, conninfo: str) -> None:
    """Raise SystemExit with one line if a session, made with `conninfo`, is not as it should be."""
    wanted = settings(schema)
    cursor = await conn.execute(
        "SELECT pg_backend_pid() AS pid, current_setting('server_encoding') AS encoding, "
        "ARRAY(SELECT current_setting(name) FROM unnest(%s::text[]) AS name) AS values",
        [list(wanted)],
    )
    row = await cursor.fetchone()
    assert row is not None
    if row["encoding"] != "UTF8":
        raise SystemExit(
            f"The encoding of the database in DATABASE_URL is {row['encoding']}, and the lessons "
            "need UTF8. Use one made by CREATE DATABASE name TEMPLATE template0 ENCODING 'UTF8' "
            "LOCALE 'C'."
        )
    for name, value in zip(wanted, row["values"], strict=True):
        if value != wanted[name]:
            raise SystemExit(
                f"The settings of the connection to DATABASE_URL did not arrive: {name} is "
                f"{value!r}, not {wanted[name]!r}. A pooler may have left out the startup "
                f"parameter `options` (pgbouncer: ignore_startup_parameters). {NO_POOLER}."
            )
    # A server tells its own process id when one connects, a pooler some other. Behind a pooler in
    # transaction mode two sessions share one process, as soon as one follows the other.
    if row["pid"] != conn.info.backend_pid:
        async with await AsyncConnection.connect(conninfo, autocommit=True) as other:
            cursor_of_other = await other.execute("SELECT pg_backend_pid()")
            if await cursor_of_other.fetchone() == (row["pid"],):
                raise SystemExit(
                    "DATABASE_URL leads to a connection pooler in transaction mode, in which a "
                    f"session keeps neither its settings nor LISTEN. {NO_POOLER}."
                )
