"""How a program starts, is told to stop, ends, and reports errors."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from programs import DEADLINE, Outcome, outcome, run_program, start_program
from shared import error_text, stop_signals
from shared.errors import MAX_ERROR_CHARACTERS


class Unprintable(Exception):
    """Its message cannot be had."""

    def __str__(self) -> str:
        raise SystemExit("no message")


class UnprintableArgument:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def nested_group(depth: int) -> BaseExceptionGroup[Any]:
    error: BaseException = ValueError("innermost")
    for level in range(depth):
        error = BaseExceptionGroup(f"level {level}", [error])
    assert isinstance(error, BaseExceptionGroup)
    return error


@given(st.text(alphabet=st.characters(), max_size=50))
def test_an_error_text_has_type_and_message(message: str) -> None:
    text = error_text(ValueError(message))
    assert text.startswith("ValueError")
    assert "\0" not in text
    text.encode()  # has no lone surrogate


def test_error_text_replaces_what_jsonb_refuses() -> None:
    assert error_text(ValueError("a\0b\ud800c")) == "ValueError: a\ufffdb\ufffdc"


def test_error_text_without_a_message_is_the_type() -> None:
    assert error_text(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize("error", [Unprintable(), KeyError(UnprintableArgument())], ids=type)
def test_error_text_survives_a_message_that_raises(error: Exception) -> None:
    assert error_text(error).startswith(type(error).__name__)


def test_error_text_has_the_members_of_a_group() -> None:
    inner = ExceptionGroup("inner", [KeyError("b")])
    group = ExceptionGroup("outer", [ValueError("a"), inner, TypeError("c")])
    assert error_text(group) == (
        "ExceptionGroup: outer (3 sub-exceptions); ValueError: a; KeyError: 'b'; TypeError: c"
    )


def test_error_text_survives_deep_nesting() -> None:
    assert error_text(nested_group(1_000)) == (
        "ExceptionGroup: level 999 (1 sub-exception); ValueError: innermost"
    )


@pytest.mark.parametrize(
    "error",
    [ValueError("x" * 10_000_000), ExceptionGroup("many", [ValueError("x" * 100)] * 100_000)],
    ids=["message", "members"],
)
def test_error_text_is_cut(error: Exception) -> None:
    assert len(error_text(error)) == MAX_ERROR_CHARACTERS == 10_000


RAISED_SIGNALS = [signal.SIGINT, signal.SIGTERM]


async def check_calls(calls: asyncio.Queue[str], number: signal.Signals, *expected: str) -> None:
    """A signal leads to these calls, in any order."""
    signal.raise_signal(number)
    async with asyncio.timeout(DEADLINE):
        assert sorted([await calls.get() for _ in expected]) == sorted(expected)
    assert calls.empty()


@pytest.mark.parametrize("number", RAISED_SIGNALS, ids=lambda number: number.name)
async def test_the_first_signal_and_the_second(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    calls: asyncio.Queue[str] = asyncio.Queue()
    with stop_signals(lambda: calls.put_nowait("first"), lambda: calls.put_nowait("second")):
        await check_calls(calls, number, "first")
        await check_calls(calls, number, "second")
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("last", ["a", "b"])
async def test_a_signal_reaches_all_workers_of_a_process(last: str) -> None:
    handlers = [signal.getsignal(number) for number in RAISED_SIGNALS]
    calls: asyncio.Queue[str] = asyncio.Queue()
    blocks = {}
    for name in "ab":
        blocks[name] = stop_signals(
            partial(calls.put_nowait, f"{name} first"), partial(calls.put_nowait, f"{name} second")
        )
        blocks[name].__enter__()
    await check_calls(calls, signal.SIGTERM, "a first", "b first")
    # One ends earlier, and the other still hears of the next signal.
    first = {"a": "b", "b": "a"}[last]
    blocks[first].__exit__(None, None, None)
    await check_calls(calls, signal.SIGTERM, f"{last} second")
    blocks[last].__exit__(None, None, None)
    assert [signal.getsignal(number) for number in RAISED_SIGNALS] == handlers


async def test_handlers_are_put_back_after_an_error() -> None:
    handlers = [signal.getsignal(number) for number in RAISED_SIGNALS]

    def fail() -> None:
        with stop_signals(lambda: None, lambda: None):
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert [signal.getsignal(number) for number in RAISED_SIGNALS] == handlers


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    async def use() -> None:
        with stop_signals(lambda: None, lambda: None):
            used.set()

    used = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(use()))
    thread.start()
    thread.join(DEADLINE)
    assert used.is_set()


WAITING = """
async def main():
    try:
        print("ready", flush=True)
        await asyncio.sleep(60)
    finally:
        print("cleaned up", flush=True)

run(main())
"""


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("number", RAISED_SIGNALS, ids=lambda number: number.name)
def test_a_signal_cancels_main(number: signal.Signals) -> None:
    process = start_program(WAITING)
    wait_until_ready(process)
    process.send_signal(number)
    end = outcome(process)
    assert (end.status, end.stdout, end.stderr) == (128 + number, "cleaned up\n", "")


def test_a_second_signal_ends_a_main_that_ignores_the_first() -> None:
    process = start_program(
        """
        async def main():
            print("ready", flush=True)
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    print("ignored", flush=True)

        run(main())
        """
    )
    wait_until_ready(process)
    process.send_signal(signal.SIGINT)
    assert process.stdout
    assert process.stdout.readline() == "ignored\n"
    process.send_signal(signal.SIGTERM)
    end = outcome(process)
    assert end.status == 128 + signal.SIGTERM
    assert end.stderr == ""


INCESSANT = """
import atexit, os, signal
atexit.register(print, "atexit", flush=True)

def send(frame, event, argument):
    if event.startswith("c_"):  # before and after each call of a C function
        os.kill(os.getpid(), signal.SIGHUP)

async def main():
    sys.setprofile(send)
    await asyncio.sleep(60)

run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_the_end_of_the_terminal_counts_once_at_any_moment() -> None:
    """Terminal and shell each send a SIGHUP, and the second may come while the program ends."""
    end = run_program(INCESSANT)
    assert (end.status, end.stdout, end.stderr) == (129, "atexit\n", "")


BLOCKED = """
import atexit, time
atexit.register(print, "atexit", flush=True)

async def main():
    with {block}:
        print("ready", flush=True)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                print("swallowed", flush=True)

run(main())
"""


def send_until_ended(process: subprocess.Popen[str], number: signal.Signals) -> int:
    """Send a signal again and again; return how many it took at most."""
    for sent in range(1, 100):
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.3)
            return sent
    raise AssertionError("it does not end")


@pytest.mark.parametrize("number", RAISED_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("block", ["stop_signals(int, int)", "contextlib.nullcontext()"])
def test_a_third_signal_ends_what_blocks_the_event_loop(block: str, number: signal.Signals) -> None:
    process = start_program("import contextlib\n" + BLOCKED.format(block=block))
    wait_until_ready(process)
    assert send_until_ended(process, number) >= 3
    end = outcome(process)
    assert end.status == 128 + number
    assert "atexit" not in end.stdout
    assert end.stderr == ""


ASLEEP = """
import signal, threading, time
from shared.runtime import STOP_SIGNALS

def another_thread():
    time.sleep(0.5)
    print("ready", flush=True)
    time.sleep(3600)

async def main():
    # So a signal comes to the other thread, and does not interrupt the main thread's wait. Nor does
    # one that comes just before the wait begins, which no test can hit at will.
    threading.Thread(target=another_thread, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    stopped = asyncio.get_running_loop().create_future()
    with {block}:
        await stopped
    print("stopped", flush=True)

run(main())
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs pthread_sigmask")
@pytest.mark.parametrize("number", RAISED_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("block", "stops"),
    [
        ("stop_signals(lambda: stopped.set_result(None), int)", True),
        ("contextlib.nullcontext()", False),
    ],
)
def test_a_signal_wakes_up_an_event_loop_whose_wait_it_does_not_interrupt(
    block: str, stops: bool, number: signal.Signals
) -> None:
    process = start_program("import contextlib\n" + ASLEEP.format(block=block))
    wait_until_ready(process)
    process.send_signal(number)
    end = outcome(process)
    assert (end.status, end.stdout) == ((0, "stopped\n") if stops else (128 + number, ""))


FORKING = """
import multiprocessing, threading, time
FORK = multiprocessing.get_context("fork")

def child():
    time.sleep(60)

async def fork(after):
    process = FORK.Process(target=child)
    {start}
    time.sleep(after)
    {send}
    process.join(60)
    print(process.exitcode, flush=True)
    process.kill()

async def main():
    with stop_signals(lambda: stopped.set_result(None), int):
        for after in {after}:
            await fork(after)
        stopped = asyncio.get_running_loop().create_future()
        print("ready", flush=True)
        await stopped
        print("stopped", flush=True)

run(main())
"""
IN_A_THREAD = "thread = threading.Thread(target=process.start); thread.start(); thread.join()"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("start", ["process.start()", IN_A_THREAD])
@pytest.mark.parametrize(
    ("send", "after", "code"),
    # A KeyboardInterrupt ends a child of multiprocessing with status 1. It is lost in a child's
    # first moments, as without any handlers of ours; how long those are is the machine's affair.
    [
        ("process.terminate()", [0, 0, 0, 0.5], -signal.SIGTERM),
        ("while process.is_alive(): os.kill(process.pid, 2); process.join(10)", [1], 1),
    ],
)
def test_a_forked_child_ends_by_a_signal_and_its_parent_stops_at_one(
    start: str, send: str, after: list[float], code: int
) -> None:
    """Also if the signal comes before the child has run a line of Python."""
    process = start_program("import os\n" + FORKING.format(start=start, send=send, after=after))
    assert process.stdout
    for _ in after:
        assert process.stdout.readline() == f"{code}\n"
    wait_until_ready(process)
    process.terminate()
    end = outcome(process)
    assert (end.status, end.stdout) == (0, "stopped\n")


THREAD = """
import atexit, signal, time
atexit.register(print, "atexit", flush=True)

def work():
    print("ready", flush=True)
    {work}

async def main():
    thread = asyncio.create_task(asyncio.to_thread(work))
    await asyncio.sleep(0.1)
    {then}

run(main())
"""


@pytest.mark.parametrize(
    ("then", "status"), [("pass", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)], ids=str
)
def test_a_thread_does_not_keep_a_program_alive(then: str, status: int) -> None:
    end = run_program(THREAD.format(work="time.sleep(3600)", then=then))
    assert (end.status, end.stdout) == (status, "ready\natexit\n")
    *rest, line = end.stderr.splitlines()
    assert "threads still run: asyncio_0" in line
    assert bool(rest) == (then == "1 / 0")
    assert "ThreadsLeft" not in end.stderr


def test_a_thread_that_is_soon_at_its_end_is_waited_for() -> None:
    # The alarm does not go off meanwhile, however long the machine stops this program.
    patience = "import shared.runtime\nshared.runtime.LEAVE_THREADS_AFTER = 3600\n"
    work = "time.sleep(1); print('worked', flush=True)"
    end = run_program(patience + THREAD.format(work=work, then="pass"))
    assert (end.status, end.stdout, end.stderr) == (0, "ready\nworked\natexit\n", "")


def test_ctrl_c_ends_the_wait_for_a_thread() -> None:
    work = """
    while not signal.getitimer(signal.ITIMER_REAL)[0]:  # which is set last
        time.sleep(0.01)
    print("waited for", flush=True)
    time.sleep(3600)
    """
    process = start_program(
        "import shared.runtime\nshared.runtime.LEAVE_THREADS_AFTER = 3600\n"
        + THREAD.format(work=work, then="pass")
    )
    wait_until_ready(process)
    assert process.stdout
    assert process.stdout.readline() == "waited for\n"
    process.send_signal(signal.SIGINT)
    end = outcome(process)
    assert (end.status, end.stdout) == (0, "atexit\n")
    assert len(end.stderr.splitlines()) == 1


STOPPED = """
import shared.runtime, signal, threading, time
shared.runtime.LEAVE_THREADS_AFTER = 2

def work():
    for _ in range(30):
        threading.Thread(target=time.sleep, args=[3600], daemon=True).start()
    while not signal.getitimer(signal.ITIMER_REAL)[0]:
        time.sleep(0.01)
    print("ready", flush=True)
    time.sleep(3600)

async def main():
    thread = asyncio.create_task(asyncio.to_thread(work))
    await asyncio.sleep(0.1)

run(main())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_program_that_was_stopped_meanwhile_does_not_wait_for_threads_for_ever() -> None:
    """What comes while it is stopped goes to any of its threads."""
    process = start_program(STOPPED)
    wait_until_ready(process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert outcome(process).status == 0


STUBBORN = """
import atexit
atexit.register(print, "atexit", flush=True)

async def stubborn():
    while True:
        try:
            await asyncio.sleep(60)
        except {caught}:
            pass

async def main():
    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0.01)
    {then}

run(main())
"""


@pytest.mark.parametrize(
    ("caught", "then", "status"),
    [("asyncio.CancelledError", "sys.exit(3)", 3), ("BaseException", "pass", 0)],
)
def test_a_task_that_ignores_its_cancellation_is_abandoned(
    caught: str, then: str, status: int
) -> None:
    end = run_program(STUBBORN.format(caught=caught, then=then))
    assert (end.status, end.stdout, end.stderr) == (status, "atexit\n", "")


def test_system_exit_in_a_task_ends_the_program_with_its_message() -> None:
    end = run_program(
        """
        async def fail():
            raise SystemExit("a clear line")

        async def main():
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(60))
                group.create_task(fail())

        run(main())
        """
    )
    assert end.sole_error_line() == "a clear line"


def test_a_bug_in_main_shows_its_traceback() -> None:
    end = run_program("async def main(): return 1 / 0\n\nrun(main())")
    assert end.status == 1
    assert end.stderr.startswith("Traceback")
    assert end.stderr.count("ZeroDivisionError") == 1


def test_a_log_record_is_one_line() -> None:
    end = run_program(
        """
        import logging

        async def main():
            logging.info("one\\ntwo %s", "\\ud800")
            logging.debug("not shown")
            logging.getLogger("psycopg.pool").warning("not shown either")

        run(main())
        """
    )
    (line,) = end.stderr.splitlines()
    assert line.split()[1:4] == ["INFO", "one", "two"]


OUTAGE = """
import psycopg
from psycopg_pool import PoolTimeout

async def fail(error):
    raise error

async def main():
    async with asyncio.TaskGroup() as outer:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(60))
            {failures}

run(main())
"""


def test_an_outage_that_ends_a_worker_is_one_line(database: str) -> None:
    end = run_program(
        """
        import psycopg

        async def poll():
            conn = await psycopg.AsyncConnection.connect(database_url())
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

        async def main():
            async with asyncio.TaskGroup() as group:
                group.create_task(poll())
                group.create_task(poll())

        run(main())
        """
    )
    line = end.sole_error_line()
    assert line.startswith("the database went away: ")
    assert "terminating connection" in line
    assert line.endswith("; start the worker again")


def test_an_outage_that_is_not_in_a_group_is_one_line() -> None:
    end = run_program(
        """
        from psycopg_pool import PoolTimeout

        async def main():
            raise PoolTimeout("no connection")

        run(main())
        """
    )
    assert end.sole_error_line() == (
        "the database went away: no connection; start the worker again"
    )


def test_an_outage_of_others_and_a_bug_keep_their_traceback() -> None:
    failures = "[group.create_task(fail(error)) for error in (PoolTimeout('no'), KeyError('bug'))]"
    end = run_program(OUTAGE.format(failures=failures))
    assert end.status == 1
    assert "Traceback" in end.stderr
    assert "KeyError: 'bug'" in end.stderr


def test_the_line_on_an_outage_has_no_password() -> None:
    failures = "group.create_task(fail(psycopg.OperationalError('bob:s3cret@h\\nline two')))"
    url = "postgresql://bob:s3cret@localhost/db"
    line = run_program(OUTAGE.format(failures=failures), database_url=url).sole_error_line()
    assert line == "the database went away: bob:***@h line two; start the worker again"


def pipeline(code: str, shell: str) -> Outcome:
    """Run a program with its output redirected by the shell, to which it is "$@"."""
    program = f"from shared import *\nimport asyncio\n{code}"
    result = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


PRINTING = """
from shared.demo import show

async def main():
    for number in range(10_000):
        print("line", number, "\u20ac")
    show("rows \u20ac", [{"a": "\u20ac" * 200, "b": 1}])

run(main())
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_any_more_ends_the_program_quietly(
    unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    end = pipeline(PRINTING, '{ "$@"; echo "status $?" >&2; } | head -n 1')
    assert (end.stdout, end.stderr) == ("line 0 \u20ac\n", "status 1\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("program", [PRINTING, PRINTING.replace("10_000", "1")], ids=len)
def test_output_that_cannot_be_written_is_one_line(program: str) -> None:
    line = pipeline(program, '"$@" > /dev/full').sole_error_line()
    assert line == "Cannot write the output: disk full"


def test_a_closed_stdout_does_not_matter() -> None:
    end = pipeline(PRINTING, '"$@" >&-')
    assert (end.status, end.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_an_encoding_without_a_character_shows_a_question_mark(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    end = pipeline(PRINTING, '"$@"')
    assert (end.status, end.stderr) == (0, "")
    assert "line 9999 ?\n" in end.stdout
