"""A worker of the lab: python -m shared.lab.worker LESSON QUEUE SETTINGS

It runs the lesson's own Worker. On stdin come the gates at which functions are held; when stdin
ends, the lab has ended, and so does this process at once. SETTINGS is a JSON object: see Settings.
"""

import asyncio
import ctypes
import importlib
import inspect
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

from psycopg.conninfo import make_conninfo

from shared import database_url, load_queries, open_pool, run
from shared.lab.functions import Functions, Gates
from shared.lab.lesson import OpenLesson, modules_in

# Before what is for the lab, not for people. A line of the log has no such character in it.
MARK = "\x1e@lab "
SLOTS_INTERVAL = 0.25  # seconds
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Settings(TypedDict):
    functions: list[str] | None  # those to register; None: all
    slots: dict[str, int]  # concurrency, durable_concurrency
    constants: dict[str, float]  # of the lesson's modules, HEARTBEAT_INTERVAL for example
    gates: list[str]


def say(**facts: Any) -> None:
    """Tell the lab something."""
    print(MARK + json.dumps(facts), flush=True)


def obey(gates: Gates, loop: asyncio.AbstractEventLoop) -> None:
    """Take orders from stdin, in a thread; end the process when the lab has ended."""
    rest = b""
    while data := os.read(0, 65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            with suppress(RuntimeError):  # the loop is closed: this process is ending anyway
                loop.call_soon_threadsafe(gates.set, json.loads(line)["gates"])
    os._exit(1)


def die_with_the_lab() -> None:
    """On Linux: let the system kill this process when the lab ends, also while it is frozen.

    Elsewhere it continues frozen processes whose parent has ended, and those read the end of stdin.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def import_lesson(path: Path, constants: dict[str, float]) -> dict[str, ModuleType]:
    """Import a lesson's modules, but not its program, and set constants where they are."""
    sys.path.insert(0, str(path))
    names = [file.stem for file in modules_in(path) if file.stem != "main"]
    modules = {name: importlib.import_module(name) for name in names}
    for module in modules.values():
        for name, value in constants.items():
            if hasattr(module, name):
                setattr(module, name, value)
    return modules


def accepted(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function takes: an early lesson knows fewer."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def introduction(worker: Any, modules: dict[str, ModuleType]) -> dict[str, Any]:
    """What the lab wants to know of a worker, as far as it is known."""
    heartbeat = modules.get("heartbeat")
    facts = {
        "display_name": getattr(worker, "display_name", None),
        "inactive_after": getattr(heartbeat, "INACTIVE_AFTER", None),
        "heartbeat_interval": getattr(heartbeat, "HEARTBEAT_INTERVAL", None),
    }
    return {name: value for name, value in facts.items() if value is not None}


def slots_taken(worker: Any) -> dict[str, list[int]]:
    """How many slots are taken, and how many there are, by kind."""
    slots = getattr(worker, "slots", None)
    kinds = {"plain": slots}
    if isinstance(slots, dict):
        kinds = {"plain": slots.get(False), "durable": slots.get(True)}
    return {name: [s.limit - s.free, s.limit] for name, s in kinds.items() if s is not None}


class Teller:
    """Tells the lab who this worker is and what slots are taken, as it changes."""

    def __init__(self) -> None:
        self.worker: Any = None  # none yet
        self._before: dict[str, Any] = {}

    def tell(self) -> None:
        with suppress(AttributeError):  # of a reader's lesson, whose slots are made otherwise
            facts: dict[str, Any] = {"slots": slots_taken(self.worker)}
            if hasattr(self.worker, "id"):
                facts["id"] = str(self.worker.id)
            if facts != self._before:
                say(**facts)
                self._before = facts

    def say_of_gate(self, **facts: Any) -> None:
        """Before the lab hears of a gate, and maybe freezes this process, it has the slots."""
        self.tell()
        say(**facts)

    async def keep_telling(self) -> None:
        """Returns never."""
        while True:
            self.tell()
            await asyncio.sleep(SLOTS_INTERVAL)


async def main(path: Path, queue: str, settings: Settings) -> None:
    die_with_the_lab()
    teller = Teller()
    gates = Gates(teller.say_of_gate)
    gates.closed = set(settings["gates"])
    threading.Thread(
        target=obey, args=[gates, asyncio.get_running_loop()], name="orders", daemon=True
    ).start()
    modules = import_lesson(path, settings["constants"])
    lesson = OpenLesson(path)
    queries = load_queries(path)
    async with open_pool(path) as pool:
        async with pool.connection() as conn:
            await lesson.inspect(conn)
        # The payment service is somebody else: what cuts the worker's connections leaves it alone.
        os.environ["DATABASE_URL"] = make_conninfo(database_url(), application_name=f"{queue}-shop")
        async with open_pool(path) as shop:
            worker_class = modules["worker"].Worker
            worker = worker_class(pool, queries, **accepted(worker_class, dict(settings["slots"])))
            functions = Functions(lesson, modules, queries, shop, queue, gates).by_name()
            for name in settings["functions"] or functions:
                worker.register(name, functions[name])
            say(hello=introduction(worker, modules))
            teller.worker = worker
            telling = asyncio.create_task(teller.keep_telling())
            try:
                await worker.start(queue)
            finally:
                telling.cancel()


if __name__ == "__main__":
    run(main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])))
