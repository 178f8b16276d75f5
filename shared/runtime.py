"""How a program starts, is told to stop, and ends."""

import asyncio
import atexit
import ctypes
import errno
import io
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from shared.database import without_password
from shared.outages import is_away, one_line

Handler = Callable[[int, FrameType | None], None]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
ABANDON_AFTER = 1.0  # seconds
LEAVE_THREADS_AFTER = 5.0  # seconds
TICK = 0.5  # seconds

logger = logging.getLogger(__name__)


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

    The first SIGINT or SIGTERM cancels it, and the program ends with status 130 or 143; the second
    one raises SystemExit wherever the program is; the third ends the process on the spot, without
    any cleaning up (unless it is inside a C function that never looks for signals). The end of the
    terminal, SIGHUP, counts as one signal, with status 129.

    Unlike asyncio.run it does not wait for ever for tasks that ignore their cancellation: they are
    abandoned after ABANDON_AFTER seconds. Nor does the program, as it ends, for threads: not longer
    than LEAVE_THREADS_AFTER seconds. An outage of the database that reaches it is one line.
    """
    set_up_logging()
    try:
        with writing_to_stdout():
            run_loop(main)
    except Exception as error:
        if outage := only_outage(error):
            # It is libpq's message, and may quote the URL.
            raise SystemExit(f"the database went away: {outage}; start the worker again") from None
        raise
    finally:
        # Last, since these functions are called in reverse order, and the one that waits for the
        # threads of asyncio.to_thread is registered when the first of them is started.
        threading._register_atexit(limit_wait_for_threads)  # type: ignore[attr-defined]


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in an event loop of its own, and handle signals meanwhile."""
    # Named, since psycopg cannot use the event loop that is the default on Windows.
    loop = asyncio.SelectorEventLoop()
    task = loop.create_task(main)
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if number not in STOP_SIGNALS and number in received:
            return  # the terminal and its shell each send a SIGHUP
        received.append(number)
        if number not in STOP_SIGNALS:
            # To the end of the program, and without a moment between, in which another one would
            # end it before its atexit, and leave Postgres running.
            signal.signal(number, signal.SIG_IGN)
        if len(received) > 2:
            os._exit(128 + number)
        if len(received) > 1:
            raise SystemExit(128 + number)
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)

    with woken_by_signals(loop), signal_handler(stop, *hangup()):
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            # Without a signal here it was a second one within stop_signals, a Ctrl-C too.
            raise SystemExit(128 + (received[0] if received else signal.SIGINT)) from None
        finally:
            close_loop(loop)
            if task.done() and not task.cancelled():
                # Marks it as seen, or asyncio would print the traceback of a SystemExit.
                task.exception()


@contextmanager
def woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Within this block a signal wakes up an event loop that waits.

    A handler alone does not always. Python calls it between two steps of Python code, and a signal
    that comes after the last of them, just before the system call that waits, does not end that
    call. So each signal also writes a byte to a socket that the loop watches, as described for
    signal.set_wakeup_fd.
    """
    watched, written = socket.socketpair()
    with watched, written:
        watched.setblocking(False)
        written.setblocking(False)
        loop.add_reader(watched, watched.recv, 4096)
        before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)


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


def only_outage(error: Exception) -> str | None:
    """If an error, or all there is in a group of errors, is the database's absence: one of them."""
    away, others = ExceptionGroup("", [error]).split(is_away)
    if others or not away:
        return None
    first: Exception = away
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    return without_password(one_line(first)) if os.environ.get("DATABASE_URL") else one_line(first)


@contextmanager
def writing_to_stdout() -> Iterator[None]:
    """Write out, at the end of this block, what has been printed.

    A terminal or pipe whose encoding lacks a character gets a question mark. Raises SystemExit if
    it cannot be written: with one line, or without any if nobody reads it any more (`| head`).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            flush_stdout()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise SystemExit(1) from None
        if error.errno == errno.ENOSPC:
            raise SystemExit(f"Cannot write {error.filename or 'the output'}: disk full") from None
        raise


def flush_stdout() -> None:
    """Write out what has been printed."""
    if not sys.stdout or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
    except OSError:
        # What is left goes to nowhere, or Python would try again, and complain, at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


class ThreadsLeft(BaseException):
    """Ends the interpreter's wait for threads."""


def limit_wait_for_threads() -> None:
    """Called when the interpreter is about to wait for threads: let it not wait for ever.

    What a function has started with asyncio.to_thread cannot be cancelled, and may never end. A
    SIGINT ends the wait at once.
    """
    if not hasattr(signal, "SIGALRM"):  # Windows
        return

    deadline = time.monotonic() + LEAVE_THREADS_AFTER

    def leave(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM and time.monotonic() < deadline:
            return
        left = [thread.name for thread in threading.enumerate() if not thread.daemon]
        left.remove(threading.main_thread().name)
        if left:
            signal.setitimer(signal.ITIMER_REAL, 0)
            logger.warning("ending although threads still run: %s", ", ".join(left))
            sys.unraisablehook = lambda unraisable: None  # would show a traceback
            raise ThreadsLeft

    def go_on() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGALRM, signal.SIGINT):
        signal.signal(number, leave)
    # Again and again: one that comes while this process is stopped may go to another thread when it
    # is continued, and a signal to another thread does not interrupt the wait of this one.
    signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
    atexit.register(go_on)  # called as soon as the wait is over


class Receivers:
    """The stop_signals blocks of one event loop, which all get each signal."""

    def __init__(self) -> None:
        self.receivers: list[Callable[[int], None]] = []
        self.handler = ExitStack()

    def add(self, receiver: Callable[[int], None]) -> None:
        if not self.receivers:
            self.handler.enter_context(signal_handler(self.receive))
        self.receivers.append(receiver)

    def remove(self, receiver: Callable[[int], None]) -> None:
        self.receivers.remove(receiver)
        if not self.receivers:
            self.handler.close()

    def receive(self, number: int, frame: FrameType | None) -> None:
        for receiver in self.receivers.copy():
            receiver(number)


# Several workers may run in one loop, and a worker's end must not take the handlers from another.
receivers: WeakKeyDictionary[asyncio.AbstractEventLoop, Receivers] = WeakKeyDictionary()


@contextmanager
def stop_signals(first: Callable[[], object], second: Callable[[], object]) -> Iterator[None]:
    """Within this block the first SIGINT or SIGTERM calls `first`, the second `second`.

    Both are called by the running event loop. The third ends the process on the spot, also when the
    loop is blocked by a function and can call nothing. If there are several such blocks at a time,
    one for each worker, a signal reaches them all. Outside the main thread, where Python handles no
    signals, the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    callbacks = iter([first, second])

    def receive(number: int) -> None:
        callback = next(callbacks, None)
        if callback is None:
            os._exit(128 + number)
        loop.call_soon_threadsafe(callback)

    all_blocks = receivers.setdefault(loop, Receivers())
    all_blocks.add(receive)
    try:
        yield
    finally:
        all_blocks.remove(receive)


# The handlers in force, the outermost first, with those that they replaced.
in_force: list[tuple[Handler, dict[signal.Signals, Any]]] = []


def hangup() -> list[signal.Signals]:
    """SIGHUP, with which a terminal ends: not on Windows, and not if it is ignored (nohup)."""
    number = getattr(signal, "SIGHUP", None)
    return [number] if number and signal.getsignal(number) is not signal.SIG_IGN else []


@contextmanager
def signal_handler(handler: Handler, *others: signal.Signals) -> Iterator[None]:
    """Handle SIGINT and SIGTERM within this block, and others if given."""
    numbers = [*STOP_SIGNALS, *others]
    previous = {number: signal.signal(number, handler) for number in numbers}
    in_force.append((handler, previous))
    try:
        yield
    finally:
        in_force.remove((handler, previous))
        for number, old_handler in previous.items():
            if signal.getsignal(number) is handler:  # or it is ignored by now
                put_back(number, old_handler)


def put_back(number: signal.Signals, old_handler: Any) -> None:
    """Install the handler that signal.signal said was there before."""
    # None: a handler that was not installed by Python, and that Python cannot put back.
    signal.signal(number, signal.SIG_DFL if old_handler is None else old_handler)


# The signals that a thread does not let through, while it forks.
mask = threading.local()


def hold_signals() -> None:
    """Before a fork: a signal for the child must not come while the child has our handlers yet."""
    mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, [*STOP_SIGNALS, *hangup()])


def release_signals() -> None:
    """After a fork, in parent and child."""
    signal.pthread_sigmask(signal.SIG_SETMASK, mask.before)


def forget_handlers() -> None:
    """In a forked child: handle signals as before the first of our handlers.

    They would call into an event loop that nobody runs there, and the child would ignore SIGTERM.
    """
    for handler, previous in reversed(in_force):
        for number, old_handler in previous.items():
            if signal.getsignal(number) is handler:
                put_back(number, old_handler)
    release_signals()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=hold_signals, after_in_parent=release_signals, after_in_child=forget_handlers
    )
