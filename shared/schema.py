"""Applying a lesson's schema.sql to the database."""

import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.rows import DictRow

from shared.outages import one_line

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = "10s"

# What may hold a semicolon that ends no statement, and the semicolon that does.
TOKEN = re.compile(
    r"""
      (?P<blank> \s+ | --[^\n]* | /\*(?: /\*.*?\*/ | . )*?\*/ )   # comments nest, once is enough
    | [eE]'(?: [^'\\] | \\. | '' )*'
    | '[^']*'
    | "[^"]*"
    | \$(?P<tag>[A-Za-z_]\w*)?\$ .*? \$(?(tag)(?P=tag))\$
    | \w+
    | (?P<end> ; )
    | .
    """,
    re.VERBOSE | re.DOTALL,
)


def schema_name(lesson_dir: str | Path) -> str:
    """The schema of a lesson's directory: lesson_07 for 07-durable-tasks.

    Raises SystemExit if the directory's name does not begin with a number.
    """
    name = Path(lesson_dir).resolve().name
    number = re.match(r"[0-9]+", name)
    if not number:
        raise SystemExit(
            f"{name}: the name of a lesson's directory must begin with its number, "
            "as in 07-durable-tasks"
        )
    return f"lesson_{int(number[0]):02}"


def read_sql(path: Path) -> str:
    """The text of an SQL file. Raises SystemExit if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise SystemExit(f"Cannot read {path}: {error}") from None


def statements(script: str) -> Iterator[tuple[int, str]]:
    """The statements of an SQL script, each with its position in the script."""
    start = None
    for token in TOKEN.finditer(script):
        if token["blank"]:
            continue
        if token["end"]:
            if start is not None:
                yield start, script[start : token.start()]
            start = None
        elif start is None:
            start = token.start()
    if start is not None:
        yield start, script[start:]


async def apply_schema(conn: AsyncConnection[DictRow], schema: str, path: Path) -> None:
    """Make the schema what schema.sql says: all of it or nothing.

    A schema made from another version of the file is dropped first, with its tables and their rows.
    Raises SystemExit if that fails.
    """
    script = read_sql(path)
    version = "schema.sql " + hashlib.sha256(script.encode()).hexdigest()
    try:
        async with conn.transaction():
            await conn.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'".encode())
            # Two programs may start at once: the second waits here, and finds the work done.
            await conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [schema])
            applied = await applied_version(conn, schema)
            if applied != version:
                await recreate_schema(conn, schema, version)
                await execute_script(conn, script, path)
            if applied not in (None, version):
                logger.info("%s has changed: dropped %s and created it anew", path.name, schema)
    except psycopg.errors.InsufficientPrivilege as error:
        raise SystemExit(
            f"Cannot create the schema {schema}: {one_line(error)}. The database user "
            f"{conn.info.user!r} needs GRANT CREATE ON DATABASE."
        ) from None
    except psycopg.errors.LockNotAvailable:
        raise SystemExit(
            f"Cannot change the schema {schema}: another program or an open transaction "
            "is using it. Stop that first."
        ) from None
    except psycopg.Error as error:
        raise SystemExit(f"Cannot create the schema {schema}: {one_line(error)}") from None


async def applied_version(conn: AsyncConnection[DictRow], schema: str) -> str | None:
    """What recreate_schema noted on the schema; None if there is no such schema."""
    cursor = await conn.execute(
        """
        SELECT coalesce(obj_description(oid, 'pg_namespace'), '') AS version
        FROM pg_namespace
        WHERE nspname = %s
        """,
        [schema],
    )
    row = await cursor.fetchone()
    return row["version"] if row else None


async def recreate_schema(conn: AsyncConnection[DictRow], schema: str, version: str) -> None:
    """Drop the schema if it is there, create it, and note the version on it."""
    name = sql.Identifier(schema)
    await conn.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(name))
    await conn.execute(sql.SQL("CREATE SCHEMA {}").format(name))
    await conn.execute(sql.SQL("COMMENT ON SCHEMA {} IS {}").format(name, sql.Literal(version)))


async def execute_script(conn: AsyncConnection[DictRow], script: str, path: Path) -> None:
    """Execute an SQL script; raise SystemExit with file and line of the first error.

    One statement at a time, since for many errors Postgres names no position.
    """
    for start, statement in statements(script):
        try:
            await conn.execute(statement.encode())
        except psycopg.Error as error:
            # Counted by Postgres in characters, from 1, within the statement.
            within = int(error.diag.statement_position or 1) - 1
            line = script.count("\n", 0, start + within) + 1
            message = error.diag.message_primary or one_line(error)
            raise SystemExit(f"{path}, line {line}: {message}") from None
