"""The programs of lessons 07 to 10: what they print and leave in the database proves their point.

Each `--breaks` shows what is still wrong in its lesson, and the demo of the next lesson that the
same is well there. The demos run twice at once, since they must not disturb each other; of 07 that
cuts connections `--breaks` too.
"""

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import pytest

from helpers import execute, wait_for
from lesson_loader import LAST
from shared import Pool, open_pool

pytestmark = [
    pytest.mark.since(7),
    pytest.mark.skipif(sys.platform == "win32", reason="signals, and groups of processes"),
]
T = TypeVar("T")
SECONDS = 120  # far more than they are allowed to take, for a machine that is busy
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} INFO ")


@asynccontextmanager
async def program(lesson: Any, *flags: str) -> AsyncIterator[Process]:
    """A lesson's main.py, in a process group of its own, of which nothing may be left behind."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        lesson.path / "main.py",
        *flags,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "default"},
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


async def end(process: Process, status: int = 0) -> tuple[str, list[str]]:
    """Wait for its end; return what it has printed, and what it has logged above INFO."""
    out, lines = await output(process)
    assert process.returncode == status, "\n".join([out, *lines])
    return out, lines


async def output(process: Process) -> tuple[str, list[str]]:
    """The same, however it ends."""
    async with asyncio.timeout(SECONDS):
        out, err = (text.decode() for text in await process.communicate())
    return out, [line for line in err.splitlines() if not LOG_LINE.match(line)]


async def demo(lesson: Any, *flags: str) -> tuple[str, list[str]]:
    async with program(lesson, *flags) as process:
        return await end(process)


async def twice_at_once(lesson: Any, *flags: str) -> list[tuple[str, list[str]]]:
    return list(await asyncio.gather(demo(lesson, *flags), demo(lesson, *flags)))


async def in_time(play: Callable[[], Awaitable[T]], is_in_time: Callable[[T], bool]) -> T:
    """Run a demo, and up to twice again if it came too late to show its point; what it returned.

    Some catch a worker in what takes a second or two, and a machine may stand still for as long.
    """
    for _ in range(2):
        result = await play()
        if is_in_time(result):
            return result
    return await play()


async def quiet_demo(lesson: Any, *flags: str) -> str:
    """A demo that has nothing to warn of."""
    out, warnings = await demo(lesson, *flags)
    assert warnings == []
    return out


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


async def tasks(pool: Pool, task_name: str) -> list[dict[str, Any]]:
    return [
        row
        for row in await execute(pool, "SELECT * FROM tasks ORDER BY id")
        if row["task_name"] == task_name
    ]


async def nothing_is_left(pool: Pool) -> bool:
    """Nothing that could get in the way of the next run."""
    return not await execute(pool, "SELECT * FROM tasks WHERE status IN ('QUEUED', 'RUNNING')")


@pytest.mark.until(7)
async def test_an_order_is_processed_twice_at_once_and_again(lesson: Any, pool: Pool) -> None:
    """The first two start on an empty database, the third on one that has been used."""
    await asyncio.gather(quiet_demo(lesson), quiet_demo(lesson))
    await quiet_demo(lesson)
    rows = await orders(pool)
    assert len(rows) >= 2
    for order in rows:
        # In two attempts, if it was claimed by the other program, which ended first.
        assert (order["status"], order["retry_count"]) == ("COMPLETED", 0)
        assert order["events"] == [1, 2]
    assert await charges(pool) == [1] * len(rows)


@pytest.mark.only(7, LAST)  # from 08 on it is the same to the letter
async def test_a_crash_a_retry_and_a_replay(lesson: Any, database: str) -> None:
    """All at the same time: each has a queue of its own."""
    crashes: list[str] = []

    async def crash() -> str:
        crashes.append(await quiet_demo(lesson, "--crash"))
        return crashes[-1]

    again = "has been charged before"
    outputs = await asyncio.gather(
        in_time(crash, lambda output: again in output),
        *(quiet_demo(lesson, flag) for flag in ("--retry", "--replay")),
    )
    async with open_pool(lesson.path) as pool:
        assert await execute(pool, "SELECT * FROM tasks WHERE status != 'COMPLETED'") == []
        assert await charges(pool) == [1] * len(crashes) + [1, 2]
        assert len([row for row in await orders(pool) if row["attempt"] > 1]) >= 3
        children = await execute(pool, "SELECT count(*) AS n FROM tasks WHERE NOT is_durable")
        assert children == [{"n": 2 * len(crashes) + 2 + 4}]
    assert all("idempotency_key" in output for output in outputs), "the rows are not shown"
    assert again in outputs[0], "the charge was not made again"


@pytest.mark.until(7)
async def test_07_a_worker_that_comes_back_changes_nothing_and_works_on(
    lesson: Any, pool: Pool
) -> None:
    async with program(lesson, "--stall") as process, asyncio.timeout(SECONDS):
        out, err = (text.decode() for text in await process.communicate())
    assert process.returncode == 0, out + err
    assert err.count("is not ours any more, its outcome is dropped") == 2, err
    rows = await orders(pool)
    assert sorted((row["status"], row["attempt"], len(row["events"])) for row in rows) == [
        ("COMPLETED", 1, 2),
        ("COMPLETED", 2, 2),
    ]
    assert await charges(pool) == [1, 1]
    assert await nothing_is_left(pool)


@pytest.mark.until(7)
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
async def test_an_order_that_was_stopped_half_way_is_finished_by_the_next_run(
    lesson: Any, pool: Pool, how: str
) -> None:
    number = signal.Signals[how]

    async def stop() -> tuple[Any, ...]:
        """Stop it after the charge; the state of its order, how it ended, and its warnings."""
        await execute(pool, "TRUNCATE tasks, payments CASCADE")
        async with program(lesson) as first:
            await wait_for(lambda: charges(pool), "the customer is charged", SECONDS)
            with suppress(ProcessLookupError):
                first.send_signal(number)
            _, lines = await output(first)
        (order,) = await orders(pool)
        return order["status"], first.returncode, lines

    expected: tuple[Any, ...] = ("RUNNING", -number if how == "SIGKILL" else 128 + number, [])
    assert await in_time(stop, lambda end: end[0] == "RUNNING") == expected
    assert "going on with task" in await quiet_demo(lesson)
    (order,) = await orders(pool)
    assert (order["status"], order["attempt"], order["retry_count"]) == ("COMPLETED", 2, 0)
    assert order["events"] == [1, 2]
    assert await charges(pool) == [1]


@pytest.mark.only(7, LAST)
@pytest.mark.parametrize("flag", ["--crash", "--replay"])
async def test_a_demo_that_is_interrupted_leaves_no_process_behind(
    lesson: Any, pool: Pool, flag: str
) -> None:
    """Whether its worker is a process of its own or not."""

    async def interrupt() -> tuple[bool, int | None, list[str]]:
        """Whether it had come to show its order, how it ended, and its warnings."""
        await execute(pool, "TRUNCATE tasks, payments CASCADE")
        async with program(lesson, flag) as process:
            await wait_for(lambda: charges(pool), "the customer is charged", SECONDS)
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            out, lines = await output(process)
        return "the order and its child tasks" in out, process.returncode, lines

    assert await in_time(interrupt, lambda end: not end[0]) == (False, 128 + signal.SIGINT, [])


@pytest.mark.until(7)
async def test_07_breaks_a_worker_whose_connections_are_cut_ends(lesson: Any, pool: Pool) -> None:
    for out, lines in await twice_at_once(lesson, "--breaks"):
        assert re.search(r"cut its [1-9]\d* connections", out)
        assert "it has ended, with status 1" in out
        assert re.search(r"COMPLETED +2 +\d+", out), "nothing was done again"
        assert len(lines) == 1, "the worker has to say in one line why it ends"
        assert "the database went away" in lines[0]
    parcels = await tasks(pool, "pack_parcel")
    assert Counter(task["status"] for task in parcels) == {"COMPLETED": 400}
    assert await nothing_is_left(pool)


@pytest.mark.since(8)
@pytest.mark.until(8)
async def test_08_a_worker_whose_connections_are_cut_lives(lesson: Any, pool: Pool) -> None:
    """The scenario of 07's --breaks."""
    for out, lines in await twice_at_once(lesson):
        assert re.search(r"cut its [1-9]\d* connections", out)
        assert re.search(r"process \d+ lives", out)
        assert all("WARNING" in line for line in lines), lines
        assert any("no heartbeat" in line for line in lines), "nothing was cut"
    parcels = await tasks(pool, "pack_parcel")
    assert Counter(task["status"] for task in parcels) == {"COMPLETED": 400}
    assert await nothing_is_left(pool)


@pytest.mark.since(8)
@pytest.mark.until(8)
async def test_08_breaks_what_is_cut_off_waits_for_others(lesson: Any, pool: Pool) -> None:
    again = "pack_parcel: RUNNING, attempt 2"
    out, lines = await in_time(
        lambda: demo(lesson, "--breaks"), lambda result: result[0].count(again) == 3
    )
    assert re.search(r"SIGTERM: worker process \d+ has ended, with status 143", out)
    assert out.count(again) == 3
    assert lines == []
    parcels = (await tasks(pool, "pack_parcel"))[-3:]
    assert [(task["status"], task["attempt"]) for task in parcels] == [("COMPLETED", 2)] * 3
    took = [task["finished_at"] - task["inserted_at"] for task in parcels]
    # 2 s of work, and 5 s until the others missed the worker.
    assert min(took) >= timedelta(seconds=7)


@pytest.mark.since(9)
@pytest.mark.until(9)
async def test_09_a_worker_that_is_told_to_stop_leaves_nothing(lesson: Any, pool: Pool) -> None:
    """The scenario of 08's --breaks, with work that takes too long beside it."""

    async def play() -> list[tuple[float, int]]:
        """Run it; the parcels and the orders, each with what it takes and its last attempt."""
        await execute(pool, "TRUNCATE tasks, payments CASCADE")
        for out, lines in await twice_at_once(lesson):
            assert re.search(r"process \d+ has ended, with status 0", out)
            assert lines == []
        assert await execute(pool, "SELECT * FROM tasks WHERE status != 'COMPLETED'") == []
        assert await charges(pool) == [1, 1]
        parcels = await tasks(pool, "pack_parcel")
        ends = [(task["input"]["seconds"], task["attempt"]) for task in parcels]
        return sorted([*ends, *((2, row["attempt"]) for row in await orders(pool))])

    expected = [(1.5, 1), (1.5, 1), (2, 2), (2, 2), (5, 2), (5, 2)]
    assert await in_time(play, lambda ends: ends == expected) == expected
    assert await execute(pool, "SELECT * FROM workers") == [], "somebody did not say goodbye"


@pytest.mark.since(9)
@pytest.mark.until(9)
async def test_09_breaks_functions_that_no_worker_gets_rid_of(lesson: Any, pool: Pool) -> None:
    out, lines = await demo(lesson, "--breaks")
    assert re.search(r"ignore_cancellation +RUNNING +100", out), "their timeout is 1 s"
    assert len(re.findall(r"has claimed a function that ends it", out)) == 2
    assert re.search(r"5 s after SIGTERM process \d+ is still there", out)
    assert lines == []
    assert await execute(pool, "SELECT * FROM tasks") == []


@pytest.mark.since(10)
@pytest.mark.until(10)
async def test_10_unruly_functions_fail_and_the_worker_goes_on(lesson: Any, pool: Pool) -> None:
    """The scenario of 09's --breaks, and more."""
    for _, lines in await twice_at_once(lesson):
        assert len(lines) == 1
        assert "ignores its cancellation, and is left behind" in lines[0]
    errors = {
        "exit_program": "SystemExit: this program ends here",
        "ignore_cancellation": "TimeoutError: timed out after 0:00:01",
        "return_rubbish": "TypeError: Object of type set is not JSON serializable",
        "end_process": "its worker became inactive 2 times",
    }
    for task_name, error in errors.items():
        rows = await tasks(pool, task_name)
        assert [row["status"] for row in rows] == ["FAILED"] * 2
        assert [row["output"] for row in rows] == [{"error": error}] * 2
    assert [row["lost_count"] for row in await tasks(pool, "end_process")] == [2, 2]
    assert [row["status"] for row in await tasks(pool, "pack_parcel")] == ["COMPLETED"] * 2
    assert await nothing_is_left(pool)


@pytest.mark.since(10)
@pytest.mark.until(10)
async def test_10_breaks_an_order_of_nothing_takes_long(lesson: Any, pool: Pool) -> None:
    out, lines = await demo(lesson, "--breaks")
    in_all = re.search(r"in all +(\d+)", out)
    assert in_all, out
    # It asks for its first child at most at once, and for the second one POLL_INTERVAL later.
    assert int(in_all[1]) > 100
    assert lines == []
    assert [row["status"] for row in await orders(pool)] == ["COMPLETED"] * 20
    assert await nothing_is_left(pool)
