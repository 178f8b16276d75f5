"""The programs of lesson 14: what they print and leave in the database proves their point.

`--breaks` of 13 is well in 14.
"""

import re
from collections import Counter
from typing import Any

import pytest

from helpers import execute
from shared import Pool
from test_durable_demos import charges, demo, nothing_is_left, tasks, twice_at_once
from test_durable_demos import pytestmark as pytestmark


@pytest.mark.since(14)
@pytest.mark.until(14)
async def test_14_an_approval_is_heard_whenever_it_comes(lesson: Any, pool: Pool) -> None:
    """The scenario of 13's --breaks: orders that wait for days, and one that is approved early."""
    for out, lines in await twice_at_once(lesson):
        assert re.search(r"ask_for_approval +SUSPENDED +102", out), out
        assert re.search(r"approval +SLEEPING +102", out)
        assert "plain slots taken: 0 of 100" in out
        assert "durable slots taken: 0 of 1000" in out
        for how in ("before", "after", "twice"):
            assert re.search(rf"^ +{how} +\d+ +approved by \w+ +1 *$", out, re.MULTILINE), out
        assert re.search(r"^ +never +\d+ +cancelled: nobody has answered +0 *$", out, re.MULTILINE)
        assert out.rstrip().endswith("nobody has answered: 100")
        assert lines == []
    outputs = Counter(order["output"] for order in await tasks(pool, "ask_for_approval"))
    assert outputs == {
        "approved by Ann": 2,
        "approved by Bob": 2,
        "approved by Cem": 2,
        "cancelled: nobody has answered": 200,
    }
    waits = Counter(str(wait["output"]) for wait in await tasks(pool, "approval"))
    assert waits["{'timed_out': True}"] == 200
    assert sum(waits.values()) == 206
    signals = await execute(pool, "SELECT received_by, idempotency_key FROM signals")
    assert len(signals) == 6, "a second click is a second signal"
    assert all(signal["received_by"] for signal in signals)
    assert await charges(pool) == [1] * 6
    assert await execute(pool, "SELECT * FROM tasks WHERE status != 'COMPLETED'") == []


@pytest.mark.since(14)
@pytest.mark.until(14)
async def test_14_breaks_an_email_can_be_sent_again_only_with_a_charge(
    lesson: Any, pool: Pool
) -> None:
    out, lines = await demo(lesson, "--breaks")
    assert re.findall(r"^email: order-\w+ (.*)$", out, re.MULTILINE) == [
        "is out of stock",
        "is confirmed",
    ]
    assert re.search(r"task \d+ is COMPLETED, not FAILED", out)
    assert len(re.findall(r"payment \d+: charged", out)) == 2
    assert lines == []
    assert await charges(pool) == [2], "it has charged once"
    assert await nothing_is_left(pool)
