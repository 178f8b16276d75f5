"""The programs of lessons 12 and 13: what they print and leave in the database proves their point.

`--breaks` of 11 is well in 12, and that of 12 in 13.
"""

import re
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from helpers import execute
from shared import Pool
from test_durable_demos import (
    charges,
    demo,
    nothing_is_left,
    orders,
    quiet_demo,
    tasks,
    twice_at_once,
)
from test_durable_demos import pytestmark as pytestmark


async def counts(pool: Pool) -> Counter[tuple[str, str, int]]:
    """How many tasks have which name, status and attempt."""
    rows = await execute(pool, "SELECT task_name, status, attempt FROM tasks")
    return Counter((row["task_name"], row["status"], row["attempt"]) for row in rows)


@pytest.mark.since(12)
@pytest.mark.until(12)
async def test_12_a_sleep_is_as_long_as_it_was_to_be(lesson: Any, pool: Pool) -> None:
    """The scenario of 11's --breaks, with a worker that is killed and not stopped."""
    for out, lines in await twice_at_once(lesson):
        assert re.search(r"2 seconds later: killed process \d+", out)
        assert re.search(r"sleep +COMPLETED +0 +0\.0 s +3\.0 s", out), out
        assert lines == []
    sleeps = await tasks(pool, "sleep")
    assert [sleep["status"] for sleep in sleeps] == ["COMPLETED"] * 2
    for sleep in sleeps:
        assert sleep["wake_at"] - sleep["inserted_at"] == timedelta(seconds=3)
        assert sleep["finished_at"] >= sleep["wake_at"], "it was cut short"
    rows = await orders(pool)
    assert [(row["status"], row["retry_count"]) for row in rows] == [("COMPLETED", 0)] * 2
    # More often than twice, if a worker on a busy machine was taken for dead.
    assert all(row["attempt"] >= 2 for row in rows), "nobody was killed"
    assert [row["events"] for row in rows] == [[1, 2, 3]] * 2
    assert await charges(pool) == [1, 1]
    assert await nothing_is_left(pool)


@pytest.mark.since(12)
@pytest.mark.until(12)
async def test_12_breaks_orders_that_wait_fill_all_slots(lesson: Any, pool: Pool) -> None:
    out, lines = await demo(lesson, "--breaks")
    assert re.search(r"ask_for_review +QUEUED +1000", out), out
    assert re.search(r"ask_for_review +RUNNING +1000", out)
    assert re.search(r"sleep +SLEEPING +1000", out)
    assert len(re.findall(r"process_order +QUEUED +1", out)) == 2, "one has found a slot"
    assert re.search(r"process_basket +RUNNING +1", out)
    assert lines == []
    assert await execute(pool, "SELECT * FROM tasks") == []
    assert await charges(pool) == []


@pytest.mark.since(13)
@pytest.mark.until(13)
async def test_13_who_waits_holds_no_slot_and_comes_back(lesson: Any, pool: Pool) -> None:
    """The scenario of 12's --breaks, with a tenth of the slots."""
    out = await quiet_demo(lesson)
    for asleep in (0, 100, 2000):
        assert re.search(rf"^ +{asleep} +0 of 100 +0 *$", out, re.MULTILINE), out
    assert re.search(r"ask_for_review +SUSPENDED +2000", out)
    assert re.search(r"sleep +SLEEPING +2000", out)
    assert re.search(r"process_basket +COMPLETED +1", out)
    found = await counts(pool)
    assert found["sleep", "COMPLETED", 0] == 2000
    woken = {
        attempt: number
        for (name, status, attempt), number in found.items()
        if (name, status) == ("ask_for_review", "COMPLETED")
    }
    assert sum(woken.values()) == 2000
    assert min(woken) == 2, "an order has waited in memory"
    assert await charges(pool) == [1]
    assert await execute(pool, "SELECT * FROM tasks WHERE status != 'COMPLETED'") == []


@pytest.mark.since(13)
@pytest.mark.until(13)
async def test_13_breaks_an_approval_that_comes_too_early_is_lost(lesson: Any, pool: Pool) -> None:
    out, lines = await demo(lesson, "--breaks")
    assert re.search(r"order-\w+ is approved, and nobody is asking", out)
    later, in_the_end = re.split("the other 100 are approved", out)
    assert re.search(r"wait_for_approval +RUNNING +100", later), later
    assert re.search(r"charge_payment +QUEUED +1", later), "it has found a slot"
    assert re.search(r"ask_for_approval +COMPLETED +100", in_the_end), in_the_end
    assert re.search(r"wait_for_approval +(QUEUED|RUNNING) +1", in_the_end), "it was heard"
    assert lines == []
    assert await execute(pool, "SELECT * FROM tasks WHERE status != 'COMPLETED'") == []
    assert len(await tasks(pool, "wait_for_approval")) == 101
    assert await charges(pool) == [1]
