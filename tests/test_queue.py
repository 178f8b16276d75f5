"""The queue: claims, fencing, failures, retries and timeouts."""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from helpers import (
    DEADLINE,
    QUEUE,
    QUICK,
    enqueue,
    execute,
    finished,
    get_task,
    make_worker,
    set_globals,
    statuses,
    wait_for,
    working,
)
from lesson_loader import LAST
from shared import Pool

# The worker of lessons 05 and 06 is that of 04; see test_tables.py. Those of 08 and 09 run tasks as
# that of 07 does, those of 10 to 12 as that of 13, which also claims as they do.
pytestmark = pytest.mark.only(2, 3, 4, 7, LAST)

NO_TICK = 3600.0  # seconds, for an interval that must not matter


class Gate:
    """A task function that notes its input, and ends when the test lets it."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.open = asyncio.Event()
        self.running = 0
        self.most_at_once = 0

    def function(self, name: str = "gated") -> Any:
        async def gated(input: Any) -> Any:
            self.started.append(input)
            self.running += 1
            self.most_at_once = max(self.most_at_once, self.running)
            await self.open.wait()
            self.running -= 1
            return input

        gated.__name__ = name
        return gated


async def echo(input: Any) -> Any:
    return input


async def fail(input: Any) -> Any:
    raise ConnectionError("the mail server hung up")


# Claims


@pytest.mark.since(2)
@pytest.mark.only(*range(2, LAST + 1))
async def test_a_task_is_run_with_its_input_and_keeps_its_output(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    value = {"list": [1, 2.5, None, True], "text": "Grüße \U0001f600"}
    id = await enqueue(pool, "echo", value)
    async with working(make_worker(lesson, pool, queries, echo)):
        row = await finished(pool, id)
    assert (row["status"], row["output"]) == ("COMPLETED", value)
    assert row["finished_at"] >= row["inserted_at"]


@pytest.mark.since(2)
async def test_a_worker_takes_tasks_of_its_own_queue_only(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    other = await enqueue(pool, "echo", queue="other")
    mine = await enqueue(pool, "echo")
    async with working(make_worker(lesson, pool, queries, echo)):
        await finished(pool, mine)
    assert (await get_task(pool, other))["status"] == "QUEUED"


@pytest.mark.since(2)
async def test_a_row_that_another_claim_has_locked_is_passed_over(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Nobody waits for it, and it is claimed as soon as the lock is gone."""
    locked = await enqueue(pool, "echo")
    free = await enqueue(pool, "echo")
    async with AsyncExitStack() as stack:
        async with pool.connection() as conn, conn.transaction():
            await conn.execute("UPDATE tasks SET queue = 'x' WHERE id = %s", [locked])
            # Only now: one that has the task already could not write its outcome, nor the others'.
            await stack.enter_async_context(working(make_worker(lesson, pool, queries, echo)))
            free_later = await enqueue(pool, "echo")
            await finished(pool, free)
            await finished(pool, free_later)
            await conn.execute("UPDATE tasks SET queue = %s WHERE id = %s", [QUEUE, locked])
        assert (await finished(pool, locked))["status"] == "COMPLETED"


@pytest.mark.since(3)
async def test_the_oldest_task_is_claimed_first(lesson: Any, pool: Pool, queries: Any) -> None:
    gate = Gate()
    gate.open.set()
    ids = [await enqueue(pool, "gated", n) for n in range(5)]
    async with working(make_worker(lesson, pool, queries, gate.function(), concurrency=1)):
        await finished(pool, ids[-1])
    assert gate.started == [0, 1, 2, 3, 4]


@pytest.mark.since(4)
@pytest.mark.parametrize("concurrency", [1, 10])
async def test_a_higher_priority_comes_first_and_then_the_lower_id(
    lesson: Any, pool: Pool, queries: Any, concurrency: int
) -> None:
    gate = Gate()
    gate.open.set()
    priorities = [1, -5, 3, 2, 3, 1]
    for n, priority in enumerate(priorities):
        await enqueue(pool, "gated", n, priority=priority)
    worker = make_worker(lesson, pool, queries, gate.function(), concurrency=concurrency)
    async with working(worker):
        await wait_for(lambda: len(gate.started) == len(priorities), "all have started")
    assert gate.started == [2, 4, 3, 0, 5, 1]


@pytest.mark.since(3)
@pytest.mark.flaw(2, reason="how many tasks run at once is not limited")
async def test_a_hundred_tasks_run_at_once_by_default_and_no_more(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    gate = Gate()
    for n in range(150):
        await enqueue(pool, "gated", n)
    async with working(make_worker(lesson, pool, queries, gate.function())):
        await wait_for(lambda: len(gate.started) >= 100, "100 have started")
        await asyncio.sleep(0.5)
        assert gate.most_at_once == 100
        assert await statuses(pool) == {"RUNNING": 100, "QUEUED": 50}
        gate.open.set()
        await all_completed(pool, 150)
    assert gate.most_at_once <= 100


async def all_completed(pool: Pool, tasks: int) -> None:
    async def completed() -> bool:
        return await statuses(pool) == {"COMPLETED": tasks}

    await wait_for(completed, f"{tasks} tasks have completed")


@pytest.mark.since(3)
async def test_no_more_tasks_are_claimed_than_there_are_free_slots(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Seen from the database: a claimed task that waits in the worker would be RUNNING too."""
    most_running = 0

    async def watching(input: Any) -> Any:
        nonlocal most_running
        most_running = max(most_running, (await statuses(pool))["RUNNING"])

    for _ in range(20):
        await enqueue(pool, "watching")
    async with working(make_worker(lesson, pool, queries, watching, concurrency=3)):
        await all_completed(pool, 20)
    assert 1 <= most_running <= 3


@pytest.mark.since(3)
@pytest.mark.parametrize("pause", [0, 0.0002])
async def test_slots_that_come_free_are_filled_at_once_while_work_waits(
    lesson: Any, pool: Pool, queries: Any, pause: float
) -> None:
    """One after the other, or many at once: the worker does not wait for its next poll."""
    gate = Gate()
    tasks = 100

    async def pausing(input: Any) -> Any:
        gate.started.append(input)
        await gate.open.wait()
        await asyncio.sleep(input * pause)

    await execute(
        pool,
        """
        INSERT INTO tasks (queue, task_name, input)
        SELECT %s, 'pausing', to_jsonb(n)
        FROM generate_series(1, %s) AS n
        """,
        QUEUE,
        tasks,
    )
    worker = make_worker(lesson, pool, queries, pausing, concurrency=10, **QUICK)
    async with working(worker):
        await wait_for(lambda: len(gate.started) == 10, "all slots are taken")
        ticks = {"POLL_INTERVAL": NO_TICK, "HEARTBEAT_INTERVAL": NO_TICK, "INACTIVE_AFTER": NO_TICK}
        set_globals(lesson, ticks)
        await asyncio.sleep(3 * QUICK["HEARTBEAT_INTERVAL"])  # the waits that had begun are over
        gate.open.set()
        await all_completed(pool, tasks)


class WaitsWithAnAnswer:
    """A lesson's queries; while `pause` is set, a claim waits for it with its answer."""

    def __init__(self, queries: Any) -> None:
        self.queries = queries
        self.pause: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.queries, name)

    async def poll_tasks(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        rows = [row async for row in self.queries.poll_tasks(conn, **values)]
        pause, self.pause = self.pause, None
        if pause:
            await pause()
        for row in rows:
            yield row


@pytest.mark.since(3)
@pytest.mark.only(3, LAST)
async def test_a_slot_that_comes_free_during_a_claim_is_filled_at_once_too(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    started: list[int] = []
    gates = [asyncio.Event() for _ in range(3)]

    async def gated(input: int) -> None:
        started.append(input)
        await gates[input].wait()

    async def end_the_first() -> None:
        set_globals(lesson, dict.fromkeys(QUICK, NO_TICK))
        gates[0].set()
        await finished(pool, first)
        await asyncio.sleep(0.1)

    waiting = WaitsWithAnAnswer(queries)
    first = await enqueue(pool, "gated", 0)
    for n in (1, 2):
        await enqueue(pool, "gated", n)
    async with working(make_worker(lesson, pool, waiting, gated, concurrency=2, **QUICK)):
        await wait_for(lambda: len(started) == 2, "both slots are taken")
        waiting.pause = end_the_first
        await wait_for(lambda: len(started) == 3, "the third has started")
        for gate in gates:
            gate.set()


@pytest.mark.since(2)
async def test_two_workers_never_run_the_same_task(lesson: Any, pool: Pool, queries: Any) -> None:
    runs: Counter[int] = Counter()

    async def count(input: Any) -> Any:
        runs[input] += 1
        await asyncio.sleep(0.001)

    # Nobody is taken for inactive, however long this process stands still.
    settings = {"POLL_INTERVAL": 0.01, "INACTIVE_AFTER": NO_TICK}
    workers = [make_worker(lesson, pool, queries, count, **settings) for _ in range(3)]
    async with working(*workers):
        for n in range(200):
            await enqueue(pool, "count", n)
        await all_completed(pool, 200)
    assert runs == Counter(range(200))


@pytest.mark.since(2)
async def test_tasks_with_names_that_the_worker_does_not_know_are_left_alone(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """While a release is rolled out, its tasks are not for the workers of the one before."""
    new = [await enqueue(pool, "of_the_next_release", n) for n in range(5)]
    before = [await get_task(pool, id) for id in new]
    slots = {"concurrency": 1} if lesson.number >= 3 else {}  # they do not take up the claim either
    old_worker = make_worker(lesson, pool, queries, echo, **slots, **QUICK)
    async with working(old_worker, make_worker(lesson, pool, queries, **QUICK)):
        for n in range(3):
            row = await finished(pool, await enqueue(pool, "echo", n))
            assert (row["status"], row["output"]) == ("COMPLETED", n)
        assert [await get_task(pool, id) for id in new] == before

        async def of_the_next_release(input: Any) -> Any:
            return input

        async with working(make_worker(lesson, pool, queries, of_the_next_release)):
            assert [(await finished(pool, id))["output"] for id in new] == [0, 1, 2, 3, 4]


@pytest.mark.since(4)
async def test_each_claim_adds_one_to_attempt_and_names_the_worker(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    id = await enqueue(pool, "failing", max_retries=2)
    seen: list[tuple[int, Any]] = []

    async def failing(input: Any) -> Any:
        row = await get_task(pool, id)
        seen.append((row["attempt"], row["worker_id"]))
        raise ConnectionError("the mail server hung up")

    worker = make_worker(lesson, pool, queries, failing)
    async with working(worker):
        await finished(pool, id)
        (row,) = await execute(pool, "SELECT id FROM workers")
    assert seen == [(attempt, row["id"]) for attempt in (1, 2, 3)]


@pytest.mark.since(4)
@pytest.mark.only(4, 7, 8, 9, LAST)
async def test_a_worker_whose_start_was_cancelled_can_be_started_again(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """What it has left RUNNING is run again, by whom is all the same."""
    gate = Gate()
    worker = make_worker(lesson, pool, queries, gate.function(), **QUICK, SHUTDOWN_GRACE=0.1)
    id = await enqueue(pool, "gated")
    async with working(worker):
        await wait_for(lambda: gate.started, "the task has started")
    gate.open.set()
    async with working(worker):
        row = await finished(pool, id)
    assert (row["status"], row["attempt"], row["retry_count"]) == ("COMPLETED", 2, 0)


# Fencing


@pytest.mark.since(4)
@pytest.mark.parametrize("outcome", ["returns", "raises", "raises with retries left"])
async def test_a_zombie_changes_nothing_of_a_task_that_another_worker_has_claimed(
    lesson: Any, pool: Pool, queries: Any, outcome: str
) -> None:
    gate = Gate()

    async def zombie(input: Any) -> Any:
        gate.started.append(input)
        await gate.open.wait()
        if outcome != "returns":
            raise ConnectionError("too late")
        return "too late"

    id = await enqueue(pool, "zombie", max_retries=5 if "retries left" in outcome else 0)
    worker = make_worker(lesson, pool, queries, zombie, echo, INACTIVE_AFTER=NO_TICK)
    async with working(worker):
        await wait_for(lambda: gate.started, "the zombie has started")
        # What another worker does when it claims the task after this one seemed dead.
        await execute(
            pool,
            "UPDATE tasks SET worker_id = %s, attempt = attempt + 1 WHERE id = %s",
            await another_worker(pool),
            id,
        )
        before = await get_task(pool, id)
        gate.open.set()
        # Its own later task ends after the zombie's has been dealt with.
        await finished(pool, await enqueue(pool, "echo"))
        await asyncio.sleep(0.2)
        assert await get_task(pool, id) == before


async def another_worker(pool: Pool) -> Any:
    """A worker that only exists in the table, with a heartbeat of now; its id."""
    id = uuid4()
    await execute(pool, "INSERT INTO workers (id, display_name) VALUES (%s, 'another')", id)
    return id


@pytest.mark.since(4)
async def test_a_former_attempt_changes_nothing_when_the_same_worker_has_the_next_one(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    attempts: list[int] = []

    async def gated(input: Any) -> Any:
        attempts.append(len(attempts))
        number = attempts[-1]
        await gates[number].wait()
        return f"from attempt {number + 1}"

    id = await enqueue(pool, "gated")
    async with working(make_worker(lesson, pool, queries, gated, echo)):
        await wait_for(lambda: len(attempts) == 1, "the first attempt has started")
        await execute(pool, "UPDATE tasks SET status = 'QUEUED' WHERE id = %s", id)
        await wait_for(lambda: len(attempts) == 2, "the second attempt has started")
        gates[0].set()
        await finished(pool, await enqueue(pool, "echo"))
        await asyncio.sleep(0.2)
        assert (await get_task(pool, id))["status"] == "RUNNING"
        gates[1].set()
        row = await finished(pool, id)
    assert (row["output"], row["attempt"]) == ("from attempt 2", 2)


@pytest.mark.since(2)
async def test_the_outcome_of_a_task_that_has_finished_meanwhile_is_dropped(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    gate = Gate()
    id = await enqueue(pool, "gated", "too late")
    async with working(make_worker(lesson, pool, queries, gate.function(), echo)):
        await wait_for(lambda: gate.started, "the task has started")
        await execute(
            pool, "UPDATE tasks SET status = 'FAILED', finished_at = now() WHERE id = %s", id
        )
        before = await get_task(pool, id)
        gate.open.set()
        await finished(pool, await enqueue(pool, "echo"))
        await asyncio.sleep(0.1)
        assert await get_task(pool, id) == before


# Failure and retries


@pytest.mark.since(2)
async def test_a_failure_stores_type_and_message(lesson: Any, pool: Pool, queries: Any) -> None:
    id = await enqueue(pool, "fail")
    async with working(make_worker(lesson, pool, queries, fail)):
        row = await finished(pool, id)
    assert row["status"] == "FAILED"
    assert "ConnectionError" in row["output"]["error"]
    assert "the mail server hung up" in row["output"]["error"]
    assert row["finished_at"] is not None


@pytest.mark.since(4)
@pytest.mark.flaw(3, reason="a failure is never retried")
async def test_a_task_that_fails_twice_and_then_succeeds_has_completed(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    calls: list[Any] = []

    async def flaky(input: Any) -> Any:
        calls.append(input)
        if len(calls) < 3:
            raise ConnectionError("the mail server hung up")
        return "sent"

    id = await enqueue(pool, "flaky", **({"max_retries": 5} if lesson.number >= 4 else {}))
    async with working(make_worker(lesson, pool, queries, flaky)):
        row = await finished(pool, id)
    assert (row["status"], row["output"]) == ("COMPLETED", "sent")
    assert (row["retry_count"], row["attempt"], row.get("lost_count", 0)) == (2, 3, 0)


@pytest.mark.since(4)
async def test_a_task_fails_for_good_when_its_retries_are_used_up(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    id = await enqueue(pool, "fail", max_retries=2)
    async with working(make_worker(lesson, pool, queries, fail)):
        row = await finished(pool, id)
    assert row["status"] == "FAILED"
    assert (row["retry_count"], row["attempt"], row.get("lost_count", 0)) == (2, 3, 0)


@pytest.mark.since(4)
async def test_a_task_with_more_retries_behind_it_than_allowed_fails(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Somebody has lowered max_retries, to make an end of it."""
    id = await enqueue(pool, "fail", retry_count=3, max_retries=1)
    async with working(make_worker(lesson, pool, queries, fail)):
        row = await finished(pool, id)
    assert (row["status"], row["retry_count"]) == ("FAILED", 3)


@pytest.mark.since(4)
async def test_a_failure_with_retries_left_puts_the_task_back_with_its_error(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    gate = Gate()
    id = await enqueue(pool, "once", max_retries=1)
    attempts = 0

    async def once(input: Any) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            await enqueue(pool, "gated", priority=2)  # which takes the only slot
            raise ConnectionError("the mail server hung up")

    worker = make_worker(lesson, pool, queries, once, gate.function(), concurrency=1)
    async with working(worker):
        row = await wait_for_status_after_failure(pool, id)
        assert row["output"]["error"].startswith("ConnectionError")
        assert row["finished_at"] is None
        gate.open.set()
        assert (await finished(pool, id))["status"] == "COMPLETED"


async def wait_for_status_after_failure(pool: Pool, id: int) -> dict[str, Any]:
    async def row_with_retry() -> dict[str, Any] | None:
        row = await get_task(pool, id)
        return row if row["retry_count"] and row["status"] == "QUEUED" else None

    row: dict[str, Any] = await wait_for(row_with_retry, f"task {id} is queued for a retry")
    return row


@pytest.mark.since(4)
@pytest.mark.parametrize(
    "how", ["plain", "in a group", "deep in a group", "beside another", "behind"]
)
async def test_a_non_retryable_error_fails_at_once(
    lesson: Any, pool: Pool, queries: Any, how: str
) -> None:
    async def malformed(input: Any) -> Any:
        error = lesson.errors.NonRetryableError("nobody is not an address")
        if how == "plain":
            raise error
        if how == "in a group":
            raise ExceptionGroup("several", [error])
        if how == "beside another":
            raise ExceptionGroup("several", [ValueError("first"), error])
        if how == "deep in a group":
            raise ExceptionGroup("outer", [ExceptionGroup("inner", [error]), ValueError("last")])
        raise ValueError("no such address") from error

    id = await enqueue(pool, "malformed", max_retries=5)
    async with working(make_worker(lesson, pool, queries, malformed)):
        row = await finished(pool, id)
    assert (row["status"], row["attempt"], row["retry_count"]) == ("FAILED", 1, 0)
    message = "no such address" if how == "behind" else "nobody is not an address"
    assert message in row["output"]["error"]


@pytest.mark.since(4)
async def test_a_function_whose_own_task_group_failed_fails_like_any_other(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Python 3.11 and 3.12 leave the asyncio task that ran the group marked as being cancelled."""
    calls = 0

    async def fork(input: Any) -> None:
        nonlocal calls
        calls += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(fail(input))

    id = await enqueue(pool, "fork", max_retries=1)
    async with working(make_worker(lesson, pool, queries, fork)):
        row = await finished(pool, id)
    assert (row["status"], row["retry_count"], calls) == ("FAILED", 1, 2)
    assert "the mail server hung up" in row["output"]["error"]


@pytest.mark.since(4)
async def test_a_group_of_other_errors_is_retried(lesson: Any, pool: Pool, queries: Any) -> None:
    async def unlucky(input: Any) -> Any:
        raise ExceptionGroup("several", [ValueError("one"), ExceptionGroup("in", [OSError("two")])])

    id = await enqueue(pool, "unlucky", max_retries=1)
    async with working(make_worker(lesson, pool, queries, unlucky)):
        row = await finished(pool, id)
    assert row["retry_count"] == 1
    assert "one" in row["output"]["error"]
    assert "two" in row["output"]["error"]


# Timeouts


@pytest.mark.since(4)
async def test_a_task_that_outlives_its_timeout_is_cancelled_and_retried(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    cancelled = 0

    async def slow(input: Any) -> Any:
        nonlocal cancelled
        try:
            await asyncio.sleep(NO_TICK)
        except asyncio.CancelledError:
            cancelled += 1
            raise

    id = await enqueue(pool, "slow", timeout=timedelta(milliseconds=50), max_retries=1)
    async with working(make_worker(lesson, pool, queries, slow)):
        row = await finished(pool, id)
    assert row["status"] == "FAILED"
    assert "timed out after" in row["output"]["error"]
    assert (row["attempt"], row["retry_count"], cancelled) == (2, 1, 2)


@pytest.mark.since(4)
async def test_a_function_that_raises_after_its_timeout_has_timed_out_all_the_same(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    async def complaining(input: Any) -> Any:
        try:
            await asyncio.sleep(NO_TICK)
        finally:
            raise ValueError("cannot clean up")

    id = await enqueue(pool, "complaining", timeout=timedelta(milliseconds=50))
    async with working(make_worker(lesson, pool, queries, complaining)):
        row = await finished(pool, id)
    assert row["status"] == "FAILED"
    assert "timed out after" in row["output"]["error"]


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.flaw(9, reason="a function that swallows its cancellation completes after its timeout")
async def test_a_function_that_swallows_the_cancellation_has_timed_out_all_the_same(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    async def swallowing(input: Any) -> Any:
        try:
            await asyncio.sleep(NO_TICK)
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)
        return "late"

    id = await enqueue(pool, "swallowing", timeout=timedelta(milliseconds=50))
    async with working(make_worker(lesson, pool, queries, swallowing)):
        row = await finished(pool, id)
    assert row["status"] == "FAILED"
    assert "timed out after" in row["output"]["error"]


@pytest.mark.since(4)
async def test_a_task_that_timed_out_has_cleaned_up_before_its_next_attempt(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    events: list[str] = []

    async def tidy(input: Any) -> Any:
        events.append("begins")
        if len(events) > 1:
            return
        try:
            await asyncio.sleep(NO_TICK)
        finally:
            await asyncio.sleep(0.3)
            events.append("has cleaned up")

    id = await enqueue(pool, "tidy", timeout=timedelta(milliseconds=50), max_retries=1)
    async with working(make_worker(lesson, pool, queries, tidy)):
        assert (await finished(pool, id))["status"] == "COMPLETED"
    assert events == ["begins", "has cleaned up", "begins"]


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.flaw(9, reason="a function that ignores its cancellation keeps its slot for ever")
async def test_a_function_that_never_ends_is_abandoned_after_its_timeout(
    lesson: Any, pool: Pool, queries: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its slot comes free: the worker goes on with one slot."""
    gate = Gate()

    async def endless(input: Any) -> Any:
        while not gate.open.is_set():
            with suppress(asyncio.CancelledError):
                await gate.open.wait()

    async def obedient(input: Any) -> Any:
        await asyncio.sleep(NO_TICK)

    obedient_id = await enqueue(pool, "obedient", timeout=timedelta(milliseconds=50))
    id = await enqueue(pool, "endless", timeout=timedelta(milliseconds=50))
    next_id = await enqueue(pool, "echo", "next")
    settings = {"concurrency": 1, "SHUTDOWN_GRACE": 0.5}
    worker = make_worker(lesson, pool, queries, obedient, endless, echo, **settings)
    async with working(worker):
        try:
            seconds = DEADLINE if lesson.number >= 10 else 2
            await wait_for(lambda: is_completed(pool, next_id), "the slot is free", seconds)
        finally:
            gate.open.set()  # or the test would not end either
        row = await finished(pool, id)
    assert row["status"] == "FAILED"
    assert "timed out after" in row["output"]["error"]
    assert f"task {id} ignores its cancellation" in caplog.text
    assert f"task {obedient_id} ignores" not in caplog.text


async def is_completed(pool: Pool, id: int) -> bool:
    return bool((await get_task(pool, id))["status"] == "COMPLETED")


@pytest.mark.since(4)
async def test_a_timeout_error_of_the_tasks_own_is_told_apart(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    async def impatient(input: Any) -> Any:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(NO_TICK)

    async def complaining(input: Any) -> Any:
        raise TimeoutError("the mail server is slow")

    ids = [
        await enqueue(pool, name, timeout=timedelta(seconds=60))
        for name in ("impatient", "complaining")
    ]
    async with working(make_worker(lesson, pool, queries, impatient, complaining)):
        errors = [(await finished(pool, id))["output"]["error"] for id in ids]
    assert all("TimeoutError" in error for error in errors)
    assert not any("timed out after" in error for error in errors)
    assert "the mail server is slow" in errors[1]


@pytest.mark.since(4)
async def test_a_task_that_nobody_claims_before_its_schedule_timeout_fails(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """One is late when the worker comes, the other while the only slot is taken."""
    gate = Gate()
    late = await enqueue_until(pool, "echo", timedelta(seconds=-1))
    worker = make_worker(lesson, pool, queries, gate.function(), echo, concurrency=1, **QUICK)
    async with working(worker):
        await enqueue(pool, "gated")
        await wait_for(lambda: gate.started, "the slot is taken")
        waiting = await enqueue_until(pool, "echo", timedelta(milliseconds=200))
        rows = [await finished(pool, late), await finished(pool, waiting)]
        gate.open.set()
    for row in rows:
        assert (row["status"], row["attempt"]) == ("FAILED", 0)
        assert "schedule" in row["output"]["error"]
        assert row["finished_at"] >= row["schedule_timeout_at"]


async def enqueue_until(pool: Pool, task_name: str, delay: timedelta, **columns: Any) -> int:
    """Enqueue a task with a schedule timeout that far from now."""
    id = await enqueue(pool, task_name, queue="not yet", **columns)
    await execute(
        pool,
        "UPDATE tasks SET queue = %s, schedule_timeout_at = now() + %s WHERE id = %s",
        QUEUE,
        delay,
        id,
    )
    return id


@pytest.mark.since(4)
async def test_a_task_is_not_claimed_after_its_schedule_timeout(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Even if nobody has come to fail it yet."""
    settings = {"HEARTBEAT_INTERVAL": NO_TICK, "INACTIVE_AFTER": NO_TICK, "POLL_INTERVAL": 0.02}
    async with working(make_worker(lesson, pool, queries, echo, **settings)):
        await finished(pool, await enqueue(pool, "echo"))
        late = await enqueue_until(pool, "echo", timedelta(seconds=-1))
        await finished(pool, await enqueue(pool, "echo"))
        assert (await get_task(pool, late))["attempt"] == 0


@pytest.mark.since(4)
async def test_a_task_that_was_claimed_once_has_no_schedule_timeout_any_more(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    calls: list[Any] = []

    async def flaky(input: Any) -> Any:
        calls.append(input)
        if len(calls) == 1:
            await execute(pool, "UPDATE tasks SET schedule_timeout_at = now() - INTERVAL '1 h'")
            raise ConnectionError("the mail server hung up")

    id = await enqueue_until(pool, "flaky", timedelta(hours=1), max_retries=1)
    async with working(make_worker(lesson, pool, queries, flaky, **QUICK)):
        row = await finished(pool, id)
    assert (row["status"], row["attempt"]) == ("COMPLETED", 2)


@pytest.mark.since(4)
async def test_a_retry_may_wait_beyond_the_schedule_timeout(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    late = {"queue": "busy", "schedule_timeout_at": "2000-01-01"}
    retry = await enqueue(pool, "echo", attempt=1, **late)
    unclaimed = await enqueue(pool, "echo", **late)
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)):
        assert (await finished(pool, unclaimed))["status"] == "FAILED"
        assert (await get_task(pool, retry))["status"] == "QUEUED"


# The log


@pytest.mark.since(4)
async def test_each_change_of_a_tasks_state_is_a_line_of_the_log(
    lesson: Any, pool: Pool, queries: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gate = Gate()
    worker = make_worker(lesson, pool, queries, echo, fail, gate.function(), **QUICK)
    lost = await enqueue(pool, "echo", status="RUNNING", attempt=1, worker_id=uuid4())
    expired = await enqueue(pool, "echo", queue="other", schedule_timeout_at="2000-01-01")
    done = await enqueue(pool, "echo")
    failed = await enqueue(pool, "fail", max_retries=1)
    taken = await enqueue(pool, "gated")

    def lines(id: int) -> list[str]:
        name = re.escape(worker.display_name)
        found = re.findall(rf"worker {name}, task {id}, attempt (\d+: [^,\n]+)", caplog.text)
        # A line follows its commit, so the next attempt may be claimed, and say so, before it.
        return sorted(found, key=lambda line: int(line.split(":")[0]))

    async with working(worker):
        for id in (lost, expired, done, failed):
            await finished(pool, id)
        await execute(pool, "UPDATE tasks SET queue = 'other', attempt = 2 WHERE id = %s", taken)
        gate.open.set()
        await finished(pool, await enqueue(pool, "gated"))
        gate.open.clear()
        put_back = await enqueue(pool, "gated")
        await wait_for(lambda: gate.running, "the last one has started")
        # Nor is the last line of a task there as soon as its outcome is.
        last = {done: "1: COMPLETED", failed: "2: FAILED", lost: "2: COMPLETED"}
        last |= {expired: "0: FAILED", taken: "1: is not ours any more"}
        await wait_for(
            lambda: all(line in lines(id) for id, line in last.items()), "all lines are there"
        )

    assert lines(done) == ["1: RUNNING echo", "1: COMPLETED"]
    assert lines(failed) == ["1: RUNNING fail", "1: QUEUED", "2: RUNNING fail", "2: FAILED"]
    assert lines(lost) == ["1: QUEUED", "2: RUNNING echo", "2: COMPLETED"]
    assert lines(expired) == ["0: FAILED"]
    assert f"task {expired}, attempt 0: FAILED, schedule timeout" in caplog.text
    assert f"task {lost}, attempt 1: QUEUED, its worker is inactive" in caplog.text
    assert "1: is not ours any more" in lines(taken)
    expected = ["1: RUNNING gated", "1: QUEUED"] if lesson.number >= 9 else ["1: RUNNING gated"]
    assert lines(put_back) == expected


# register


@pytest.mark.since(2)
def test_a_function_that_is_not_async_is_refused(lesson: Any) -> None:
    def plain(input: Any) -> Any:
        return input

    async def generator(input: Any) -> Any:
        yield input

    worker = lesson.worker.Worker(None, None)
    for function in (plain, generator, lambda input: echo(input)):
        with pytest.raises((TypeError, ValueError), match=r"send_email.*async def"):
            worker.register("send_email", function)


@pytest.mark.since(2)
def test_a_name_that_is_taken_is_refused(lesson: Any) -> None:
    worker = lesson.worker.Worker(None, None)
    worker.register("send_email", echo)
    with pytest.raises(ValueError, match="send_email"):
        worker.register("send_email", fail)
