"""How a program starts, is told to stop, ends, and reports errors."""

import asyncio
import ctypes
import logging
import re
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
ABANDON_AFTER = 1.0  # seconds
MAX_ERROR_CHARACTERS = 10_000


class OneLineFormatter(logging.Formatter):
    """One line per record, whatever an error message contains. Tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return " ".join(super().formatMessage(record).splitlines())


def set_up_logging() -> None:
    """Log to stderr from level INFO on."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        OneLineFormatter("%(asctime)s.%(msecs)03d %(levelname)-7s %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a program's main coroutine to its end.

    The first SIGINT or SIGTERM cancels it, and the program ends with status 130 or 143; another one
    ends it at once. Unlike asyncio.run it does not wait for ever for tasks that ignore their
    cancellation: they are abandoned after ABANDON_AFTER seconds.
    """
    set_up_logging()
    # Named, since psycopg cannot use the event loop that is the default on Windows.
    loop = asyncio.SelectorEventLoop()
    task = loop.create_task(main)
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise SystemExit(128 + number)
        loop.call_soon_threadsafe(task.cancel)

    try:
        with signal_handler(stop):
            loop.run_until_complete(task)
    except asyncio.CancelledError:
        # Without a signal here it was a second one within stop_signals, which is a Ctrl-C too.
        raise SystemExit(128 + (received[0] if received else signal.SIGINT)) from None
    finally:
        close_loop(loop)
        if task.done() and not task.cancelled():
            task.exception()  # marks it as seen, or asyncio would print a SystemExit's traceback


def close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what still runs on a loop, wait for it within bounds, and close the loop."""
    for task in asyncio.all_tasks(loop):
        task.cancel()
    deadline = loop.time() + ABANDON_AFTER
    while (tasks := asyncio.all_tasks(loop)) and loop.time() < deadline:
        # A task that raises one of these stops the loop, and the others still need it.
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_until_complete(asyncio.wait(tasks, timeout=deadline - loop.time()))
    for task in asyncio.all_tasks(loop):
        # Destroying a coroutine runs it once more. One that catches everything would then run for
        # ever, so those that are left are kept from being destroyed, even as the program ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(task))
    loop.close()


@contextmanager
def stop_signals(first: Callable[[], object], second: Callable[[], object]) -> Iterator[None]:
    """Within this block the first SIGINT or SIGTERM calls `first`, every later one `second`.

    Both are called by the running event loop. Outside the main thread, where Python handles no
    signals, the block changes nothing.
    """
    loop = asyncio.get_running_loop()
    callback = first

    def schedule(number: int, frame: FrameType | None) -> None:
        nonlocal callback
        loop.call_soon_threadsafe(callback)
        callback = second

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with signal_handler(schedule):
        yield


@contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM within this block."""
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old_handler in previous.items():
            # None: a handler that was not installed by Python, and that Python cannot put back.
            signal.signal(number, signal.SIG_DFL if old_handler is None else old_handler)


def error_text(error: BaseException) -> str:
    """An exception's type and message; of an exception group also those of all errors in it.

    The text suits jsonb: NUL and lone surrogates are replaced, MAX_ERROR_CHARACTERS is its limit.
    """
    texts = [describe(error)]
    waiting = [error]
    # A loop, since recursion would fail on a group nested a thousand deep.
    while waiting and len(texts) < MAX_ERROR_CHARACTERS:
        current = waiting.pop()
        # Not by its own attribute, which may be the user's code and raise anything at all.
        if issubclass(type(current), BaseExceptionGroup):
            waiting.extend(reversed(BaseExceptionGroup.exceptions.__get__(current)))
        elif current is not error:
            texts.append(describe(current))
    text = "; ".join(texts)
    if len(text) > MAX_ERROR_CHARACTERS:
        text = text[: MAX_ERROR_CHARACTERS - 1] + "…"
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


def describe(error: BaseException) -> str:
    """`TypeName: message` of one exception, of which little more than can be kept."""
    name = "Exception"
    try:
        name = f"{type(error).__name__}"
        message = "".join(str(error))
    except BaseException:
        # Both may be the user's code and raise anything at all.
        message = "(its message could not be read)"
    text = f"{name}: {message}" if message else name
    return text[: MAX_ERROR_CHARACTERS + 1]
