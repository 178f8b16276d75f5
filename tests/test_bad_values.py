"""Whatever a task gets, returns or raises: its row ends, with an error, and the worker goes on."""

import asyncio
import math
from contextlib import suppress
from typing import Any

import psycopg
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
    statuses,
    wait_for,
    working,
)
from lesson_loader import LAST
from shared import Pool

# Lesson 03 treats values as 02 does, and 05 to 09 as 04 does.
pytestmark = pytest.mark.only(2, 4, 7, LAST)

CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


class Hostile(dict[str, Any]):
    """What it raises while it is made JSON must not pass for an exit, or for an outage."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(key="value")
        self.error = error

    def items(self) -> Any:
        raise self.error


BAD_OUTPUTS: dict[str, Any] = {
    "NaN": math.nan,
    "Infinity in a list": [1, math.inf],
    "NUL": {"text": "a\0b"},
    "NUL in a key": {"a\0b": 1},
    "lone surrogate": "\ud800",
    "lone surrogate in a key": {"\udfff": 1},
    "set": {1, 2},
    "bytes": b"bytes",
    "object": object(),
    "tuple as key": {(1, 2): 3},
    "circular": CIRCULAR,
    "100,000 deep": nested(100_000),
    "integer of 10,000 digits": 10**10_000,
    "function": nested,
    "exception": ValueError("returned, not raised"),
    "SystemExit on the way": Hostile(SystemExit(3)),
    "OperationalError on the way": Hostile(psycopg.OperationalError("not an outage")),
    "CancelledError on the way": Hostile(asyncio.CancelledError()),
}


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


BAD_ERRORS: dict[str, Exception] = {
    "10 MB": ValueError("long " * 2_000_000),
    "NUL": ValueError("a\0b"),
    "lone surrogates": ValueError("\ud800 and \udfff"),
    "unreadable": UnreadableError(),
    "unspeakable": UnspeakableError(),
    "not text": ValueError(math.nan, CIRCULAR),
    "group 2,000 deep": ExceptionGroup("innermost", [ValueError("x")]),
    "group of 20,000": ExceptionGroup("many", [ValueError("x" * 99)] * 20_000),
}
for _ in range(2_000):
    BAD_ERRORS["group 2,000 deep"] = ExceptionGroup("outer", [BAD_ERRORS["group 2,000 deep"]])


async def echo(input: Any) -> Any:
    return input


async def give_back(input: Any) -> Any:
    return BAD_OUTPUTS[input]


async def give_up(input: Any) -> Any:
    raise BAD_ERRORS[input]


async def errors_of(
    lesson: Any, pool: Pool, queries: Any, function: Any, inputs: list[str], **settings: Any
) -> dict[str, str]:
    """Run a task with each input, and then a good one; the errors of those that failed."""
    ids = {input: await enqueue(pool, function.__name__, input) for input in inputs}
    async with working(make_worker(lesson, pool, queries, function, echo, **settings)) as start:
        rows = {input: await finished(pool, id) for input, id in ids.items()}
        good = await finished(pool, await enqueue(pool, "echo", "still here"))
        assert not start.done()
    assert good["output"] == "still here"
    return {n: row["output"]["error"] for n, row in rows.items() if row["status"] == "FAILED"}


@pytest.mark.since(2)
async def test_an_output_that_is_not_json_or_not_jsonb_fails_the_task(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    errors = await errors_of(lesson, pool, queries, give_back, list(BAD_OUTPUTS))
    assert errors.keys() == BAD_OUTPUTS.keys()
    assert all(errors.values())
    assert "set is not JSON" in errors["set"]


@pytest.mark.since(2)
async def test_an_error_of_any_kind_is_stored_as_readable_text(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    errors = await errors_of(lesson, pool, queries, give_up, list(BAD_ERRORS))
    assert errors.keys() == BAD_ERRORS.keys()
    assert all(0 < len(error) <= 10_000 for error in errors.values())
    assert errors["10 MB"].startswith("ValueError: long long")
    assert "a\ufffdb" in errors["NUL"]
    assert "\ufffd and \ufffd" in errors["lone surrogates"]
    assert "UnreadableError" in errors["unreadable"]
    assert "UnspeakableError" in errors["unspeakable"]


@pytest.mark.since(4)
async def test_a_bad_output_is_a_failure_like_any_other(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    id = await enqueue(pool, "give_back", "NUL", max_retries=2)
    async with working(make_worker(lesson, pool, queries, give_back)):
        row = await finished(pool, id)
    assert (row["status"], row["attempt"], row["retry_count"]) == ("FAILED", 3, 2)


@pytest.mark.since(2)
async def test_a_value_beyond_the_limits_of_postgres_fails_its_task_and_not_the_worker(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """psycopg calls SQLSTATE class 54 an OperationalError, as if the database were away."""
    await execute(pool, "CREATE INDEX ON tasks (CAST(output AS TEXT))")  # 2,704 bytes at most

    async def incompressible(input: Any) -> Any:
        return [hash((n, "salt")) for n in range(2_000)]

    errors = await errors_of(lesson, pool, queries, incompressible, ["large"])
    assert "large" in errors


@pytest.mark.since(7)
async def test_a_child_task_error_without_a_proper_id_fails_its_task_and_not_the_worker(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """There is no child to record. Behind it there may be another error, which has one."""
    ids: dict[str, Any] = {"set": {1, 2}, "NaN": math.nan, "NUL": "\0", "True": True}

    def spoilt(input: str) -> Any:
        error = lesson.errors.ChildTaskError(1, "step", "no")
        error.child_task_id = ids[input]
        return error

    async def spoil(input: Any) -> Any:
        if input == "never made":
            raise lesson.errors.ChildTaskError.__new__(lesson.errors.ChildTaskError)
        raise spoilt(input)

    async def spoil_one(input: Any) -> Any:
        raise ExceptionGroup("two", [spoilt("set"), lesson.errors.ChildTaskError(7, "step", "no")])

    inputs = {*ids, "never made"}
    errors = await errors_of(lesson, pool, queries, spoil, [*inputs])
    assert errors.keys() == inputs
    recorded = "SELECT input FROM tasks WHERE output -> 'child_task_id' IS NOT NULL"
    assert await execute(pool, recorded) == []
    assert (await errors_of(lesson, pool, queries, spoil_one, ["one"])).keys() == {"one"}
    assert await execute(pool, recorded) == [{"input": "one"}]


# The rows that other programs put into the table


@pytest.mark.since(2)
async def test_an_input_that_python_cannot_read_fails_its_task_and_no_other(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """All of them are in the same claim."""
    ids = [await enqueue(pool, "echo", "before")]
    for text in ["9" * 5000, "9" * 400 + ".5", "[" * 5000 + "]" * 5000]:
        (row,) = await execute(
            pool,
            "INSERT INTO tasks (queue, task_name, input) VALUES (%s, 'echo', %s) RETURNING id",
            QUEUE,
            text,
        )
        ids.append(row["id"])
    ids.append(await enqueue(pool, "echo", "after"))
    async with working(make_worker(lesson, pool, queries, echo)):
        rows = [await finished(pool, id) for id in ids]
    first, *bad, last = rows
    assert (first["output"], last["output"]) == ("before", "after")
    if bad[-1]["status"] == "COMPLETED":
        bad.pop()  # newer Pythons read deeper than others
    for row in bad:
        assert row["status"] == "FAILED"
        assert "input" in row["output"]["error"]


ODD_VALUES = [
    ("schedule_timeout_at", "'infinity'"),
    ("schedule_timeout_at", "'-infinity'"),
    ("schedule_timeout_at", "'20000-01-01'"),
    ("schedule_timeout_at", "'0044-03-15 BC'"),
    ("timeout", "INTERVAL '100000000 years'"),
    ("timeout", "INTERVAL '-1 s'"),
    ("timeout", "INTERVAL '0'"),
    ("max_retries", "-1"),
    ("priority", "2147483647"),
]


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.flaw(9, reason="a time or an interval that Python cannot hold ends the workers")
async def test_odd_values_are_refused_by_the_table_or_do_no_harm_to_others(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    for column, value in ODD_VALUES:
        with suppress(psycopg.errors.IntegrityError):
            await execute(
                pool,
                f"""
                INSERT INTO tasks (queue, task_name, input, {column})
                VALUES (%s, 'echo', '1', {value})
                """,
                QUEUE,
            )
    async with working(make_worker(lesson, pool, queries, echo, **QUICK)) as start:
        good_id = await enqueue(pool, "echo")

        async def all_finished() -> bool:
            assert not start.done()
            return (await statuses(pool)).keys() <= {"COMPLETED", "FAILED"}

        await wait_for(all_finished, "all tasks have finished")
        good = await get_task(pool, good_id)
    assert good["status"] == "COMPLETED"


@pytest.mark.since(2)
@pytest.mark.only(2)
async def test_a_bad_input_is_refused_when_it_is_enqueued(lesson: Any, pool: Pool) -> None:
    for name in ["NaN", "Infinity in a list", "NUL", "lone surrogate", "circular", "set"]:
        with pytest.raises((ValueError, TypeError, psycopg.DataError)):
            await enqueue(pool, "echo", BAD_OUTPUTS[name])
    assert await statuses(pool) == {}


# What a function can do to the worker


async def cancel_itself() -> None:
    task = asyncio.current_task()
    assert task
    task.cancel()


MISDEEDS: dict[str, BaseException] = {
    "CancelledError": asyncio.CancelledError("by hand"),
    "SystemExit": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "GeneratorExit": GeneratorExit(),
    "group": BaseExceptionGroup("several", [SystemExit(3), ValueError("x")]),
    "StopIteration": StopIteration(5),
    "StopAsyncIteration": StopAsyncIteration(),
    "TimeoutError": TimeoutError(),
    "bare": BaseException("of its own"),
}


async def misbehave(input: Any) -> Any:
    if input in MISDEEDS:
        raise MISDEEDS[input]
    if input == "a coroutine":
        return asyncio.sleep(0)
    if input == "a wrong argument":
        return await echo(1, 2)  # type: ignore[call-arg]
    await cancel_itself()
    if input == "cancels itself":
        await asyncio.sleep(0)
    return input


@pytest.mark.since(4)
@pytest.mark.flaw(3, reason="a task whose function raises CancelledError stays RUNNING for ever")
async def test_a_function_that_raises_a_cancelled_error_of_its_own_fails_like_any_other(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    retries = {"max_retries": 1} if lesson.number >= 4 else {}
    id = await enqueue(pool, "misbehave", "CancelledError", **retries)
    async with working(make_worker(lesson, pool, queries, misbehave, echo)) as start:
        seconds = DEADLINE if lesson.number >= 4 else 2
        await wait_for(lambda: has_failed(pool, id), "the task has failed", seconds)
        good = await finished(pool, await enqueue(pool, "echo"))
        assert not start.done()
    row = await get_task(pool, id)
    assert "CancelledError: by hand" in row["output"]["error"]
    assert (row["attempt"], row["retry_count"]) == (2, 1)
    assert good["status"] == "COMPLETED"


async def has_failed(pool: Pool, id: int) -> bool:
    return bool((await get_task(pool, id))["status"] == "FAILED")


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.flaw(9, reason="a function that raises what is no Exception ends its worker")
async def test_a_function_that_raises_what_is_no_exception_does_not_stop_the_worker(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    id = await enqueue(pool, "misbehave", "bare")
    async with working(make_worker(lesson, pool, queries, misbehave)) as start:

        async def failed() -> bool:
            assert not start.done()
            return await has_failed(pool, id)

        await wait_for(failed, "the task has failed")


@pytest.mark.since(10)
@pytest.mark.only(10, LAST)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
async def test_nothing_a_function_does_stops_the_worker(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    others = ["a coroutine", "a wrong argument", "cancels itself"]
    inputs = {*MISDEEDS, *others}
    either = "cancels itself and returns"  # may be called COMPLETED or FAILED
    errors = await errors_of(lesson, pool, queries, misbehave, [*inputs, either])
    assert errors.keys() - {either} == inputs
    assert all(errors.values())
    for input in ("cancels itself", either):
        assert "CancelledError" in errors.get(input, "CancelledError")


@pytest.mark.since(2)
async def test_an_error_that_nobody_expected_takes_the_worker_down(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Loudly, rather than leaving it half alive."""
    statement = "ALTER TABLE tasks RENAME COLUMN queue TO topic"
    assert "queue" in await end_after(lesson, pool, queries, statement)


@pytest.mark.since(4)
async def test_a_heartbeat_that_fails_takes_the_worker_down(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    assert "workers" in await end_after(lesson, pool, queries, "DROP TABLE workers")


async def end_after(lesson: Any, pool: Pool, queries: Any, statement: str) -> str:
    """How a worker ends when this statement is executed under it."""
    start = asyncio.create_task(make_worker(lesson, pool, queries, echo, **QUICK).start(QUEUE))
    await finished(pool, await enqueue(pool, "echo"))
    await execute(pool, statement)
    await asyncio.wait({start}, timeout=DEADLINE)
    ended_by_itself = start.done()
    start.cancel()
    with pytest.raises((ExceptionGroup, psycopg.Error)) as raised:
        await start
    assert ended_by_itself
    return describe(raised.value)


def describe(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(describe, error.exceptions))
    return str(error)
