"""The programs of lesson 15: what they print and leave in the database proves their point.

`--breaks` of 14 is well in 15.
"""

import re
from typing import Any

import pytest

from helpers import execute
from shared import Pool
from test_durable_demos import charges, nothing_is_left, quiet_demo, tasks, twice_at_once
from test_durable_demos import pytestmark as pytestmark


async def branches(pool: Pool) -> list[list[tuple[int, int, int | None]]]:
    """The whole log of each order: event, its branch, and the one that has abandoned it."""
    logs: dict[int, list[tuple[int, int, int | None]]] = {}
    for row in await execute(pool, "SELECT * FROM durable_events ORDER BY event_id, branch_id"):
        event = row["event_id"], row["branch_id"], row["abandoned_in"]
        logs.setdefault(row["task_id"], []).append(event)
    return list(logs.values())


@pytest.mark.since(15)
@pytest.mark.until(15)
async def test_15_a_wrong_email_is_sent_again_and_the_charge_is_not(
    lesson: Any, pool: Pool
) -> None:
    """The scenario of 14's --breaks: an order that went well but for its last step."""
    for out, lines in await twice_at_once(lesson):
        assert re.findall(r"^email: order-\w+ is (.*)$", out, re.MULTILINE) == [
            "sold out",
            "confirmed",
        ]
        assert len(re.findall(r"^payment \d+: ", out, re.MULTILINE)) == 1
        shown = re.findall(
            r"^ +(\d) +{'email': '(.*)', .*}} +(\d) +(\d+) +\w+ *$", out, re.MULTILINE
        )
        children = [child for *_, child in shown]
        assert [row[:3] for row in shown] == [
            ("1", "sold out", "1"),
            ("1", "sold out", "2"),
            # after the fork
            ("1", "sold out", "1"),
            ("1", "sold out", "2"),
            ("2", "confirmed", "1"),
            ("2", "confirmed", "2"),
        ]
        assert children[:2] == children[2:4]
        assert children[4] == children[0], "both branches have the same charge"
        assert children[5] != children[1]
        assert lines == []
    assert await charges(pool) == [1, 1]
    assert await branches(pool) == [[(1, 1, None), (2, 1, 2), (2, 2, None)]] * 2
    outcomes = await execute(pool, "SELECT output FROM task_branches")
    assert [row["output"]["email"] for row in outcomes] == ["sold out"] * 2
    assert [order["output"]["email"] for order in await tasks(pool, "process_order")] == [
        "confirmed",
        "confirmed",
    ]
    assert await nothing_is_left(pool)


@pytest.mark.since(15)
@pytest.mark.until(15)
async def test_15_breaks_each_outcome_is_a_transaction(lesson: Any, pool: Pool) -> None:
    out = await quiet_demo(lesson, "--breaks")
    assert re.search(r"claimed the tasks +5000 +5000 +\d", out), out
    assert re.search(r"by one statement +5000 +1 +\d", out)
    statuses = await execute(pool, "SELECT status, attempt, count(*) FROM tasks GROUP BY 1, 2")
    assert statuses == [{"status": "COMPLETED", "attempt": 1, "count": 5000}]


@pytest.mark.since(15)
@pytest.mark.until(15)
@pytest.mark.parametrize(
    ("flag", "charged", "log"),
    [
        ("--crash", 1, [(1, 1, None), (2, 1, None)]),
        ("--retry", 1, [(1, 1, None), (2, 1, None)]),
        ("--replay", 2, [(1, 1, 2), (1, 2, None), (2, 1, 2), (2, 2, None)]),
        ("--fork", 1, [(1, 1, None), (2, 1, 2), (2, 2, None)]),
    ],
)
async def test_15_keeps_what_it_could_do(
    lesson: Any, pool: Pool, flag: str, charged: int, log: list[tuple[int, int, int | None]]
) -> None:
    await quiet_demo(lesson, flag)
    assert await charges(pool) == [charged]
    assert await branches(pool) == [log]
    assert await nothing_is_left(pool)
