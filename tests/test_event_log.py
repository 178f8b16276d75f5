"""The event log: each event once, by the task's owner only, and the same event in each attempt."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from helpers import enqueue, execute, wait_for
from lesson_loader import LAST
from shared import Connection, Pool

# From 07 on event_log.py and its queries are the same.
pytestmark = [pytest.mark.since(5), pytest.mark.only(5, 6, LAST)]

CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)


class Log:
    """A lesson's event log, called with as many arguments as the lesson has."""

    def __init__(self, lesson: Any, pool: Pool, queries: Any) -> None:
        self.lesson = lesson
        self.pool = pool
        self.queries = queries
        self.log = lesson.event_log.EventLog(queries)
        self.children_created = 0

    async def claim(self, id: int) -> Any:
        """Take the task as a worker does, for a worker of its own."""
        rows = await execute(
            self.pool,
            """
            UPDATE tasks
            SET status = 'RUNNING', worker_id = %s, attempt = attempt + 1
            WHERE id = %s
            RETURNING *
            """,
            uuid4(),
            id,
        )
        return self.lesson.models.Task(**rows[0])

    async def new_task(self) -> Any:
        return await self.claim(await enqueue(self.pool, "process_order"))

    async def append_on(
        self,
        conn: Connection,
        task: Any,
        event_id: int = 1,
        task_name: str = "charge",
        input: Any = None,
        kind: str = "TASK_STARTED",
    ) -> Any:
        async def create_child() -> int:
            self.children_created += 1
            cursor = await conn.execute(
                "INSERT INTO tasks (queue, task_name, input) VALUES ('q', 'c', '{}') RETURNING id"
            )
            row = await cursor.fetchone()
            assert row
            return int(row["id"])

        arguments: list[Any] = [task_name, input][: 2 * (self.lesson.number >= 6)]
        if self.lesson.number >= 7:
            arguments.append(create_child)
        return await self.log.append(conn, task, event_id, kind, *arguments)

    async def append(self, task: Any, event_id: int = 1, *event: Any) -> Any:
        async with self.pool.connection() as conn, conn.transaction():
            return await self.append_on(conn, task, event_id, *event)

    async def rows(self) -> list[dict[str, Any]]:
        """All events, and the transaction that wrote each."""
        return await execute(self.pool, "SELECT xmin::TEXT, * FROM durable_events ORDER BY 2, 3")


@pytest.fixture
def log(lesson: Any, pool: Pool, queries: Any) -> Log:
    return Log(lesson, pool, queries)


async def test_an_event_is_recorded_once(log: Log) -> None:
    task = await log.new_task()
    first, was_recorded = await log.append(task)
    assert (first.task_id, first.event_id, first.kind) == (task.id, 1, "TASK_STARTED")
    assert was_recorded is False

    rows = await log.rows()
    again, was_recorded = await log.append(task)
    assert was_recorded is True
    assert again == first
    assert await log.rows() == rows, "it has written"


async def test_the_next_attempt_finds_what_the_one_before_recorded(log: Log) -> None:
    task = await log.new_task()
    recorded = [await log.append(task, id) for id in (1, 2)]
    successor = await log.claim(task.id)
    found = [await log.append(successor, id) for id in (1, 2, 3)]
    assert [event for event, _ in found[:2]] == [event for event, _ in recorded]
    assert [was_recorded for _, was_recorded in found] == [True, True, False]


async def test_two_tasks_do_not_share_a_log(log: Log) -> None:
    assert (await log.append(await log.new_task()))[1] is False
    assert (await log.append(await log.new_task()))[1] is False


@pytest.mark.since(7)
async def test_a_child_is_created_for_a_new_event_only(log: Log) -> None:
    task = await log.new_task()
    event, _ = await log.append(task)
    again, _ = await log.append(await log.claim(task.id))
    assert log.children_created == 1
    assert again.child_task_id == event.child_task_id
    await log.append(task := await log.claim(task.id), 2)
    assert log.children_created == 2


@pytest.mark.parametrize(
    "what_happened",
    [
        "worker_id = gen_random_uuid()",
        "attempt = attempt + 1",
        "status = 'COMPLETED'",
        "status = 'FAILED'",
        "status = 'QUEUED'",
    ],
)
async def test_a_zombie_is_refused(log: Log, what_happened: str) -> None:
    """Any one of the three, worker, attempt and status, is enough: also for an event recorded."""
    task = await log.new_task()
    await log.append(task)
    await execute(log.pool, f"UPDATE tasks SET {what_happened}")
    rows = await log.rows()
    for event_id in (1, 2):
        with pytest.raises(log.lesson.errors.TaskNotOwnedError, match=str(task.id)):
            await log.append(task, event_id)
    assert await log.rows() == rows
    assert log.children_created == (log.lesson.number >= 7)


Meanwhile = Callable[[Connection], Awaitable[Any]]


async def while_it_waits(log: Log, task: Any, first: Meanwhile, commit: bool = True) -> Any:
    """Append while the transaction of `first` holds the task's row: the outcome of the append."""
    async with log.pool.connection() as one, log.pool.connection() as two:

        async def append_second() -> Any:
            async with two.transaction():
                return await log.append_on(two, task)

        async def is_waiting() -> bool:
            pids = two.info.backend_pid, one.info.backend_pid
            (row,) = await execute(log.pool, "SELECT %s = ANY (pg_blocking_pids(%s))", *pids[::-1])
            return bool(next(iter(row.values())))

        async with one.transaction(force_rollback=not commit):
            await first(one)
            second = asyncio.create_task(append_second())
            await wait_for(is_waiting, "the second append waits for the first transaction")
        return (await asyncio.gather(second, return_exceptions=True))[0]


async def test_two_appends_at_the_same_time_record_one_event(log: Log) -> None:
    """The second waits for the first's lock, and must not read the log as it was before."""
    task = await log.new_task()
    event, was_recorded = await while_it_waits(log, task, lambda conn: log.append_on(conn, task))
    assert was_recorded is True
    assert event.event_id == 1
    assert len(await log.rows()) == 1
    assert log.children_created == (log.lesson.number >= 7)


async def test_an_append_goes_on_if_the_one_before_it_was_rolled_back(log: Log) -> None:
    task = await log.new_task()
    _, was_recorded = await while_it_waits(
        log, task, lambda conn: log.append_on(conn, task), commit=False
    )
    assert was_recorded is False
    assert len(await log.rows()) == 1


async def test_an_append_that_waited_is_refused_if_the_task_was_taken_meanwhile(log: Log) -> None:
    task = await log.new_task()
    take = "UPDATE tasks SET attempt = attempt + 1"
    outcome = await while_it_waits(log, task, lambda conn: conn.execute(take))
    assert isinstance(outcome, log.lesson.errors.TaskNotOwnedError)
    assert await log.rows() == []


async def test_a_task_cannot_be_taken_while_its_owner_appends(log: Log) -> None:
    """The row stays locked until the caller's transaction ends, or two attempts could write."""
    task = await log.new_task()
    async with log.pool.connection() as conn, conn.transaction():
        await log.append_on(conn, task)
        free = await execute(log.pool, "SELECT id FROM tasks FOR NO KEY UPDATE SKIP LOCKED")
        assert task.id not in [row["id"] for row in free]


async def test_event_and_child_are_rolled_back_with_the_transaction_of_the_caller(log: Log) -> None:
    task = await log.new_task()
    async with log.pool.connection() as conn, conn.transaction(force_rollback=True):
        await log.append_on(conn, task)
    assert await log.rows() == []
    assert [row["id"] for row in await execute(log.pool, "SELECT id FROM tasks")] == [task.id]


@pytest.mark.since(6)
@pytest.mark.parametrize(
    ("recorded", "asked_for"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}),
        ((1, (2, 3)), [1, [2, 3]]),
        ({1: "x", 10: "y", 9: "z"}, {"9": "z", "10": "y", "1": "x"}),
        ("\u00e9 \U0001f600", "\u00e9 \U0001f600"),
    ],
    ids=["order of keys", "tuples", "int keys", "not ascii"],
)
async def test_equal_json_is_the_same_event(log: Log, recorded: Any, asked_for: Any) -> None:
    task = await log.new_task()
    await log.append(task, 1, "charge", recorded)
    _, was_recorded = await log.append(await log.claim(task.id), 1, "charge", asked_for)
    assert was_recorded is True


@pytest.mark.since(6)
@pytest.mark.flaw(5, reason="that the function has changed goes unnoticed")
@pytest.mark.parametrize(
    "asked_for",
    [
        ("refund", {"amount": 42}),
        ("charge", {"amount": 43}),
        ("charge", {"amount": "42"}),
        ("charge", {}),
        ("charge", None),
        ("charge", [{"amount": 42}]),
        ("charge", {"amount": 42}, "ANOTHER_KIND"),
    ],
    ids=str,
)
async def test_another_event_than_the_recorded_one_is_refused(
    log: Log, asked_for: tuple[Any, ...]
) -> None:
    task = await log.new_task()
    await log.append(task, 3, "charge", {"amount": 42})
    rows = await log.rows()
    errors = log.lesson.errors
    refusal = getattr(errors, "NonDeterminismError", errors.NonRetryableError)
    with pytest.raises(refusal) as raised:
        await log.append(await log.claim(task.id), 3, *asked_for)
    assert await log.rows() == rows

    assert issubclass(refusal, errors.NonRetryableError)
    text = str(raised.value)
    assert f"task {task.id}" in text
    assert "event 3" in text
    assert asked_for[0] in text
    assert "TASK_STARTED" in text


@pytest.mark.since(7)
async def test_the_refusal_names_what_was_recorded_and_what_was_asked_for(log: Log) -> None:
    task = await log.new_task()
    await log.append(task, 1, "charge")
    await execute(
        log.pool, "UPDATE tasks SET task_name = 'was', input = '21' WHERE id > %s", task.id
    )
    with pytest.raises(log.lesson.errors.NonDeterminismError) as raised:
        await log.append(task, 1, "refund", 43)
    for part in ("was", "21", "refund", "43"):
        assert part in str(raised.value)


@pytest.mark.since(6)
@pytest.mark.parametrize(
    "input", [math.nan, math.inf, {1, 2}, Decimal(1), CIRCULAR, b"x", {(1, 2): 3}], ids=repr
)
async def test_what_is_not_json_raises_and_writes_nothing(log: Log, input: Any) -> None:
    task = await log.new_task()
    async with log.pool.connection() as conn, conn.transaction():
        with pytest.raises((TypeError, ValueError)):
            await log.append_on(conn, task, 1, "charge", input)
        await log.append_on(conn, task, 1, "charge", "the transaction is still usable")
    assert len(await log.rows()) == 1
