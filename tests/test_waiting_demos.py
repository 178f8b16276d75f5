"""The programs of lesson 11: what they print and leave in the database proves their point.

Its `--breaks` shows what is still wrong there; test_sleeping_demos.py that it is well in lesson 12.
"""

import re
from collections import Counter
from typing import Any

import pytest

from helpers import execute
from shared import Pool
from test_durable_demos import (
    charges,
    demo,
    in_time,
    nothing_is_left,
    orders,
    tasks,
    twice_at_once,
)
from test_durable_demos import pytestmark as pytestmark


@pytest.mark.since(11)
@pytest.mark.until(11)
async def test_11_a_worker_is_told_and_without_its_listener_it_asks(
    lesson: Any, pool: Pool
) -> None:
    """The scenario of 10's --breaks, and a listener that is cut twice."""
    for out, lines in await twice_at_once(lesson):
        assert len(lines) == 2
        assert all("cannot listen" in line for line in lines), lines
        assert re.findall(r"(is there|has been cut|is there again)  +\d+", out) == [
            "is there",
            "has been cut",
            "is there again",
        ]
        waits = dict(re.findall(r"^  (\w.*?)  +(\d+ ms  +\d+) ms", out, re.MULTILINE))
        asking, told = map(int, waits["until a poll claims it"].split(" ms"))
        assert told < asking + 250, "a worker that is not told asks every second, or 500 ms later"
    assert [row["status"] for row in await orders(pool)] == ["COMPLETED"] * 44
    assert await execute(pool, "SELECT * FROM tasks WHERE status != 'COMPLETED'") == []
    nothings = Counter(task["queue"] for task in await tasks(pool, "do_nothing"))
    assert list(nothings.values()) == [3 + 44] * 2, "two steps an order, and three tasks"


@pytest.mark.since(11)
@pytest.mark.until(11)
async def test_11_breaks_a_sleep_begins_anew_with_each_worker(lesson: Any, pool: Pool) -> None:
    async def play() -> tuple[str, list[str]]:
        await execute(pool, "TRUNCATE tasks, payments CASCADE")
        return await demo(lesson, "--breaks")

    def slept(out: str) -> float:
        """How many seconds it says that there were between the two steps."""
        took = re.search(r"it took (\d+\.\d)", out)
        assert took, out
        return float(took[1])

    # A worker that is stopped a second late has an order that sleeps no longer.
    out, lines = await in_time(play, lambda result: slept(result[0]) >= 2 + 2 + 3)
    assert out.count("sleeps for 3 seconds") == 3, "it has to begin once in each worker"
    assert slept(out) >= 2 + 2 + 3
    assert lines == []
    rows = await orders(pool)
    assert [(row["status"], row["attempt"], row["retry_count"]) for row in rows] == [
        ("COMPLETED", 3, 0)
    ]
    assert [row["events"] for row in rows] == [[1, 2]], "the log says nothing of a sleep"
    assert await charges(pool) == [1]
    assert await nothing_is_left(pool)
