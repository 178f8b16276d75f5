"""The programs of lessons 01 to 06: they prove their point, and `--breaks` what is still wrong.

Each failure that a `--breaks` shows is followed by the test that the lesson which mends it is well.
"""

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg.rows import dict_row

from durable_helpers import Lab
from helpers import execute, make_worker, statuses, wait_for, working
from programs import run_program
from shared import Pool

if sys.platform != "win32":
    import resource

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="looks at POSIX sessions")

TIME_LIMIT = 90  # seconds: it must end, and how soon is not for a busy machine to say
TASKS = "SELECT * FROM tasks ORDER BY id"
PAYMENTS = "SELECT count(*) FROM payments GROUP BY order_id"


def only_lesson(number: int) -> Callable[[Any], Any]:
    """This test is about the program of one lesson."""

    def mark(test: Any) -> Any:
        return pytest.mark.since(number)(pytest.mark.until(number)(test))

    return mark


async def run_demo(lesson: Any, *flags: str, files: int = 0) -> str:
    """Run a lesson's main.py; return what it printed, when all is as it should be.

    `files` limits how many files it may have open.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(lesson.path / "main.py"),
        *flags,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "default"},
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
        preexec_fn=limit if files else None,
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


async def three_times(lesson: Any) -> list[str]:
    """Two at once, on an empty database, and one more on one that has been used."""
    outs = await asyncio.gather(run_demo(lesson), run_demo(lesson))
    return [*outs, await run_demo(lesson)]


async def breaks_twice(lesson: Any) -> list[str]:
    """Two at once, on an empty database."""
    return list(await asyncio.gather(*(run_demo(lesson, "--breaks") for _ in range(2))))


def rows(lesson: Any, database: str, statement: str) -> list[dict[str, Any]]:
    """The rows of a query in the lesson's schema."""
    options = f"-c search_path=lesson_{lesson.number:02}"
    with psycopg.connect(database, options=options, row_factory=dict_row) as conn:
        return conn.execute(statement.encode()).fetchall()


def tasks_by_run(lesson: Any, database: str) -> list[list[dict[str, Any]]]:
    """The tasks of each run, which has a queue of its own. None of them may be left open."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for task in rows(lesson, database, TASKS):
        assert task["status"] in ("COMPLETED", "FAILED"), task
        runs.setdefault(task["queue"], []).append(task)
    return list(runs.values())


def payments_by_order(lesson: Any, database: str) -> list[int]:
    return [row["count"] for row in rows(lesson, database, PAYMENTS)]


# 01: a query goes to Postgres and back


@only_lesson(1)
async def test_demo_01_makes_a_round_trip(lesson: Any, database: str) -> None:
    for out in await three_times(lesson):
        for name in ("Python", "psycopg", "aiosql", "Postgres"):
            assert re.search(rf"^{name} +\d+\.\d+", out, re.MULTILINE), out
    assert len(rows(lesson, database, "SELECT * FROM greetings")) == 3


@only_lesson(1)
async def test_breaks_01_loses_what_was_only_in_memory(lesson: Any, database: str) -> None:
    outs = await breaks_twice(lesson)
    statement = "SELECT message FROM greetings WHERE message ->> 'from' LIKE 'demo-%'"
    greetings = [row["message"] for row in rows(lesson, database, statement)]
    written = Counter(greeting["from"] for greeting in greetings)
    assert len(written) == 2
    assert all(2 <= number <= 5 for number in written.values())
    # Two, unless this machine was too busy to kill it in time.
    assert min(written.values()) < 5
    for out in outs:
        (number,) = (number for sender, number in written.items() if repr(sender) in out)
        assert f"The other {5 - number} jobs are gone" in out


ENQUEUE_AND_DIE = """
import os, signal
from psycopg.types.json import Jsonb

async def main():
    queries = load_queries(sys.argv[1])
    async with open_pool(sys.argv[1]) as pool, pool.connection() as conn:
        for n in range(5):
            await queries.create_task(conn, queue="q", task_name="greet", input=Jsonb(n))
        os.kill(os.getpid(), signal.SIGKILL)

run(main())
"""


@only_lesson(2)
async def test_in_02_jobs_outlive_the_process_that_made_them(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    outcome = await asyncio.to_thread(run_program, ENQUEUE_AND_DIE, lesson.path)
    assert outcome.status == -9, outcome
    greeted = []

    async def greet(input: Any) -> None:
        greeted.append(input)

    async def all_completed() -> bool:
        return await statuses(pool) == {"COMPLETED": 5}

    async with working(make_worker(lesson, pool, queries, greet)):
        await wait_for(all_completed, "all jobs are done")
    assert sorted(greeted) == [0, 1, 2, 3, 4]


# 02: a table is a queue


@only_lesson(2)
async def test_demo_02_runs_one_task(lesson: Any, database: str) -> None:
    for out in await three_times(lesson):
        assert "COMPLETED" in out
    runs = tasks_by_run(lesson, database)
    assert [[task["status"] for task in tasks] for tasks in runs] == [["COMPLETED"]] * 3


@only_lesson(2)
async def test_breaks_02_runs_out_of_files(lesson: Any, database: str) -> None:
    outs = await breaks_twice(lesson)
    runs = tasks_by_run(lesson, database)
    assert len(runs) == 2
    for tasks in runs:
        counts = Counter(task["status"] for task in tasks)
        assert counts.total() == 400
        assert 90 <= counts["COMPLETED"] <= 110  # how many are open already is not quite known
        errors = [task["output"]["error"] for task in tasks if task["status"] == "FAILED"]
        assert all("Too many open files" in error for error in errors)
        shown = rf"FAILED +{counts['FAILED']}\b"
        assert any(re.search(shown, out) and "Too many open files" in out for out in outs), outs


@only_lesson(3)
async def test_in_03_a_thousand_tasks_have_files_enough(lesson: Any, database: str) -> None:
    """The same function, and as many files as 02 has."""
    await run_demo(lesson, files=160)
    (tasks,) = tasks_by_run(lesson, database)
    assert Counter(task["status"] for task in tasks) == {"COMPLETED": 1000}


# 03: a worker claims no more than it has free slots


@only_lesson(3)
async def test_demo_03_never_has_more_than_100_tasks_at_once(lesson: Any, database: str) -> None:
    for out in await three_times(lesson):
        assert "at most 100 of them ran at once, on 100 slots" in out
        assert "1000 different ones were run, 0 of them more than once" in out
    runs = tasks_by_run(lesson, database)
    assert [Counter(task["status"] for task in tasks) for tasks in runs] == [
        {"COMPLETED": 1000}
    ] * 3


@only_lesson(3)
async def test_breaks_03_leaves_the_tasks_of_a_killed_worker_running(
    lesson: Any, database: str
) -> None:
    for out in await breaks_twice(lesson):
        assert len(re.findall(r"\{'seconds': 5\} +RUNNING", out)) == 3
        assert len(re.findall(r"\{'seconds': 6\} +COMPLETED", out)) == 1
    for tasks in tasks_by_run(lesson, database):
        assert [task["status"] for task in tasks] == ["FAILED"] * 3 + ["COMPLETED"]
        assert [task["output"] for task in tasks[:3]] == [{"error": "set by hand"}] * 3


# 04: heartbeats, retries, timeouts, priorities


@only_lesson(4)
async def test_demo_04_shows_retries_timeouts_priorities_and_a_killed_worker(
    lesson: Any, database: str
) -> None:
    """The last of them is what 03 breaks: another worker has written the report."""
    for out in await three_times(lesson):
        assert "high, middle, low" in out
    runs = tasks_by_run(lesson, database)
    assert len(runs) == 3
    for tasks in runs:
        check_tasks_of_demo_04(tasks)


def check_tasks_of_demo_04(tasks: list[dict[str, Any]]) -> None:
    (killed,) = (task for task in tasks if task["task_name"] == "write_report")
    assert (killed["status"], killed["retry_count"], killed["attempt"]) == ("COMPLETED", 0, 2)
    (retried,) = (t for t in tasks if t["status"] == "COMPLETED" and t["retry_count"])
    assert retried["attempt"] == retried["retry_count"] + 1
    failed = [task for task in tasks if task["status"] == "FAILED"]
    assert any(task["retry_count"] == task["max_retries"] > 0 for task in failed)
    errors = [task["output"]["error"] for task in failed]
    for text in ("NonRetryableError", "timed out after", "schedule timeout"):
        assert len([error for error in errors if text in error]) == 1


@only_lesson(4)
async def test_freeze_04_refuses_the_attempt_that_lost_the_task(lesson: Any, database: str) -> None:
    """Two at once: the second worker of one run may put back the task of the other, too."""
    for out in await asyncio.gather(*(run_demo(lesson, "--freeze") for _ in range(2))):
        assert re.search(r"slow +COMPLETED +2 +0 +done", out), out
    for (task,) in tasks_by_run(lesson, database):
        assert (task["status"], task["attempt"], task["retry_count"]) == ("COMPLETED", 2, 0)


@only_lesson(4)
async def test_breaks_04_charges_an_order_twice(lesson: Any, database: str) -> None:
    for out in await breaks_twice(lesson):
        assert len(re.findall(r"order-\w+ +42 ", out)) == 2
    assert payments_by_order(lesson, database) == [2, 2]
    for (task,) in tasks_by_run(lesson, database):
        assert (task["status"], task["attempt"]) == ("COMPLETED", 2)


# 05: a task writes down what it does


@only_lesson(5)
async def test_demo_05_charges_once_and_refuses_the_zombie(lesson: Any, database: str) -> None:
    """What 04 breaks: the second attempt finds the charge in the log."""
    for out in await three_times(lesson):
        assert re.search(r"refused: task \d+ is not owned by attempt 1 any more", out)
        for step in ("charge_payment", "reserve_stock"):
            assert f"found: {step} has begun" in out
    assert payments_by_order(lesson, database) == [1, 1, 1]
    check_orders(lesson, database, status="COMPLETED", events=3, runs=3)


def check_orders(lesson: Any, database: str, *, status: str, events: int, runs: int) -> None:
    """Each run has one task, which has ended so in its second attempt, with so many events."""
    tasks = [task for (task,) in tasks_by_run(lesson, database)]
    assert [(task["status"], task["attempt"]) for task in tasks] == [(status, 2)] * runs
    statement = "SELECT task_id, count(*) FROM durable_events GROUP BY task_id"
    counts = {row["task_id"]: row["count"] for row in rows(lesson, database, statement)}
    assert counts == {task["id"]: events for task in tasks}


@only_lesson(5)
async def test_breaks_05_takes_one_step_for_another(lesson: Any, database: str) -> None:
    for out in await breaks_twice(lesson):
        assert "found: reserve_stock has begun" in out
        assert len(re.findall(r"order-\w+ +42 ", out)) == 2
    assert payments_by_order(lesson, database) == [2, 2]
    check_orders(lesson, database, status="COMPLETED", events=3, runs=2)


# 06: each event has a key


@only_lesson(6)
async def test_demo_06_catches_the_changed_function(lesson: Any, database: str) -> None:
    """What 05 breaks: one charge, and an error that names both steps."""
    for out in await three_times(lesson):
        assert re.search(r"refused: task \d+, event 1: .* asked for is .*'reserve_stock'", out)
    assert payments_by_order(lesson, database) == [1, 1, 1]
    check_orders(lesson, database, status="FAILED", events=1, runs=3)
    for (task,) in tasks_by_run(lesson, database):
        assert "NonDeterminismError" in task["output"]["error"]


@only_lesson(6)
async def test_breaks_06_waits_for_a_task_that_does_not_exist(lesson: Any, database: str) -> None:
    for out in await breaks_twice(lesson):
        assert "found: charge_payment has begun" in out
        assert re.search(r"process_order +RUNNING +2", out)
        assert len(re.findall("TASK_STARTED", out)) == 1
    assert payments_by_order(lesson, database) == []
    check_orders(lesson, database, status="FAILED", events=1, runs=2)


# What the worker of 07 does first is create the child, and then append the event.
KILLED_BETWEEN_CHILD_AND_EVENT = """
import os, signal
sys.path.insert(0, sys.argv[1])
from worker import Worker

async def process_order(context, input):
    return await context.run_task("step", input)

async def append_event(conn, **values):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    queries = load_queries(sys.argv[1])
    queries.append_event = append_event
    async with open_pool(sys.argv[1]) as pool:
        worker = Worker(pool, queries)
        worker.register("process_order", process_order)
        await worker.start("q")

run(main())
"""


@only_lesson(7)
async def test_in_07_a_kill_between_task_and_event_leaves_neither(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    lab = Lab(lesson, pool, queries)

    async def process_order(context: Any, input: Any) -> Any:
        return await context.run_task("step", input)

    id = await lab.enqueue(process_order, "A-1")
    outcome = await asyncio.to_thread(run_program, KILLED_BETWEEN_CHILD_AND_EVENT, lesson.path)
    assert outcome.status == -9, outcome
    (order,) = await lab.tasks()
    assert (order["id"], order["status"]) == (id, "RUNNING")
    assert await execute(pool, "SELECT * FROM durable_events") == []

    order = await lab.finish(id, process_order)
    assert (order["status"], order["attempt"], order["output"]) == ("COMPLETED", 2, "A-1")
    assert len(await lab.children(id)) == 1
    assert lab.calls == {"A-1": 1}
