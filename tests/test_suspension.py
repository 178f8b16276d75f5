"""Suspension: a durable task that does nothing but wait leaves its worker, and comes back.

Its wake-up must not get lost, whoever is first: the one who suspends it, or the one who finishes
what it waits for. The first part plays that on two connections, in every order, and does the same
with mutants of the trigger and of the suspension, which must be seen to lose it.
"""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from durable_helpers import Lab
from helpers import (
    QUEUE,
    ended,
    enqueue,
    execute,
    finished,
    get_task,
    kill,
    set_globals,
    statuses,
    wait_for,
    wait_for_status,
    worker_process,
    working,
    write_outcome,
)
from lesson_loader import LAST
from shared import Connection, Pool, open_connection
from watched import Point, Watch, WatchedQueries, last_query, open_watched

pytestmark = [pytest.mark.since(13), pytest.mark.only(13, LAST)]
SCRIPT = Path(__file__).parent / "waiting_process.py"
HOUR = timedelta(hours=1)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")


@pytest.fixture
def lab(lesson: Any, pool: Pool, queries: Any) -> Lab:
    lab = Lab(lesson, pool, queries)
    # Nobody here is taken for dead because the machine was busy.
    set_globals(lesson, {"SUSPEND_AFTER": 0.1, "INACTIVE_AFTER": 60.0})
    return lab


# Two connections


class Family:
    """A durable task and its children, each run by a worker of its own that is not there."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.worker_id = uuid4()
        self.children: list[int] = []

    async def make(self, children: int = 1, **columns: Any) -> "Family":
        running = {"status": "RUNNING", "attempt": 1, "worker_id": self.worker_id}
        column, value = self.lab.of_branch
        self.parent = await enqueue(
            self.lab.pool, "parent", **{"is_durable": True, **running, **columns}
        )
        for n in range(children):
            self.children.append(await enqueue(self.lab.pool, "child", **running))
            await execute(
                self.lab.pool,
                f"""
                INSERT INTO durable_events (task_id, event_id, kind, key, child_task_id{column})
                VALUES (%s, %s, 'TASK_STARTED', '', %s{value})
                """,
                *[self.parent, n + 1, self.children[n]],
            )
        return self

    async def status(self) -> str:
        return str((await get_task(self.lab.pool, self.parent))["status"])

    async def finish(self, conn: Connection, n: int = 0) -> None:
        owner = (self.children[n], self.worker_id, 1)
        rows = await write_outcome(self.lab.queries, conn, *owner, "COMPLETED", n)
        assert rows == 1

    async def lock(self, conn: Connection) -> None:
        await self.lab.queries.lock_task_to_suspend(
            conn, id=self.parent, worker_id=self.worker_id, attempt=1
        )

    async def suspend(self, conn: Connection) -> None:
        await self.lab.queries.suspend_task(conn, id=self.parent, ids=self.children)


class Side:
    """One connection, whose statements are sent one after the other, and may have to wait."""

    def __init__(self, conn: Connection, observer: Connection) -> None:
        self.conn = conn
        self.observer = observer
        self.last = asyncio.create_task(asyncio.sleep(0))

    async def send(self, step: Callable[[Connection], Awaitable[Any]]) -> bool:
        """Returns when it has been executed, or has to wait for a lock: whether it has to."""
        before = self.last

        async def run() -> None:
            await before
            await step(self.conn)

        self.last = asyncio.create_task(run())
        await wait_for(self._is_done_or_waits, "a statement has ended, or waits for a lock")
        return not self.last.done()

    async def _is_done_or_waits(self) -> bool:
        if self.last.done():
            return True
        sql = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
        cursor = await self.observer.execute(sql, [self.conn.info.backend_pid])
        return await cursor.fetchone() is not None


@asynccontextmanager
async def two_sides(pool: Pool) -> AsyncIterator[tuple[Side, Side]]:
    async with (
        await open_connection(pool) as observer,
        await open_connection(pool) as one,
        await open_connection(pool) as other,
    ):
        sides = Side(one, observer), Side(other, observer)
        yield sides
        for side in sides:
            side.last.cancel()
            await asyncio.wait({side.last})


async def begin(conn: Connection) -> None:
    await conn.execute("BEGIN")


async def commit(conn: Connection) -> None:
    await conn.execute("COMMIT")


def orders(suspender: int, finisher: int) -> Iterator[str]:
    """All orders of so many statements of a suspender (S) and a finisher (F)."""
    for positions in combinations(range(suspender + finisher), suspender):
        yield "".join("S" if n in positions else "F" for n in range(suspender + finisher))


async def played(lab: Lab, suspension: list[str]) -> dict[str, str]:
    """The parent's status after each order of a suspension and the end of its only child.

    A statement that has to wait for the other side lets that go on.
    """
    outcomes = {}
    for order in orders(len(suspension) + 1, 2):
        family = await Family(lab).make()

        async def mutant(conn: Connection, family: Family = family) -> None:
            await conn.execute(
                """
                WITH owned AS (SELECT id FROM tasks WHERE id = %s AND status = 'RUNNING' FOR UPDATE)
                UPDATE tasks
                SET status = 'SUSPENDED'
                FROM owned
                WHERE tasks.id = owned.id
                  AND NOT EXISTS (
                      SELECT FROM tasks WHERE id = %s AND status IN ('COMPLETED', 'FAILED')
                  )
                """,
                [family.parent, family.children[0]],
            )

        async def weak_lock(conn: Connection, family: Family = family) -> None:
            sql = "SELECT FROM tasks WHERE id = %s AND status = 'RUNNING' FOR NO KEY UPDATE"
            await conn.execute(sql, [family.parent])

        steps = {
            "lock": family.lock,
            "suspend": family.suspend,
            "lock and look": mutant,
            "lock for no key update": weak_lock,
        }
        async with two_sides(lab.pool) as (suspender, finisher):
            of = {
                "S": (suspender, iter([*[steps[name] for name in suspension], commit])),
                "F": (finisher, iter([family.finish, commit])),
            }
            for side in (suspender, finisher):
                await side.send(begin)
            for letter in order:
                side, left = of[letter]
                await side.send(next(left))
            await asyncio.gather(suspender.last, finisher.last)
        outcomes[order] = await family.status()
    return outcomes


async def test_whoever_is_first_the_wake_up_is_not_lost(lab: Lab) -> None:
    """If the finisher was first, there is no suspension, else there is one, and then a wake-up."""
    outcomes = await played(lab, ["lock", "suspend"])
    assert len(outcomes) == 10
    assert outcomes == {order: {"S": "QUEUED", "F": "RUNNING"}[order[0]] for order in outcomes}


@pytest.mark.parametrize(
    "suspension",
    [["lock and look"], ["lock for no key update", "suspend"]],
    ids=["looks in the statement that locks", "locks too little"],
)
async def test_a_suspender_of_another_kind_loses_the_wake_up(
    lab: Lab, suspension: list[str]
) -> None:
    outcomes = await played(lab, suspension)
    assert "SUSPENDED" in outcomes.values()


PARENT = "FROM durable_events JOIN tasks ON id = task_id WHERE child_task_id = NEW.id"
WAKE = "UPDATE tasks SET status = 'QUEUED' WHERE status = 'SUSPENDED' AND id"
MUTANTS = {
    "one statement": f"{WAKE} = (SELECT id {PARENT});",
    "one statement that locks": f"{WAKE} = (SELECT id {PARENT} FOR KEY SHARE OF tasks);",
    "it looks first": f"""
        IF EXISTS (SELECT {PARENT} AND tasks.status = 'SUSPENDED') THEN
            {WAKE} = (SELECT id {PARENT});
        END IF;
    """,
    "locks too much": f"PERFORM id {PARENT} FOR UPDATE OF tasks; {WAKE} = (SELECT id {PARENT});",
}


async def mutate(lab: Lab, mutant: str) -> None:
    """Give the trigger another function."""
    body = f"BEGIN {MUTANTS[mutant]} RETURN NULL; END"
    head = "CREATE OR REPLACE FUNCTION wake_parent() RETURNS TRIGGER"
    await execute(lab.pool, f"{head} AS $$ {body} $$ LANGUAGE plpgsql")


@pytest.mark.parametrize("mutant", ["one statement", "one statement that locks", "it looks first"])
async def test_a_trigger_of_another_kind_loses_the_wake_up(lab: Lab, mutant: str) -> None:
    await mutate(lab, mutant)
    outcomes = await played(lab, ["lock", "suspend"])
    assert "SUSPENDED" in outcomes.values()
    assert outcomes["SSSFF"] == "QUEUED", "it does not even do what it can"


@pytest.mark.parametrize("mutant", [None, "locks too much"])
async def test_finishers_of_a_parent_that_is_not_suspended_do_not_wait_for_each_other(
    lab: Lab, mutant: str | None
) -> None:
    """Nor does the claim pass over a QUEUED parent until they have committed."""
    if mutant:
        await mutate(lab, mutant)
    running = await Family(lab).make(2)
    async with two_sides(lab.pool) as (one, other):
        await one.send(begin)
        assert not await one.send(running.finish)
        assert await other.send(lambda conn: running.finish(conn, 1)) == bool(mutant)
        await one.send(commit)
        await other.last
    family = await Family(lab).make(2, status="QUEUED", worker_id=None)
    beat = "INSERT INTO workers (id, display_name) VALUES (%s, 'w')"
    await execute(lab.pool, beat, family.worker_id)
    async with two_sides(lab.pool) as (one, other):
        await one.send(begin)
        assert not await one.send(family.finish)
        has_to_wait = await other.send(lambda conn: family.finish(conn, 1))
        async with lab.pool.connection() as conn:
            claimed = [
                row["id"]
                async for row in lab.queries.poll_tasks(
                    conn,
                    queue=QUEUE,
                    is_durable=True,
                    task_names=["parent"],
                    limit=10,
                    worker_id=family.worker_id,
                    inactive_after=60.0,
                )
            ]
        await one.send(commit)
        await other.last
    assert (has_to_wait, claimed) == ((False, [family.parent]) if not mutant else (True, []))


async def test_finishers_of_a_suspended_parent_wait_once(lab: Lab) -> None:
    """For the one that queues it, until that has committed."""
    family = await Family(lab).make(3)
    await execute(lab.pool, "UPDATE tasks SET status = 'SUSPENDED' WHERE id = %s", family.parent)
    async with two_sides(lab.pool) as (one, other):
        await one.send(begin)
        assert not await one.send(family.finish)
        assert await family.status() == "SUSPENDED"
        assert await other.send(lambda conn: family.finish(conn, 1))
        await one.send(commit)
        await other.last
        assert await family.status() == "QUEUED"
        await one.send(begin)
        assert not await one.send(lambda conn: family.finish(conn, 2))
        await one.send(commit)


async def test_sleepers_whose_parent_is_being_suspended_are_woken_the_next_time(lab: Lab) -> None:
    """Housekeeping waits for nobody."""
    family = await Family(lab).make(1)
    other = await Family(lab).make(1)
    await execute(
        lab.pool,
        "UPDATE tasks SET status = 'SLEEPING', wake_at = now() WHERE id = ANY (%s)",
        family.children + other.children,
    )
    async with (
        await open_connection(lab.pool) as suspender,
        await open_connection(lab.pool) as housekeeper,
    ):

        async def woken() -> list[int]:
            async with asyncio.timeout(30):
                rows = lab.queries.wake_tasks(housekeeper, limit=10)
                return [row["id"] async for row in rows]

        async with suspender.transaction():
            await family.lock(suspender)
            assert await woken() == other.children
            await family.suspend(suspender)
        assert await woken() == family.children
    assert (await family.status(), await other.status()) == ("QUEUED", "RUNNING")


@pytest.mark.only(13, 15)
async def test_a_replay_is_refused_while_a_child_is_ending_and_does_not_wait_for_it(
    lab: Lab,
) -> None:
    """The child waits for its parent, which the replay holds: they would wait for each other."""
    family = await Family(lab).make(1)
    await execute(lab.pool, "UPDATE tasks SET status = 'FAILED' WHERE id = %s", family.parent)
    await execute(lab.pool, "UPDATE tasks SET status = 'QUEUED' WHERE id = %s", family.children[0])
    async with await open_connection(lab.pool) as conn, conn.transaction():
        await conn.execute("UPDATE tasks SET priority = 2 WHERE id = %s", family.children)
        async with asyncio.timeout(30):
            with pytest.raises(ValueError, match="is RUNNING"):
                await lab.lesson.rerun.replay_task(lab.pool, lab.queries, family.parent)
    await lab.lesson.rerun.replay_task(lab.pool, lab.queries, family.parent)
    assert (await get_task(lab.pool, family.children[0]))["status"] == "FAILED"


@pytest.mark.only(13, 15)
@pytest.mark.parametrize("again", ["retry_task", "replay_task"])
async def test_a_child_that_is_ending_is_refused_without_waiting_for_it(
    lab: Lab, again: str
) -> None:
    """It will wait for its suspended parent, which is held meanwhile."""
    family = await Family(lab).make(1, status="SUSPENDED", worker_id=None)
    (child,) = family.children
    await execute(lab.pool, "UPDATE tasks SET is_durable = true WHERE id = %s", child)
    async with await open_connection(lab.pool) as conn, conn.transaction():
        await conn.execute("SELECT id FROM tasks WHERE id = %s FOR UPDATE", [child])
        async with asyncio.timeout(30):
            with pytest.raises(ValueError, match=f"task {child} is RUNNING"):
                await getattr(lab.lesson.rerun, again)(lab.pool, lab.queries, child)
        await family.finish(conn)
    assert await family.status() == "QUEUED"


async def test_a_replay_abandons_suspended_descendants_and_theirs(lab: Lab) -> None:
    async def fails(context: Any, input: Any) -> None:
        context.suspend = forever  # it is to be there when its child has gone
        waits = asyncio.ensure_future(context.run_task("waits", 1, is_durable=True))
        await wait_for(is_suspended, "the child is suspended")
        waits.cancel()
        raise OSError("no luck")

    async def waits(context: Any, input: Any) -> None:
        await context.sleep(HOUR)

    async def is_suspended() -> bool:
        return "SUSPENDED" in await statuses(lab.pool)

    id = await lab.enqueue(fails)
    assert (await lab.finish(id, waits, fails))["status"] == "FAILED"
    await lab.lesson.rerun.replay_task(lab.pool, lab.queries, id)
    parent, child, sleeper = await lab.tasks()
    assert [row["status"] for row in (parent, child, sleeper)] == ["QUEUED", "FAILED", "FAILED"]
    assert child["output"] == sleeper["output"]


async def forever(idle: float) -> None:
    await asyncio.sleep(3600)


# Suspended and woken


async def waits_for(context: Any, input: Any) -> Any:
    """A durable task that waits for the task called `gated`."""
    return await context.run_task("gated", input)


class Gate:
    """A plain task that ends when it is told to, and counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.opened = asyncio.Event()

    async def gated(self, input: Any) -> Any:
        self.calls += 1
        await self.opened.wait()
        return input

    @property
    def function(self) -> Callable[[Any], Awaitable[Any]]:
        return self.gated


async def test_what_waits_leaves_and_comes_back_with_the_next_attempt(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "worker")
    gate = Gate()
    id = await lab.enqueue(waits_for, 42)
    worker = lab.worker(waits_for, gate.function)

    def told() -> list[str]:
        lines = [message.split(f", task {id}, ") for message in caplog.messages]
        return [words[1] for words in lines if len(words) == 2]

    async with working(worker):
        row = await wait_for_status(lab.pool, id, "SUSPENDED")
        assert (row["worker_id"], row["output"], row["finished_at"]) == (None, None, None)
        await wait_for(lambda: not worker.slots[True].running, "its slot is free")
        assert worker.slots[True].free == worker.slots[True].limit
        await asyncio.sleep(0.3)
        assert (await get_task(lab.pool, id))["status"] == "SUSPENDED", "nothing wakes it"
        gate.opened.set()
        row = await finished(lab.pool, id)
        await wait_for(lambda: told()[-1].endswith("COMPLETED"), "it is logged, after the commit")
    assert (row["status"], row["output"], row["attempt"]) == ("COMPLETED", 42, 2)
    assert (row["retry_count"], row["lost_count"], gate.calls) == (0, 0, 1)
    assert told() == [
        "attempt 1: RUNNING waits_for",
        "attempt 1: SUSPENDED",
        "attempt 2: RUNNING waits_for",
        "attempt 2: COMPLETED",
    ]


async def test_suspended_tasks_keep_no_slot_and_no_memory(lab: Lab) -> None:
    async def sleeps(context: Any, input: Any) -> None:
        await context.sleep(HOUR)

    def objects_left() -> int:
        gc.collect()
        kinds = (lab.lesson.models.Task, lab.lesson.durable_context.DurableContext)
        return sum(isinstance(thing, kinds) for thing in gc.get_objects())

    async def all_are() -> bool:
        return (await statuses(lab.pool)).get("SUSPENDED") == 100

    worker = lab.worker(sleeps, durable_concurrency=5)
    for n in range(100):
        await lab.enqueue(sleeps, n)
    async with working(worker):
        await wait_for(all_are, "all are suspended")
        await wait_for(lambda: not worker.slots[True].running, "no slot is taken")
        assert worker.slots[True].free == 5
        # The variables of a loop that waits may still hold a few.
        await wait_for(lambda: objects_left() <= 5, "nothing is left of them")
        assert not worker.children._waiting


# What a worker says and asks however many tasks it has.
OF_LOOPS = {
    "poll_tasks",
    "heartbeat",
    "requeue_own_tasks",
    "get_finished_tasks",
    "notify",
    "listen",
}
OF_LOOPS |= {"wake_tasks", "requeue_lost_tasks", "delete_inactive_workers", "expire_tasks"}
OF_LOOPS |= {"get_topic", "delete_worker"}


async def test_a_suspension_and_a_wake_up_are_few_statements(lab: Lab) -> None:
    """Two to suspend it; to wake it none but those that tell and claim, however many they are."""
    calls: list[str] = []
    gate = Gate()
    queries = lab.queries

    class Noting:
        def __getattr__(self, name: str) -> Any:
            query = getattr(queries, name)

            def call(*arguments: Any, **keywords: Any) -> Any:
                calls.append(name)
                return query(*arguments, **keywords)

            return call

    lab.queries = Noting()
    set_globals(lab.lesson, {"SUSPEND_AFTER": 0.4})
    id = await lab.enqueue(waits_for, 42)
    async with working(lab.worker(waits_for, gate.function)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
        before = [name for name in calls if name not in OF_LOOPS]
        calls.clear()
        gate.opened.set()
        await finished(lab.pool, id)
    after = [name for name in calls if name not in OF_LOOPS]
    step = ["lock_task", "get_event", "create_child", "append_event", "get_task"]
    replay, end = ["lock_task", "get_event", "get_task", "get_events"], "complete_task"
    if lab.lesson.number >= 16:
        step, replay, end = ["start_steps"], ["get_log"], "write_outcomes"
    assert before == [*step, "lock_task_to_suspend", "suspend_task"]
    # The child's end, the replay, and the order's own end.
    assert after == [end, *replay, end]


@pytest.mark.until(15)  # from 16 on to take up an event takes no time
async def test_the_time_to_wait_begins_anew_with_each_call_that_gets_on(lab: Lab) -> None:
    """A branch that finds what it has done before is not suspended because another one sleeps.

    It would stay away for as long as the other one, with something to go on with.
    """

    may_fail = asyncio.Event()

    async def steps(context: Any) -> None:
        for n in range(30):
            await context.run_task("step", n)
        if context.attempt == 1:
            await may_fail.wait()
            raise OSError("again")
        await context.run_task("step", "last")

    async def parent(context: Any, input: Any) -> None:
        await asyncio.gather(context.sleep(HOUR), steps(context))

    # To take up an event takes 10 ms more, all of them so long that it might be suspended.
    lab.queries = Slow(lab.queries, "get_event", 0.01)
    set_globals(lab.lesson, {"SUSPEND_AFTER": 3600.0})
    id = await lab.enqueue(parent, max_retries=1)
    async with working(lab.worker(parent)):
        await wait_for(lambda: lab.calls["29"], "all have been done", 60)
        set_globals(lab.lesson, {"SUSPEND_AFTER": 0.1})
        may_fail.set()
        await wait_for(lambda: lab.calls["last"], "the last has been done")
        await wait_for_status(lab.pool, id, "SUSPENDED")
    assert max(lab.calls.values()) == 1


class Slow:
    """The same queries, one of which takes longer."""

    def __init__(self, queries: Any, name: str, seconds: float) -> None:
        self._queries = queries
        self._name = name
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        query = getattr(self._queries, name)

        async def slow(*arguments: Any, **keywords: Any) -> Any:
            await asyncio.sleep(self._seconds)
            return await query(*arguments, **keywords)

        return slow if name == self._name else query


async def test_a_task_that_waits_for_many_gives_back_one_slot(lab: Lab) -> None:
    may_end = asyncio.Event()

    async def many(context: Any, input: Any) -> None:
        await asyncio.gather(*[context.sleep(HOUR) for _ in range(10)])

    async def busy(context: Any, input: Any) -> None:
        lab.calls["busy"] += 1
        await may_end.wait()
        lab.calls["busy"] -= 1

    set_globals(lab.lesson, {"SUSPEND_AFTER": 3600.0})
    id = await lab.enqueue(many)
    worker = lab.worker(many, busy, durable_concurrency=2)

    async def all_sleep() -> bool:
        return (await statuses(lab.pool)).get("SLEEPING") == 10

    async with working(worker):
        await wait_for(all_sleep, "it waits for all of them")
        assert worker.slots[True].free == 2
        for _ in range(5):
            await lab.enqueue(busy)
        await wait_for(lambda: lab.calls["busy"] == 2, "the slots are taken")
        await asyncio.sleep(0.3)
        assert (lab.calls["busy"], worker.slots[True].free) == (2, 0)
        may_end.set()
        await execute(lab.pool, "UPDATE tasks SET wake_at = now() WHERE status = 'SLEEPING'")
        await finished(lab.pool, id)
        await wait_for(lambda: worker.slots[True].free == 2, "they are free again")


async def test_nested_durable_tasks_need_one_slot(lab: Lab) -> None:
    """Also while none of them is suspended."""

    async def nested(context: Any, input: int) -> int:
        if input == 0:
            return 0
        return 1 + int(await context.run_task("nested", input - 1, is_durable=True))

    set_globals(lab.lesson, {"SUSPEND_AFTER": 3600.0})
    ids = [await lab.enqueue(nested, 4) for _ in range(3)]
    async with working(lab.worker(nested, durable_concurrency=1)):
        assert [(await finished(lab.pool, id))["output"] for id in ids] == [4, 4, 4]
    assert {row["attempt"] for row in await lab.tasks()} == {1}


@pytest.mark.parametrize(
    ("children", "seconds"), [(30, 0.0), (12, 0.1)], ids=["quick ones", "one after the other"]
)
async def test_a_fan_out_is_replayed_no_oftener_than_it_may_be_suspended(
    lab: Lab, children: int, seconds: float
) -> None:
    """Each child that ends wakes its parent, but that stays for SUSPEND_AFTER at least."""

    async def child(input: int) -> int:
        lab.calls[input] += 1
        await asyncio.sleep(seconds * input)
        return input

    async def parent(context: Any, input: Any) -> int:
        return sum(await asyncio.gather(*[context.run_task("child", n) for n in range(children)]))

    set_globals(lab.lesson, {"SUSPEND_AFTER": 1.0})
    row = await lab.run(parent, child)
    assert row["output"] == sum(range(children))
    assert set(lab.calls.values()) == {1}
    assert len(await lab.children(row["id"])) == children
    took = (row["finished_at"] - row["inserted_at"]).total_seconds()
    assert row["attempt"] <= took / 1.0 + 1


async def test_workers_are_told_of_a_parent_that_was_woken(lab: Lab) -> None:
    """Nobody polls here, and the parent's worker is not the one that has ended its child."""
    hours = {"POLL_INTERVAL": 3600.0, "HEARTBEAT_INTERVAL": 3600.0, "INACTIVE_AFTER": 36_000.0}
    set_globals(lab.lesson, hours)
    gate = Gate()
    workers = [
        lab.worker(waits_for, concurrency=0),
        lab.worker(waits_for, concurrency=0),
        lab.worker(gate.function, durable_concurrency=0),
    ]
    for worker in workers:  # none claims before its first beat, and asks only once here
        beat = "INSERT INTO workers (id, display_name) VALUES (%s, 'us')"
        await execute(lab.pool, beat, worker.id)
    id = await lab.enqueue(waits_for, 42)
    async with working(*workers):
        await wait_for_status(lab.pool, id, "SUSPENDED")
        gate.opened.set()
        row = await finished(lab.pool, id)
    assert (row["output"], row["attempt"]) == (42, 2)


# What may happen to a child meanwhile


async def test_a_child_that_is_retried_does_not_wake_its_parent(lab: Lab) -> None:
    may_go = asyncio.Semaphore(0)

    async def parent(context: Any, input: Any) -> Any:
        return await context.run_task("unlucky", 1, max_retries=2)

    async def unlucky(input: Any) -> str:
        lab.calls["unlucky"] += 1
        await may_go.acquire()
        if lab.calls["unlucky"] < 3:
            raise OSError("no luck")
        return "at last"

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent, unlucky)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
        for n in (2, 3):
            may_go.release()
            await wait_for(lambda n=n: lab.calls["unlucky"] == n, "it is tried again")  # type: ignore[misc]
            row = await get_task(lab.pool, id)
            assert (row["status"], row["attempt"]) == ("SUSPENDED", 1)
        may_go.release()
        row = await finished(lab.pool, id)
    assert (row["output"], row["attempt"]) == ("at last", 2)


ENDS = {
    "by hand": (
        "UPDATE tasks SET status = 'FAILED', finished_at = now() WHERE id = %s",
        "no error is recorded",
    ),
    "expired": (
        "UPDATE tasks SET schedule_timeout_at = now() WHERE id = %s",
        "schedule timeout: nobody claimed it",
    ),
    "given up": (
        "UPDATE tasks SET status = 'RUNNING', worker_id = gen_random_uuid() WHERE id = %s",
        "its worker became inactive 1 times",
    ),
}


@pytest.mark.parametrize("end", ENDS)
async def test_whoever_ends_a_child_wakes_its_parent(lab: Lab, end: str) -> None:
    statement, error = ENDS[end]
    set_globals(lab.lesson, {"MAX_LOST_WORKERS": 1, "INACTIVE_AFTER": 1.0})
    id = await lab.enqueue(waits_for)
    async with working(lab.worker(waits_for)):  # nobody knows `gated`
        await wait_for_status(lab.pool, id, "SUSPENDED")
        (child,) = await lab.children(id)
        await execute(lab.pool, statement, child["id"])
        row = await finished(lab.pool, id)
    assert (row["status"], row["attempt"], row["lost_count"]) == ("FAILED", 2, 0)
    assert error in row["output"]["error"]
    assert row["output"]["child_task_id"] == child["id"]


# Timeouts


async def test_neither_timeout_counts_while_a_task_is_suspended(lab: Lab) -> None:
    """The schedule timeout is over with the first claim, `timeout` is that of one attempt."""
    gate = Gate()
    # On a busy machine an attempt may time out before it is suspended, or has ended.
    id = await lab.enqueue(waits_for, 42, timeout=timedelta(seconds=1), max_retries=10)
    async with working(lab.worker(waits_for, gate.function)):
        suspended = await wait_for_status(lab.pool, id, "SUSPENDED")
        passed = "UPDATE tasks SET schedule_timeout_at = now() WHERE id = %s"
        await execute(lab.pool, passed, id)
        await asyncio.sleep(1.2)
        row = await get_task(lab.pool, id)
        for column in ("status", "attempt", "retry_count"):
            assert row[column] == suspended[column]
        gate.opened.set()
        row = await finished(lab.pool, id)
    assert (row["status"], row["output"]) == ("COMPLETED", 42)
    assert row["attempt"] == row["retry_count"] + 2


async def test_a_woken_task_is_claimed_although_its_schedule_timeout_has_passed(lab: Lab) -> None:
    family = await Family(lab).make(1)
    await execute(
        lab.pool,
        "UPDATE tasks SET status = 'SUSPENDED', schedule_timeout_at = now() WHERE id = %s",
        family.parent,
    )
    async with lab.pool.connection() as conn:
        await family.finish(conn)
        assert [row async for row in lab.queries.expire_tasks(conn, limit=10)] == []
    assert await family.status() == "QUEUED"


# Functions


async def test_a_finally_runs_at_each_suspension_and_can_start_no_step_then(lab: Lab) -> None:
    gate = Gate()
    errors: list[str] = []

    async def parent(context: Any, input: Any) -> Any:
        try:
            return await context.run_task("gated", 42)
        finally:
            lab.calls["finally"] += 1
            try:
                await context.run_task("step", "release")
            except RuntimeError as error:
                errors.append(str(error))

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent, gate.function)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
        await wait_for(lambda: lab.calls["finally"], "it has tidied up")
        assert len(await lab.children(id)) == 1
        set_globals(lab.lesson, {"SUSPEND_AFTER": 3600.0})  # not while it waits for `step`
        gate.opened.set()
        row = await finished(lab.pool, id)
    assert (row["output"], row["attempt"], lab.calls["finally"]) == (42, 2, 2)
    assert errors == [f"attempt 1 of task {id} has ended"]
    assert len(await lab.children(id)) == 2


@pytest.mark.parametrize("then", ["returns", "raises", "waits again", "never ends"])
async def test_a_function_that_swallows_its_suspension_changes_nothing(lab: Lab, then: str) -> None:
    gate = Gate()

    async def parent(context: Any, input: Any) -> Any:
        try:
            return await context.run_task("gated", 42)
        except asyncio.CancelledError:
            lab.calls["swallowed"] += 1
            if then == "raises":
                raise OSError("no luck") from None
            if then == "waits again":
                return await context.run_task("gated", 43)
            while then == "never ends" and not gate.opened.is_set():
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    await asyncio.sleep(0.01)
        return "wrong"

    set_globals(lab.lesson, {"SHUTDOWN_GRACE": 0.3})
    id = await lab.enqueue(parent)
    worker = lab.worker(parent, gate.function, durable_concurrency=1)
    try:
        async with working(worker):
            await wait_for(lambda: lab.calls["swallowed"], "it has swallowed its cancellation")
            assert (await get_task(lab.pool, id))["status"] == "SUSPENDED"
            await wait_for(lambda: worker.slots[True].free, "its slot is free")
            assert (await get_task(lab.pool, id))["status"] == "SUSPENDED"
            gate.opened.set()
            row = await finished(lab.pool, id)
    finally:
        gate.opened.set()  # or it would never end
    assert (row["status"], row["output"], row["attempt"]) == ("COMPLETED", 42, 2)
    assert len(await lab.children(id)) == 1


async def test_branches_that_wait_and_work_at_once_lose_nothing(lab: Lab) -> None:
    """Steps, sleeps and nested durable tasks, under a gather in a gather."""

    async def branch(context: Any, n: int) -> Any:
        await context.sleep(timedelta(seconds=0.1 * n))
        return await context.run_task("order", n, is_durable=True)

    async def parent(context: Any, input: Any) -> Any:
        # One durable call at a time in each branch, so that each attempt numbers them alike.
        return await asyncio.gather(
            *[context.run_task("branching", n, is_durable=True) for n in range(4)],
            context.run_task("step", "plain"),
            context.sleep(timedelta(seconds=0.5)),
        )

    async def branching(context: Any, input: Any) -> Any:
        return await branch(context, input)

    async def order(context: Any, input: Any) -> Any:
        await asyncio.gather(context.sleep(timedelta(seconds=0.3)), context.sleep(timedelta(0)))
        return await context.run_task("step", input)

    row = await lab.run(parent, branching, order)
    assert row["output"] == [0, 1, 2, 3, "plain", None]
    assert set(lab.calls.values()) == {1}
    assert set(await statuses(lab.pool)) == {"COMPLETED"}
    assert len(await lab.tasks()) == 1 + 4 * (1 + 1 + 1 + 3) + 2


# Crashes


@pytest.fixture
def input_of(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "notes").touch()
    return {"file": str(tmp_path / "notes"), "gate": str(tmp_path / "gate")}


def noted(input: dict[str, Any], word: str, pid: int | None = None) -> int:
    """How often a process, or any, has noted this word."""
    lines = [line.split() for line in Path(input["file"]).read_text().splitlines()]
    return sum(line[1] == word and pid in (None, int(line[0])) for line in lines)


def open_gate(input: dict[str, Any]) -> None:
    Path(input["gate"]).touch()


async def check_done_once(lab: Lab, id: int) -> None:
    row = await finished(lab.pool, id)
    assert (row["status"], row["output"]) == ("COMPLETED", "approved")
    assert row["retry_count"] == 0
    assert len(await lab.tasks()) == 2


async def test_killed_between_the_statements_of_its_suspension_it_is_taken_over(
    lab: Lab, input_of: dict[str, Any]
) -> None:
    await execute(
        lab.pool,
        """
        CREATE FUNCTION stall() RETURNS TRIGGER AS $$
        BEGIN
            PERFORM pg_advisory_xact_lock(1);
            RETURN NEW;
        END
        $$ LANGUAGE plpgsql
        """,
    )
    await execute(
        lab.pool,
        """
        CREATE TRIGGER stall BEFORE UPDATE OF status ON tasks
        FOR EACH ROW WHEN (NEW.status = 'SUSPENDED')
        EXECUTE FUNCTION stall()
        """,
    )

    async def stalls() -> bool:
        sql = """
            SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = database
            WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted
        """
        return (await conn.execute(sql.encode())).rowcount == 1

    id = await enqueue(lab.pool, "order", input_of, is_durable=True)
    async with await open_connection(lab.pool) as conn:
        await conn.execute("SELECT pg_advisory_lock(1)")
        async with worker_process(lab.lesson, script=SCRIPT, SUSPEND_AFTER=0.1) as victim:
            await wait_for(stalls, "it is locked, and not suspended yet")
            victim.kill()
            await victim.wait()
    await execute(lab.pool, "DROP TRIGGER stall ON tasks")
    assert (await get_task(lab.pool, id))["status"] == "RUNNING"
    async with worker_process(lab.lesson, script=SCRIPT, SUSPEND_AFTER=0.1):
        row = await wait_for_status(lab.pool, id, "SUSPENDED")
        assert (row["attempt"], row["lost_count"]) == (2, 1)
        open_gate(input_of)
        await check_done_once(lab, id)


async def test_a_suspended_task_survives_all_workers(lab: Lab, input_of: dict[str, Any]) -> None:
    """They are killed; the next one runs its child again, which wakes it. It has lost nothing."""
    id = await enqueue(lab.pool, "order", input_of, is_durable=True)
    async with worker_process(lab.lesson, script=SCRIPT, SUSPEND_AFTER=0.1) as victim:
        await wait_for_status(lab.pool, id, "SUSPENDED")
        await wait_for(lambda: noted(input_of, "asks"), "its child runs")
        victim.kill()
        await victim.wait()
    row = await get_task(lab.pool, id)
    assert (row["status"], row["attempt"], row["lost_count"]) == ("SUSPENDED", 1, 0)
    open_gate(input_of)
    async with worker_process(lab.lesson, script=SCRIPT):
        await check_done_once(lab, id)
    assert (await get_task(lab.pool, id))["attempt"] == 2


@posix_only
async def test_a_zombie_suspends_nobody(lab: Lab, input_of: dict[str, Any]) -> None:
    """It was about to suspend its order when it stood still. Now the order is another worker's."""
    id = await enqueue(lab.pool, "order", input_of, is_durable=True)
    patient: dict[str, Any] = {"SUSPEND_AFTER": 3600.0}
    # Long enough to stop it in time, and no judge of the other one when it comes back.
    slow: dict[str, Any] = {"SUSPEND_AFTER": 6.0, "INACTIVE_AFTER": 60.0}
    async with worker_process(lab.lesson, script=SCRIPT, **slow) as zombie:
        await wait_for(lambda: lab.children(id), "it waits for its child")
        zombie.send_signal(signal.SIGSTOP)
        assert (await get_task(lab.pool, id))["status"] == "RUNNING"
        async with worker_process(lab.lesson, script=SCRIPT, **patient) as other:
            await wait_for(lambda: noted(input_of, "asks", other.pid), "another one has them")
            await wait_for(lambda: noted(input_of, "begins", other.pid), "another one has both")
            before = await get_task(lab.pool, id)
            zombie.send_signal(signal.SIGCONT)
            await wait_for(lambda: noted(input_of, "ends", zombie.pid), "the zombie has let go")
            assert await get_task(lab.pool, id) == before
            assert (before["status"], before["attempt"]) == ("RUNNING", 2)
            open_gate(input_of)
            await check_done_once(lab, id)
    assert (await get_task(lab.pool, id))["attempt"] == 2


@posix_only
async def test_a_shutdown_leaves_suspended_tasks_alone_and_puts_back_the_rest(
    lab: Lab, input_of: dict[str, Any]
) -> None:
    """What waits and has not left yet is put back: it may have something to go on with."""
    patient: dict[str, Any] = {"SUSPEND_AFTER": 3600.0}
    first = await enqueue(lab.pool, "order", input_of, is_durable=True)
    async with worker_process(lab.lesson, script=SCRIPT, SUSPEND_AFTER=0.1) as process:
        await wait_for_status(lab.pool, first, "SUSPENDED")
        await kill(lab.pool, process)  # it must not claim the second with its last statement
    async with worker_process(lab.lesson, script=SCRIPT, **patient) as process:
        second = await enqueue(lab.pool, "order", input_of, is_durable=True)
        asks = partial(noted, input_of, "asks", process.pid)
        await wait_for(lambda: asks() == 2, "it runs both children")
        process.send_signal(signal.SIGTERM)
        assert await ended(process) == 0
    before = [(row["status"], row["worker_id"]) for row in await lab.tasks()]
    assert before == [("SUSPENDED", None), *3 * [("QUEUED", None)]]
    assert await execute(lab.pool, "SELECT id FROM workers") == []
    open_gate(input_of)
    async with worker_process(lab.lesson, script=SCRIPT, **patient):
        for id in (first, second):
            row = await finished(lab.pool, id)
            assert (row["output"], row["attempt"], row["lost_count"]) == ("approved", 2, 0)


async def test_a_shutdown_suspends_nobody_who_has_something_to_go_on_with(lab: Lab) -> None:
    """One branch sleeps, another is between two steps: it is not to wait for the first one."""

    async def steps(context: Any) -> None:
        await context.run_task("step", "first")
        if context.attempt == 1:
            lab.calls["between"] += 1
            await asyncio.sleep(3600)
        await context.run_task("step", "last")

    async def parent(context: Any, input: Any) -> None:
        await asyncio.gather(context.sleep(HOUR), steps(context))

    set_globals(lab.lesson, {"SUSPEND_AFTER": 3600.0})
    id = await lab.enqueue(parent)
    async with working(worker := lab.worker(parent)) as start:
        await wait_for(lambda: lab.calls["between"], "it is between two steps")
        worker.stop()
        await wait_for(start.done, "the worker has ended")
    async with working(lab.worker(parent)):
        await wait_for(lambda: lab.calls["last"], "the next worker goes on")
    assert [child["task_name"] for child in await lab.children(id)] == ["sleep", "step", "step"]


# Lost connections, and cancellations at the worst moment


class AtSuspension:
    """Does something before or after a statement of the first suspension, or its COMMIT."""

    def __init__(
        self, name: str, phase: str, action: Callable[[Connection], Awaitable[None]]
    ) -> None:
        self.name = name
        self.phase = phase
        self.action = action
        self.points: list[Point] = []

    async def on_point(self, point: Point, conn: Connection | None) -> None:
        is_ours = last_query.get()[0] in ("lock_task_to_suspend", "suspend_task")
        is_it = is_ours and (point.name, point.phase) == (self.name, self.phase)
        if is_it and not self.points:
            self.points.append(point)
            assert conn
            await self.action(conn)


async def lose(conn: Connection) -> None:
    conn.pgconn.finish()
    raise psycopg.OperationalError("injected")


@asynccontextmanager
async def worker_at(lab: Lab, at: AtSuspension, *functions: Any) -> AsyncIterator[Any]:
    async with open_watched(lab.pool, "watched", Watch(at.on_point)) as pool:
        watched = Lab(lab.lesson, pool, WatchedQueries(lab.queries))
        set_globals(lab.lesson, {"SUSPEND_AFTER": 0.2})
        worker = watched.worker(*functions)
        async with working(worker):
            yield worker


@pytest.mark.parametrize("phase", ["before", "after"])
async def test_a_suspension_whose_answer_got_lost_is_no_failure(lab: Lab, phase: str) -> None:
    gate = Gate()
    at = AtSuspension("commit", phase, lose)
    id = await lab.enqueue(waits_for, 42)
    async with worker_at(lab, at, waits_for, gate.function):
        await wait_for(lambda: at.points, "the connection is lost")
        await wait_for_status(lab.pool, id, "SUSPENDED")
        gate.opened.set()
        row = await finished(lab.pool, id)
    assert (row["status"], row["output"], row["attempt"]) == ("COMPLETED", 42, 2)
    assert (row["retry_count"], row["lost_count"], gate.calls) == (0, 0, 1)


async def test_a_child_that_ends_while_the_connection_is_lost_is_not_overlooked(lab: Lab) -> None:
    """When the suspension is tried again nothing waits any more. It would never be woken."""
    gate = Gate()

    async def parent(context: Any, input: Any) -> Any:
        await context.run_task("gated", 42)
        lab.calls["got on"] += 1
        return await context.run_task("step", 43)

    async def let_it_get_on(conn: Connection) -> None:
        gate.opened.set()
        await wait_for(lambda: lab.calls["got on"], "the child has ended, and its parent knows it")
        await lose(conn)

    at = AtSuspension("lock_task_to_suspend", "before", let_it_get_on)
    id = await lab.enqueue(parent)
    async with worker_at(lab, at, parent, gate.function):
        row = await finished(lab.pool, id)
    assert at.points
    assert (row["status"], row["output"]) == ("COMPLETED", 43)


async def test_a_timeout_while_the_suspension_is_committed_is_not_recorded(lab: Lab) -> None:
    """Who wins is the row: it is suspended, and the failure of that attempt is refused."""
    gate = Gate()

    async def hold_up(conn: Connection) -> None:
        await asyncio.sleep(3600)  # until it is cancelled; what then is sent, is sent

    at = AtSuspension("commit", "before", hold_up)
    # On a busy machine an attempt may time out before it comes to that.
    id = await lab.enqueue(waits_for, 42, timeout=timedelta(seconds=1), max_retries=10)
    async with worker_at(lab, at, waits_for, gate.function) as worker:
        await wait_for(lambda: at.points, "it is about to be committed")
        before = await get_task(lab.pool, id)
        await wait_for(lambda: not worker.slots[True].running, "it has timed out")
        suspended = await get_task(lab.pool, id)
        assert suspended["status"] == "SUSPENDED"
        for column in ("attempt", "retry_count"):
            assert suspended[column] == before[column]
        await execute(lab.pool, "UPDATE tasks SET timeout = NULL WHERE id = %s", id)
        gate.opened.set()
        row = await finished(lab.pool, id)
    assert (row["status"], row["output"]) == ("COMPLETED", 42)
    assert row["attempt"] == suspended["attempt"] + 1


async def test_a_worker_that_ends_while_a_suspension_is_committed_loses_nothing(lab: Lab) -> None:
    gate = Gate()

    async def hold_up(conn: Connection) -> None:
        await asyncio.sleep(3600)

    at = AtSuspension("commit", "before", hold_up)
    id = await lab.enqueue(waits_for, 42)
    async with worker_at(lab, at, waits_for, gate.function):
        await wait_for(lambda: at.points, "it is about to be committed")
    row = await get_task(lab.pool, id)
    assert row["status"] in ("SUSPENDED", "QUEUED")
    set_globals(lab.lesson, {"SUSPEND_AFTER": 3600.0})  # the next attempt is not suspended
    gate.opened.set()
    async with working(lab.worker(waits_for, gate.function)):
        row = await finished(lab.pool, id)
    assert (row["status"], row["output"], row["attempt"]) == ("COMPLETED", 42, 2)


async def test_a_task_can_be_suspended_once(lab: Lab) -> None:
    """Several do it at once, and again when it has been woken and runs elsewhere."""
    gate = Gate()
    contexts: list[Any] = []

    async def parent(context: Any, input: Any) -> Any:
        contexts.append(context)
        return await context.run_task("gated", input)

    set_globals(lab.lesson, {"SUSPEND_AFTER": 3600.0})
    id = await lab.enqueue(parent, 42)
    async with working(lab.worker(parent, gate.function)):
        await wait_for(lambda: gate.calls and contexts[0]._waiting, "it waits")
        await asyncio.gather(*[contexts[0].suspend(0.0) for _ in range(5)])
        assert (await get_task(lab.pool, id))["status"] == "SUSPENDED"
        await execute(lab.pool, "UPDATE tasks SET status = 'QUEUED' WHERE id = %s", id)
        await wait_for(lambda: len(contexts) == 2, "it runs again")
        await contexts[0].suspend(0.0)
        assert (await get_task(lab.pool, id))["status"] == "RUNNING"
        gate.opened.set()
        row = await finished(lab.pool, id)
    assert (row["output"], row["attempt"], row["lost_count"]) == (42, 2, 0)
    assert len(await lab.children(id)) == 1
