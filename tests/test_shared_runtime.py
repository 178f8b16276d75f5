"""How a program starts, is told to stop, ends, and reports errors."""

import asyncio
import signal
import subprocess
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from programs import DEADLINE, outcome, run_program, start_program
from shared import error_text, stop_signals
from shared.runtime import MAX_ERROR_CHARACTERS


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


@pytest.mark.parametrize("number", RAISED_SIGNALS, ids=lambda number: number.name)
async def test_the_first_signal_and_the_later_ones(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    calls: asyncio.Queue[str] = asyncio.Queue()
    with stop_signals(lambda: calls.put_nowait("first"), lambda: calls.put_nowait("second")):
        for expected in ["first", "second", "second"]:
            signal.raise_signal(number)
            async with asyncio.timeout(DEADLINE):
                assert await calls.get() == expected
    assert signal.getsignal(number) is handler


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
