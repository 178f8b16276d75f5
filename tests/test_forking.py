"""fork_task: the log has branches. What is before an event stays done, the rest can be read."""

import asyncio
import itertools
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from durable_helpers import Lab
from helpers import (
    QUEUE,
    enqueue,
    execute,
    finished,
    get_task,
    set_globals,
    wait_for,
    wait_for_status,
    working,
    write_outcome,
)
from lesson_loader import LAST
from players import Player, orders, play, wait_for_lock_wait
from shared import Connection, Pool

pytestmark = [pytest.mark.since(15), pytest.mark.only(15, LAST)]

HOUR = timedelta(hours=1)
ABANDONED = {"error": "abandoned: its parent does not ask for it any more"}
FINISHED = ("COMPLETED", "FAILED")
OPEN = ("QUEUED", "SLEEPING", "SUSPENDED")  # and nobody is at work
STATES = (*FINISHED, *OPEN, "RUNNING")
TABLES = ("tasks", "durable_events", "task_branches", "signals")


class ForkLab(Lab):
    """Orders whose steps are known by their names, and which a release may change."""

    def __init__(self, lesson: Any, pool: Pool, queries: Any) -> None:
        super().__init__(lesson, pool, queries)
        # Nobody here is taken for dead because the machine was busy.
        set_globals(lesson, {"SUSPEND_AFTER": 0.1, "INACTIVE_AFTER": 60.0})
        self.steps: list[str] = ["a", "b", "c"]
        self.is_broken = False
        self.rerun = lesson.rerun

    async def order(self, context: Any, input: Any) -> Any:
        outputs = [await context.run_task("step", step) for step in self.steps]
        if self.is_broken:
            raise OSError("no luck")
        return outputs

    async def make_order(self) -> int:
        """An order that has been processed, or has failed."""
        return int((await self.run(self.order))["id"])

    async def fork(self, id: int, from_event: int) -> None:
        await self.rerun.fork_task(self.pool, self.queries, id, from_event)

    async def retry(self, id: int) -> None:
        await self.rerun.retry_task(self.pool, self.queries, id)

    async def replay(self, id: int) -> None:
        await self.rerun.replay_task(self.pool, self.queries, id)

    async def send(self, id: int, payload: Any, key: str | None = None) -> None:
        async with self.pool.connection() as conn:
            await self.lesson.signals.send_signal(conn, self.queries, id, "go", payload, key)

    async def everything(self) -> dict[str, Any]:
        return {
            table: await execute(self.pool, f"SELECT * FROM {table} ORDER BY 1, 2, 3")
            for table in TABLES
        }

    async def branch(self, id: int, branch: int | None = None) -> list[dict[str, Any]]:
        """The events of one branch of a log, or of the current one, each with its child."""
        is_in = "branch_id <= %s AND (abandoned_in IS NULL OR abandoned_in > %s)"
        events = await execute(
            self.pool,
            "SELECT event_id, kind, inserted_at, key, branch_id, child_task_id FROM durable_events"
            f" WHERE task_id = %s AND {is_in if branch else 'abandoned_in IS NULL'}"
            " ORDER BY event_id",
            *([id, branch, branch] if branch else [id]),
        )
        return [event | await get_task(self.pool, event["child_task_id"]) for event in events]

    async def outcomes(self, id: int) -> list[dict[str, Any]]:
        """What the branches that were left have led to."""
        return await execute(
            self.pool,
            "SELECT branch_id, from_event, status, output, finished_at FROM task_branches"
            " WHERE task_id = %s ORDER BY branch_id",
            id,
        )

    async def child(self, parent: int, event_id: int, name: str = "step", **columns: Any) -> int:
        """Make an event, in the current branch, and its child, which is durable unless a step."""
        id = await enqueue(self.pool, name, **({"is_durable": name != "step"} | columns))
        kind = "SIGNAL_AWAITED" if name == "go" else "TASK_STARTED"
        await execute(
            self.pool,
            "INSERT INTO durable_events (task_id, event_id, kind, key, child_task_id, branch_id)"
            " SELECT id, %s, %s, '', %s, branch_id FROM tasks WHERE id = %s",
            *(event_id, kind, id, parent),
        )
        return id


@pytest.fixture
def lab(lesson: Any, pool: Pool, queries: Any) -> ForkLab:
    return ForkLab(lesson, pool, queries)


async def forever(idle: float) -> None:
    await asyncio.sleep(3600)


# The branches


@pytest.mark.parametrize("from_event", [1, 2, 3, 4])
async def test_an_order_can_be_forked_at_each_of_its_events(lab: ForkLab, from_event: int) -> None:
    """What is before stays done, and what was done after stays to be read."""
    for is_broken in (False, True):
        lab.is_broken = is_broken
        lab.calls.clear()
        id = await lab.make_order()
        await execute(
            lab.pool,
            "UPDATE tasks SET retry_count = 1, lost_count = 2, schedule_timeout_at = now()"
            " WHERE id = %s",
            id,
        )
        row, log = await get_task(lab.pool, id), await lab.branch(id)
        assert (row["status"], len(log)) == ("FAILED" if is_broken else "COMPLETED", 3)

        await (lab.fork(id, from_event) if from_event > 1 else lab.replay(id))
        queued = {"status": "QUEUED", "branch_id": 2, "retry_count": 0, "lost_count": 0}
        queued |= dict.fromkeys(["output", "finished_at", "schedule_timeout_at", "worker_id"])
        assert await get_task(lab.pool, id) == row | queued
        assert await lab.branch(id) == log[: from_event - 1]

        lab.is_broken = False
        done = await lab.finish(id, lab.order)
        # On a busy machine it may have been suspended meanwhile.
        assert (done["output"], done["attempt"] > 1) == (["a", "b", "c"], True)
        assert lab.calls == {
            step: 1 if event < from_event else 2 for event, step in enumerate("abc", start=1)
        }
        new = await lab.branch(id)
        assert new == await lab.branch(id, 2)
        assert new[: from_event - 1] == log[: from_event - 1]
        assert {e["child_task_id"] for e in new[from_event - 1 :]}.isdisjoint(
            e["child_task_id"] for e in log
        )
        assert [event["event_id"] for event in new] == [1, 2, 3]
        assert await lab.branch(id, 1) == log, "the old branch does not read as before"
        outcome = {name: row[name] for name in ("branch_id", "status", "output", "finished_at")}
        assert await lab.outcomes(id) == [outcome | {"from_event": from_event}]


async def test_a_fork_of_a_fork_of_a_fork(lab: ForkLab) -> None:
    """Logs that grow and shrink: in the end each branch reads as when it was the current one."""
    numbers = random.Random(15)
    id = await lab.make_order()
    logs = [await lab.branch(id)]
    for _ in range(12):
        from_event = numbers.randint(1, len(logs[-1]) + 1)
        lab.steps[from_event - 1 :] = [str(n) for n in range(numbers.randint(0, 3))]
        await lab.fork(id, from_event)
        assert await lab.branch(id) == logs[-1][: from_event - 1]
        assert (await lab.finish(id, lab.order))["output"] == lab.steps
        logs.append(await lab.branch(id))
    assert [await lab.branch(id, n) for n in range(1, 14)] == logs
    assert [len(log) for log in logs] != sorted(len(log) for log in logs)
    async with lab.pool.connection() as conn:
        rows = [row async for row in lab.queries.get_branches(conn, task_id=id)]
    for n, log in enumerate(logs, start=1):
        of_branch = [row for row in rows if row["branch_id"] == n]
        assert {(row["status"], len(row["output"])) for row in of_branch} == {
            ("COMPLETED", len(log))
        }
        assert [row["child_task_id"] for row in of_branch] == (
            [event["child_task_id"] for event in log] or [None]
        )


@pytest.mark.parametrize("from_event", [-1, 0, 5, 2**40])
async def test_an_event_that_is_not_there_yet_is_refused(lab: ForkLab, from_event: int) -> None:
    id = await lab.make_order()
    before = await lab.everything()
    message = f"task {id} can be forked at events 1 to 4, not at {from_event}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        await lab.fork(id, from_event)
    assert await lab.everything() == before


async def test_the_end_is_that_of_the_current_branch(lab: ForkLab) -> None:
    id = await lab.make_order()
    lab.steps = []
    await lab.fork(id, 1)
    await lab.finish(id, lab.order)
    with pytest.raises(ValueError, match="events 1 to 1, not at 2"):
        await lab.fork(id, 2)


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        (["a", "b", "changed", "new"], None),
        (["a", "b"], None),
        (["changed", "b", "c"], "event 1: recorded is TASK_STARTED 'step' with input 'a'"),
        (["a"], "event 2: recorded are events up to 2"),
    ],
    ids=["after", "nothing after", "before", "nothing there"],
)
async def test_a_function_may_have_changed_after_the_fork_and_not_before(
    lab: ForkLab, steps: list[str], error: str | None
) -> None:
    id = await lab.make_order()
    lab.steps = steps
    await lab.fork(id, 3)
    row = await lab.finish(id, lab.order)
    if error is None:
        assert row["output"] == steps
    else:
        assert f"NonDeterminismError: task {id}, {error}" in row["output"]["error"]


async def test_a_zombie_of_the_old_branch_changes_nothing(lab: ForkLab) -> None:
    """Neither that of a former attempt, nor the one whose outcome was recorded."""
    id = await lab.enqueue(lab.order)
    zombies = [await claim(lab)]
    await execute(lab.pool, "UPDATE tasks SET status = 'QUEUED', worker_id = NULL")
    zombies.append(await claim(lab))
    async with lab.pool.connection() as conn:
        await write(lab, conn, zombies[1], "COMPLETED")
    await lab.fork(id, 1)
    for is_claimed in (False, True):
        if is_claimed:
            task = await claim(lab)
        before = await lab.everything()
        for zombie in zombies:
            async with lab.pool.connection() as conn:
                for status in ("COMPLETED", "FAILED", "QUEUED"):
                    assert await write(lab, conn, zombie, status) == 0
                with pytest.raises(lab.errors.TaskNotOwnedError):
                    await append(lab, conn, zombie)
        assert await lab.everything() == before
    async with lab.pool.connection() as conn:
        event, _ = await append(lab, conn, task)
    assert (event.branch_id, event.abandoned_in) == (2, None)


async def claim(lab: ForkLab) -> Any:
    """As a worker does, that is then not heard of any more."""
    async with lab.pool.connection() as conn:
        (task,) = await poll(lab, conn, "order", is_durable=True)
    return task


async def poll(lab: ForkLab, conn: Connection, name: str, is_durable: bool) -> list[Any]:
    worker_id = uuid4()
    await lab.queries.heartbeat(conn, id=worker_id, display_name="", max_silence=1e6)
    rows = lab.queries.poll_tasks(
        conn,
        queue=QUEUE,
        is_durable=is_durable,
        task_names=[name],
        limit=1,
        worker_id=worker_id,
        inactive_after=1e6,
    )
    return [lab.lesson.models.Task(**row) async for row in rows]


async def write(lab: ForkLab, conn: Connection, task: Any, status: str) -> int:
    owner = (task.id, task.worker_id, task.attempt)
    return await write_outcome(lab.queries, conn, *owner, status, [])


async def append(lab: ForkLab, conn: Connection, task: Any) -> Any:
    async def create_child() -> int:
        return await enqueue(lab.pool, "step", "a")

    log = lab.lesson.event_log.EventLog(lab.queries)
    async with conn.transaction():
        return await log.append(conn, task, 1, "TASK_STARTED", "step", "a", create_child)


async def test_one_delete_removes_tasks_with_their_branches(lab: ForkLab) -> None:
    id = await lab.make_order()
    await lab.fork(id, 2)
    await lab.finish(id, lab.order)
    await execute(lab.pool, "DELETE FROM tasks WHERE status = 'COMPLETED'")
    assert await lab.everything() == {table: [] for table in TABLES}


async def test_the_tables_of_branches(lab: ForkLab) -> None:
    rows = await execute(
        lab.pool,
        "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns"
        " WHERE table_schema = current_schema() AND (table_name = 'task_branches'"
        " OR table_name = 'durable_events' AND column_name IN ('branch_id', 'abandoned_in'))"
        " ORDER BY table_name, ordinal_position",
    )
    assert [tuple(row.values())[1:] for row in rows] == [
        ("branch_id", "integer", "NO"),
        ("abandoned_in", "integer", "YES"),
        ("task_id", "bigint", "NO"),
        ("branch_id", "integer", "NO"),
        ("from_event", "bigint", "NO"),
        ("status", "USER-DEFINED", "NO"),
        ("output", "jsonb", "YES"),
        ("finished_at", "timestamp with time zone", "YES"),
    ]
    id = await lab.make_order()
    await lab.fork(id, 3)
    await lab.child(id, 3)  # event 3 of branch 1 is abandoned, event 2 is not
    with pytest.raises(psycopg.errors.UniqueViolation):
        await lab.child(id, 2)


# What becomes of the children


async def family(lab: ForkLab, child: str, grandchild: str) -> tuple[int, int, int]:
    """A task that has failed. A step runs, and a child and a grandchild are in these states."""
    id = await lab.enqueue(lab.order, status="FAILED")
    await lab.child(id, 1, status="RUNNING")
    middle = await lab.child(id, 2, "order", status=child)
    leaf = await lab.child(middle, 1, status=grandchild)
    return id, middle, leaf


async def test_what_was_begun_and_is_open_is_abandoned_two_levels_deep(lab: ForkLab) -> None:
    """All of section 12's table. What runs makes the fork refuse, what has finished stays."""
    for child, grandchild in itertools.product(STATES, STATES):
        id, middle, leaf = await family(lab, child, grandchild)
        before = await lab.everything()
        rows = {row["id"]: row for row in await lab.tasks()}
        if "RUNNING" in (child, grandchild):
            running = f"{middle} (order)" if child == "RUNNING" else f"{leaf} (step)"
            message = f"task {id} cannot be forked there while task {running}"
            with pytest.raises(ValueError, match=rf"^{re.escape(message)}.* RUNNING$"):
                await lab.fork(id, 2)
            assert await lab.everything() == before
        else:
            await lab.fork(id, 2)
            after = {row["id"]: row for row in await lab.tasks()}
            assert after[id]["status"] == "QUEUED"
            for task, was in ((middle, child), (leaf, grandchild)):
                if was in OPEN:
                    ended = {"status": "FAILED", "output": ABANDONED}
                    assert after[task]["finished_at"] is not None
                    ended["finished_at"] = after[task]["finished_at"]
                    assert after[task] == rows[task] | ended
                else:
                    assert after[task] == rows[task]
            assert [after[n] for n in rows if n not in (id, middle, leaf)] == [
                rows[n] for n in rows if n not in (id, middle, leaf)
            ], "it has changed what is before the fork"


async def test_a_retry_leaves_everything_as_it_is_but_the_step_that_failed(lab: ForkLab) -> None:
    for child, grandchild in itertools.product(STATES, STATES):
        id, *_ = await family(lab, child, grandchild)
        failed = await lab.child(id, 3, status="FAILED")
        await execute(lab.pool, "UPDATE tasks SET finished_at = now() WHERE id = %s", failed)
        statement = "UPDATE tasks SET output = %s WHERE id = %s"
        await execute(lab.pool, statement, Jsonb({"child_task_id": failed}), id)
        before = await lab.everything()
        await lab.retry(id)
        after = await lab.everything()
        changed = [n["id"] for n, o in zip(after["tasks"], before["tasks"], strict=True) if n != o]
        assert changed == [id, failed]
        assert {name: after[name] for name in TABLES[1:]} == {n: before[n] for n in TABLES[1:]}


@pytest.mark.parametrize("state", STATES)
async def test_what_was_begun_before_the_fork_stays_whatever_it_does(
    lab: ForkLab, state: str
) -> None:
    """Also if somebody is writing it at this moment: nobody asks."""
    id = await lab.enqueue(lab.order, status="FAILED")
    child = await lab.child(id, 1, "order", status=state)
    await lab.child(child, 1, status="RUNNING")
    before = await lab.tasks()
    async with lab.pool.connection() as conn, conn.transaction():
        await conn.execute("SELECT id FROM tasks WHERE id = %s FOR UPDATE", [child])
        await asyncio.wait_for(lab.fork(id, 2), 30)
    assert (await lab.tasks())[1:] == before[1:]


async def test_a_step_that_still_runs_is_awaited_by_the_new_branch(lab: ForkLab) -> None:
    """It is of both branches, so it wakes the one that is there when it ends."""
    is_open = asyncio.Event()

    async def slow(input: Any) -> str:
        await is_open.wait()
        return "slow"

    async def both_have_begun() -> bool:
        return len(await lab.tasks()) == 3

    async def parent(context: Any, input: Any) -> Any:
        first = asyncio.ensure_future(context.run_task("slow", None))
        sleep = asyncio.ensure_future(context.sleep(HOUR))
        if context.attempt == 1:
            context.suspend = forever
            await wait_for(both_have_begun, "both have begun")
            await context.run_task("step", "once")
            raise OSError("no luck")
        return [await first, await sleep, await context.run_task("step", "twice")]

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent, slow)):
        await wait_for_status(lab.pool, id, "FAILED")
        kept = (await lab.branch(id))[:2]
        assert [event["status"] for event in kept] == ["RUNNING", "SLEEPING"]
        await lab.fork(id, 3)
        await wait_for_status(lab.pool, id, "SUSPENDED")
        assert await lab.branch(id) == kept
        is_open.set()
        await execute(lab.pool, "UPDATE tasks SET wake_at = now() WHERE status = 'SLEEPING'")
        row = await finished(lab.pool, id)
    assert row["output"] == ["slow", None, "twice"]
    log = await lab.branch(id)
    assert [event["child_task_id"] for event in log[:2]] == [e["child_task_id"] for e in kept]


async def test_what_is_abandoned_is_over_whatever_comes(lab: ForkLab) -> None:
    """Neither its time nor a signal nor a worker brings it back, or wakes the new branch."""

    async def parent(context: Any, input: Any) -> Any:
        if context.attempt > 1:
            return await context.wait_for_signal("go", timeout=HOUR)
        context.suspend = forever  # it is to be there when its children have gone
        calls = [
            context.wait_for_signal("go", timeout=HOUR),
            context.sleep(HOUR),
            context.run_task("inner", None, is_durable=True),
            context.run_task("inner", None, is_durable=True),
            context.run_task("unknown", None),
        ]
        running = [asyncio.ensure_future(call) for call in calls]
        await wait_for(are_waiting, "everything has begun")
        for call in running:
            call.cancel()
        raise OSError("no luck")

    async def inner(context: Any, input: Any) -> Any:
        return [await context.wait_for_signal("go"), await context.sleep(HOUR)]

    async def are_waiting() -> bool:
        states = sorted(row["status"] for row in (await lab.tasks())[1:])
        return states == ["QUEUED"] + 4 * ["SLEEPING"] + 2 * ["SUSPENDED"]

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent, inner)):
        await wait_for_status(lab.pool, id, "FAILED")
        await lab.fork(id, 1)
        abandoned = (await lab.tasks())[1:8]
        assert {row["status"] for row in abandoned} == {"FAILED"}
        await wait_for_status(lab.pool, id, "SUSPENDED")
        await execute(lab.pool, "UPDATE tasks SET wake_at = now() WHERE status = 'FAILED'")
        await asyncio.sleep(0.5)
        assert (await get_task(lab.pool, id))["attempt"] == 2
        await lab.send(id, "for the new branch")
        assert (await finished(lab.pool, id))["output"] == "for the new branch"
    for row in abandoned:
        now = await get_task(lab.pool, row["id"])
        assert now | {"wake_at": None} == row | {"wake_at": None}
        if row["task_name"] == "inner":
            with pytest.raises(ValueError, match="is FAILED already"):
                await lab.send(row["id"], "for nobody")


async def test_a_child_that_was_forked_itself_takes_its_branches_with_it(lab: ForkLab) -> None:
    """Its own abandoned branch is over; what its current one has open is abandoned."""
    id = await lab.enqueue(lab.order, status="FAILED")
    child = await lab.child(id, 1, "order", status="FAILED")
    old = await lab.child(child, 1, status="COMPLETED")
    await lab.fork(child, 1)
    new = await lab.child(child, 1)
    async with lab.pool.connection() as conn, conn.transaction():
        await conn.execute("SELECT id FROM tasks WHERE id = %s FOR UPDATE", [old])
        await lab.fork(id, 1)
    states = {row["id"]: (row["status"], row["output"]) for row in await lab.tasks()}
    assert states[child] == states[new] == ("FAILED", ABANDONED)
    assert states[old] == ("COMPLETED", None)


# Signals


async def wait_twice(context: Any, input: Any) -> Any:
    return [await context.wait_for_signal("go"), await context.wait_for_signal("go")]


async def test_a_signal_is_received_in_one_branch(lab: ForkLab) -> None:
    """What was received stays so, what was not goes to the new branch, and keys go on to hold."""
    id = await lab.enqueue(wait_twice)
    for n in (1, 2, 3):
        await lab.send(id, n, f"key {n}")
    assert (await lab.finish(id, wait_twice))["output"] == [1, 2]
    await lab.fork(id, 2)
    for n in (1, 2, 3):
        await lab.send(id, "again", f"key {n}")
    assert (await lab.finish(id, wait_twice))["output"] == [1, 3]
    await lab.fork(id, 1)
    async with working(lab.worker(wait_twice)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
        for payload in (4, 5):
            await lab.send(id, payload)
        assert (await finished(lab.pool, id))["output"] == [4, 5]
    for branch, events in ((1, (1, 2)), (2, (1, 3)), (3, (4, 5))):
        outputs = [event["output"] for event in await lab.branch(id, branch)]
        assert outputs == [{"payload": n} for n in events]


async def test_a_signal_is_not_given_to_a_wait_of_the_old_branch(lab: ForkLab) -> None:
    """Which has the same event, and a lower id."""
    id = await lab.enqueue(lab.order, status="FAILED")
    old = await lab.child(id, 1, "go", status="SLEEPING", is_durable=False)
    await lab.fork(id, 1)
    await lab.send(id, 1)
    new = await lab.child(id, 1, "go", status="SLEEPING", is_durable=False)
    await lab.send(id, 2)
    assert (await get_task(lab.pool, old))["output"] == ABANDONED
    assert (await get_task(lab.pool, new))["output"] == {"payload": 1}


async def test_a_wait_that_timed_out_fails_each_retry_and_not_a_fork(lab: ForkLab) -> None:
    async def wait(context: Any, input: Any) -> Any:
        step = await context.run_task("step", "asks")
        return [step, await context.wait_for_signal("go", timeout=timedelta(0))]

    id = int((await lab.run(wait))["id"])
    await lab.retry(id)
    await lab.send(id, "late")
    assert "SignalTimeoutError" in (await lab.finish(id, wait))["output"]["error"]
    await lab.fork(id, 3)
    assert "SignalTimeoutError" in (await lab.finish(id, wait))["output"]["error"]
    await lab.fork(id, 2)
    assert (await lab.finish(id, wait))["output"] == ["asks", "late"]
    assert lab.calls == {"asks": 1}


# Who is refused


async def refused(lab: ForkLab, actions: Sequence[Awaitable[None]], message: str) -> None:
    before = await lab.everything()
    for action in actions:
        with pytest.raises(ValueError, match=f"^{message}"):
            await action
    assert await lab.everything() == before


async def test_what_cannot_be_forked(lab: ForkLab) -> None:
    await refused(lab, [lab.fork(4711, 1)], "there is no task 4711$")
    plain = await enqueue(lab.pool, "step", status="FAILED")
    await refused(lab, [lab.fork(plain, 1)], rf"task {plain} \(step\) is not durable$")
    for state in (*OPEN, "RUNNING"):
        id = await lab.enqueue(lab.order, status=state)
        await refused(lab, [lab.fork(id, 1)], f"task {id} is {state}, not COMPLETED or FAILED$")
        child = await lab.child(id, 1, "order", status="FAILED")
        message = f"task {child} is a child of task {id}, which is {state}: "
        await refused(lab, [lab.fork(child, 1)], message)
        await execute(lab.pool, "UPDATE tasks SET status = 'FAILED' WHERE id = %s", id)
        await lab.fork(child, 1)


@pytest.mark.parametrize("state", FINISHED)
@pytest.mark.parametrize("parent_is", ["QUEUED", "SUSPENDED", "FAILED"])
async def test_what_was_abandoned_is_never_run_again(
    lab: ForkLab, state: str, parent_is: str
) -> None:
    """Nor what it had begun: its effects would come on top of those of the new branch."""
    id = await lab.enqueue(lab.order, status="FAILED")
    child = await lab.child(id, 1, "order", status=state)
    grandchild = await lab.child(child, 1, "order", status=state)
    await lab.fork(id, 1)
    await execute(lab.pool, "UPDATE tasks SET status = %s WHERE id = %s", parent_is, id)
    for task in (child, grandchild):
        actions = [lab.retry(task), lab.replay(task), lab.fork(task, 1)]
        await refused(lab, actions, f"task {task} is abandoned: task {id} goes on without it$")


async def test_a_failure_that_was_handled_in_another_branch_can_be_retried(lab: ForkLab) -> None:
    """The compensation is abandoned: there is nothing now that a mended step would contradict."""

    async def compensates(context: Any, input: Any) -> Any:
        try:
            return await context.run_task("broken", "email")
        except lab.errors.ChildTaskError:
            if context.attempt > 1:
                raise
            return await context.run_task("step", "refund")

    set_globals(lab.lesson, {"SUSPEND_AFTER": 60.0})  # which would be an attempt more
    compensated = await lab.run(compensates)
    assert compensated["output"] == "refund"
    id = int(compensated["id"])
    await lab.fork(id, 2)
    assert (await lab.finish(id, compensates))["status"] == "FAILED"
    lab.calls["mended"] = 1
    await lab.retry(id)
    assert (await lab.finish(id, compensates))["output"] == "email"


async def test_a_retry_that_is_refused_names_the_event_to_fork_from(lab: ForkLab) -> None:
    async def compensates(context: Any, input: Any) -> Any:
        charge = await context.run_task("step", "charge")
        try:
            return [charge, await context.run_task("broken", "email")]
        except lab.errors.ChildTaskError:
            await context.run_task("step", "refund")
            raise

    id = int((await lab.run(compensates))["id"])
    lab.calls["mended"] = 1
    with pytest.raises(ValueError, match="fork_task can go back to event 2 of its log"):
        await lab.retry(id)
    await lab.fork(id, 2)
    assert (await lab.finish(id, compensates))["output"] == ["charge", "email"]
    assert (lab.calls["charge"], lab.calls["refund"]) == (1, 1)


# Two at once


class OneConnection:
    """What the functions of rerun.py take for a pool."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        yield self.conn


@asynccontextmanager
async def forking(lab: ForkLab, id: int, from_event: int, commit: bool) -> AsyncIterator[None]:
    """Within this block the fork is done, and not committed."""
    async with lab.pool.connection() as conn, conn.transaction():
        pool = OneConnection(conn)
        await lab.rerun.fork_task(pool, lab.queries, id, from_event)
        yield
        if not commit:
            raise psycopg.Rollback


@pytest.mark.parametrize("second", ["fork", "replay", "retry"])
@pytest.mark.parametrize("commit", [True, False], ids=["committed", "rolled back"])
async def test_of_two_forks_at_once_the_second_is_refused(
    lab: ForkLab, second: str, commit: bool
) -> None:
    lab.is_broken = True
    id = await lab.make_order()
    more = [2] if second == "fork" else []
    async with forking(lab, id, 3, commit):
        other = asyncio.create_task(getattr(lab, second)(id, *more))
        await wait_for_lock_wait(lab.pool)
    if commit:
        with pytest.raises(ValueError, match=f"task {id} is QUEUED"):
            await other
        assert [row["from_event"] for row in await lab.outcomes(id)] == [3]
    else:
        await other
        assert len(await lab.outcomes(id)) == (second != "retry")
    lab.is_broken = False
    assert (await lab.finish(id, lab.order))["output"] == ["a", "b", "c"]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("action", ["retry", "replay"])
async def test_who_waits_for_a_fork_above_sees_that_it_has_abandoned_the_task(
    lab: ForkLab, action: str, depth: int
) -> None:
    """It read the log before that, to find the row for which it has waited."""
    id = await lab.enqueue(lab.order, status="FAILED")
    tasks = [id]
    for _ in range(2):
        tasks.append(await lab.child(tasks[-1], 1, "order", status="FAILED"))
    async with forking(lab, id, 1, commit=True):
        other = asyncio.create_task(getattr(lab, action)(tasks[depth]))
        await wait_for_lock_wait(lab.pool)
    with pytest.raises(ValueError, match=f"task {tasks[depth]} is abandoned"):
        await other
    assert [(await get_task(lab.pool, task))["status"] for task in tasks[1:]] == 2 * ["FAILED"]


@pytest.mark.parametrize("action", ["retry", "replay"])
async def test_who_waits_for_a_fork_above_sees_that_the_parent_is_at_work(
    lab: ForkLab, action: str
) -> None:
    """The task is of the new branch, too, which goes on from what has become of it."""
    id = await lab.enqueue(lab.order, status="FAILED")
    child = await lab.child(id, 1, "order", status="FAILED")
    async with forking(lab, id, 2, commit=True):
        other = asyncio.create_task(getattr(lab, action)(child))
        await wait_for_lock_wait(lab.pool)
    with pytest.raises(ValueError, match=f"{child} is a child of task {id}, which is QUEUED"):
        await other


@pytest.mark.parametrize("commit", [True, False], ids=["committed", "rolled back"])
async def test_a_fork_of_a_task_that_is_ending(lab: ForkLab, commit: bool) -> None:
    """It waits to see how that ends."""
    id = await lab.enqueue(lab.order)
    task = await claim(lab)
    async with lab.pool.connection() as conn, conn.transaction():
        await write(lab, conn, task, "COMPLETED")
        fork = asyncio.create_task(lab.fork(id, 1))
        await wait_for_lock_wait(lab.pool)
        if not commit:
            raise psycopg.Rollback
    if commit:
        await fork
    else:
        with pytest.raises(ValueError, match=f"task {id} is RUNNING"):
            await fork


class Turns:
    """Queries of which some wait for their player's turn."""

    def __init__(self, queries: Any, player: Player, *names: str) -> None:
        self.queries = queries
        self.player = player
        self.names = names

    def __getattr__(self, name: str) -> Any:
        query = getattr(self.queries, name)

        async def rows_in_turn(*arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
            await self.player.turn()
            async for row in query(*arguments, **keywords):
                yield row

        async def in_turn(*arguments: Any, **keywords: Any) -> Any:
            await self.player.turn()
            return await query(*arguments, **keywords)

        if name not in self.names:
            return query
        return rows_in_turn if name == "get_events" else in_turn


class Scene:
    """A failed task, one above it that it has failed, and what it has begun, which may go on."""

    def __init__(self, lab: ForkLab) -> None:
        self.lab = lab
        self.owner: dict[str, Any] = {"worker_id": uuid4(), "attempt": 1}

    async def set(self, other: str) -> None:
        lab = self.lab
        self.above = await lab.enqueue(lab.order, status="FAILED")
        self.top = await lab.child(self.above, 1, "order", status="FAILED")
        self.failed = await lab.child(self.top, 1, "order", status="FAILED")
        await lab.child(self.failed, 1)
        self.suspended = await lab.child(self.top, 2, "order", status="SUSPENDED")
        await lab.child(self.suspended, 1, "go", status="SLEEPING", is_durable=False)
        running = {"status": "RUNNING", **self.owner} if other == "complete" else {}
        self.leaf = await lab.child(self.suspended, 2, **running)
        for failed, parent in ((self.failed, self.top), (self.top, self.above)):
            output = Jsonb({"child_task_id": failed})
            await execute(lab.pool, "UPDATE tasks SET output = %s WHERE id = %s", output, parent)
        if other == "wake":
            overdue = "SET wake_at = now() WHERE status = 'SLEEPING'"
        else:
            overdue = "SET schedule_timeout_at = now() WHERE status = 'QUEUED'"
        if other in ("wake", "expire"):
            await execute(lab.pool, f"UPDATE tasks {overdue}")

    async def fork(self, turns: tuple[str, ...], player: Player) -> None:
        await self.rerun(player, "fork_task", self.top, *turns)

    async def rerun(self, player: Player, name: str, id: int, *turns: str) -> None:
        await player.turn()
        queries = Turns(self.lab.queries, player, *turns)
        more = [1] if name == "fork_task" else []
        await getattr(self.lab.rerun, name)(self.lab.pool, queries, id, *more)

    async def play(self, other: str, player: Player) -> None:
        """One of those that may meet the fork, in two turns."""
        if other.startswith("retry "):
            return await self.rerun(player, "retry_task", self.of(other), "reset_tasks")
        if other.startswith("fork "):
            return await self.rerun(player, "fork_task", self.of(other), "begin_branch")
        await player.turn()
        async with self.lab.pool.connection() as conn, conn.transaction():
            await self.write(conn, other)
            await player.turn()
        return None

    def of(self, other: str) -> int:
        return int(getattr(self, other.split()[-1]))

    async def write(self, conn: Connection, other: str) -> None:
        lab = self.lab
        if other == "wake":
            _ = [row async for row in lab.queries.wake_tasks(conn, limit=1000)]
        elif other == "expire":
            _ = [row async for row in lab.queries.expire_tasks(conn, limit=1000)]
        elif other == "complete":
            await write_outcome(
                lab.queries, conn, self.leaf, status="COMPLETED", output=None, **self.owner
            )
        elif other == "claim":
            await poll(lab, conn, "step", is_durable=False)
        else:
            await lab.lesson.signals.send_signal(conn, lab.queries, self.of(other), "go", 1)


OTHERS = [
    *("wake", "expire", "complete", "claim", "send to suspended", "send to top"),
    *("retry failed", "fork failed", "retry above", "fork above", "fork top"),
]
BELOW = """
WITH RECURSIVE below AS (
    SELECT child_task_id AS id FROM durable_events WHERE abandoned_in IS NOT NULL
    UNION
    SELECT child_task_id FROM below JOIN durable_events ON task_id = below.id
)
SELECT tasks.* FROM below JOIN tasks USING (id) WHERE status NOT IN ('COMPLETED', 'FAILED')
"""
NOT_WOKEN = """
SELECT id FROM tasks WHERE status = 'SUSPENDED' AND EXISTS (
    SELECT FROM durable_events JOIN tasks AS child ON child.id = child_task_id
    WHERE task_id = tasks.id AND abandoned_in IS NULL AND child.status IN ('COMPLETED', 'FAILED')
)
"""


@pytest.mark.parametrize("other", OTHERS)
async def test_whatever_meets_a_fork_neither_waits_in_a_circle_nor_is_left_behind(
    lab: ForkLab, other: str
) -> None:
    """Statement by statement, in every order."""
    results = set()
    # Who completes the leaf holds it, and waits for its parent: does the fork, between the two?
    per_level = ("abandon_tasks",) if other == "complete" else ()
    turns = per_level or ("get_events", "begin_branch")
    for order in orders(4 if per_level else 3, 2):
        scene = Scene(lab)
        await scene.set(other)
        players = [Player(partial(scene.fork, turns)), Player(partial(scene.play, other))]
        outcomes = await play(lab.pool, players, order)
        assert {type(outcome) for outcome in outcomes} <= {type(None), ValueError}, outcomes
        assert None in outcomes, f"{order}: {outcomes}"
        results.add(tuple(outcome is None for outcome in outcomes))
        assert await execute(lab.pool, BELOW) == [], f"{order}: something abandoned is not over"
        assert await execute(lab.pool, NOT_WOKEN) == [], f"{order}: a wake-up is lost"
        assert (await get_task(lab.pool, scene.top))["branch_id"] == 1 + len(
            await lab.outcomes(scene.top)
        )
        if outcomes[0] is None:
            assert await lab.branch(scene.top) == [], order
            assert len(await lab.branch(scene.top, 1)) == 2, order
        await execute(lab.pool, "DELETE FROM tasks")
    assert len(results) > 1, "they have never met"


# A fork that is killed


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("query", ["begin_branch", "reset_tasks", "notify"])
async def test_a_fork_that_is_killed_has_happened_or_not(lab: ForkLab, query: str) -> None:
    """Until the last statement it has not. After that workers find the task by asking."""
    id = await lab.make_order()
    await lab.child(id, 4)
    before = await lab.everything()
    script = Path(__file__).parent / "fork_process.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(lab.lesson.path), str(id), query
    )
    assert await process.wait() == -signal.SIGKILL
    if query != "notify":
        assert await lab.everything() == before
        await lab.fork(id, 2)
    assert [row["status"] for row in await lab.branch(id, 1)] == 3 * ["COMPLETED"] + ["FAILED"]
    assert (await lab.finish(id, lab.order))["branch_id"] == 2
    assert lab.calls == {"a": 1, "b": 2, "c": 2}
