"""The programs of lesson 16: what they print and leave in the database proves their point.

`--breaks` of 15 is well in 16.
"""

import re
from typing import Any

import pytest

from helpers import execute
from shared import Pool
from test_durable_demos import charges, nothing_is_left, quiet_demo
from test_durable_demos import pytestmark as pytestmark
from test_fork_demos import branches


@pytest.mark.since(16)
@pytest.mark.until(16)
async def test_16_many_outcomes_are_one_transaction_and_a_bad_one_fails_alone(
    lesson: Any, pool: Pool
) -> None:
    """The scenario of 15's --breaks: 5,000 tasks that do nothing."""
    for _ in range(2):  # on an empty database, and on a used one
        out = await quiet_demo(lesson)
        assert re.search(r"^ +1 +500 +500 +[\d.]+ ms *$", out, re.MULTILINE), out
        batched = re.search(r"^ +100 +5000 +(\d+) +[\d.]+ ms *$", out, re.MULTILINE)
        assert batched, out
        assert 50 <= int(batched[1]) <= 500
        assert re.search(r"bad_or_fine +COMPLETED +99\b", out)
        assert re.search(r"bad_or_fine +FAILED +1\b", out)
        assert out.rstrip().endswith("UntranslatableCharacter: unsupported Unicode escape sequence")
    rows = await execute(
        pool,
        "SELECT task_name, status, attempt, count(*) FROM tasks GROUP BY 1, 2, 3 ORDER BY 1, 2",
    )
    assert [tuple(row.values()) for row in rows] == [
        ("bad_or_fine", "COMPLETED", 1, 198),
        ("bad_or_fine", "FAILED", 1, 2),
        ("nothing", "COMPLETED", 1, 11000),
    ]
    failed = await execute(pool, "SELECT input FROM tasks WHERE status = 'FAILED'")
    assert [row["input"] for row in failed] == [50, 50]
    assert await nothing_is_left(pool)


@pytest.mark.since(16)
@pytest.mark.until(16)
@pytest.mark.parametrize(
    ("flag", "charged", "log"),
    [
        ("--crash", 1, [(1, 1, None), (2, 1, None)]),
        ("--retry", 1, [(1, 1, None), (2, 1, None)]),
        ("--replay", 2, [(1, 1, 2), (1, 2, None), (2, 1, 2), (2, 2, None)]),
        ("--fork", 1, [(1, 1, None), (2, 1, 2), (2, 2, None)]),
    ],
)
async def test_16_keeps_what_it_could_do(
    lesson: Any, pool: Pool, flag: str, charged: int, log: list[tuple[int, int, int | None]]
) -> None:
    await quiet_demo(lesson, flag)
    assert await charges(pool) == [charged]
    assert await branches(pool) == [log]
    assert await nothing_is_left(pool)
