"""The database goes away and comes back: nothing is lost or stuck, and no retry is spent."""

import asyncio
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from helpers import (
    DEADLINE,
    QUEUE,
    QUICK,
    ended,
    enqueue,
    execute,
    finished,
    get_task,
    make_worker,
    statuses,
    wait_for,
    worker_process,
    working,
)
from lesson_loader import LAST
from shared import EmbeddedPostgres, Pool, load_queries, open_connection, open_pool

# Before lesson 08 workers are crash-only; see test_crash_only.py.
pytestmark = [pytest.mark.since(8), pytest.mark.only(8, LAST)]

# Nobody is taken for inactive, so that whatever happens is the work of the poll loop.
ALONE = QUICK | {"INACTIVE_AFTER": 3600.0}


async def echo(input: Any) -> Any:
    return input


@pytest.mark.flaw(7, reason="an outage ends the worker, and what it was doing is done again")
async def test_two_hundred_tasks_survive_connections_that_are_cut_all_the_time(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    runs: Counter[int] = Counter()
    tasks = 200

    async def pausing(input: Any) -> Any:
        runs[input] += 1
        await asyncio.sleep(0.05)
        return input

    for n in range(tasks):
        await enqueue(pool, "pausing", n)
    workers = [make_worker(lesson, pool, queries, pausing, concurrency=3, **ALONE) for _ in "ab"]
    async with await open_connection(pool) as conn, working(*workers) as start:
        for _ in range(15):
            await cut_all_connections(conn)
            await asyncio.sleep(0.1)

        async def all_finished() -> bool:
            assert not start.done()
            cursor = await conn.execute("SELECT FROM tasks WHERE finished_at IS NULL")
            return cursor.rowcount == 0

        await wait_for(all_finished, "all tasks have finished", seconds=3 * DEADLINE)
        rows = await (await conn.execute("SELECT * FROM tasks")).fetchall()
    assert {row["status"] for row in rows} == {"COMPLETED"}
    assert {(row["retry_count"], row.get("lost_count", 0)) for row in rows} == {(0, 0)}
    assert runs == Counter(range(tasks))


async def cut_all_connections(conn: Any) -> None:
    """All to this database, except this one."""
    await conn.execute(
        """
        SELECT pg_terminate_backend(pid)
        FROM pg_stat_activity
        WHERE datname = current_database()
          AND pid <> pg_backend_pid()
        """
    )


class CutsAfterTheFunction:
    """A lesson's queries, and the connection that is to write the first outcome is cut before."""

    def __init__(self, queries: Any, pool: Pool) -> None:
        self.queries = queries
        self.pool = pool
        self.times = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queries, name)

    async def complete_task(self, conn: Any, **values: Any) -> Any:
        await self.cut(conn)
        return await self.queries.complete_task(conn, **values)

    async def write_outcomes(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        await self.cut(conn)
        async for row in self.queries.write_outcomes(conn, **values):
            yield row

    async def cut(self, conn: Any) -> None:
        self.times += 1
        if self.times == 1:
            async with await open_connection(self.pool) as other:
                await other.execute("SELECT pg_terminate_backend(%s)", [conn.info.backend_pid])


@pytest.mark.since(4)
@pytest.mark.only(4, 7, 8, LAST)
@pytest.mark.flaw(3, reason="a task that ends while its connection is cut ends FAILED")
async def test_an_outage_is_never_the_tasks_failure(lesson: Any, pool: Pool, queries: Any) -> None:
    cutting = CutsAfterTheFunction(queries, pool)
    id = await enqueue(pool, "echo", "done")
    async with working(make_worker(lesson, pool, cutting, echo)):
        row = await finished(pool, id)
    assert (row["status"], row["output"]) == ("COMPLETED", "done")
    assert (row["attempt"], row["retry_count"], cutting.times) == (1, 0, 2)


# A claim that was committed although its answer got lost


class LosesAnswers:
    """A lesson's queries, with connections that are cut just after a claim was committed."""

    def __init__(self, queries: Any, times: int) -> None:
        self.queries = queries
        self.times = times
        self.lost: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queries, name)

    async def poll_tasks(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        rows = [row async for row in self.queries.poll_tasks(conn, **values)]
        if rows and len(self.lost) < self.times:
            self.lost.append(rows)
            await conn.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        for row in rows:
            yield row


async def test_a_claim_whose_answer_got_lost_is_put_back_by_the_worker_itself(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    losing = LosesAnswers(queries, times=2)
    ids = [await enqueue(pool, "echo", n) for n in range(5)]
    async with working(make_worker(lesson, pool, losing, echo, **ALONE)):
        rows = [await finished(pool, id) for id in ids]
    assert len(losing.lost) == 2
    expected = ("COMPLETED", 3, 0, 0)
    for row in rows:
        counts = (row["attempt"], row["retry_count"], row.get("lost_count", 0))
        assert (row["status"], *counts) == expected


async def test_a_claim_that_is_committed_some_time_later_is_put_back_too(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """No poll fails at that moment, so the worker has to look from time to time."""
    release = asyncio.Event()

    async def gated(input: Any) -> Any:
        await release.wait()
        return input

    async with working(make_worker(lesson, pool, queries, gated, echo, **ALONE)):
        known = await enqueue(pool, "gated")
        await finished(pool, await enqueue(pool, "echo"))
        unknown = await enqueue(pool, "echo", "late", queue="none")
        await execute(
            pool,
            """
            UPDATE tasks
            SET status = 'RUNNING', attempt = 1, queue = %s, worker_id = (SELECT id FROM workers)
            WHERE id = %s
            """,
            QUEUE,
            unknown,
        )
        late = await finished(pool, unknown)
        assert (await get_task(pool, known))["attempt"] == 1  # which it does know of
        release.set()
        await finished(pool, known)
    assert (late["status"], late["output"]) == ("COMPLETED", "late")
    assert (late["attempt"], late["retry_count"], late.get("lost_count", 0)) == (2, 0, 0)


async def test_a_former_attempt_that_still_runs_does_not_hide_a_lost_claim(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """It is the pair (id, attempt) that a worker knows or does not know."""
    release = asyncio.Event()
    inputs: list[Any] = []

    async def gated(input: Any) -> Any:
        inputs.append(input)
        if len(inputs) == 1:
            await release.wait()

    id = await enqueue(pool, "gated")
    async with working(make_worker(lesson, pool, queries, gated, **ALONE)):
        await wait_for(lambda: inputs, "the first attempt has started")
        await execute(pool, "UPDATE tasks SET attempt = 2 WHERE id = %s", id)
        row = await finished(pool, id)
        release.set()
    assert (row["status"], row["attempt"]) == ("COMPLETED", 3)


# A release that adds a column


@pytest.mark.flaw(7, reason="a column that is added under a running worker ends it")
async def test_a_worker_goes_on_when_a_column_is_added(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Its rows get one more value, and Postgres refuses statements that it has prepared."""
    release = asyncio.Event()
    waiting = 0

    async def gated(input: Any) -> Any:
        nonlocal waiting
        waiting += 1
        await release.wait()
        return input

    async def order(context: Any, input: Any) -> Any:
        return [await context.run_task(name, name) for name in ("echo", "gated", "echo")]

    settings = ALONE | {"SUSPEND_AFTER": 3600.0}  # however long the order waits for its step
    worker = make_worker(lesson, pool, queries, echo, gated, order, **settings)
    async with working(worker) as start, open_pool(lesson.path) as other_pool:
        release.set()
        for _ in range(15):  # now every statement is prepared
            await finished(pool, await enqueue(pool, "order", is_durable=True))
        release.clear()
        waiting = 0
        ids = [await enqueue(pool, "order", is_durable=True)]
        await wait_for(lambda: waiting, "the order waits for its second step")
        await execute(pool, "ALTER TABLE tasks ADD COLUMN note TEXT NOT NULL DEFAULT 'none'")
        await execute(pool, "ALTER TABLE durable_events ADD COLUMN note TEXT")
        ids += [await enqueue(other_pool, "order", is_durable=True) for _ in range(5)]
        release.set()

        async def all_completed() -> bool:
            assert not start.done()
            return (await statuses(other_pool)).keys() == {"COMPLETED"}

        await wait_for(all_completed, "all tasks have completed")
        rows = [await get_task(other_pool, id) for id in ids]
    for row in rows:
        assert (row["output"], row["attempt"]) == (["echo", "gated", "echo"], 1)


# The server itself


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """A server that these tests may stop. Its directory has a short name, for its socket."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        server = EmbeddedPostgres(Path(directory))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
async def own_pool(
    lesson: Any, server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pool]:
    """The lesson's pool on the server that may be stopped."""
    monkeypatch.setenv("DATABASE_URL", server.url())
    async with open_pool(lesson.path) as pool:
        await execute(pool, "TRUNCATE tasks CASCADE")
        yield pool


def stop_server(server: EmbeddedPostgres, how: str) -> None:
    """SIGINT is a fast stop, SIGQUIT an immediate one, after which it has to recover."""
    os.kill(int(server.pid_file.read_text().split()[0]), signal.Signals[how])


@pytest.mark.skipif(sys.platform == "win32", reason="Postgres is stopped by a signal")
@pytest.mark.parametrize("how", ["SIGINT", "SIGQUIT"])
async def test_a_worker_survives_a_restart_of_the_server(
    lesson: Any, own_pool: Pool, server: EmbeddedPostgres, how: str
) -> None:
    """Tasks that end meanwhile have their results written when it is back."""
    started: list[int] = []
    release = asyncio.Event()

    async def gated(input: Any) -> Any:
        started.append(input)
        await release.wait()
        if input % 2:
            raise ValueError("odd")
        return input

    pool = own_pool
    ids = [await enqueue(pool, "gated", n) for n in range(10)]
    waiting = [await enqueue(pool, "echo", n) for n in range(10)]
    settings = ALONE | {"concurrency": 10}
    worker = make_worker(lesson, pool, load_queries(lesson.path), gated, echo, **settings)
    async with working(worker):
        await wait_for(lambda: len(started) == 10, "all slots are taken")
        stop_server(server, how)
        await wait_for(lambda: not server.is_running(), "the server has stopped")
        release.set()
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.url)  # starts it
        rows = [await finished(pool, id) for id in ids]
        others = [await finished(pool, id) for id in waiting]
    assert [row["status"] for row in rows] == ["COMPLETED", "FAILED"] * 5
    assert {row["status"] for row in others} == {"COMPLETED"}
    for row in rows:
        assert (row["attempt"], row["retry_count"], row.get("lost_count", 0)) == (1, 0, 0)
    assert sorted(started) == list(range(10))


@pytest.mark.only(LAST)
async def test_a_worker_survives_a_server_that_is_read_only_for_a_while(
    lesson: Any, own_pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    started = asyncio.Event()
    release = asyncio.Event()

    async def gated(input: Any) -> Any:
        started.set()
        await release.wait()
        return input

    # The pool has no connection to a server that is read-only.
    url = make_conninfo(cast(str, own_pool.conninfo), target_session_attrs="any")
    conn = await psycopg.AsyncConnection.connect(url, autocommit=True)

    async def make_read_only(value: str) -> None:
        await conn.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}".encode())
        await conn.execute("SELECT pg_reload_conf()")

    id = await enqueue(own_pool, "gated", 1)
    waiting = await enqueue(own_pool, "gated", 2)
    settings = ALONE | {"concurrency": 1}
    worker = make_worker(lesson, own_pool, load_queries(lesson.path), gated, **settings)
    async with conn, working(worker):
        await asyncio.wait_for(started.wait(), DEADLINE)
        await make_read_only("on")
        try:
            await wait_for(lambda: "read-only" in caplog.text, "the worker has noticed")
            release.set()
            await wait_for(lambda: "trying again" in caplog.text, "the outcome is refused")
            cursor = await conn.execute("SELECT status FROM tasks WHERE id = %s", [id])
            assert await cursor.fetchone() == ("RUNNING",)
        finally:
            await make_read_only("off")
        rows = [await finished(own_pool, id), await finished(own_pool, waiting)]
    for row in rows:
        assert (row["status"], row["attempt"], row["retry_count"]) == ("COMPLETED", 1, 0)


@pytest.mark.since(9)
@pytest.mark.only(LAST)
@pytest.mark.skipif(sys.platform == "win32", reason="Postgres is stopped by a signal")
async def test_a_worker_that_never_reached_the_database_can_be_stopped(
    lesson: Any, own_pool: Pool, server: EmbeddedPostgres
) -> None:
    queries = load_queries(lesson.path)
    stop_server(server, "SIGINT")
    await wait_for(lambda: not server.is_running(), "the server has stopped")
    worker = make_worker(lesson, own_pool, queries, echo, SHUTDOWN_GRACE=0.2)
    start = asyncio.create_task(worker.start(QUEUE))
    await asyncio.sleep(0.2)
    worker.stop()
    await asyncio.wait_for(start, DEADLINE)


@pytest.mark.since(9)
@pytest.mark.only(LAST)
@pytest.mark.skipif(sys.platform == "win32", reason="Postgres is stopped by a signal")
@pytest.mark.parametrize("seconds", [3600, 5], ids=["runs", "has ended"])
async def test_a_worker_can_be_stopped_while_the_database_is_away(
    lesson: Any, own_pool: Pool, server: EmbeddedPostgres, tmp_path: Path, seconds: float
) -> None:
    """It can neither put its task back nor write its outcome, so another finds the task lost."""
    file = tmp_path / "notes"
    id = await enqueue(own_pool, "sleep", {"file": str(file), "seconds": seconds})
    async with worker_process(lesson, SHUTDOWN_GRACE=0.5) as process:
        await wait_for(file.exists, "the task has started")
        stop_server(server, "SIGINT")
        await wait_for(lambda: not server.is_running(), "the server has stopped")
        if seconds == 5:
            await wait_for(lambda: "ends" in file.read_text(), "the function has ended")
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0

    async def sleep(input: Any) -> Any:
        return "by another"

    await asyncio.to_thread(server.url)  # starts it
    queries = load_queries(lesson.path)
    async with working(make_worker(lesson, own_pool, queries, sleep, **QUICK)):
        row = await finished(own_pool, id)
    assert (row["output"], row["attempt"], row["retry_count"]) == ("by another", 2, 0)
