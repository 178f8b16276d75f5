"""The loops of a worker: how often they try, how long they wait, and answers that come too late."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from helpers import (
    QUEUE,
    QUICK,
    enqueue,
    execute,
    finished,
    get_task,
    make_worker,
    wait_for,
    wait_for_status,
    working,
)
from lesson_loader import LAST
from shared import Pool

# Those of 09 are those of 08.
pytestmark = [pytest.mark.since(8), pytest.mark.only(8, LAST)]


class Spied:
    """A lesson's queries, some of which are another's."""

    def __init__(self, queries: Any) -> None:
        self.queries = queries

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queries, name)


class NeverAnswers(Spied):
    """Heartbeats and claims always fail, and are counted."""

    beats = polls = 0

    async def heartbeat(self, conn: Any, **values: Any) -> None:
        self.beats += 1
        raise psycopg.OperationalError("the database system is shutting down")

    async def poll_tasks(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        self.polls += 1
        raise psycopg.OperationalError("the database system is shutting down")
        yield


@pytest.mark.parametrize("loop", ["beats", "polls"])
async def test_what_fails_at_once_is_tried_again_but_seldom(
    lesson: Any, pool: Pool, queries: Any, loop: str
) -> None:
    """Once per HEARTBEAT_INTERVAL, lest it fills the log and the processor."""
    spied = NeverAnswers(queries)
    settings = QUICK | {"HEARTBEAT_INTERVAL": 0.5, "POLL_INTERVAL": 0.001}
    worker = make_worker(lesson, pool, spied, durable_concurrency=0, **settings)
    async with working(worker):
        await wait_for(lambda: getattr(spied, loop), "it has tried once")
        began, before = time.monotonic(), getattr(spied, loop)
        await asyncio.sleep(1.2)
        await wait_for(lambda: getattr(spied, loop) > before, "it has tried again")
        tries, seconds = getattr(spied, loop) - before, time.monotonic() - began
    # Twice: there are two loops that poll. Once more: they look when the worker begins to listen.
    assert tries <= 2 * (2 + seconds / 0.5)


class FailsAfterOne(Spied):
    """The claim that finds a task is the last one that works."""

    failing = False
    failures = 0

    async def poll_tasks(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        if self.failing:
            self.failures += 1
            raise psycopg.OperationalError("the database system is shutting down")
        async for row in self.queries.poll_tasks(conn, **values):
            self.failing = True
            yield row


async def test_a_claim_that_fails_while_more_tasks_wait_is_tried_again_but_seldom(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Although a free slot is filled at once otherwise."""

    async def echo(input: Any) -> Any:
        return input

    spied = FailsAfterOne(queries)
    id, _ = [await enqueue(pool, "echo", n) for n in range(2)]
    settings = QUICK | {"HEARTBEAT_INTERVAL": 0.5, "concurrency": 1, "durable_concurrency": 0}
    async with working(make_worker(lesson, pool, spied, echo, **settings)):
        await finished(pool, id)
        began, before = time.monotonic(), spied.failures
        await asyncio.sleep(1.2)
        await wait_for(lambda: spied.failures > before, "it has tried again")
        tries, seconds = spied.failures - before, time.monotonic() - began
    # As above: only now may they begin to listen.
    assert tries <= 2 * (2 + seconds / 0.5)


class FailsOnce(Spied):
    """One of the queries fails when it is asked for the first time."""

    def __init__(self, queries: Any, failing: str) -> None:
        super().__init__(queries)
        self.failing = failing
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        if name == self.failing:
            self.asked += 1
            if self.asked == 1:
                raise psycopg.OperationalError("the database system is shutting down")
        return super().__getattr__(name)


@pytest.mark.parametrize(
    "query",
    ["expire_tasks", "requeue_lost_tasks", "delete_inactive_workers", "get_finished_tasks"],
)
async def test_an_outage_ends_none_of_the_loops(
    lesson: Any, pool: Pool, queries: Any, query: str
) -> None:
    """Nor any other: they are in one task group. Connections are cut too seldom just there."""

    async def step(input: Any) -> Any:
        await wait_for(lambda: spied.asked > 0, "it has failed")
        return "done"

    async def parent(context: Any, input: Any) -> Any:
        return await context.run_task("step", None)

    spied = FailsOnce(queries, query)
    id = await enqueue(pool, "parent", is_durable=True)
    async with working(make_worker(lesson, pool, spied, parent, step, **QUICK)) as start:
        row = await finished(pool, id)
        await wait_for(lambda: spied.asked > 1, "it is asked again")
        assert not start.done()
    assert row["output"] == "done"  # on a slow machine in attempt 2, after a suspension


@pytest.mark.parametrize("is_registered", [False, True])
async def test_a_first_beat_is_in_touch_only_with_one_whose_answer_got_lost(
    lesson: Any, pool: Pool, queries: Any, is_registered: bool
) -> None:
    settings = QUICK | {"HEARTBEAT_INTERVAL": 3600.0, "INACTIVE_AFTER": 36000.0}
    worker = make_worker(lesson, pool, queries, **settings)
    if is_registered:
        beat = "INSERT INTO workers (id, display_name) VALUES (%s, 'us')"
        await execute(pool, beat, worker.id)
    async with working(worker):
        await wait_for(lambda: worker.heartbeat.last, "the heart beats")
    assert worker.heartbeat.last.in_touch == is_registered


class CountsBeats(Spied):
    """Heartbeats are counted, and how many there were at the first look after the others."""

    beats = 0
    beats_at_judgement: int | None = None

    async def heartbeat(self, conn: Any, **values: Any) -> Any:
        self.beats += 1
        return await self.queries.heartbeat(conn, **values)

    def requeue_lost_tasks(self, conn: Any, **values: Any) -> Any:
        if self.beats_at_judgement is None:
            self.beats_at_judgement = self.beats
        return self.queries.requeue_lost_tasks(conn, **values)


async def test_a_worker_judges_nobody_before_its_beats_have_lasted_as_long_as_one_may_be_silent(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Whoever lives has beaten by then. The first beat is the beginning."""
    spied = CountsBeats(queries)
    settings = QUICK | {"HEARTBEAT_INTERVAL": 0.25, "INACTIVE_AFTER": 0.75}
    async with working(make_worker(lesson, pool, spied, **settings)):
        await wait_for(lambda: spied.beats_at_judgement, "it has judged")
    assert (spied.beats_at_judgement or 0) >= 1 + 3


async def test_others_are_judged_by_the_judges_own_last_beat(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Here nobody can beat for a while, for their rows are locked, and all else goes on."""
    release = asyncio.Event()

    async def gated(input: Any) -> Any:
        await release.wait()

    spied = [CountsBeats(queries) for _ in range(2)]
    workers = [make_worker(lesson, pool, each, gated, **QUICK) for each in spied]
    id = await enqueue(pool, "gated")
    async with working(*workers):
        await wait_for(lambda: all(each.beats_at_judgement for each in spied), "both judge")
        await wait_for_status(pool, id, "RUNNING")
        async with pool.connection() as conn, conn.transaction():
            await conn.execute("SELECT FROM workers FOR UPDATE")
            await asyncio.sleep(2 * QUICK["INACTIVE_AFTER"])
        release.set()
        row = await finished(pool, id)
    assert (row["status"], row["attempt"]) == ("COMPLETED", 1)


class AnswersLate(Spied):
    """The first answer that a child has ended is held back until `release`."""

    def __init__(self, queries: Any) -> None:
        super().__init__(queries)
        self.on_its_way = asyncio.Event()
        self.release = asyncio.Event()

    async def get_finished_tasks(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        rows = [row async for row in self.queries.get_finished_tasks(conn, **values)]
        if rows and not self.on_its_way.is_set():
            self.on_its_way.set()
            await self.release.wait()
        for row in rows:
            yield row


async def test_an_answer_harms_nobody_if_its_parent_has_timed_out_meanwhile(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    late = AnswersLate(queries)

    async def order(context: Any, input: Any) -> Any:
        return await context.run_task("step", input)

    async def step(input: Any) -> Any:
        return input

    worker = make_worker(lesson, pool, late, order, step, **QUICK)
    async with working(worker):
        # Time enough to come to that, on a machine that stands still for a while.
        columns = {"is_durable": True, "timeout": timedelta(seconds=5)}
        id = await enqueue(pool, "order", 1, **columns)
        await wait_for(late.on_its_way.is_set, "the answer is on its way")
        row = await finished(pool, id)
        late.release.set()
        next_row = await finished(pool, await enqueue(pool, "order", 2, is_durable=True))
    assert (row["status"], row["output"]) == (
        "FAILED",
        {"error": "TimeoutError: timed out after 0:00:05"},
    )
    assert (next_row["status"], next_row["output"]) == ("COMPLETED", 2)


class LosesTheLog(Spied):
    """The first look at a whole log fails."""

    looks = 0

    def get_events(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        return self.look(self.queries.get_events(conn, **values))

    def get_log(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        return self.look(self.queries.get_log(conn, **values))

    async def look(self, rows: AsyncIterator[Any]) -> AsyncIterator[Any]:
        self.looks += 1
        if self.looks == 1:
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        async for row in rows:
            yield row


async def test_an_outage_at_the_look_into_the_whole_log_costs_no_attempt(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    async def order(context: Any, input: Any) -> Any:
        return input

    spied = LosesTheLog(queries)
    id = await enqueue(pool, "order", 1, is_durable=True, attempt=1)
    async with working(make_worker(lesson, pool, spied, order, **QUICK)):
        row = await finished(pool, id)
    assert (row["status"], row["attempt"], spied.looks) == ("COMPLETED", 2, 2)


@pytest.mark.since(9)
@pytest.mark.only(LAST)
async def test_a_durable_task_is_put_back_while_plain_ones_still_have_their_grace(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Its progress is in the log, so others go on with it at once."""
    started: list[str] = []
    release = asyncio.Event()

    async def plain(input: Any) -> Any:
        started.append("plain")
        await release.wait()

    async def order(context: Any, input: Any) -> Any:
        started.append("order")
        await asyncio.sleep(3600)

    ids = [await enqueue(pool, "plain"), await enqueue(pool, "order", is_durable=True)]
    worker = make_worker(lesson, pool, queries, plain, order, SHUTDOWN_GRACE=3600.0, **QUICK)
    async with working(worker) as start:
        await wait_for(lambda: len(started) == 2, "both run")
        worker.stop()
        await wait_for_status(pool, ids[1], "QUEUED")
        assert (await get_task(pool, ids[0]))["status"] == "RUNNING"
        release.set()
        await start
    assert (await get_task(pool, ids[0]))["status"] == "COMPLETED"


class BreaksAtTheEnd(Spied):
    """When the worker has been told to stop, its first look at what it owns fails."""

    armed = False

    async def requeue_own_tasks(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        if self.armed:
            self.armed = False
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        async for row in self.queries.requeue_own_tasks(conn, **values):
            yield row


@pytest.mark.since(9)
@pytest.mark.only(LAST)
async def test_a_connection_lost_while_a_worker_stops_keeps_nothing_running(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    started = asyncio.Event()

    async def order(context: Any, input: Any) -> Any:
        started.set()
        await asyncio.sleep(3600)

    spied = BreaksAtTheEnd(queries)
    id = await enqueue(pool, "order", is_durable=True)
    worker = make_worker(lesson, pool, spied, order, **QUICK)
    async with working(worker) as start:
        await started.wait()
        worker.stop()
        spied.armed = True
        await start
    assert not spied.armed
    row = await get_task(pool, id)
    assert (row["status"], row["worker_id"]) == ("QUEUED", None)


async def test_an_input_that_cannot_be_read_is_not_tried_again(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    async def echo(input: Any) -> Any:
        return input

    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        id = await enqueue(pool, "echo", queue="later", max_retries=3)
        unreadable = "UPDATE tasks SET input = '1e5000', queue = %s WHERE id = %s"
        await execute(pool, unreadable, QUEUE, id)
        row = await finished(pool, id)
    assert (row["status"], row["attempt"], row["retry_count"]) == ("FAILED", 1, 0)
