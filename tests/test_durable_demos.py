"""The programs of lessons 05 to 07: what they leave in the database proves their point."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from helpers import execute, wait_for
from shared import Pool, open_pool

pytestmark = pytest.mark.since(5)
SECONDS = 60  # far more than they are allowed to take, for a machine that is busy


@asynccontextmanager
async def program(lesson: Any, *flags: str) -> AsyncIterator[Process]:
    """A lesson's main.py, in a process group of its own, of which nothing may be left behind."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        lesson.path / "main.py",
        *flags,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
    )
    try:
        yield process
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
            await process.communicate()


async def end(process: Process) -> str:
    """Wait for its end, which must be a clean one; return what it has printed."""
    async with asyncio.timeout(SECONDS):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    for word in (b"Traceback", b"Warning", b"WARNING", b"ERROR"):
        assert word not in err, err.decode()
    return out.decode()


async def demo(lesson: Any, *flags: str) -> str:
    async with program(lesson, *flags) as process:
        return await end(process)


async def charges(pool: Pool) -> list[int]:
    """How often the customer of each order was charged."""
    rows = await execute(pool, "SELECT count(*) AS n FROM payments GROUP BY order_id ORDER BY n")
    return [row["n"] for row in rows]


async def orders(pool: Pool) -> list[dict[str, Any]]:
    """The durable tasks of the demos, with the event ids of their logs."""
    return await execute(
        pool,
        """
        SELECT status, attempt, retry_count, output, ARRAY(
            SELECT event_id
            FROM durable_events
            WHERE task_id = id
            ORDER BY event_id
        ) AS events
        FROM tasks
        WHERE is_durable
        """,
    )


def two_attempts_write_one_log(order: dict[str, Any]) -> None:
    assert (order["status"], order["attempt"]) == ("COMPLETED", 2)
    assert order["events"] == [1, 2, 3]


def a_changed_function_is_caught(order: dict[str, Any]) -> None:
    assert (order["status"], order["attempt"]) == ("FAILED", 2)
    assert "NonDeterminismError" in order["output"]["error"]
    assert order["events"] == [1, 2]


def an_order_is_processed(order: dict[str, Any]) -> None:
    # In two attempts, if it was claimed by the other program, which ended first.
    assert (order["status"], order["retry_count"]) == ("COMPLETED", 0)
    assert order["events"] == [1, 2]


POINTS = {5: two_attempts_write_one_log, 6: a_changed_function_is_caught, 7: an_order_is_processed}


async def test_a_demo_proves_its_point_twice_at_once_and_again(lesson: Any, database: str) -> None:
    """The first two start on an empty database, the third on one that has been used."""
    await asyncio.gather(demo(lesson), demo(lesson))
    await demo(lesson)
    async with open_pool(lesson.path) as pool:
        rows = await orders(pool)
        assert len(rows) >= 2
        for row in rows:
            POINTS[lesson.number](row)
        if lesson.number >= 7:
            assert await charges(pool) == [1] * len(rows)


@pytest.mark.since(7)
async def test_a_crash_a_retry_and_a_replay(lesson: Any, database: str) -> None:
    """All at the same time: each has a queue of its own."""
    flags = ["--crash", "--retry", "--replay"]
    outputs = await asyncio.gather(*(demo(lesson, flag) for flag in flags))
    async with open_pool(lesson.path) as pool:
        assert await execute(pool, "SELECT * FROM tasks WHERE status != 'COMPLETED'") == []
        assert await charges(pool) == [1, 1, 2]
        assert [row["attempt"] > 1 for row in await orders(pool)] == [True] * 3
        lost = await execute(pool, "SELECT lost_count FROM tasks WHERE lost_count > 0")
        assert lost, "nobody was killed"
        children = await execute(pool, "SELECT count(*) AS n FROM tasks WHERE NOT is_durable")
        assert children == [{"n": 2 + 2 + 4}]
    assert all("idempotency_key" in output for output in outputs), "the rows are not shown"


@pytest.mark.since(7)
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
async def test_an_order_that_was_stopped_half_way_is_finished_by_the_next_run(
    lesson: Any, pool: Pool, how: str
) -> None:
    async with program(lesson) as first:
        await wait_for(lambda: charges(pool), "the customer is charged", SECONDS)
        first.send_signal(signal.Signals[how])
        if how == "SIGKILL":
            await first.communicate()
        else:
            await end(first)
    assert [row["status"] for row in await orders(pool)] in (["QUEUED"], ["RUNNING"])
    await demo(lesson)
    (order,) = await orders(pool)
    assert (order["status"], order["attempt"], order["retry_count"]) == ("COMPLETED", 2, 0)
    assert order["events"] == [1, 2]
    assert await charges(pool) == [1]
