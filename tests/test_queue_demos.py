"""The demos of lessons 01 to 04: they end well, on an empty and on a used database."""

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg.rows import dict_row

TIME_LIMIT = 60  # seconds: it must end, and how soon is not for a busy machine to say


async def run_demo(lesson: Any) -> str:
    """Run a lesson's main.py; return what it printed, when all is as it should be."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(lesson.path / "main.py"),
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "default"},
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
    )
    async with asyncio.timeout(TIME_LIMIT):
        out, err = (text.decode() for text in await process.communicate())
    assert process.returncode == 0, err
    for line in err.splitlines():
        assert re.match(r"\d\d:\d\d:\d\d\.\d{3} INFO ", line), f"not expected on stderr: {line}"
    assert not session_members(process.pid), "the demo has left processes behind"
    return out


def session_members(leader: int) -> list[Any]:
    """The processes that this one has started, and those have, although it has ended."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (OSError, psutil.Error):
            continue
    return members


def rows(lesson: Any, database: str, statement: str) -> list[dict[str, Any]]:
    """The rows of a query in the lesson's schema."""
    options = f"-c search_path=lesson_{lesson.number:02}"
    with psycopg.connect(database, options=options, row_factory=dict_row) as conn:
        return conn.execute(statement.encode()).fetchall()


TASKS = "SELECT * FROM tasks ORDER BY id"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="looks at POSIX sessions")


@pytest.mark.since(1)
@pytest.mark.until(1)
async def test_demo_01_makes_a_round_trip(lesson: Any, database: str) -> None:
    for times in (1, 2):
        out = await run_demo(lesson)
        for name in ("Python", "psycopg", "aiosql", "Postgres"):
            assert re.search(rf"^{name} +\d+\.\d+", out, re.MULTILINE), out
        assert len(rows(lesson, database, "SELECT * FROM greetings")) == times


@pytest.mark.since(2)
@pytest.mark.since(2)
@pytest.mark.until(2)
async def test_demo_02_runs_one_task(lesson: Any, database: str) -> None:
    """Two at once, on an empty database; and then once more."""
    outs = await asyncio.gather(run_demo(lesson), run_demo(lesson))
    for out in [*outs, await run_demo(lesson)]:
        assert "COMPLETED" in out
    tasks = rows(lesson, database, TASKS)
    assert [task["status"] for task in tasks] == ["COMPLETED"] * 3


@pytest.mark.since(3)
@pytest.mark.since(3)
@pytest.mark.until(3)
async def test_demo_03_never_has_more_than_100_tasks_at_once(lesson: Any, database: str) -> None:
    """Two at once, on an empty database; and then once more."""
    outs = await asyncio.gather(run_demo(lesson), run_demo(lesson))
    for out in [*outs, await run_demo(lesson)]:
        assert "at most 100 of them ran at once, on 100 slots" in out
        assert "1000 different ones were run, none more often than 1 time" in out
    counts = rows(lesson, database, "SELECT status, count(*) FROM tasks GROUP BY status")
    assert counts == [{"status": "COMPLETED", "count": 3000}]


@pytest.mark.since(4)
@pytest.mark.since(4)
@pytest.mark.until(4)
async def test_demo_04_shows_retries_timeouts_priorities_and_a_killed_worker(
    lesson: Any, database: str
) -> None:
    for times in (1, 2):
        out = await run_demo(lesson)
        assert "high, middle, low" in out
        tasks = rows(lesson, database, TASKS)
        # The same rows each time, whatever the runs before have left.
        check_tasks_of_demo_04(tasks[len(tasks) * (times - 1) // times :])
        assert rows(lesson, database, "SELECT * FROM workers") == []


def check_tasks_of_demo_04(tasks: list[dict[str, Any]]) -> None:
    assert {task["status"] for task in tasks} == {"COMPLETED", "FAILED"}
    (killed,) = (task for task in tasks if task["lost_count"])
    assert (killed["status"], killed["retry_count"], killed["attempt"]) == ("COMPLETED", 0, 2)
    (retried,) = (t for t in tasks if t["status"] == "COMPLETED" and t["retry_count"])
    assert retried["attempt"] == retried["retry_count"] + 1
    failed = [task for task in tasks if task["status"] == "FAILED"]
    assert any(task["retry_count"] == task["max_retries"] > 0 for task in failed)
    errors = [task["output"]["error"] for task in failed]
    for text in ("NonRetryableError", "timed out after", "schedule timeout"):
        assert len([error for error in errors if text in error]) == 1
