"""python -m shared signal: for people who send a signal by hand."""

import asyncio

import psycopg
import pytest
from psycopg.rows import dict_row

from lesson_loader import LESSONS
from shared import open_pool
from test_shared_tools import tool

TASKS = """
INSERT INTO lesson_14.tasks (queue, task_name, input, is_durable, status)
VALUES ('q', 'order', '{}', true, 'QUEUED'), ('q', 'step', '{}', false, 'QUEUED'),
    ('q', 'order', '{}', true, 'COMPLETED')
"""


@pytest.fixture
def tasks(database: str) -> None:
    """A durable task, a plain one, and one that has finished, in the test's database."""

    async def apply_schema() -> None:
        async with open_pool(LESSONS / "14-signals"):
            pass

    asyncio.run(apply_schema())
    with psycopg.connect(database) as conn:
        conn.execute(TASKS.encode())


def test_a_signal_is_sent(tasks: None, database: str) -> None:
    for arguments in (["approval", '{"by": ["Ann"]}'], ["approval"], ["-- 'x'", '"\u20ac"']):
        end = tool("signal", "14", "1", *arguments)
        assert (end.status, end.stdout, end.stderr) == (0, f"sent {arguments[0]!r} to task 1\n", "")
    with psycopg.connect(database, row_factory=dict_row) as conn:
        rows = conn.execute("SELECT name, payload FROM lesson_14.signals ORDER BY id").fetchall()
    assert rows == [
        {"name": "approval", "payload": {"by": ["Ann"]}},
        {"name": "approval", "payload": None},
        {"name": "-- 'x'", "payload": "\u20ac"},
    ]
    shown = tool("watch", "14").stdout
    assert "signals" in shown
    assert '{"by": ["Ann"]}' in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["14", "2", "go"], "task 2 (step) is not durable"),
        (["14", "3", "go"], "task 3 (order) is COMPLETED already"),
        (["14", "99", "go"], "there is no task 99"),
        (["14", "x", "go"], "TASK_ID is a number, not 'x'"),
        (["14", "1", "go", "hello"], "The payload is not JSON"),
        (["14", "1", "go", "NaN"], "not JSON compliant"),
        (["14", "1", "go", '"\\u0000"'], "cannot be converted to text"),
        (["14", "1", "go", "[" * 100_000], "The payload is not JSON"),
        (["13", "1", "go"], "There are no signals in lesson 13"),
        (["42", "1", "go"], "There are no signals in lesson 42"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_is_one_line(tasks: None, arguments: list[str], message: str) -> None:
    assert message in tool("signal", *arguments).sole_error_line()


def test_a_lesson_that_has_not_been_run(database: str) -> None:
    assert "has that lesson been run?" in tool("signal", "14", "1", "go").sole_error_line()


@pytest.mark.parametrize("arguments", [["14", "1"], ["x", "1", "go"], ["14", "1", "go", "1", "2"]])
def test_usage(arguments: list[str]) -> None:
    end = tool("signal", *arguments)
    assert end.status == 1
    assert "python -m shared signal NN TASK_ID NAME [JSON]" in end.stderr
    assert "Traceback" not in end.stderr
