"""Durable tasks: what completed is not done again, and an attempt does what the one before did."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from durable_helpers import Lab
from helpers import (
    DEADLINE,
    enqueue,
    execute,
    finished,
    get_task,
    set_globals,
    wait_for,
    wait_for_status,
    working,
)
from lesson_loader import LAST
from shared import Pool

# Between them only outages and stopping are added.
pytestmark = [pytest.mark.since(7), pytest.mark.only(7, LAST)]


@pytest.fixture
def lab(lesson: Any, pool: Pool, queries: Any) -> Lab:
    lab = Lab(lesson, pool, queries)
    # No attempt ends because the machine was busy.
    set_globals(lesson, {"INACTIVE_AFTER": 60.0, "SUSPEND_AFTER": 60.0})
    return lab


# Results and replay


@pytest.mark.flaw(6, reason="the worker does not know the log yet")
async def test_a_durable_task_runs_its_children_and_returns_a_result(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        results = [await context.run_task("step", {**input, "n": n}) for n in (1, 2)]
        return [context.task_id, context.attempt, *results]

    row = await lab.run(parent, input={"order": "A-1"})
    steps = [{"order": "A-1", "n": n} for n in (1, 2)]
    assert row["output"] == [row["id"], 1, *steps]
    assert [child["event_id"] for child in await lab.children(row["id"])] == [1, 2]
    assert {task["status"] for task in await lab.tasks()} == {"COMPLETED"}


async def test_a_retry_goes_on_where_the_attempt_before_failed(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        first = await context.run_task("step", "first")
        if context.attempt < 3:
            raise OSError("no luck")
        return [first, await context.run_task("step", "second")]

    row = await lab.run(parent, max_retries=2)
    assert row["output"] == ["first", "second"]
    assert (row["attempt"], row["retry_count"]) == (3, 2)
    assert lab.calls == {"first": 1, "second": 1}
    assert [child["attempt"] for child in await lab.children(row["id"])] == [1, 1]


async def test_the_first_run_and_the_replay_see_the_same_values(lab: Lab) -> None:
    """Both get what went through jsonb; the function's own tuple would differ on replay only."""
    seen = []

    async def python_values(input: Any) -> Any:
        return (1, {2: ("x", None), "big": 10**30, "float": 0.1})

    async def parent(context: Any, input: Any) -> None:
        seen.append(await context.run_task("python_values", None))
        if context.attempt == 1:
            raise OSError("again")

    assert (await lab.run(parent, python_values, max_retries=1))["status"] == "COMPLETED"
    assert repr(seen[0]) == repr(seen[1])
    assert seen[0] == [1, {"2": ["x", None], "big": 10**30, "float": 0.1}]


async def test_an_input_may_differ_between_attempts_in_python_types_only(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        ways: list[Any] = [{1: (1, 2), "k": "v"}, {"k": "v", "1": [1, 2]}]
        result = await context.run_task("step", ways[context.attempt - 1])
        if context.attempt == 1:
            raise OSError("again")
        return result

    row = await lab.run(parent, max_retries=1)
    assert row["output"] == {"1": [1, 2], "k": "v"}
    assert len(await lab.children(row["id"])) == 1


# Event ids


async def with_gather(calls: list[Awaitable[Any]]) -> None:
    await asyncio.gather(*calls)


async def with_as_completed(calls: list[Awaitable[Any]]) -> None:
    for call in asyncio.as_completed(calls):
        await call


async def with_a_task_group(calls: list[Any]) -> None:
    async with asyncio.TaskGroup() as group:
        for call in reversed(calls):
            group.create_task(call)


async def one_by_one_from_the_end(calls: list[Awaitable[Any]]) -> None:
    for call in reversed(calls):
        await call


@pytest.mark.parametrize(
    "wait", [with_gather, with_as_completed, with_a_task_group, one_by_one_from_the_end]
)
async def test_event_ids_are_those_of_the_calls(
    lab: Lab, wait: Callable[[list[Any]], Awaitable[None]]
) -> None:
    """They are taken when run_task is called, however the calls are awaited then."""

    async def parent(context: Any, input: Any) -> None:
        await wait([context.run_task("step", n) for n in range(1, 6)])
        if context.attempt == 1:
            raise OSError("again")

    row = await lab.run(parent, max_retries=1)
    assert row["status"] == "COMPLETED", row["output"]
    children = await lab.children(row["id"])
    assert [(child["event_id"], child["input"]) for child in children] == [
        (n, n) for n in range(1, 6)
    ]
    assert lab.calls == {str(n): 1 for n in range(1, 6)}


async def test_the_next_attempt_may_await_in_another_order(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        calls = [context.run_task("step", n) for n in (1, 2)]
        if context.attempt == 1:
            await one_by_one_from_the_end(calls)
            raise OSError("again")
        return await asyncio.gather(*calls)

    row = await lab.run(parent, max_retries=1)
    assert row["output"] == [1, 2]
    assert lab.calls == {"1": 1, "2": 1}


async def test_the_input_of_a_step_is_the_one_of_the_call(lab: Lab) -> None:
    """Whatever becomes afterwards of the dict that was given, in this attempt or another one."""

    async def parent(context: Any, input: Any) -> Any:
        line: dict[str, Any] = {}
        calls: list[Any] = []
        for n in (1, 2, 3):
            line["n"] = n
            line["before"] = len(calls)
            calls.append(context.run_task("step", line))
        if context.attempt == 2:
            line.clear()
        outputs = await asyncio.gather(*calls)
        if context.attempt == 1:
            raise OSError("again")
        return [output["n"] for output in outputs]

    row = await lab.run(parent, max_retries=1)
    assert row["output"] == [1, 2, 3]
    event_key = lab.lesson.event_log.event_key
    for event in await lab.children(row["id"]):
        assert event["input"] == {"n": event["event_id"], "before": event["event_id"] - 1}
        assert event["key"] == event_key("TASK_STARTED", "step", event["input"])


async def test_an_input_that_changes_while_the_step_starts_is_one_value(lab: Lab) -> None:
    """What is stored is what the key was made of."""

    async def parent(context: Any, input: Any) -> None:
        state = {"n": 0}
        call = asyncio.ensure_future(context.run_task("step", state))
        while not call.done():
            await asyncio.sleep(0)
            state["n"] += 1

    (event,) = await lab.children((await lab.run(parent))["id"])
    assert event["input"] == {"n": 0}
    assert event["key"] == lab.lesson.event_log.event_key("TASK_STARTED", "step", {"n": 0})


async def test_a_bad_input_is_refused_by_the_call_and_takes_no_event_id(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        with pytest.raises((TypeError, ValueError)):
            context.run_task("step", {1, 2})
        return await context.run_task("step", "good")

    row = await lab.run(parent)
    assert row["output"] == "good"
    assert [child["event_id"] for child in await lab.children(row["id"])] == [1]


# Slots


async def count_down(context: Any, input: Any) -> int:
    """A durable task with durable tasks in it, `input` deep."""
    if input == 0:
        return int(await context.run_task("step", 1))
    return 1 + int(await context.run_task("count_down", input - 1, is_durable=True))


async def fan_out(context: Any, input: Any) -> Any:
    calls = [context.run_task("count_down", n % 3, is_durable=True) for n in range(20)]
    return await asyncio.gather(*calls)


async def test_nested_durable_tasks_finish_with_one_slot_for_plain_ones(lab: Lab) -> None:
    """Parents waiting for children must never keep them from running."""
    ids = [await lab.enqueue(count_down, 3) for _ in range(3)]
    wide = await lab.enqueue(fan_out)
    async with working(lab.worker(fan_out, count_down, concurrency=1)):
        assert [(await finished(lab.pool, id))["output"] for id in ids] == [4, 4, 4]
        row = await finished(lab.pool, wide)
    assert row["output"] == [1 + n % 3 for n in range(20)]
    assert {task["attempt"] for task in await lab.tasks()} == {1}


@pytest.mark.since(13)
@pytest.mark.flaw(10, reason="nested durable tasks that fill all durable slots wait for ever")
async def test_nested_durable_tasks_finish_with_one_slot(lab: Lab) -> None:
    id = await lab.enqueue(count_down, 3)
    seconds = DEADLINE if lab.lesson.number >= 13 else 2

    async def has_completed() -> bool:
        return bool((await get_task(lab.pool, id))["status"] == "COMPLETED")

    async with working(lab.worker(count_down, durable_concurrency=1)):
        await wait_for(has_completed, "they have completed", seconds)


async def test_durable_tasks_run_in_as_many_slots_as_they_have(lab: Lab) -> None:
    """Neither more at once, nor fewer."""
    running: set[int] = set()
    at_once = []

    async def busy(context: Any, input: Any) -> None:
        running.add(context.task_id)
        at_once.append(len(running))
        await asyncio.sleep(0.02)
        await context.run_task("step", context.task_id)
        running.remove(context.task_id)

    ids = [await lab.enqueue(busy) for _ in range(8)]
    async with working(lab.worker(busy, durable_concurrency=2)):
        for id in ids:
            assert (await finished(lab.pool, id))["status"] == "COMPLETED"
    assert max(at_once) == 2


async def test_a_waiting_durable_task_takes_no_slot_of_the_plain_ones(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        return await context.run_task("step", context.task_id)

    ids = [await lab.enqueue(parent) for _ in range(10)]
    async with working(lab.worker(parent, concurrency=1)):
        assert [(await finished(lab.pool, id))["output"] for id in ids] == ids


# Children


async def test_a_child_inherits_queue_and_priority(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> None:
        await context.run_task("step", 1)
        await context.run_task("step", 2, max_retries=3, timeout=timedelta(minutes=1))

    id = await lab.enqueue(parent, queue="other", priority=7)
    async with working(lab.worker(parent), queue="other"):
        await finished(lab.pool, id)
    plain, special = await lab.children(id)
    for child in (plain, special):
        assert (child["queue"], child["priority"], child["is_durable"]) == ("other", 7, False)
    assert (plain["max_retries"], plain["timeout"]) == (0, None)
    assert (special["max_retries"], special["timeout"]) == (3, timedelta(minutes=1))


async def test_a_child_uses_its_own_retries(lab: Lab) -> None:
    async def flaky(input: Any) -> str:
        lab.calls["flaky"] += 1
        if lab.calls["flaky"] < 3:
            raise OSError("not yet")
        return "at last"

    async def parent(context: Any, input: Any) -> Any:
        return await context.run_task("flaky", None, max_retries=2)

    row = await lab.run(parent, flaky)
    assert (row["output"], row["attempt"]) == ("at last", 1)
    (child,) = await lab.children(row["id"])
    assert (child["attempt"], child["retry_count"]) == (3, 2)


async def test_a_child_has_its_own_timeout(lab: Lab) -> None:
    async def endless(input: Any) -> None:
        await asyncio.sleep(2 * DEADLINE)

    async def parent(context: Any, input: Any) -> Any:
        try:
            await context.run_task("endless", None, timeout=timedelta(seconds=0.1))
        except lab.errors.ChildTaskError as error:
            return str(error)

    assert "timed out after" in (await lab.run(parent, endless))["output"]


async def test_current_task_is_the_same_in_each_attempt_and_another_for_each_task(lab: Lab) -> None:
    """Its id is the idempotency key, so it has to hold for concurrent tasks as well."""
    seen = []

    async def plain(input: Any) -> int:
        await asyncio.sleep(0.02)
        task = lab.lesson.worker.current_task.get()
        seen.append((task.id, task.attempt))
        if task.attempt == 1:
            raise OSError("again")
        return int(task.id)

    ids = [await enqueue(lab.pool, "plain", max_retries=1) for _ in range(3)]
    async with working(lab.worker(plain)):
        assert [(await finished(lab.pool, id))["output"] for id in ids] == ids
    assert sorted(seen) == [(id, attempt) for id in ids for attempt in (1, 2)]


async def test_a_parent_that_timed_out_waits_for_the_same_child_again(lab: Lab) -> None:
    may_end = asyncio.Event()

    async def slow(input: Any) -> str:
        lab.calls["slow"] += 1
        await may_end.wait()
        return "done"

    async def parent(context: Any, input: Any) -> Any:
        if context.attempt >= 2:
            may_end.set()
        return await context.run_task("slow", None)

    # On a busy machine later attempts may time out as well.
    row = await lab.run(parent, slow, max_retries=100, timeout=timedelta(seconds=0.5))
    assert row["output"] == "done"
    assert row["retry_count"] >= 1
    assert lab.calls == {"slow": 1}


# Failed children


async def test_the_failure_of_a_child_can_be_handled_and_is_seen_again_on_replay(lab: Lab) -> None:
    seen = []

    async def parent(context: Any, input: Any) -> Any:
        try:
            await context.run_task("broken", "mail")
        except lab.errors.ChildTaskError as error:
            seen.append((str(error), error.child_task_id, error.task_name, error.error))
        plan_b = await context.run_task("step", "letter")
        if context.attempt == 1:
            lab.calls["mended"] = 1  # too late: the failure is history
            raise OSError("again")
        return plan_b

    row = await lab.run(parent, max_retries=1)
    assert (row["status"], row["output"]) == ("COMPLETED", "letter")
    assert lab.calls["mail"] == 1
    assert seen[0] == seen[1]
    (child, _) = await lab.children(row["id"])
    text, *parts = seen[0]
    assert parts == [child["id"], "broken", "OSError: mail is broken"]
    assert all(str(part) in text for part in parts)


async def test_the_failure_of_a_child_ends_the_durable_task_for_good(lab: Lab) -> None:
    """Each later attempt would only see it again, so no retry is spent on it."""

    async def parent(context: Any, input: Any) -> None:
        lab.calls["parent"] += 1
        await context.run_task("step", 1)
        await context.run_task("broken", "mail")

    row = await lab.run(parent, max_retries=5)
    assert (row["status"], row["attempt"], row["retry_count"]) == ("FAILED", 1, 0)
    (_, child) = await lab.children(row["id"])
    assert row["output"]["child_task_id"] == child["id"]
    assert "ChildTaskError" in row["output"]["error"]
    assert "mail is broken" in row["output"]["error"]
    assert lab.calls == {"parent": 1, "1": 1, "mail": 1}


async def test_a_failure_in_a_task_group_can_be_compensated(lab: Lab) -> None:
    """On Python 3.11 and 3.12 such a group leaves its asyncio task as if it were cancelled."""

    async def parent(context: Any, input: Any) -> Any:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(context.run_task("broken", "ship"))
        except* lab.errors.ChildTaskError:
            pass
        refund = await context.run_task("step", "refund")
        if context.attempt == 1:
            raise OSError("again")
        return refund

    row = await lab.run(parent, max_retries=1)
    assert (row["status"], row["output"], row["attempt"]) == ("COMPLETED", "refund", 2)


async def test_a_child_may_fail_without_having_been_claimed(lab: Lab) -> None:
    """Somebody has given it a schedule timeout, lest it waits for ever."""

    async def parent(context: Any, input: Any) -> Any:
        return await context.run_task("step", 1)

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent, concurrency=0)):
        (child,) = await wait_for(lambda: lab.children(id), "the child is recorded")
        await execute(
            lab.pool, "UPDATE tasks SET schedule_timeout_at = now() WHERE id = %s", child["id"]
        )
        row = await finished(lab.pool, id)
    assert (row["status"], row["output"]["child_task_id"]) == ("FAILED", child["id"])


async def test_of_several_failures_in_a_group_the_first_is_named(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> None:
        calls = [context.run_task("broken", n) for n in (1, 2, 3)]
        first, *others = await asyncio.gather(*calls, return_exceptions=True)
        inner = BaseExceptionGroup("inner", [first])
        raise BaseExceptionGroup("outer", [OSError("not a child"), inner, *others])

    row = await lab.run(parent, max_retries=5)
    assert (row["status"], row["attempt"]) == ("FAILED", 1)
    assert row["output"]["child_task_id"] == (await lab.children(row["id"]))[0]["id"]
    assert "not a child" in row["output"]["error"]


async def test_a_child_that_nobody_has_registered_waits_for_somebody_who_has(lab: Lab) -> None:
    """While a release is rolled out, the old workers run orders and do not know the new step."""

    async def new_step(input: Any) -> Any:
        return input

    async def parent(context: Any, input: Any) -> Any:
        return await context.run_task("new_step", "by the new release")

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent)):
        (child,) = await wait_for(lambda: lab.children(id), "the child is recorded")
        # The old release goes on with other tasks, so there was time to claim this one.
        for _ in range(3):
            await finished(lab.pool, await enqueue(lab.pool, "step"))
        assert (await get_task(lab.pool, child["id"]))["attempt"] == 0
        async with working(lab.worker(new_step)):
            row = await finished(lab.pool, id)
    assert (row["output"], row["attempt"]) == ("by the new release", 1)


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.flaw(
    9, reason="a child's output that Python cannot read reaches its parent all the same"
)
async def test_an_output_that_python_cannot_read_is_an_error_that_names_the_child(lab: Lab) -> None:
    """It was written by another program, in another language."""

    async def parent(context: Any, input: Any) -> Any:
        return await context.run_task("step", 1)

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent, concurrency=0)):
        (child,) = await wait_for(lambda: lab.children(id), "the child is recorded")
        await execute(
            lab.pool,
            "UPDATE tasks SET status = 'COMPLETED', output = %s, finished_at = now() WHERE id = %s",
            "9" * 5000,
            child["id"],
        )
        row = await finished(lab.pool, id)
    assert row["status"] == "FAILED"
    assert f"output of task {child['id']}" in row["output"]["error"]


NO_ERROR: list[Any] = [None, 5, "text", ["error"], {"reason": "why"}]


@pytest.mark.parametrize("output", NO_ERROR, ids=repr)
@pytest.mark.parametrize("status", ["COMPLETED", "FAILED"])
async def test_a_child_may_be_ended_by_hand(lab: Lab, status: str, output: Any) -> None:
    """With nothing but its status, or with any output: its parent goes on, or fails and says so."""

    async def parent(context: Any, input: Any) -> Any:
        return {"child": await context.run_task("step", 1)}

    id = await lab.enqueue(parent, max_retries=5)
    async with working(lab.worker(parent, concurrency=0)):
        (child,) = await wait_for(lambda: lab.children(id), "the child is recorded")
        await execute(
            lab.pool,
            "UPDATE tasks SET status = %s, output = %s WHERE id = %s",
            status,
            None if output is None else Jsonb(output),
            child["id"],
        )
        row = await finished(lab.pool, id)
    assert (row["status"], row["attempt"]) == (status, 1)
    if status == "COMPLETED":
        assert row["output"] == {"child": output}
    else:
        assert row["output"]["child_task_id"] == child["id"]
        assert f"ChildTaskError: child task {child['id']} (step) failed" in row["output"]["error"]


async def raised_from(error: BaseException) -> None:
    raise OSError("no confirmation") from error


async def raised_from_twice(error: BaseException) -> None:
    try:
        raise KeyError("not there") from error
    except KeyError as second:
        raise OSError("no confirmation") from second


async def in_a_group_raised_from(error: BaseException) -> None:
    raise OSError("no confirmation") from BaseExceptionGroup("both", [KeyError("a"), error])


async def raised_from_within_a_group(error: BaseException) -> None:
    try:
        await raised_from(error)
    except OSError as second:
        raise ExceptionGroup("both", [KeyError("a"), second]) from None


@pytest.mark.parametrize(
    "reraise",
    [raised_from, raised_from_twice, in_a_group_raised_from, raised_from_within_a_group],
)
async def test_an_error_that_a_child_has_caused_keeps_the_childs_id_and_is_not_retried(
    lab: Lab, reraise: Callable[[BaseException], Awaitable[None]]
) -> None:
    async def parent(context: Any, input: Any) -> Any:
        try:
            return await context.run_task("broken", "email")
        except lab.errors.ChildTaskError as error:
            await reraise(error)

    row = await lab.run(parent, max_retries=5)
    assert (row["status"], row["attempt"]) == ("FAILED", 1)
    (child,) = await lab.children(row["id"])
    assert row["output"]["child_task_id"] == child["id"]

    lab.calls["mended"] = 1
    await lab.lesson.rerun.retry_task(lab.pool, lab.queries, row["id"])
    assert (await lab.finish(row["id"], parent))["output"] == "email"
    assert lab.calls["email"] == 2


async def test_finished_tasks_can_be_deleted_in_one_statement(lab: Lab) -> None:
    """With their children and logs. A child goes only together with the log that names it."""
    ids = [await lab.enqueue(count_down, 2) for _ in range(3)]
    left = await lab.enqueue(count_down, 1, queue="another")
    async with working(lab.worker(count_down)):
        for id in ids:
            await finished(lab.pool, id)
    children = "DELETE FROM tasks WHERE NOT is_durable"
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        await execute(lab.pool, children)
    assert len(await lab.tasks()) == 3 * 4 + 1
    await execute(lab.pool, "DELETE FROM tasks WHERE status IN ('COMPLETED', 'FAILED')")
    assert [task["id"] for task in await lab.tasks()] == [left]
    assert await execute(lab.pool, "SELECT * FROM durable_events") == []


# Non-determinism


async def other_name(context: Any) -> None:
    await context.run_task("step", 1)
    await context.run_task("other", 2)


async def other_input(context: Any) -> None:
    await context.run_task("step", 1)
    await context.run_task("step", {"n": 2})


async def other_order(context: Any) -> None:
    await context.run_task("step", 2)
    await context.run_task("step", 1)


async def one_step_less(context: Any) -> None:
    await context.run_task("step", 1)


async def nothing_at_all(context: Any) -> None:
    pass


async def in_a_group(context: Any) -> None:
    await asyncio.gather(context.run_task("step", 1), context.run_task("step", 3))


async def caught(context: Any) -> None:
    for input in (1, 3, 2):
        with suppress(Exception):
            await context.run_task("step", input)


async def caught_and_replaced(context: Any) -> None:
    try:
        await context.run_task("step", 3)
    finally:
        raise OSError("another error, which could be retried")


async def caught_and_cancelled(context: Any) -> None:
    with suppress(Exception):
        await context.run_task("step", 3)
    raise asyncio.CancelledError("not an Exception, and could be retried")


CHANGES = [
    other_name,
    other_input,
    other_order,
    one_step_less,
    nothing_at_all,
    in_a_group,
    caught,
    caught_and_replaced,
]


async def assert_it_fails_for_good(lab: Lab, changed: Callable[[Any], Awaitable[None]]) -> None:
    async def parent(context: Any, input: Any) -> None:
        if context.attempt == 1:
            await context.run_task("step", 1)
            await context.run_task("step", 2)
            raise OSError("again")
        await changed(context)

    row = await lab.run(parent, max_retries=5)
    assert row["status"] == "FAILED"
    assert "NonDeterminismError" in row["output"]["error"]
    assert f"task {row['id']}, event " in row["output"]["error"]
    assert (row["attempt"], row["retry_count"]) == (2, 1), "it was retried"
    assert len(await lab.children(row["id"])) == 2
    assert lab.calls == {"1": 1, "2": 1}


@pytest.mark.parametrize("changed", CHANGES)
async def test_an_attempt_that_does_something_else_fails_for_good(
    lab: Lab, changed: Callable[[Any], Awaitable[None]]
) -> None:
    await assert_it_fails_for_good(lab, changed)


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.flaw(9, reason="a CancelledError of the function's own hides its non-determinism")
async def test_an_attempt_that_hides_what_it_did_fails_for_good(lab: Lab) -> None:
    await assert_it_fails_for_good(lab, caught_and_cancelled)


async def test_from_then_on_each_step_raises_it(lab: Lab) -> None:
    seen = []

    async def parent(context: Any, input: Any) -> None:
        if context.attempt == 1:
            await context.run_task("step", 1)
            raise OSError("again")
        for n in (2, 3):
            try:
                await context.run_task("step", n)
            except Exception as error:
                seen.append(type(error))

    assert (await lab.run(parent, max_retries=1))["status"] == "FAILED"
    assert seen == 2 * [lab.errors.NonDeterminismError]


async def test_an_attempt_may_do_more_than_the_one_before(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        for n in range(context.attempt):
            await context.run_task("step", n)
        if context.attempt < 3:
            raise OSError("again")
        return context.attempt

    assert (await lab.run(parent, max_retries=2))["output"] == 3


@pytest.mark.parametrize("calls", [0, 1])
async def test_a_log_may_stay_empty(lab: Lab, calls: int) -> None:
    """A call that is not awaited is no step."""

    async def parent(context: Any, input: Any) -> str:
        if context.attempt == 1:
            raise OSError("again")
        for _ in range(calls):
            context.run_task("step", 1).close()
        return "no step"

    row = await lab.run(parent, max_retries=1)
    assert (row["output"], await lab.children(row["id"])) == ("no step", [])


async def test_an_event_that_is_left_over_is_noticed_although_one_before_it_is_missing(
    lab: Lab,
) -> None:
    """The log holds event 2 only, since the call with id 1 was never awaited."""

    async def parent(context: Any, input: Any) -> None:
        unused = context.run_task("step", 1)
        if context.attempt == 1:
            await context.run_task("step", 2)
        unused.close()
        if context.attempt == 1:
            raise OSError("again")

    row = await lab.run(parent, max_retries=1)
    assert row["status"] == "FAILED"
    assert "NonDeterminismError" in row["output"]["error"]


# The end of a context


async def test_a_context_ends_with_its_attempt(lab: Lab) -> None:
    left: list[Any] = []

    async def parent(context: Any, input: Any) -> None:
        left.extend([context, context.run_task("step", "called before, awaited after")])

    assert (await lab.run(parent))["status"] == "COMPLETED"
    context, coroutine = left
    with pytest.raises(RuntimeError, match="ended"):
        await coroutine
    with pytest.raises(RuntimeError, match="ended"):
        context.run_task("step", "late")  # the call, before anybody awaits it
    assert len(await lab.tasks()) == 1


def order_that_releases(lab: Lab, way: str, may_end: asyncio.Event) -> Any:
    """An order that, however it ends, calls a step in the end."""

    async def release(context: Any, begun: Any) -> None:
        if way == "detached":
            await asyncio.create_task(release_now(context))
        elif way == "called before":
            await begun
        else:
            await context.run_task("step", "release")

    async def release_now(context: Any) -> None:
        await context.run_task("step", "release")

    async def order(context: Any, input: Any) -> str:
        if context.attempt == 2:
            may_end.set()
        reserve = context.run_task("slow", "reserve")
        begun = context.run_task("step", "release") if way == "called before" else None
        try:
            await reserve
            if way != "called before":
                await context.run_task("step", "charge")
        except asyncio.CancelledError:
            lab.calls["cancelled"] += 1
            if way != "swallowed":
                raise
        finally:
            try:
                await release(context, begun)
            except RuntimeError:
                lab.calls["refused"] += 1
                raise
        return "done"

    return order


WAYS = ["finally", "detached", "called before", "swallowed"]


@pytest.mark.parametrize("way", WAYS)
async def test_an_attempt_that_timed_out_can_start_no_more_steps(lab: Lab, way: str) -> None:
    """They would be recorded where the next attempt asks for others."""
    may_end = asyncio.Event()
    await assert_the_next_attempt_completes(lab, way, may_end, "timeout")


@pytest.mark.parametrize("way", WAYS)
async def test_an_attempt_whose_worker_is_cancelled_can_start_no_more_steps(
    lab: Lab, way: str
) -> None:
    await assert_the_next_attempt_completes(lab, way, asyncio.Event(), "cancel")


@pytest.mark.since(9)
@pytest.mark.only(9, LAST)
@pytest.mark.parametrize("way", WAYS)
async def test_an_attempt_whose_worker_stops_can_start_no_more_steps(lab: Lab, way: str) -> None:
    await assert_the_next_attempt_completes(lab, way, asyncio.Event(), "stop")


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
async def test_a_branch_starts_no_step_when_its_function_has_returned(lab: Lab) -> None:
    """Not even while the log is looked at, before the outcome is written."""
    refused: list[str] = []
    branches: list[asyncio.Task[None]] = []

    async def hasty(context: Any, input: Any) -> str:
        async def branch() -> None:
            await asyncio.sleep(0)  # until the function has returned
            try:
                await context.run_task("too_late", None)
            except RuntimeError as error:
                refused.append(str(error))

        branches.append(asyncio.create_task(branch()))
        return "done"

    async def too_late(input: Any) -> None:
        lab.calls["too_late"] += 1

    id = await lab.enqueue(hasty)
    async with working(lab.worker(hasty, too_late)):
        assert (await finished(lab.pool, id))["output"] == "done"
        await branches[0]
    assert refused == [f"attempt 1 of task {id} has ended"]
    assert len(await lab.tasks()) == 1


async def assert_the_next_attempt_completes(
    lab: Lab, way: str, may_end: asyncio.Event, how: str
) -> None:
    """An attempt that is ended `how` wants to start a step in that `way`; the next one is well."""

    async def slow(input: Any) -> Any:
        lab.calls[input] += 1
        await may_end.wait()
        return input

    is_put_back = how != "cancel" or lab.lesson.number >= 9
    order = order_that_releases(lab, way, may_end)
    options = {"timeout": timedelta(seconds=1.5), "max_retries": 1} if how == "timeout" else {}
    id = await lab.enqueue(order, **options)
    steps = lab.worker(slow, durable_concurrency=0)
    worker = lab.worker(order, concurrency=0)
    async with working(steps):
        async with working(worker) as start:
            await wait_for(lambda: lab.calls["reserve"], "the order waits for its first step")
            if how == "timeout":  # for this attempt; the next one may be slow
                await execute(lab.pool, "UPDATE tasks SET timeout = NULL WHERE id = %s", id)
            if how == "cancel":
                start.cancel()
            elif how == "stop":
                worker.stop()
            await wait_for(lambda: lab.calls["cancelled"], "it is cancelled")
            if how == "timeout":
                row = await finished(lab.pool, id)
            else:  # a second cancellation, as at the end of this block, may interrupt its goodbye
                await asyncio.wait({start}, timeout=DEADLINE)
        assert lab.calls["refused"] == 1, "the step was not refused"
        if how != "timeout":
            assert len(await lab.children(id)) == 1
            assert (await get_task(lab.pool, id))["attempt"] == 1
            if not is_put_back:
                set_globals(lab.lesson, {"INACTIVE_AFTER": 1.0})
                await wait_for_status(lab.pool, id, "QUEUED")
                set_globals(lab.lesson, {"INACTIVE_AFTER": 60.0})
            may_end.set()  # from lesson 13 on the order is suspended, and this is what wakes it
            async with working(lab.worker(order, concurrency=0)):
                row = await finished(lab.pool, id)
    assert (row["status"], row["output"], row["attempt"]) == ("COMPLETED", "done", 2)
    assert row["retry_count"] == (how == "timeout")
    assert lab.calls["reserve"] == 1 or not is_put_back
    assert lab.calls["release"] == 1 or not is_put_back


async def test_a_time_out_is_one_whatever_the_function_raises_after_it(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> None:
        try:
            await asyncio.sleep(2 * DEADLINE)
        finally:
            await context.run_task("step", "release")

    row = await lab.run(parent, timeout=timedelta(seconds=0.2))
    assert (row["status"], await lab.children(row["id"])) == ("FAILED", [])
    assert "timed out after" in row["output"]["error"]


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.flaw(9, reason="what a durable function leaves behind goes on beside its next attempt")
async def test_what_a_failed_gather_leaves_behind_has_ended_before_the_attempt(lab: Lab) -> None:
    """Or it would go on beside the next attempt, and write the same log."""
    may_end = asyncio.Event()
    ends: list[str] = []
    siblings: list[asyncio.Task[None]] = []

    async def slow(input: Any) -> None:
        lab.calls["slow"] += 1
        await may_end.wait()

    async def sibling(context: Any) -> None:
        try:
            await context.run_task("slow", None)
        finally:
            await asyncio.sleep(0.1)
            ends.append("sibling")

    async def failing() -> None:
        await wait_for(lambda: lab.calls["slow"], "the sibling waits for its child")
        raise OSError("no luck")

    async def parent(context: Any, input: Any) -> None:
        if context.attempt == 1:
            siblings.append(asyncio.create_task(sibling(context)))
            await asyncio.gather(*siblings, failing())
        ends.append(f"attempt {context.attempt} begins")
        may_end.set()
        await context.run_task("slow", None)

    row = await lab.run(parent, slow, max_retries=1)
    seen = list(ends)
    for left in siblings:  # on lesson 09: or it is collected as garbage, at any moment of any test
        left.cancel()
    await asyncio.wait(siblings)
    assert (row["status"], row["attempt"]) == ("COMPLETED", 2)
    assert seen == ["sibling", "attempt 2 begins"]
    assert lab.calls["slow"] == 1


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
async def test_what_is_left_behind_and_ignores_its_cancellation_is_abandoned(lab: Lab) -> None:
    set_globals(lab.lesson, {"SHUTDOWN_GRACE": 0.1})
    may_end = asyncio.Event()
    left = []

    async def slow(input: Any) -> None:
        lab.calls["slow"] += 1
        await may_end.wait()

    async def stubborn(context: Any) -> None:
        with suppress(asyncio.CancelledError):
            await context.run_task("slow", None)
        await may_end.wait()

    async def parent(context: Any, input: Any) -> str:
        left.append(asyncio.create_task(stubborn(context)))
        await wait_for(lambda: lab.calls["slow"], "it waits for its child")
        return "done"

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent, slow)):
        try:
            assert (await finished(lab.pool, id))["output"] == "done"
        finally:
            may_end.set()


# Rubbish


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


RUBBISH: list[dict[str, Any]] = [
    {"input": math.nan},
    {"input": -math.inf},
    {"input": {1, 2}},
    {"input": object()},
    {"input": "NUL \0"},
    {"input": "surrogate \ud800"},
    {"input": nested(100_000)},
    {"input": circular()},
    {"input": 10**5000},
    {"task_name": None},
    {"task_name": {"step": 1}},
    {"task_name": "NUL \0"},
    {"task_name": "surrogate \ud800"},
    {"timeout": "soon"},
    {"timeout": 5},
    {"max_retries": "many"},
    {"max_retries": 2**40},
    {"max_retries": None},
    {"is_durable": None},
    {"is_durable": "perhaps"},
]
REFUSED_BY_DOMAINS: list[dict[str, Any]] = [
    {"timeout": timedelta.max},
    {"timeout": timedelta(seconds=-1)},
]


async def test_a_function_may_go_on_from_a_refused_step(lab: Lab) -> None:
    """Only non-determinism ends an attempt for good."""

    async def parent(context: Any, input: Any) -> Any:
        with suppress(psycopg.DataError):
            await context.run_task("NUL \0", None)
        return await context.run_task("step", "after")

    row = await lab.run(parent)
    assert (row["status"], row["output"], row["attempt"]) == ("COMPLETED", "after", 1)


async def test_rubbish_given_to_run_task_fails_that_task_and_no_other(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> None:
        await context.run_task(**{"task_name": "step", "input": None, **rubbish[input]})

    async def good(context: Any, input: Any) -> Any:
        return await context.run_task("step", "fine")

    rubbish = RUBBISH + REFUSED_BY_DOMAINS * (lab.lesson.number >= 10)
    ids = [await lab.enqueue(parent, n) for n in range(len(rubbish))]
    worker = lab.worker(parent, good)
    async with working(worker):
        for id, given in zip(ids, rubbish, strict=True):
            row = await finished(lab.pool, id)
            assert row["status"] == "FAILED", given.keys()
            assert ": " in row["output"]["error"], given.keys()
        id = await lab.enqueue(good)
        assert (await finished(lab.pool, id))["output"] == "fine"
    assert [task["task_name"] for task in await lab.tasks()] == ["parent"] * len(ids) + [
        "good",
        "step",
    ], "rubbish has created a child"


@pytest.mark.parametrize("output", [math.nan, {1}, "\0", nested(100_000)], ids=type)
async def test_a_durable_task_that_returns_rubbish_fails(lab: Lab, output: Any) -> None:
    async def parent(context: Any, input: Any) -> Any:
        await context.run_task("step", 1)
        return output

    row = await lab.run(parent)
    assert row["status"] == "FAILED"
    assert row["output"]["error"]


async def assert_it_is_retried_after(lab: Lab, error: BaseException) -> None:
    async def parent(context: Any, input: Any) -> Any:
        result = await context.run_task("step", context.attempt > 0)
        if context.attempt == 1:
            raise error
        return result

    row = await lab.run(parent, max_retries=1)
    assert (row["status"], row["output"], row["retry_count"]) == ("COMPLETED", True, 1)


async def test_a_durable_task_may_raise_a_cancelled_error_of_its_own(lab: Lab) -> None:
    await assert_it_is_retried_after(lab, asyncio.CancelledError())


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
async def test_a_durable_task_may_raise_anything(lab: Lab, error: BaseException) -> None:
    await assert_it_is_retried_after(lab, error)
