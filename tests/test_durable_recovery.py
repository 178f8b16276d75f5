"""Durable tasks under crashes, stalls and lost connections: one child for each event, once charged.

Processes are killed, stopped and continued by real signals; see durable_process.py.
"""

import asyncio
import gc
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import psycopg
import pytest

from durable_helpers import Lab
from helpers import (
    DEADLINE,
    QUEUE,
    ended,
    enqueue,
    execute,
    finished,
    set_globals,
    statuses,
    wait_for,
    wait_for_status,
    worker_process,
    working,
)
from lesson_loader import LAST
from shared import Pool, open_connection
from shared.database import CancellablePool

# Between them only outages and stopping are added.
pytestmark = [pytest.mark.since(7), pytest.mark.only(7, LAST)]
SCRIPT = Path(__file__).parent / "durable_process.py"
# No order is suspended because the machine was busy.
PATIENT: dict[str, Any] = {"SUSPEND_AFTER": 3600.0}
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")


@pytest.fixture
def lab(lesson: Any, pool: Pool, queries: Any) -> Lab:
    lab = Lab(lesson, pool, queries)
    set_globals(lesson, PATIENT)
    return lab


class Order:
    """An order for durable_process.py, and the notes that its processes leave."""

    def __init__(self, directory: Path, stop: str) -> None:
        self.notes = directory / "notes"
        self.notes.touch()
        self.gate = directory / "gate"
        self.stop = stop
        self.input = {"file": str(self.notes), "gate": str(self.gate), "stop": stop}

    def noted(self, word: str, pid: int | None = None) -> list[str]:
        """The notes that begin with this word, of one process or of all."""
        lines = [line.split() for line in self.notes.read_text().splitlines()]
        return [
            line[1] for line in lines if line[1].startswith(word) and pid in (None, int(line[0]))
        ]

    async def stopped(self, pid: int) -> None:
        await wait_for(lambda: self.noted(self.stop, pid), f"a process is at {self.stop}")


def order_process(lab: Lab, **settings: Any) -> AbstractAsyncContextManager[Process]:
    """A worker for such orders in a process of its own."""
    return worker_process(lab.lesson, script=SCRIPT, **PATIENT, **settings)


async def assert_done_once(lab: Lab, id: int, order: Order) -> None:
    """The order is COMPLETED, with one child for each event, and one charge whoever made it."""
    children = await lab.children(id)
    assert [child["event_id"] for child in children] == [1, 2]
    orders_and_children = [task["id"] for task in await lab.tasks() if task["task_name"] != "busy"]
    assert orders_and_children == [id, *(child["id"] for child in children)]
    row = await finished(lab.pool, id)
    assert (row["status"], row["output"]) == ("COMPLETED", [children[0]["id"], "sent"])
    assert row["retry_count"] == 0
    assert set(order.noted("charges-")) == {f"charges-{children[0]['id']}"}


@pytest.mark.parametrize(
    "moment",
    ["before-the-first-event", "busy", "charged", "between-the-children", "after-the-children"],
)
async def test_an_order_survives_the_death_of_its_worker(
    lab: Lab, tmp_path: Path, moment: str
) -> None:
    """ "busy" is when the first child is recorded and not claimed: another task has the slot."""
    order = Order(tmp_path, moment)
    if moment == "busy":
        await enqueue(lab.pool, "busy", order.input, priority=9)
    async with order_process(lab, concurrency=1) as victim:
        if moment == "busy":
            await order.stopped(victim.pid)
        id = await enqueue(lab.pool, "process_order", order.input, is_durable=True)
        await order.stopped(victim.pid)
        if moment == "busy":
            await wait_for(lambda: lab.children(id), "the first child is recorded")
        victim.kill()
        await victim.wait()
    order.gate.touch()
    async with order_process(lab, concurrency=1):
        row = await finished(lab.pool, id)
    assert (row["attempt"], row.get("lost_count", 1)) == (2, 1)
    await assert_done_once(lab, id, order)


@posix_only
async def test_a_zombie_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    """A worker stalls for longer than INACTIVE_AFTER, and comes back when all has been done."""
    order = Order(tmp_path, "charged")
    id = await enqueue(lab.pool, "process_order", order.input, is_durable=True)
    async with order_process(lab) as zombie:
        await order.stopped(zombie.pid)
        zombie.send_signal(signal.SIGSTOP)
        order.gate.touch()
        async with order_process(lab):
            await finished(lab.pool, id)
            rows = await lab.tasks(), await lab.children(id)
            zombie.send_signal(signal.SIGCONT)
            await wait_for(lambda: order.noted("order-ends", zombie.pid), "the zombie has ended it")
        if lab.lesson.number >= 9:
            zombie.send_signal(signal.SIGTERM)
            assert await ended(zombie) == 0
    assert (await lab.tasks(), await lab.children(id)) == rows
    await assert_done_once(lab, id, order)


@pytest.mark.since(9)
@pytest.mark.only(9, LAST)
@posix_only
async def test_a_shutdown_does_not_wait_for_durable_tasks(lab: Lab, tmp_path: Path) -> None:
    """They go back to the queue at once, with no retry spent, and the next worker goes on."""
    order = Order(tmp_path, "between-the-children")
    id = await enqueue(lab.pool, "process_order", order.input, is_durable=True)
    async with order_process(lab, SHUTDOWN_GRACE=600) as process:
        await order.stopped(process.pid)
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0
    row = await wait_for_status(lab.pool, id, "QUEUED")
    assert (row["attempt"], row["retry_count"], row.get("lost_count", 0)) == (1, 0, 0)
    assert await execute(lab.pool, "SELECT * FROM workers") == []
    order.gate.touch()
    async with order_process(lab):
        await finished(lab.pool, id)
    await assert_done_once(lab, id, order)
    assert len(order.noted("charges-")) == 1


async def test_a_child_may_run_on_another_worker_than_its_parent(lab: Lab) -> None:
    """Then only the database can tell the parent that it has finished."""

    async def parent(context: Any, input: Any) -> Any:
        return await asyncio.gather(*[context.run_task("step", n) for n in range(10)])

    id = await lab.enqueue(parent)
    only_durable = lab.worker(parent, concurrency=0)
    only_plain = lab.worker(parent, durable_concurrency=0)
    async with working(only_durable, only_plain):
        row = await finished(lab.pool, id)
    assert row["output"] == list(range(10))
    owners = {task["task_name"]: task["worker_id"] for task in await lab.tasks()}
    assert owners == {"parent": only_durable.id, "step": only_plain.id}


# Lost connections


class BreakingPool:
    """A pool that loses the connection at the end of every other transaction, seen from its start.

    The server ends the connection, either just before COMMIT or just after it, so that the client
    cannot tell which of the two has happened.
    """

    def __init__(self, pool: Pool, before_commit: bool) -> None:
        self.pool = pool
        self.before_commit = before_commit
        self.transactions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    @asynccontextmanager
    async def connection(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        async with self.pool.connection(*arguments, **keywords) as conn:
            transaction = conn.transaction

            @asynccontextmanager
            async def breaking() -> AsyncIterator[Any]:
                self.transactions += 1
                breaks = self.transactions % 2 == 1
                async with transaction() as tx:
                    yield tx
                    if breaks and self.before_commit:
                        await self.terminate(conn)
                if breaks:
                    await self.terminate(conn)
                    await conn.execute("SELECT 'the answer to COMMIT got lost'")

            conn.transaction = breaking  # type: ignore[method-assign, assignment]
            try:
                yield conn
            finally:
                conn.transaction = transaction  # type: ignore[method-assign]

    async def terminate(self, conn: Any) -> None:
        await execute(self.pool, "SELECT pg_terminate_backend(%s, 5000)", conn.info.backend_pid)


@pytest.mark.until(15)  # test_batches has it for 16
@pytest.mark.parametrize("before_commit", [True, False], ids=["before COMMIT", "after COMMIT"])
async def test_a_connection_lost_at_the_commit_costs_nothing(lab: Lab, before_commit: bool) -> None:
    async def parent(context: Any, input: Any) -> Any:
        return [await context.run_task("step", n) for n in (1, 2)]

    lab.pool, pool = BreakingPool(lab.pool, before_commit), lab.pool  # type: ignore[assignment]
    worker = lab.worker(parent)
    lab.pool, breaking = pool, worker.pool
    id = await lab.enqueue(parent)
    async with working(worker):
        row = await finished(pool, id)
    assert breaking.transactions >= 4, "no transaction was broken"
    assert (row["output"], row["attempt"], row["retry_count"]) == ([1, 2], 1, 0)
    assert len(await lab.children(id)) == 2
    assert len(await lab.tasks()) == 3
    assert lab.calls == {"1": 1, "2": 1}


@pytest.mark.since(8)
@pytest.mark.only(8, LAST)
@pytest.mark.flaw(7, reason="lost connections end the worker, and all it was doing is done again")
async def test_orders_survive_the_loss_of_all_connections_again_and_again(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        first = await context.run_task("step", [input, 1])
        await asyncio.sleep(0.05)
        return [first, await context.run_task("step", [input, 2])]

    ids = [await lab.enqueue(parent, n) for n in range(30)]
    async with (
        await open_connection(lab.pool) as killer,
        working(lab.worker(parent)) as start,
    ):
        for _ in range(10):
            await killer.execute(
                """
                SELECT pg_terminate_backend(pid)
                FROM pg_stat_activity
                WHERE datname = current_database() AND pid != pg_backend_pid()
                """
            )
            await asyncio.sleep(0.1)
        assert not start.done(), "the worker has ended"
        for n, id in enumerate(ids):
            row = await until_read(lab.pool, id)
            assert (row["output"], row["retry_count"]) == ([[n, 1], [n, 2]], 0)
    assert len(await lab.tasks()) == 3 * len(ids)


async def until_read(pool: Pool, id: int) -> dict[str, Any]:
    """finished(), with connections that may be dead."""
    while True:
        try:
            return await finished(pool, id)
        except psycopg.OperationalError:
            await asyncio.sleep(0.1)


@pytest.mark.only(LAST)
async def test_a_cancellation_is_not_lost_while_a_connection_is_handed_over(pool: Pool) -> None:
    """Or a busy worker would go on when it is told to end."""
    assert isinstance(pool, CancellablePool)

    async def client() -> None:
        async with pool.connection():
            pass
        await asyncio.sleep(DEADLINE)

    # Taken behind the back of our own line, so that the client waits in that of psycopg's pool.
    psycopgs: Any = super(CancellablePool, pool)
    taken = [await psycopgs.getconn() for _ in range(pool.max_size)]
    waiting = asyncio.create_task(client())
    await wait_for(lambda: pool.get_stats().get("requests_waiting"), "the client waits")
    await psycopgs.putconn(taken.pop())
    waiting.cancel()
    for conn in taken:
        await psycopgs.putconn(conn)
    await asyncio.wait({waiting}, timeout=DEADLINE / 2)
    was_cancelled = waiting.cancelled()
    waiting.cancel()
    assert was_cancelled
    # And the place in our line is free again.
    for conn in [await pool.getconn(timeout=DEADLINE) for _ in range(pool.max_size)]:
        await pool.putconn(conn)


# What steps and waiting cost


def counted(queries: Any, calls: list[dict[str, Any]]) -> SimpleNamespace:
    """The same queries, which note what they are called with."""

    def wrap(name: str, query: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(keywords)
            return query(*arguments, **keywords)

        return call

    names = queries.available_queries
    return SimpleNamespace(**{name: wrap(name, getattr(queries, name)) for name in names})


@pytest.mark.since(8)
@pytest.mark.only(8, LAST)
@pytest.mark.flaw(7, reason="steps that are started at once hold a connection each while they wait")
async def test_however_many_steps_a_task_starts_at_once_they_hold_one_connection(lab: Lab) -> None:
    """They all lock its row. If each of them waited for it with a connection, none were left."""
    may_go = asyncio.Event()

    async def parent(context: Any, input: Any) -> None:
        lab.calls["parent"] += 1
        await may_go.wait()
        await asyncio.gather(*[context.run_task("step", n) for n in range(200)])

    async def waits() -> bool:
        sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type"
        return (await conn.execute(f"{sql} = 'Lock'".encode())).rowcount > 0

    async def has_completed() -> bool:
        return await statuses(lab.pool) == {"COMPLETED": 202}

    id = await lab.enqueue(parent)
    if lab.lesson.number < 8:
        lab.pool.timeout = 1.0  # for it is going to be one
    async with working(lab.worker(parent)):
        await wait_for(lambda: lab.calls["parent"], "it has started")
        async with await open_connection(lab.pool) as conn, conn.transaction():
            await conn.execute("SELECT FROM tasks WHERE id = %s FOR UPDATE", [id])
            may_go.set()
            await wait_for(waits, "a step waits for the lock")
            assert (await finished(lab.pool, await enqueue(lab.pool, "step")))["attempt"] == 1
        await wait_for(has_completed, "it has completed", seconds=120)


@pytest.mark.until(15)  # test_batches has it for 16
@pytest.mark.only(7, 8, 15)
async def test_steps_that_wait_for_their_turn_are_not_started_after_their_order_has_failed(
    lab: Lab,
) -> None:
    may_go, may_fail = asyncio.Event(), asyncio.Event()

    async def fails() -> None:
        await may_fail.wait()
        raise OSError("no luck")

    async def parent(context: Any, input: Any) -> None:
        lab.calls["parent"] += 1
        await may_go.wait()
        try:
            await asyncio.gather(*[context.run_task("step", n) for n in range(100)], fails())
        finally:
            lab.calls["failed"] += 1

    async def waits() -> bool:
        sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type"
        return (await conn.execute(f"{sql} = 'Lock'".encode())).rowcount > 0

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent, concurrency=0)):
        await wait_for(lambda: lab.calls["parent"], "it has started")
        async with await open_connection(lab.pool) as conn, conn.transaction():
            await conn.execute("SELECT FROM tasks WHERE id = %s FOR UPDATE", [id])
            may_go.set()
            await wait_for(waits, "a step waits for the lock")
            may_fail.set()
            await wait_for(lambda: lab.calls["failed"], "it has failed")
        assert (await finished(lab.pool, id))["status"] == "FAILED"
    # Those that had a connection were on their way already.
    assert len(await lab.children(id)) <= (lab.pool.max_size if lab.lesson.number < 8 else 1)


async def test_a_later_attempt_waits_for_the_child_that_still_runs(lab: Lab) -> None:
    child_runs, child_may_end = asyncio.Event(), asyncio.Event()

    async def slow(input: Any) -> str:
        lab.calls["slow"] += 1
        child_runs.set()
        await child_may_end.wait()
        return "done"

    async def parent(context: Any, input: Any) -> Any:
        call = asyncio.ensure_future(context.run_task("slow", None))
        await child_runs.wait()
        if context.attempt == 1:
            raise OSError("no luck")
        asyncio.get_running_loop().call_later(0.3, child_may_end.set)
        return await call

    row = await lab.run(parent, slow, max_retries=1)
    assert (row["output"], row["attempt"], lab.calls["slow"]) == ("done", 2, 1)


async def assert_cheap(lab: Lab, calls: list[Any], interval: float) -> None:
    """For a while there are few queries in each interval, and few connections."""
    own = 1 if lab.lesson.number < 11 else 2  # for the heartbeat, and for listening
    clock = asyncio.get_running_loop().time
    calls.clear()
    start = clock()
    await asyncio.sleep(12 * interval)
    await wait_for(lambda: calls, "it asks at all")
    assert len(calls) < 5 * ((clock() - start) / interval + 2), "the waiting tasks ask one by one"
    (row,) = await execute(
        lab.pool,
        """
        SELECT count(*) AS n
        FROM pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend'
        """,
    )
    assert row["n"] <= lab.pool.max_size + own + 1, "more than the pool, its own and this test"


@pytest.mark.only(11, LAST)
async def test_a_thousand_waiting_tasks_cost_one_query_and_no_connection(lab: Lab) -> None:
    quiet_but_for_polls = {"POLL_INTERVAL": 0.1, "HEARTBEAT_INTERVAL": 2, "INACTIVE_AFTER": 60}
    set_globals(lab.lesson, quiet_but_for_polls | {"SUSPEND_AFTER": 3600})
    may_end = asyncio.Event()
    calls: list[dict[str, Any]] = []

    async def slow(input: Any) -> None:
        await may_end.wait()

    async def parent(context: Any, input: Any) -> Any:
        return await context.run_task("slow", None)

    async def count(what: str) -> bool:
        # Not through the pool, where a thousand tasks may be waiting for a connection.
        return (await conn.execute(f"SELECT FROM {what}".encode())).rowcount == 1000

    await execute(
        lab.pool,
        """
        INSERT INTO tasks (queue, task_name, input, is_durable)
        SELECT %s, 'parent', '{}', true
        FROM generate_series(1, 1000)
        """,
        QUEUE,
    )
    lab.queries = counted(lab.queries, calls)
    worker = lab.worker(parent, slow)
    async with await open_connection(lab.pool) as conn, working(worker):
        await wait_for(lambda: count("durable_events"), "all have started their child", 60)
        await assert_cheap(lab, calls, interval=0.1)
        may_end.set()
        completed = "tasks WHERE is_durable AND status = 'COMPLETED'"
        await wait_for(lambda: count(completed), "all have completed", 60)


# One at the start; longer than the test, and yet far enough from the end of time for Postgres.
NO_BEATS = {"HEARTBEAT_INTERVAL": 3600.0, "INACTIVE_AFTER": 36000.0}


@pytest.mark.parametrize("tasks", [0, 3])
async def test_a_worker_without_tasks_or_without_slots_only_polls(lab: Lab, tasks: int) -> None:
    """Between two heartbeats it asks for tasks at each tick, and for nothing else."""
    set_globals(lab.lesson, NO_BEATS | {"POLL_INTERVAL": 0.05})
    may_end = asyncio.Event()
    calls: list[dict[str, Any]] = []

    async def slow(input: Any) -> None:
        lab.calls["slow"] += 1
        await may_end.wait()

    def has_begun() -> bool:
        beats = any("display_name" in call for call in calls)
        listens = lab.lesson.number < 11 or {"queue": QUEUE} in calls  # get_topic, after LISTEN
        return beats and listens and len(calls) > 20 and all("queue" in c for c in calls[-10:])

    for _ in range(tasks):
        await enqueue(lab.pool, "slow")
    lab.queries = counted(lab.queries, calls)
    async with working(lab.worker(slow, concurrency=1)):
        await wait_for(lambda: lab.calls["slow"] == min(tasks, 1), "it has the task")
        # What its loops do once, at their start, may come late on a busy machine.
        await wait_for(has_begun, "it has begun all of its loops, and only polls")
        await assert_cheap(lab, calls, interval=0.05)
        assert all("queue" in call for call in calls)
        may_end.set()


@pytest.mark.parametrize("concurrency", [100, 2])
async def test_a_worker_polls_at_once_only_while_tasks_wait(lab: Lab, concurrency: int) -> None:
    set_globals(lab.lesson, NO_BEATS | {"POLL_INTERVAL": 3600.0})
    calls: list[dict[str, Any]] = []

    async def pausing(input: Any) -> None:
        await asyncio.sleep(0.01 * input)

    async def all_completed() -> bool:
        return await statuses(lab.pool) == {"COMPLETED": 7}

    def polls() -> int:
        return sum("limit" in call for call in calls)

    async def has_stopped_asking() -> bool:
        before = polls()
        await asyncio.sleep(0.3)
        return polls() == before

    for n in range(7):
        await enqueue(lab.pool, "pausing", n)
    lab.queries = counted(lab.queries, calls)
    worker = lab.worker(pausing, concurrency=concurrency)
    if lab.lesson.number >= 8:  # it does not claim before its first beat, and asks only once here
        beat = "INSERT INTO workers (id, display_name) VALUES (%s, 'us')"
        await execute(lab.pool, beat, worker.id)
    async with working(worker):
        await wait_for(all_completed, "all have completed")
        await wait_for(has_stopped_asking, "it asks no more")
        # One of each kind of tasks; and from lesson 11 on one more when it begins to listen.
        once = 2 if lab.lesson.number < 11 else 4
        limit = once if concurrency == 100 else once + 7
        assert polls() <= limit, "slots that came free ask for more"


async def test_a_worker_keeps_nothing_of_tasks_that_have_ended(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        calls = [context.run_task("step", n) for n in range(3)]
        await asyncio.gather(*calls, return_exceptions=True)
        if input % 3 == 0:
            await asyncio.gather(
                context.run_task("broken", input),
                context.run_task("parent", 1, is_durable=True),
            )
        if input % 3 == 1 and context.attempt == 1:
            raise OSError("again")
        return None

    def sizes(worker: Any) -> list[int]:
        parts = [worker, worker.children, *worker.slots.values()]
        if lab.lesson.number >= 11:
            parts.append(worker.notifications)
        values = [value for part in parts for value in vars(part).values()]
        keepers = [value for value in values if not isinstance(value, WeakSet)]
        return [len(value) for value in keepers if hasattr(value, "__len__")]

    async def all_ended() -> bool:
        return set(await statuses(lab.pool)) == {"COMPLETED", "FAILED"}

    def objects_left() -> int:
        gc.collect()
        kinds = (lab.lesson.models.Task, lab.lesson.durable_context.DurableContext)
        return sum(isinstance(thing, kinds) for thing in gc.get_objects())

    # A timer that is cancelled is kept by asyncio until its time comes, and with it the task.
    set_globals(lab.lesson, {"SUSPEND_AFTER": 1.0})
    worker = lab.worker(parent)
    at_first = sizes(worker)
    for n in range(60):
        await lab.enqueue(parent, n, max_retries=1)
    async with working(worker):
        await wait_for(all_ended, "all tasks have ended")
        await wait_for(lambda: sizes(worker) == at_first, "it has forgotten them")
        # The variables of a loop that waits may still hold a few.
        await wait_for(lambda: objects_left() <= 5, "the last of them are gone")
