"""python -m shared lab: from its start to its end, whatever ends it."""

import asyncio
import os
import secrets
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn

from shared.database import connect
from shared.lab.hand import Hand
from shared.lab.lesson import OpenLesson
from shared.lab.live import Live
from shared.lab.server import Lab, Server
from shared.runtime import stop_signals

ADDRESS = "127.0.0.1"  # no other: the page can kill processes
CLOSING_TIME = 1  # seconds, for answers that are on their way


def listen(port: int) -> socket.socket:
    """A socket on this port, or on a free one if it is 0. Raises SystemExit if it is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
        listener.listen()  # from now on who connects waits until we serve
    except (OSError, OverflowError) as error:
        listener.close()
        raise SystemExit(f"Cannot listen on port {port}: {error}. Try another --port.") from None
    return listener


@contextmanager
def ended_by_terminal(end: Callable[[], object]) -> Iterator[None]:
    """Within this block the end of the terminal calls `end`, if it is not ignored (nohup)."""
    number = getattr(signal, "SIGHUP", None)  # not on Windows
    if number is None or signal.getsignal(number) is signal.SIG_IGN:
        yield
        return
    loop = asyncio.get_running_loop()
    before = signal.signal(number, lambda *_: loop.call_soon_threadsafe(end))
    try:
        yield
    finally:
        signal.signal(number, before)


def open_browser(url: str) -> None:
    """Open the page, where there is a screen: a browser in this terminal would take it away."""
    if sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        return
    threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()


async def lab(path: Path, port: int, with_browser: bool) -> None:
    """Show a lesson until Ctrl-C, SIGTERM or the end of the terminal; then stop all workers."""
    lesson = OpenLesson(path)
    if int(lesson.number) < 2:
        raise SystemExit("The lab shows lessons from 02 on: lesson 01 has no workers yet.")
    async with await connect(lesson.schema):
        pass  # or one clear line on why there is no database
    listener = listen(port)
    port = listener.getsockname()[1]
    live = Live(lesson)
    hand = Hand(lesson, live.touch)
    live.begin(hand)
    await live.read()  # what the lesson has; if it is faulty, the page shows it
    token = secrets.token_urlsafe(24)
    front = Lab(hand, live, token, port)
    server = Server(
        uvicorn.Config(
            front.app,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSING_TIME,
        )
    )
    told = asyncio.Event()
    with stop_signals(told.set, told.set), ended_by_terminal(told.set):
        url = f"http://{ADDRESS}:{port}/?token={token}"
        print(f"{lesson.path.name} is open at {url}\nCtrl-C ends it, and its workers.", flush=True)
        if with_browser:
            open_browser(url)
        try:
            await until_told(told, front, server, listener)
        finally:
            hand.processes.kill_all()
            await live.close()


async def until_told(
    told: asyncio.Event, front: Lab, server: Server, listener: socket.socket
) -> None:
    """Serve until told to stop, or until something fails."""
    live, hand = front.live, front.hand
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve(sockets=[listener]))
        others = [
            group.create_task(live.keep_reading()),
            group.create_task(hand.processes.keep_looking()),
        ]
        await told.wait()
        hand.processes.kill_all()
        # What waits for a scene's lock can end now.
        await asyncio.wait([asyncio.create_task(front.player.stop())], timeout=CLOSING_TIME)
        live.end()
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await serving
        for task in others:
            task.cancel()
