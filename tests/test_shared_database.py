"""Connections, schemas and queries, and what a user is told when there is something wrong."""

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import PoolClosed, PoolTimeout

from helpers import execute
from programs import DEADLINE, outcome, run_program, small_lesson, start_program
from relay import Mode, relay
from server import new_database
from shared import (
    Connection,
    EmbeddedPostgres,
    Pool,
    database_url,
    is_away,
    load_queries,
    open_connection,
    open_pool,
)
from shared.database import explain, without_password
from shared.schema import schema_name, statements
from shared.session import settings

OPEN_POOL = """
async def main():
    async with open_pool(sys.argv[1]) as pool:
        load_queries(sys.argv[1])
        print("opened")

run(main())
"""
# To end with an error line: 10 are promised, and a busy machine may take as many to start Python,
# and stop it for as many. Who waits for as long as these URLs say takes a minute.
MAX_SECONDS = 45.0
PASSWORD = "s3cr@t/ /x"
ENCODED = "s3cr%40t%2F%20%2Fx"


# Connections


async def test_connections_of_the_pool(database: str, tmp_path: Path) -> None:
    async with open_pool(small_lesson(tmp_path)) as pool, pool.connection() as conn:
        assert conn.autocommit
        cursor = await conn.execute(
            "SELECT current_schemas(false) AS schemas, current_setting('application_name') AS name"
        )
        row = await cursor.fetchone()
    assert row
    assert row["schemas"] == ["lesson_07"]
    assert row["name"].startswith("lesson_07")


async def test_a_connection_outside_the_pool_is_like_those_inside(
    database: str, tmp_path: Path
) -> None:
    async with open_pool(small_lesson(tmp_path)) as pool:
        held = [await pool.getconn() for _ in range(pool.max_size)]
        async with await open_connection(pool) as conn:
            assert conn.autocommit
            await conn.execute("INSERT INTO notes VALUES ('x')")
            cursor = await conn.execute("""SELECT *, '[1e400]'::jsonb AS big FROM notes""")
            row = await cursor.fetchone()
        assert row
        assert row["note"] == "x"
        for conn in held:
            await pool.putconn(conn)


async def test_who_waits_in_vain_for_a_connection_takes_none_away(
    database: str, tmp_path: Path
) -> None:
    async with open_pool(small_lesson(tmp_path)) as pool:
        for _ in range(3):
            held = [await pool.getconn() for _ in range(pool.max_size)]
            with pytest.raises(PoolTimeout):
                await pool.getconn(timeout=0.1)
            impatient = [asyncio.create_task(pool.getconn()) for _ in range(2 * len(held))]
            await asyncio.sleep(0)
            for client in impatient:
                client.cancel()
            await asyncio.wait(impatient)
            for conn in held:
                await pool.putconn(conn)
    with pytest.raises(PoolClosed):
        await pool.getconn()


async def test_waiting_for_ones_turn_has_no_limit(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are before us: that is overload, and no outage."""
    monkeypatch.setattr("shared.database.POOL_TIMEOUT", 0.1)
    async with open_pool(small_lesson(tmp_path)) as pool:
        held = [await pool.getconn(DEADLINE) for _ in range(pool.max_size)]
        waiting = asyncio.create_task(pool.getconn())
        await asyncio.sleep(0.5)
        assert not waiting.done()
        for conn in held:
            await pool.putconn(conn)
        await pool.putconn(await waiting)


async def test_a_connection_that_cannot_be_had_when_it_is_ones_turn_is_an_outage(
    own_server: EmbeddedPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", own_server.url())
    monkeypatch.setattr("shared.database.POOL_TIMEOUT", 0.1)
    async with open_pool(small_lesson(tmp_path)) as pool:
        own_server.shut_down()
        with pytest.raises(PoolTimeout) as caught:
            await asyncio.wait_for(pool.getconn(), DEADLINE)
        assert is_away(caught.value)
        own_server.launch()


async def backends(pool: Pool) -> set[int]:
    """The server's processes behind all the connections that a pool may have."""
    connections = [await pool.getconn() for _ in range(pool.max_size)]
    for conn in connections:
        await pool.putconn(conn)
    return {conn.info.backend_pid for conn in connections}


@pytest.mark.parametrize(
    "setting",
    ["default_transaction_read_only = on", "TimeZone = 'Europe/Berlin'", "search_path = public"],
)
async def test_a_connection_that_is_not_what_it_was_is_not_kept(
    setting: str, database: str, tmp_path: Path
) -> None:
    async with open_pool(small_lesson(tmp_path)) as pool:
        before = await backends(pool)
        async with pool.connection() as conn, conn.transaction():
            if conn.info.parameter_status(setting.split()[0]) is None:
                pytest.skip("this version of Postgres does not tell when it changes")
            await conn.execute(f"SET LOCAL {setting}".encode())
        assert await backends(pool) == before
        async with pool.connection() as conn:
            await conn.execute(f"SET {setting}".encode())
            changed = conn.info.backend_pid
        after = await backends(pool)
    assert len(before) == len(after) == pool.max_size
    assert before - after == {changed}


async def test_a_connection_on_which_a_write_was_refused_is_not_kept(
    database: str, tmp_path: Path
) -> None:
    """As on a standby of a version that does not tell that it is one."""
    async with open_pool(small_lesson(tmp_path)) as pool:
        before = await backends(pool)
        write = "BEGIN READ ONLY; INSERT INTO notes VALUES ('x')"
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await execute(pool, write)
        after = await backends(pool)
    assert len(before - after) == 1


async def test_options_in_the_url_are_kept(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_conninfo(database, application_name="mine", options="-c work_mem=1MB")
    monkeypatch.setenv("DATABASE_URL", url)
    async with open_pool(small_lesson(tmp_path)) as pool, pool.connection() as conn:
        cursor = await conn.execute(
            "SELECT current_setting('work_mem') AS memory, current_setting('application_name') "
            "AS name, current_schema() AS schema"
        )
        assert await cursor.fetchone() == {"memory": "1MB", "name": "mine", "schema": "lesson_07"}


async def test_settings_of_a_server_that_the_lessons_cannot_work_with(
    database: str, tmp_path: Path
) -> None:
    for setting in (
        "timezone = 'Europe/Berlin'",
        "intervalstyle = 'iso_8601'",
        "datestyle = 'SQL, DMY'",
        "default_transaction_isolation = 'repeatable read'",
        "synchronous_commit = off",
    ):
        alter_database(database, f"SET {setting}")
    async with open_pool(small_lesson(tmp_path)) as pool, pool.connection() as conn:
        assert await differing_settings(conn) == {}
        row = await one_row(
            conn,
            "SELECT INTERVAL '-1.5 s' AS delay, TIMESTAMPTZ 'epoch' AS time, "
            # The night in which the clocks go forward in Berlin.
            "TIMESTAMPTZ '2026-03-28 12:00+0' + INTERVAL '1 day' AS next_day",
        )
    assert row.pop("time").timestamp() == 0
    assert row == {
        "delay": timedelta(seconds=-1.5),
        "next_day": datetime(2026, 3, 29, 12, tzinfo=UTC),
    }


OVERRIDING = {
    "PGTZ": "Europe/Berlin",
    "PGDATESTYLE": "SQL, DMY",
    "PGCLIENTENCODING": "LATIN1",
    "PGOPTIONS": "-c intervalstyle=iso_8601",
    "PGTARGETSESSIONATTRS": "standby",
    "PGHOSTADDR": "127.0.0.99",
}


async def test_settings_in_the_environment_that_the_lessons_cannot_work_with(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in OVERRIDING.items():
        monkeypatch.setenv(name, value)
    async with (
        open_pool(small_lesson(tmp_path)) as pool,
        pool.connection() as conn,
        await open_connection(pool) as other,
    ):
        assert await differing_settings(conn) == await differing_settings(other) == {}
        assert conn.info.encoding == other.info.encoding == "utf-8"


async def test_options_in_the_url_do_not_win(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "-c search_path=public -c timezone=Europe/Berlin"
    monkeypatch.setenv(
        "DATABASE_URL", make_conninfo(database, options=options, client_encoding="LATIN1")
    )
    async with open_pool(small_lesson(tmp_path)) as pool, pool.connection() as conn:
        assert await differing_settings(conn) == {}
        assert conn.info.encoding == "utf-8"


def alter_database(url: str, what: str) -> None:
    """ALTER DATABASE of the one at this URL, and let go of it."""
    with psycopg.connect(url, autocommit=True) as conn:
        name = sql.Identifier(conn.info.dbname)
        conn.execute(sql.SQL("ALTER DATABASE {} ").format(name) + sql.SQL(what))


async def differing_settings(conn: Connection) -> dict[str, str]:
    """The settings of a connection that are not what lesson 07 relies on."""
    expected = settings("lesson_07")
    cursor = await conn.execute(
        "SELECT name, current_setting(name) AS value FROM unnest(%s::text[]) AS name",
        [list(expected)],
    )
    found = {row["name"]: row["value"] async for row in cursor}
    assert found.keys() == expected.keys()
    return {name: value for name, value in found.items() if value != expected[name]}


async def one_row(conn: Connection, statement: str, *parameters: Any) -> dict[str, Any]:
    row = await (await conn.execute(statement.encode(), parameters or None)).fetchone()
    assert row
    return row


def test_database_url_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://host/name")
    assert database_url() == "postgresql://host/name"


# Schemas


@pytest.mark.parametrize(
    ("directory", "schema"),
    [("07-durable-tasks", "lesson_07"), ("7-x", "lesson_07"), ("12_y/", "lesson_12")],
)
def test_the_schema_has_the_number_of_the_directory(directory: str, schema: str) -> None:
    assert schema_name(directory) == schema


def test_a_directory_without_a_number_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"my-copy: .* must begin with its number"):
        schema_name("path/to/my-copy")


async def notes(lesson: Path, add: str = "") -> list[str]:
    """Open a pool, perhaps add a note, and return all that there are."""
    async with open_pool(lesson) as pool, pool.connection() as conn:
        if add:
            await conn.execute("INSERT INTO notes (note) VALUES (%s)", [add])
        cursor = await conn.execute("SELECT note FROM notes ORDER BY note")
        return [row["note"] async for row in cursor]


async def test_state_survives_until_the_schema_changes(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lesson = small_lesson(tmp_path)
    assert await notes(lesson, add="a") == ["a"]
    assert await notes(lesson, add="b") == ["a", "b"]
    assert caplog.messages == []

    with (lesson / "schema.sql").open("a") as file:
        file.write("-- changed\n")
    assert await notes(lesson) == []
    assert caplog.messages == ["schema.sql has changed: dropped lesson_07 and created it anew"]
    assert await notes(lesson, add="c") == ["c"]


async def test_a_faulty_change_leaves_the_old_schema_alone(database: str, tmp_path: Path) -> None:
    lesson = small_lesson(tmp_path)
    good = (lesson / "schema.sql").read_text()
    await notes(lesson, add="a")
    (lesson / "schema.sql").write_text(good + "CREATE TABLE;")
    with pytest.raises(SystemExit, match="line 2"):
        await notes(lesson)
    (lesson / "schema.sql").write_text(good)
    assert await notes(lesson) == ["a"]


async def test_lessons_do_not_share_tables(database: str, tmp_path: Path) -> None:
    lesson = small_lesson(tmp_path)
    other = lesson.with_name("06-other")
    other.mkdir()
    (other / "schema.sql").write_text("CREATE TABLE notes (note TEXT);")
    assert await notes(lesson, add="a") == ["a"]
    assert await notes(other) == []


def test_programs_that_start_at_once_apply_the_schema_once(database: str, tmp_path: Path) -> None:
    # Long enough for all of them to find no schema, did they not wait for each other.
    lesson = small_lesson(tmp_path, "CREATE TABLE notes (note TEXT); SELECT pg_sleep(0.5);")
    patience = "import shared.schema\nshared.schema.LOCK_TIMEOUT = '60s'\n"
    programs = [start_program(patience + OPEN_POOL, lesson) for _ in range(3)]
    for program in programs:
        end = outcome(program)
        assert (end.status, end.stdout, end.stderr) == (0, "opened\n", "")


async def test_a_schema_in_use_is_not_waited_for_for_ever(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.schema.LOCK_TIMEOUT", "100ms")
    lesson = small_lesson(tmp_path)
    async with open_pool(lesson) as pool, pool.connection() as conn, conn.transaction():
        await conn.execute("SELECT * FROM notes")
        (lesson / "schema.sql").write_text("CREATE TABLE notes (note TEXT, more TEXT);")
        with pytest.raises(SystemExit, match="another program"):
            await notes(lesson)


FAULTS = {
    "syntax": ("CREATE TABLE a ();\n\nCREATE\n\nTABEL b ();\n", 5, "syntax error"),
    "duplicate": ("CREATE TABLE a ();\n\n-- again\nCREATE TABLE a ();\n", 4, "already exists"),
    "unknown type": ("CREATE TABLE a (\n    b INT,\n    c NOSUCHTYPE\n);\n", 3, "nosuchtype"),
    "in a value": ("SELECT 1;\n/* ; /* ; */ ; */ SELECT ';' ||\n'ä' ||\n1/0;", 2, "zero"),
    "after quotes": (
        "SELECT ';', E'\\';', $a$;$b$;$a$, \";\"\nFROM (SELECT 1 \";\") x;\nX;",
        3,
        "X",
    ),
    "after umlauts": ("-- äöü\nSELECT 'äöü' AS ä,\n  nosuchcolumn;", 3, "nosuchcolumn"),
}


@pytest.mark.parametrize(("script", "line", "message"), FAULTS.values(), ids=FAULTS)
async def test_an_error_in_the_schema_names_file_and_line(
    script: str, line: int, message: str, database: str, tmp_path: Path
) -> None:
    lesson = small_lesson(tmp_path, script)
    with pytest.raises(SystemExit) as caught:
        await notes(lesson)
    text = str(caught.value)
    assert text.startswith(f"{lesson / 'schema.sql'}, line {line}: ")
    assert message in text
    assert "\n" not in text


def test_statements_are_told_apart() -> None:
    script = "-- a;\nSELECT 1;;\n /* ; */ SELECT '; --' ; SELECT $$ ; ' $$, a$b$c, $1; -- end"
    assert [statement for _, statement in statements(script)] == [
        "SELECT 1",
        "SELECT '; --' ",
        "SELECT $$ ; ' $$, a$b$c, $1",
    ]


async def test_a_missing_schema_is_one_line(database: str, tmp_path: Path) -> None:
    lesson = small_lesson(tmp_path)
    (lesson / "schema.sql").unlink()
    with pytest.raises(SystemExit, match=r"schema\.sql"):
        await notes(lesson)


# Queries


async def test_queries_take_a_connection(database: str, tmp_path: Path) -> None:
    lesson = small_lesson(tmp_path)
    queries = load_queries(lesson)
    async with open_pool(lesson) as pool, pool.connection() as conn:
        assert await queries.one(conn) == {"one": 1}


BAD_QUERIES: dict[str, str | bytes] = {
    "parameters": "-- name: get(id)^\nSELECT 1;\n",
    "operation": "-- name: get()%\nSELECT 1;\n",
    "empty": "-- name: get()^\n",
    "encoding": b"-- name: get()^\nSELECT '\xe4';\n",
}


@pytest.mark.parametrize("text", BAD_QUERIES.values(), ids=BAD_QUERIES)
def test_bad_queries_are_one_line(text: str | bytes, tmp_path: Path) -> None:
    lesson = small_lesson(tmp_path)
    (lesson / "queries.sql").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as caught:
        load_queries(lesson)
    assert str(caught.value).startswith(f"{lesson / 'queries.sql'}: ")
    assert "\n" not in str(caught.value)


def test_missing_queries_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"queries\.sql"):
        load_queries(tmp_path)


# No database


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port that takes no connections, nor goes to somebody else meanwhile."""
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


def error_line(url: str, lesson: Path) -> str:
    """The line with which a program ends that cannot use this DATABASE_URL."""
    start = time.monotonic()
    end = run_program(OPEN_POOL, lesson, database_url=url)
    assert time.monotonic() - start < MAX_SECONDS
    for secret in [PASSWORD, ENCODED, "s3cr"]:
        assert secret not in end.stdout + end.stderr
    return end.sole_error_line()


MALFORMED = [
    f"postgres//bob:{ENCODED}@host/db",
    f"mysql://bob:{ENCODED}@host/db",
    f"postgresql://bob:{ENCODED}@host/db?nosuchoption=1",
    "postgresql://bob:s3cr%zzet@host/db",
    "password=s3cret host",
    "password='s3cret",
    "s3cret",
]


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_url(url: str, tmp_path: Path) -> None:
    assert "DATABASE_URL is not a valid" in error_line(url, small_lesson(tmp_path))


UNREACHABLE = [
    "postgresql://bob:{ENCODED}@127.0.0.1:{port}/db",
    "postgresql://bob:{ENCODED}@localhost:{port}/db",
    "postgresql://bob:{ENCODED}@127.0.0.1,localhost,127.0.0.1:{port}/db",
    "postgresql://bob:x@s3cret@127.0.0.1:{port}/db",
    "postgresql://127.0.0.1:s3cret/x@127.0.0.1:{port}/db",
    "postgresql://bob@127.0.0.1:{port}/db?password={ENCODED}&connect_timeout=x",
    "postgresql://bob:{ENCODED}@127.0.0.1:999999/db",
    "host=127.0.0.1 port={port} user=bob password='{PASSWORD}' connect_timeout=60",
    "postgresql://bob:{ENCODED}@no-such-host.invalid/db",
]


@pytest.mark.parametrize("url", UNREACHABLE)
def test_an_unreachable_database(url: str, free_port: int, tmp_path: Path) -> None:
    url = url.format(port=free_port, ENCODED=ENCODED, PASSWORD=PASSWORD)
    assert "Cannot connect" in error_line(url, small_lesson(tmp_path))


def test_a_database_that_never_answers(silent_port: int, tmp_path: Path) -> None:
    addresses = ",".join(4 * ["127.0.0.1"])
    url = f"postgresql://bob:{ENCODED}@{addresses}:{silent_port}/db?connect_timeout=60"
    assert "no answer" in error_line(url, small_lesson(tmp_path))


def test_a_database_that_does_not_exist(database: str, tmp_path: Path) -> None:
    url = make_conninfo(database, dbname="nosuchdatabase")
    assert "nosuchdatabase" in error_line(url, small_lesson(tmp_path))


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_of_another_encoding(encoding: str, server_url: str, tmp_path: Path) -> None:
    with new_database(server_url, f"ENCODING '{encoding}' LOCALE 'C'") as url:
        line = error_line(url, small_lesson(tmp_path))
        assert f"is {encoding}, and the lessons need UTF8" in line
        assert tables(url) == []


def test_a_standby(own_server: EmbeddedPostgres, tmp_path: Path) -> None:
    lesson = small_lesson(tmp_path)
    url = own_server.url()
    assert run_program(OPEN_POOL, lesson, database_url=url).stdout == "opened\n"
    own_server.shut_down()
    (own_server.data / "standby.signal").touch()
    own_server.launch()
    assert "session is read-only" in error_line(url, lesson)
    either = make_conninfo(url, target_session_attrs="any")
    assert run_program(OPEN_POOL, lesson, database_url=either).stdout == "opened\n"


def tables(url: str) -> list[str]:
    """The tables of a database."""
    with psycopg.connect(url) as conn:
        cursor = conn.execute(
            "SELECT schemaname || '.' || tablename FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        )
        return [name for (name,) in cursor]


async def through_relay(
    mode: Mode, url: str, lesson: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open and use a pool on connections that such a pooler makes."""
    async with relay(url, mode) as relayed:
        monkeypatch.setenv("DATABASE_URL", relayed)
        await notes(lesson, add="x")


async def test_a_pooler_that_leaves_out_options_is_refused(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"search_path is .* not 'lesson_07'") as caught:
        await through_relay(
            "session without options", database, small_lesson(tmp_path), monkeypatch
        )
    assert "ignore_startup_parameters" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tables(database) == []


async def test_a_pooler_in_transaction_mode_is_refused(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="transaction mode") as caught:
        await through_relay("transaction", database, small_lesson(tmp_path), monkeypatch)
    assert "\n" not in str(caught.value)
    assert tables(database) == []


async def test_a_pooler_that_gives_each_client_a_session_will_do(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await through_relay("session", database, small_lesson(tmp_path), monkeypatch)
    assert tables(database) == ["lesson_07.notes"]


def test_a_pooler_that_refuses_options(database: str) -> None:
    error = psycopg.OperationalError("FATAL:  unsupported startup parameter: options")
    assert "Let DATABASE_URL lead to Postgres itself" in explain(error)


@pytest.fixture
def poor_user(database: str) -> Iterator[str]:
    """A database user without rights, whose password is PASSWORD; the connection string of it."""
    name = f"poor_{conninfo_to_dict(database)['dbname']}"
    with psycopg.connect(database, autocommit=True) as conn:
        user, password = sql.Identifier(name), sql.Literal(PASSWORD)
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(user, password))
        yield make_conninfo(database, user=name, password=PASSWORD)
        conn.execute(sql.SQL("DROP ROLE {}").format(user))


def test_a_user_who_may_not_create_schemas(poor_user: str, tmp_path: Path) -> None:
    line = error_line(poor_user, small_lesson(tmp_path))
    assert "GRANT CREATE ON DATABASE" in line
    assert "poor_" in line


def test_an_error_in_the_schema_ends_the_program(database: str, tmp_path: Path) -> None:
    line = error_line(database, small_lesson(tmp_path, "\nCREATE TABEL notes ();"))
    assert line.endswith('07-small/schema.sql, line 2: syntax error at or near "TABEL"')


def test_bad_queries_end_the_program(database: str, tmp_path: Path) -> None:
    lesson = small_lesson(tmp_path)
    (lesson / "queries.sql").write_text("-- name: get(id)^\nSELECT 1;\n")
    assert "unused declared parameter in query get" in error_line(database, lesson)


def test_a_wrong_password(own_server: EmbeddedPostgres, tmp_path: Path) -> None:
    with psycopg.connect(own_server.url(), autocommit=True) as conn:
        conn.execute("CREATE ROLE bob LOGIN PASSWORD 'another'")
    (own_server.data / "pg_hba.conf").write_text("local all all scram-sha-256")
    own_server.shut_down()
    own_server.launch()
    url = own_server.url().replace("//postgres@", f"//bob:{ENCODED}@")
    line = error_line(url, small_lesson(tmp_path))
    assert 'password authentication failed for user "bob"' in line


@pytest.mark.parametrize(
    "url",
    [f"postgresql://bob:{ENCODED}@h/d", f"postgresql://h/d?password={ENCODED}"],
)
def test_a_password_in_a_message_is_masked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    assert without_password(f"not {PASSWORD}, not {ENCODED}") == "not ***, not ***"
