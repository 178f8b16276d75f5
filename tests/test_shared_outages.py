"""Telling the database's absence from a statement's own fault, and waiting for its return."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest
from psycopg import errors
from psycopg_pool import PoolClosed, PoolTimeout

from helpers import wait_for
from programs import DEADLINE, small_lesson
from shared import EmbeddedPostgres, Pool, is_away, keep_trying, open_connection, open_pool

AWAY = [
    psycopg.OperationalError("server closed the connection unexpectedly"),
    psycopg.InterfaceError("the connection is closed"),
    PoolTimeout("couldn't get a connection"),
    errors.AdminShutdown(),
    errors.CannotConnectNow(),
    errors.DeadlockDetected(),
    errors.SerializationFailure(),
    errors.TooManyConnections(),
    errors.IdleInTransactionSessionTimeout(),
    errors.lookup("25P04")(),  # transaction_timeout, of Postgres 17
    errors.ReadOnlySqlTransaction(),
]
NOT_AWAY = [
    PoolClosed("the pool is closed"),
    errors.ProgramLimitExceeded(),
    errors.StatementTooComplex(),
    errors.UniqueViolation(),
    errors.UndefinedTable(),
    errors.InvalidTextRepresentation(),
    ValueError(),
    TimeoutError(),
    ConnectionError(),
    asyncio.CancelledError(),
    ExceptionGroup("of a worker", [psycopg.OperationalError()]),
]


@pytest.mark.parametrize("error", AWAY, ids=lambda error: type(error).__name__)
def test_away(error: Exception) -> None:
    assert is_away(error)


@pytest.mark.parametrize("error", NOT_AWAY, ids=lambda error: type(error).__name__)
def test_not_away(error: BaseException) -> None:
    assert not is_away(error)


class Operation:
    """Fails so many times and then works."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures = failures
        self.error = error
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "done"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.outages.FIRST_DELAY", 0.001)
    monkeypatch.setattr("shared.outages.MAX_DELAY", 0.002)


@pytest.mark.usefixtures("impatient")
async def test_it_is_tried_until_it_works(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    operation = Operation(5, errors.AdminShutdown("bye"))
    assert await keep_trying(operation) == "done"
    assert operation.calls == 6
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "database away, trying again: bye"),
        ("INFO", "database back"),
    ]


@pytest.mark.usefixtures("impatient")
async def test_many_operations_report_one_outage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    operations = [Operation(n, errors.AdminShutdown("bye")) for n in range(20)]
    assert await asyncio.gather(*map(keep_trying, operations)) == ["done"] * 20
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_its_own_fault_is_raised_at_once() -> None:
    operation = Operation(1, errors.UniqueViolation())
    with pytest.raises(errors.UniqueViolation):
        await keep_trying(operation)
    assert operation.calls == 1


async def test_it_can_be_cancelled() -> None:
    operation = Operation(1_000_000, errors.AdminShutdown())
    trying = asyncio.create_task(keep_trying(operation))
    await wait_for(lambda: operation.calls >= 2, "it has been tried again")
    trying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trying


@pytest.fixture
async def own_pool(
    own_server: EmbeddedPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pool]:
    monkeypatch.setenv("DATABASE_URL", own_server.url())
    async with open_pool(small_lesson(tmp_path)) as pool:
        yield pool


async def add_note(pool: Pool) -> None:
    async with pool.connection() as conn:
        await conn.execute("INSERT INTO notes VALUES ('x')")


async def fill(pool: Pool) -> None:
    """Open all the connections that the pool may have."""
    connections = [await pool.getconn() for _ in range(pool.max_size)]
    for conn in connections:
        await pool.putconn(conn)


async def test_a_restart_is_survived(own_server: EmbeddedPostgres, own_pool: Pool) -> None:
    await fill(own_pool)
    own_server.shut_down()
    own_server.launch()
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(keep_trying(lambda: add_note(own_pool)) for _ in range(50)))
        async with own_pool.connection() as conn:
            cursor = await conn.execute("SELECT count(*) AS number FROM notes")
            assert await cursor.fetchone() == {"number": 50}


async def test_who_waits_for_a_connection_gets_it_after_a_longer_outage(
    own_server: EmbeddedPostgres, own_pool: Pool
) -> None:
    await fill(own_pool)
    own_server.shut_down()
    waiting = asyncio.create_task(own_pool.getconn(timeout=2 * DEADLINE))
    # Longer than the pool tries to reconnect before it reports that it has given up.
    await asyncio.sleep(2 * own_pool.reconnect_timeout)
    assert not waiting.done()
    own_server.launch()
    async with asyncio.timeout(DEADLINE):
        await own_pool.putconn(await waiting)
        await add_note(own_pool)


async def test_a_server_that_can_only_be_read_is_an_outage_too(
    own_server: EmbeddedPostgres, own_pool: Pool
) -> None:
    """As after a failover, while the address still leads to the old primary, a standby by now."""
    await fill(own_pool)
    with psycopg.connect(own_server.url(), autocommit=True) as conn:
        conn.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        conn.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity "
            "WHERE datname = 'postgres' AND pid <> pg_backend_pid()"
        )
        adding = asyncio.create_task(keep_trying(lambda: add_note(own_pool)))
        await asyncio.sleep(1)
        assert not adding.done()
        conn.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
    async with asyncio.timeout(DEADLINE):
        await adding
        for _ in range(own_pool.max_size):
            await add_note(own_pool)


async def test_lost_connections_are_not_handed_out(own_pool: Pool) -> None:
    await fill(own_pool)
    async with await open_connection(own_pool) as other:
        await other.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity "
            "WHERE application_name LIKE 'lesson_07%%' AND pid <> pg_backend_pid()"
        )
    for _ in range(own_pool.max_size):
        await add_note(own_pool)
