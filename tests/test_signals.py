"""Signals: each is received once, by one wait, whenever it comes; a wait ends in one way."""

import asyncio
import math
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

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
from shared import Pool

pytestmark = [pytest.mark.since(14), pytest.mark.only(14, LAST)]

AT_ONCE = timedelta(0)


class SignalLab(Lab):
    """Durable tasks that wait, and signals for them."""

    async def send(self, id: int, name: str, payload: Any = None, key: str | None = None) -> None:
        async with self.pool.connection() as conn:
            await self.send_on(conn, id, name, payload, key)

    async def send_on(self, conn: Any, id: int, name: str, *more: Any) -> None:
        await self.lesson.signals.send_signal(conn, self.queries, id, name, *(more or [None]))

    async def waits(self, id: int, *wanted: str) -> dict[str, Any]:
        """Wait until the first wait of a task is there, in one of these states; return it."""

        async def first() -> Any:
            rows = await self.children(id)
            return rows[0] if rows and rows[0]["status"] in wanted else None

        row: dict[str, Any] = await wait_for(first, f"a wait is {wanted}")
        return row

    async def received(self) -> list[Any]:
        """The payloads in the order in which they were sent, and the events that received them."""
        rows = await execute(
            self.pool,
            "SELECT payload, event_id FROM signals"
            " LEFT JOIN durable_events ON child_task_id = received_by ORDER BY id",
        )
        return [(row["payload"], row["event_id"]) for row in rows]


@pytest.fixture
def lab(lesson: Any, pool: Pool, queries: Any) -> SignalLab:
    lab = SignalLab(lesson, pool, queries)
    # Nobody here is taken for dead because the machine was busy.
    set_globals(lesson, {"SUSPEND_AFTER": 0.1, "INACTIVE_AFTER": 60.0})
    return lab


async def wait_once(context: Any, input: Any) -> Any:
    return await context.wait_for_signal("go")


async def wait_twice(context: Any, input: Any) -> Any:
    return [await context.wait_for_signal("go"), await context.wait_for_signal("go")]


async def wait_in_parallel(context: Any, input: Any) -> Any:
    return await asyncio.gather(*(context.wait_for_signal("go") for _ in range(2)))


async def wait_in_vain(context: Any, input: Any) -> Any:
    return await context.wait_for_signal("go", timeout=AT_ONCE)


class Gate:
    """Queries of which one waits for the test before it is executed."""

    def __init__(self, queries: Any, name: str) -> None:
        self.queries = queries
        self.name = name
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        query = getattr(self.queries, name)

        async def gated(*arguments: Any, **keywords: Any) -> Any:
            self.reached.set()
            await self.opened.wait()
            return await query(*arguments, **keywords)

        return gated if name == self.name else query


# Before, after, and at the same moment


async def test_a_signal_that_comes_before_its_wait_is_kept(lab: SignalLab) -> None:
    id = await lab.enqueue(wait_once)
    await lab.send(id, "go", 1)
    assert await lab.received() == [(1, None)]
    row = await lab.finish(id, wait_once)
    assert (row["output"], row["attempt"]) == (1, 1)
    assert await lab.received() == [(1, 1)]


async def test_a_signal_for_a_task_in_memory_and_for_a_suspended_one(lab: SignalLab) -> None:
    for seconds, status, attempt in ((60.0, "RUNNING", 1), (0.1, "SUSPENDED", 2)):
        set_globals(lab.lesson, {"SUSPEND_AFTER": seconds})
        id = await lab.enqueue(wait_once)
        async with working(lab.worker(wait_once)):
            await lab.waits(id, "SLEEPING")
            await wait_for_status(lab.pool, id, status)
            await lab.send(id, "go", status)
            row = await finished(lab.pool, id)
        assert (row["output"], row["attempt"]) == (status, attempt)


async def test_whoever_waits_is_told(lab: SignalLab) -> None:
    """Nobody polls here."""
    set_globals(lab.lesson, {"POLL_INTERVAL": 3600.0, "HEARTBEAT_INTERVAL": 3600.0})
    set_globals(lab.lesson, {"INACTIVE_AFTER": 1e6})
    async with working(lab.worker(wait_twice), lab.worker(wait_twice)):
        ids = await enqueue_and_tell(lab, wait_twice, 3, workers=2)
        for id in ids:
            await wait_for_status(lab.pool, id, "SUSPENDED")
            await lab.send(id, "go", 0)
        for id in ids:  # which are about to begin, at work, or suspended again
            await lab.send(id, "go", 1)
        for id in ids:
            assert (await finished(lab.pool, id))["output"] == [0, 1]
    set_globals(lab.lesson, {"SUSPEND_AFTER": 60.0})
    async with working(lab.worker(wait_once)):
        (id,) = await enqueue_and_tell(lab, wait_once, 1, workers=1)
        await lab.waits(id, "SLEEPING")
        await lab.send(id, "go")
        assert (await finished(lab.pool, id))["attempt"] == 1


async def enqueue_and_tell(lab: SignalLab, function: Any, number: int, workers: int) -> list[int]:
    """As create_task does, and once the workers have beaten: before that they can claim nothing."""

    async def have_beaten() -> bool:
        return len(await execute(lab.pool, "SELECT id FROM workers")) == workers

    await wait_for(have_beaten, f"{workers} workers are there")
    ids = [await lab.enqueue(function) for _ in range(number)]
    async with lab.pool.connection() as conn:
        await lab.queries.notify(conn, queues=[QUEUE], ids=[], worker_id=None)
    return ids


async def test_a_signal_that_comes_while_its_wait_is_written(lab: SignalLab) -> None:
    """The wait has looked for signals, and is not committed: the signal has to wait for that."""
    id = await lab.enqueue(wait_once)
    gate = Gate(lab.queries, "get_task")
    worker = lab.worker(wait_once)
    worker.queries = gate
    async with working(worker):
        await gate.reached.wait()
        sending = asyncio.create_task(lab.send(id, "go", "just then"))
        await wait_for_lock_wait(lab.pool)
        gate.opened.set()
        await sending
        assert (await finished(lab.pool, id))["output"] == "just then"


async def test_a_wait_that_comes_while_its_signal_is_written(lab: SignalLab) -> None:
    """The signal has found no wait, and is not committed: the wait has to wait for that."""
    is_sent = asyncio.Event()

    async def wait_later(context: Any, input: Any) -> Any:
        await is_sent.wait()
        return await context.wait_for_signal("go")

    id = await lab.enqueue(wait_later)
    async with working(lab.worker(wait_later)):
        await wait_for_status(lab.pool, id, "RUNNING")
        async with lab.pool.connection() as conn, conn.transaction():
            await lab.send_on(conn, id, "go", "just then")
            is_sent.set()
            await wait_for_lock_wait(lab.pool)
        assert (await finished(lab.pool, id))["output"] == "just then"


async def test_a_signal_that_comes_while_its_task_is_suspended(lab: SignalLab) -> None:
    """The task has looked, and is not suspended yet: the signal has to wait, and wakes it."""
    id = await lab.enqueue(wait_once)
    gate = Gate(lab.queries, "suspend_task")
    worker = lab.worker(wait_once)
    worker.queries = gate
    async with working(worker):
        await gate.reached.wait()
        sending = asyncio.create_task(lab.send(id, "go", "just then"))
        await wait_for_lock_wait(lab.pool)
        gate.opened.set()
        await sending
        row = await finished(lab.pool, id)
    assert (row["output"], row["attempt"]) == ("just then", 2)


async def test_a_task_that_is_to_be_suspended_while_its_signal_is_written(lab: SignalLab) -> None:
    """The signal has found the wait, and is not committed: the task has to wait, and stays."""
    set_globals(lab.lesson, {"SUSPEND_AFTER": 3600.0})  # but now:
    contexts: list[Any] = []

    async def wait(context: Any, input: Any) -> Any:
        contexts.append(context)
        return await context.wait_for_signal("go")

    id = await lab.enqueue(wait)
    async with working(lab.worker(wait)):
        await lab.waits(id, "SLEEPING")
        async with lab.pool.connection() as conn, conn.transaction():
            await lab.send_on(conn, id, "go", "just then")
            suspending = asyncio.create_task(contexts[0].suspend(0.0))
            await wait_for_lock_wait(lab.pool)
        await suspending
        row = await finished(lab.pool, id)
    assert (row["output"], row["attempt"]) == ("just then", 1)


async def test_a_signal_for_a_task_between_two_attempts(lab: SignalLab) -> None:
    id = await lab.enqueue(wait_once)
    async with working(lab.worker(wait_once)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
    await execute(lab.pool, "UPDATE tasks SET status = 'QUEUED' WHERE id = %s", id)
    await lab.send(id, "go", "meanwhile")
    assert (await lab.waits(id, "COMPLETED"))["output"] == {"payload": "meanwhile"}
    assert (await lab.finish(id, wait_once))["output"] == "meanwhile"


# Each is received once


async def test_two_signals_and_one_wait(lab: SignalLab) -> None:
    id = await lab.enqueue(wait_once)
    for payload in (1, 2):
        await lab.send(id, "go", payload)
    assert (await lab.finish(id, wait_once))["output"] == 1
    assert await lab.received() == [(1, 1), (2, None)]


async def test_signals_are_received_in_the_order_in_which_they_were_sent(lab: SignalLab) -> None:
    id = await lab.enqueue(wait_twice)
    for payload in (1, 2):
        await lab.send(id, "go", payload)
    assert (await lab.finish(id, wait_twice))["output"] == [1, 2]


async def test_one_signal_and_two_waits(lab: SignalLab) -> None:
    """The older wait has it, by its event; the other one goes on waiting."""
    id = await lab.enqueue(wait_in_parallel)
    async with working(lab.worker(wait_in_parallel)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
        await lab.send(id, "stop", "not for them")
        assert {wait["status"] for wait in await lab.children(id)} == {"SLEEPING"}
        await lab.send(id, "go", 1)
        statuses = [wait["status"] for wait in await lab.children(id)]
        assert statuses == ["COMPLETED", "SLEEPING"]
        await lab.send(id, "go", 2)
        assert (await finished(lab.pool, id))["output"] == [1, 2]
    assert await lab.received() == [("not for them", None), (1, 1), (2, 2)]


async def test_two_signals_at_the_same_moment(lab: SignalLab) -> None:
    id = await lab.enqueue(wait_twice)
    async with working(lab.worker(wait_twice)):
        await lab.waits(id, "SLEEPING")
        async with lab.pool.connection() as conn, conn.transaction():
            await lab.send_on(conn, id, "go", 1)
            sending = asyncio.create_task(lab.send(id, "go", 2))
            await wait_for_lock_wait(lab.pool)
        await sending
        assert (await finished(lab.pool, id))["output"] == [1, 2]


async def test_a_repeated_idempotency_key_changes_nothing(lab: SignalLab) -> None:
    """Whatever has become of the task, and for this task only."""
    id, other = [await lab.enqueue(wait_twice) for _ in range(2)]
    async with working(lab.worker(wait_twice)):
        for _ in range(2):
            await lab.send(id, "go", 1, "first")
        await lab.send(id, "go", 2, "second")
        assert (await finished(lab.pool, id))["output"] == [1, 2]
        await lab.send(id, "stop", 3, "second")
        await lab.lesson.rerun.replay_task(lab.pool, lab.queries, id)
        await lab.send(id, "go", 4, "first")
        await wait_for_status(lab.pool, id, "SUSPENDED")
        await lab.send(id, "go", 5, "first")
        for payload in (6, 7):
            await lab.send(id, "go", payload)  # without a key each is one of its own
        assert (await finished(lab.pool, id))["output"] == [6, 7]
        await lab.send(other, "go", 8, "first")
    assert [payload for payload, _ in await lab.received()] == [1, 2, 6, 7, 8]


# Timeouts


async def test_a_wait_that_timed_out_stays_so(lab: SignalLab) -> None:
    """In each attempt, and in a retry; a retry of its own would not help."""
    row = await lab.run(wait_in_vain, max_retries=3)
    id = row["id"]
    message = "SignalTimeoutError: no signal 'go' has come in time"
    assert (row["status"], row["output"]) == ("FAILED", {"error": message})
    assert row["retry_count"] == 0
    await lab.lesson.rerun.retry_task(lab.pool, lab.queries, id)
    await lab.send(id, "go", "too late")
    assert (await lab.finish(id, wait_in_vain))["output"] == {"error": message}
    assert await lab.received() == [("too late", None)]
    assert [wait["status"] for wait in await lab.children(id)] == ["COMPLETED"]


async def test_a_timeout_can_be_handled(lab: SignalLab) -> None:
    """The late signal is for the next wait."""

    async def ask_again(context: Any, input: Any) -> Any:
        try:
            return await context.wait_for_signal("go", timeout=AT_ONCE)
        except lab.errors.SignalTimeoutError as error:
            return [str(error), await context.wait_for_signal("go", timeout=timedelta(days=1))]

    id = await lab.enqueue(ask_again)
    async with working(lab.worker(ask_again)):
        await lab.waits(id, "COMPLETED")
        await lab.send(id, "go", "late")
        row = await finished(lab.pool, id)
    assert row["output"] == ["no signal 'go' has come in time", "late"]


async def test_a_timeout_that_comes_while_its_signal_is_written(lab: SignalLab) -> None:
    id = await overdue(lab)
    async with lab.pool.connection() as conn, conn.transaction():
        await lab.send_on(conn, id, "go", "in time")
        await wake(lab)  # which waits for nobody
    await wake(lab)
    assert (await lab.waits(id, "COMPLETED"))["output"] == {"payload": "in time"}


async def test_a_signal_that_comes_while_its_wait_times_out(lab: SignalLab) -> None:
    id = await overdue(lab)
    async with lab.pool.connection() as conn, conn.transaction():
        assert [row async for row in lab.queries.wake_tasks(conn, limit=1000)]
        sending = asyncio.create_task(lab.send(id, "go", "too late"))
        await wait_for_lock_wait(lab.pool)
    await sending
    assert (await lab.waits(id, "COMPLETED"))["output"] == {"timed_out": True}
    assert await lab.received() == [("too late", None)]


async def overdue(lab: SignalLab) -> int:
    """A task whose wait is due, and left alone: no housekeeping ends it."""
    set_globals(lab.lesson, {"HEARTBEAT_INTERVAL": 3600.0})
    id = await lab.enqueue(wait_in_vain)
    async with working(lab.worker(wait_in_vain)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
    return id


async def wake(lab: SignalLab) -> None:
    async with lab.pool.connection() as conn:
        assert [row async for row in lab.queries.wake_tasks(conn, limit=1000)] == []


async def test_the_timeout_is_recorded_once_and_the_name_is_part_of_the_key(
    lab: SignalLab,
) -> None:
    async def change_timeout(context: Any, input: Any) -> Any:
        timeout = None if context.attempt == 1 else AT_ONCE
        return await context.wait_for_signal("go", timeout=timeout)

    async def change_name(context: Any, input: Any) -> Any:
        return await context.wait_for_signal("go" if context.attempt == 1 else "stop")

    ids = [await lab.enqueue(change_timeout), await lab.enqueue(change_name)]
    async with working(lab.worker(change_timeout, change_name)):
        for id in ids:
            await wait_for_status(lab.pool, id, "SUSPENDED")
            await lab.send(id, "go", "gone")
        rows = [await finished(lab.pool, id) for id in ids]
    assert rows[0]["output"] == "gone"
    assert "NonDeterminismError" in rows[1]["output"]["error"]
    assert "recorded is SIGNAL_AWAITED 'go'" in rows[1]["output"]["error"]


@pytest.mark.parametrize(
    ("limit", "error"), [(3, "TypeError"), (timedelta(days=365_001), "ValueError")], ids=str
)
async def test_a_timeout_that_is_none(lab: SignalLab, limit: Any, error: str) -> None:
    async def wait_wrongly(context: Any, input: Any) -> Any:
        await context.wait_for_signal("go", timeout=limit)

    row = await lab.run(wait_wrongly)
    assert row["output"]["error"].startswith(error)
    assert await lab.children(row["id"]) == []


# Waits that were ended by hand


async def end_by_hand(lab: SignalLab, wait: dict[str, Any]) -> None:
    by_hand = "UPDATE tasks SET status = 'FAILED', finished_at = now() WHERE id = %s"
    await execute(lab.pool, by_hand, wait["id"])


async def retry(lab: SignalLab, id: int) -> None:
    await lab.lesson.rerun.retry_task(lab.pool, lab.queries, id)


@pytest.mark.parametrize("limit", [None, timedelta(days=1)], ids=str)
async def test_a_retry_of_a_wait_that_was_ended_by_hand_waits_on(
    lab: SignalLab, limit: timedelta | None
) -> None:
    """In the queue nobody would take it, but for a function that happens to have its name."""

    async def wait_long(context: Any, input: Any) -> Any:
        return await context.wait_for_signal("step", timeout=limit)

    id = await lab.enqueue(wait_long)
    async with working(lab.worker(wait_long)):
        wait = await lab.waits(id, "SLEEPING")
        await end_by_hand(lab, wait)
        failed = await finished(lab.pool, id)
        assert failed["output"]["error"].endswith("(step) failed: no error is recorded")
        await retry(lab, id)
        assert await lab.waits(id, "SLEEPING", "QUEUED", "RUNNING") == wait
        await lab.send(id, "step", "came")
        assert (await finished(lab.pool, id))["output"] == "came"
    assert lab.calls == {}


async def test_a_wait_that_was_ended_by_hand_times_out_after_a_retry(lab: SignalLab) -> None:
    """What it then returns has to be there again."""

    async def handle(context: Any, input: Any) -> Any:
        try:
            return await context.wait_for_signal("go", timeout=timedelta(days=1))
        except lab.errors.SignalTimeoutError:
            return "no answer"

    id = await lab.enqueue(handle)
    async with working(lab.worker(handle)):
        wait = await lab.waits(id, "SLEEPING")
        await end_by_hand(lab, wait)
        assert (await finished(lab.pool, id))["status"] == "FAILED"
        await execute(lab.pool, "UPDATE tasks SET wake_at = now() WHERE id = %s", wait["id"])
        await retry(lab, id)
        assert (await finished(lab.pool, id))["output"] == "no answer"


async def test_a_signal_that_came_while_its_wait_was_failed_is_received_after_a_retry(
    lab: SignalLab,
) -> None:
    """At any level: a task below the one that is retried has the wait. A newer signal stays."""

    async def above(context: Any, input: Any) -> Any:
        return await context.run_task("wait_once", None, is_durable=True)

    id = await lab.enqueue(above)
    async with working(lab.worker(above, wait_once)):
        below = (await lab.waits(id, "SUSPENDED"))["id"]
        wait = await lab.waits(below, "SLEEPING")
    await end_by_hand(lab, wait)
    for payload in (1, 2):
        await lab.send(below, "go", payload)
    async with working(lab.worker(above, wait_once)):
        assert (await finished(lab.pool, id))["status"] == "FAILED"
        await retry(lab, id)
        assert (await finished(lab.pool, id))["output"] == 1
    assert await lab.received() == [(1, 1), (2, None)]


# What can be sent, and to whom


@pytest.mark.parametrize(
    "payload",
    [None, False, "", "null", {"timed_out": True}, [1, {"\u20ac": [None]}], "x" * 5_000_000],
    ids=lambda payload: repr(payload)[:20],
)
async def test_payloads(lab: SignalLab, payload: Any) -> None:
    """Before its wait, and after."""
    id = await lab.enqueue(wait_twice)
    await lab.send(id, "go", payload)
    async with working(lab.worker(wait_twice)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
        await lab.send(id, "go", payload)
        assert (await finished(lab.pool, id))["output"] == [payload, payload]


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (math.nan, ValueError),
        (object(), TypeError),
        ("\0", psycopg.DataError),
        ("\ud800", psycopg.DataError),
        ("x" * 2**24, ValueError),
    ],
    ids=["NaN", "no JSON", "NUL", "surrogate", "16 MB"],
)
async def test_payloads_that_are_none(lab: SignalLab, payload: Any, error: type[Exception]) -> None:
    """Nothing is stored, and the sender's transaction can go on."""
    id = await lab.enqueue(wait_once)
    async with lab.pool.connection() as conn, conn.transaction():
        with pytest.raises(error):
            await lab.send_on(conn, id, "go", payload, "key")
        await lab.send_on(conn, id, "go", "better", "key")
    assert await lab.received() == [("better", None)]


async def test_to_whom_nothing_can_be_sent(lab: SignalLab) -> None:
    plain = await enqueue(lab.pool, "step")
    ids = {status: await lab.enqueue(wait_once) for status in ("COMPLETED", "FAILED")}
    for status, id in ids.items():
        await execute(
            lab.pool, f"UPDATE tasks SET status = '{status}', finished_at = now() WHERE id = {id}"
        )
    refused = [
        (0, "there is no task 0"),
        (2**80, f"there is no task {2**80}"),
        (plain, f"task {plain} (step) is not durable"),
        *((id, f"task {id} (wait_once) is {status} already") for status, id in ids.items()),
    ]
    for id, message in refused:
        for key in (None, "key"):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                await lab.send(id, "go", 1, key)
    assert await lab.received() == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "sleep",
        "step",
        "'; DROP TABLE tasks; --",
        "\u20ac %s %(a)s :x",
        random.Random(1).randbytes(8000).hex(),
    ],
    ids=lambda name: name[:20] or "empty",
)
async def test_names_of_any_text(lab: SignalLab, name: str) -> None:
    """A name that tasks have as well makes no task of its wait."""

    async def wait(context: Any, input: Any) -> Any:
        return [await context.wait_for_signal(name) for _ in range(2)]

    id = await lab.enqueue(wait)
    await lab.send(id, name, 1)
    async with working(lab.worker(wait)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
        await lab.send(id, name, 2)
        assert (await finished(lab.pool, id))["output"] == [1, 2]
    assert not lab.calls


# The sender's transaction


async def test_what_is_rolled_back_has_not_happened(lab: SignalLab) -> None:
    id = await lab.enqueue(wait_once)
    async with working(lab.worker(wait_once)):
        await wait_for_status(lab.pool, id, "SUSPENDED")
        before = await lab.tasks()
        async with lab.pool.connection() as conn, conn.transaction():
            await lab.send_on(conn, id, "go", 1, "key")
            raise psycopg.Rollback
        assert await lab.received() == []
        assert await lab.tasks() == before
        async with lab.pool.connection() as conn, conn.transaction():
            await lab.send_on(conn, id, "go", 2, "key")
        assert (await finished(lab.pool, id))["output"] == 2


async def test_one_delete_removes_tasks_with_their_signals(lab: SignalLab) -> None:
    id = await lab.enqueue(wait_once)
    for payload in (1, 2):
        await lab.send(id, "go", payload)
    await lab.finish(id, wait_once)
    await execute(lab.pool, "DELETE FROM tasks WHERE status = 'COMPLETED'")
    assert await lab.tasks() == []
    assert await lab.received() == []


async def test_the_columns_of_signals(lab: SignalLab) -> None:
    rows = await execute(
        lab.pool,
        "SELECT column_name, data_type, is_nullable FROM information_schema.columns"
        " WHERE table_schema = current_schema() AND table_name = 'signals'"
        " ORDER BY ordinal_position",
    )
    assert [tuple(row.values()) for row in rows] == [
        ("id", "bigint", "NO"),
        ("task_id", "bigint", "NO"),
        ("name", "text", "NO"),
        ("payload", "jsonb", "NO"),
        ("idempotency_key", "text", "YES"),
        ("inserted_at", "timestamp with time zone", "NO"),
        ("received_by", "bigint", "YES"),
    ]


# Locks: statement by statement, in every order


class Turns:
    """Queries of which some wait for their player's turn."""

    NAMES = ("deliver_signal", "notify", "suspend_task")

    def __init__(self, queries: Any, player: Player) -> None:
        self.queries = queries
        self.player = player

    def __getattr__(self, name: str) -> Any:
        query = getattr(self.queries, name)

        async def in_turn(*arguments: Any, **keywords: Any) -> Any:
            if name in self.NAMES:
                await self.player.turn()
            try:
                return await query(*arguments, **keywords)
            except psycopg.errors.DeadlockDetected as error:  # the engine would try again
                self.player.deadlocks.append(error)
                raise

        return in_turn if name in (*self.NAMES, "lock_task_to_suspend") else query


class Table:
    """A durable task that waits for a signal and for a step, without a worker."""

    def __init__(self, lab: SignalLab, id: int, context: Any, worker_id: Any) -> None:
        self.lab = lab
        self.id = id
        self.context = context
        self.worker_id = worker_id

    async def deliver(self, player: Player) -> None:
        await player.turn()
        queries = Turns(self.lab.queries, player)
        async with self.lab.pool.connection() as conn:
            await self.lab.lesson.signals.send_signal(conn, queries, self.id, "go", None)

    async def suspend(self, player: Player) -> None:
        await player.turn()
        self.context.queries = Turns(self.lab.queries, player)
        await self.context.suspend(0.0)

    async def wake(self, player: Player) -> None:
        await player.turn()
        async with self.lab.pool.connection() as conn, conn.transaction():
            _ = [row async for row in self.lab.queries.wake_tasks(conn, limit=1000)]
            await player.turn()

    async def complete(self, player: Player) -> None:
        await player.turn()
        (step,) = [row for row in await self.lab.children(self.id) if row["task_name"] == "step"]
        async with self.lab.pool.connection() as conn, conn.transaction():
            owner = (step["id"], self.worker_id, 0)
            assert await write_outcome(self.lab.queries, conn, *owner, "COMPLETED", None) == 1
            await player.turn()


@asynccontextmanager
async def laid(lab: SignalLab, is_due: bool) -> AsyncIterator[Table]:
    """A task that is claimed, and waits."""
    modules = lab.lesson
    id = await enqueue(lab.pool, "order", is_durable=True)
    worker_id = uuid4()
    async with lab.pool.connection() as conn:
        await lab.queries.heartbeat(conn, id=worker_id, display_name="test", max_silence=1e6)
        claimed = lab.queries.poll_tasks(
            conn,
            queue=QUEUE,
            is_durable=True,
            task_names=["order"],
            limit=1,
            worker_id=worker_id,
            inactive_after=1e6,
        )
        (task,) = [modules.models.Task(**row) async for row in claimed]
    children = modules.children.Children(lab.pool, lab.queries, lambda child: None)
    context = modules.durable_context.DurableContext(
        lab.pool, lab.queries, children, task, modules.slots.Slots(1)
    )
    calls = [
        asyncio.create_task(context.wait_for_signal("go", AT_ONCE if is_due else None)),
        asyncio.create_task(context.run_task("step", None)),
    ]
    if lab.lesson.number >= 16:
        calls.append(asyncio.create_task(children.steps.keep_sending()))
    try:
        await wait_for(lambda: len(context._waiting) == 2, "both calls wait")
        await execute(
            lab.pool,
            "UPDATE tasks SET status = 'RUNNING', worker_id = %s WHERE task_name = 'step'"
            " AND status = 'QUEUED'",
            worker_id,
        )
        yield Table(lab, id, context, worker_id)
    finally:
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await execute(lab.pool, "DELETE FROM tasks")


PAIRS = [
    *(("deliver", other) for other in ("deliver", "wake", "suspend", "complete")),
    *(("wake", other) for other in ("wake", "suspend", "complete")),
    ("suspend", "complete"),
]
TURNS = {"deliver": 3, "wake": 2, "suspend": 2, "complete": 2}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
async def test_two_at_once_never_wait_for_each_other(lab: SignalLab, pair: tuple[str, str]) -> None:
    for order in orders(*(TURNS[name] for name in pair)):
        async with laid(lab, is_due="wake" in pair) as table:
            players = [Player(getattr(table, name)) for name in pair]
            outcomes = await play(lab.pool, players, order)
            assert [p.deadlocks for p in players] == [[], []], order
            assert outcomes == [None, None], order
            await check(table, pair, order)


async def check(table: Table, pair: tuple[str, str], order: list[int]) -> None:
    """One outcome, nothing lost, and nobody sleeps on although there is news."""
    lab = table.lab
    if "wake" in pair:  # those that it passed over are for the next round
        async with lab.pool.connection() as conn:
            _ = [row async for row in lab.queries.wake_tasks(conn, limit=1000)]
    children = await lab.children(table.id)
    (wait,) = [child for child in children if child["task_name"] == "go"]
    signals = await execute(
        lab.pool, "SELECT received_by FROM signals WHERE task_id = %s ORDER BY id", table.id
    )
    received = [row["received_by"] for row in signals]
    if wait["output"] == {"payload": None}:
        assert received == [wait["id"], None][: pair.count("deliver")], order
    else:
        assert set(received) <= {None}, order
        assert "wake" in pair or "deliver" not in pair, f"{order}: a signal is lost"
        assert wait["status"] == ("COMPLETED" if "wake" in pair else "SLEEPING"), order
    status = (await get_task(lab.pool, table.id))["status"]
    if any(child["status"] == "COMPLETED" for child in children):
        assert status in ("RUNNING", "QUEUED"), f"{order}: a wake-up is lost"
