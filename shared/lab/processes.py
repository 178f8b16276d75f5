"""The lab's worker processes: started, frozen, thawed, stopped, killed. Only these, no others."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from psycopg.conninfo import make_conninfo

from shared.database import database_url
from shared.lab.errors import LabError
from shared.lab.record import LINE, MAX_TEXT, Record
from shared.lab.worker import MARK, Settings

LOOK_INTERVAL = 0.2  # seconds
SHOWN_DEAD = 4
COLOURS = 8
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def key_of(ordinal: int) -> str:
    """A, B, ..., Z, AA, AB, ... as in a spreadsheet."""
    more, letter = divmod(ordinal, len(LETTERS))
    return (key_of(more - 1) if more else "") + LETTERS[letter]


class WorkerProcess:
    """One worker: its process, and what it has said of itself."""

    def __init__(self, ordinal: int, process: subprocess.Popen[bytes]) -> None:
        self.ordinal = ordinal
        self.key = key_of(ordinal)
        self.process = process
        self.reader: threading.Thread  # of what it writes
        self.is_alive = self.is_frozen = self.is_stopping = False
        self.killed_at: float | None = None
        self.exit: int | None = None
        self.since = time.time()
        self.facts: dict[str, Any] = {}  # display_name, id, slots, ...
        self.held: list[dict[str, Any]] = []
        self.odd_lines: deque[str] = deque(maxlen=60)  # those that are not from its log

    @property
    def state(self) -> str:
        if self.exit is not None:
            return "dead"
        if self.is_frozen:
            return "frozen"
        if self.is_stopping:
            return "stopping"
        return "alive" if self.is_alive else "starting"

    @property
    def error(self) -> str | None:
        """Why it has ended, if nobody wanted it to."""
        if not self.exit or self.killed_at or self.is_stopping:
            return None
        return "\n".join(self.odd_lines) or f"It ended with exit status {self.exit}."

    def view(self) -> dict[str, Any]:
        """As the page gets it: what is not known is left out."""
        entries = {
            "key": self.key,
            "ordinal": self.ordinal,
            "colour": self.ordinal % COLOURS,
            "pid": self.process.pid,
            "id": self.facts.get("id"),
            "display_name": self.facts.get("display_name"),
            "state": self.state,
            "since": self.since,
            "exit": self.exit,
            "asked": self.is_stopping or None,
            "error": self.error,
            "slots": self.facts.get("slots") or None,
            "held": self.held or None,
        }
        return {name: value for name, value in entries.items() if value is not None}


class Processes:
    """All workers of one run of the lab. `changed` is called whenever the page has to know."""

    def __init__(self, path: Path, queue: str, record: Record, changed: Callable[[], None]) -> None:
        self.path = path
        self.queue = queue
        self.record = record
        self.changed = changed
        self.loop = asyncio.get_running_loop()
        self.workers: list[WorkerProcess] = []
        self.closed_gates: set[str] = set()
        self.started = 0  # how many have come so far as to work
        self._count = 0

    def start(self, settings: Settings) -> WorkerProcess:
        """Start a worker."""
        key = key_of(self._count)
        url = make_conninfo(database_url(), application_name=self.application_name(key))
        # In a process group of its own, so that Ctrl-C is for the lab. Should the lab be killed,
        # most systems then also wake and end a worker that is frozen and so cannot see it.
        group: dict[str, Any] = {"process_group": 0}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        process = subprocess.Popen(
            [
                *[sys.executable, "-m", "shared.lab.worker"],
                *[str(self.path), self.queue, json.dumps(settings)],
            ],
            env=os.environ | {"DATABASE_URL": url, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **group,
        )
        worker = WorkerProcess(self._count, process)
        self._count += 1
        self.workers.append(worker)
        worker.reader = threading.Thread(target=self._read, args=[worker], daemon=True)
        worker.reader.start()
        self.record.say("start", f"started worker {key}, process {process.pid}", key)
        self.changed()
        return worker

    def application_name(self, key: str) -> str:
        """By which the connections of a worker are found."""
        return f"{self.queue}-{key}"

    def get(self, key: Any) -> WorkerProcess:
        """A worker that has not ended; raises LabError if there is none of this name."""
        self.look()
        worker = next((worker for worker in self.workers if worker.key == key), None)
        if worker is None:
            raise LabError(f"There is no worker {key}.")
        if worker.exit is not None:
            raise LabError(f"Worker {key} has ended already.")
        return worker

    def kill(self, key: str) -> None:
        worker = self.get(key)
        worker.killed_at = time.time()
        self.record.say("kill", f"killed worker {key}, process {worker.process.pid}", key)
        worker.process.kill()
        self.changed()

    def freeze(self, key: str) -> None:
        worker = self.get(key)
        if worker.is_frozen:
            raise LabError(f"Worker {key} is frozen already.")
        psutil.Process(worker.process.pid).suspend()
        self._mark(worker, is_frozen=True)
        self.record.say("freeze", f"froze worker {key}", key)

    def thaw(self, key: str) -> None:
        worker = self.get(key)
        if not worker.is_frozen:
            raise LabError(f"Worker {key} is not frozen.")
        self.record.say("thaw", f"thawed worker {key}", key)
        self._mark(worker, is_frozen=False)
        psutil.Process(worker.process.pid).resume()

    def stop(self, key: str) -> None:
        worker = self.get(key)
        self.record.say("stop", f"told worker {key} to stop (SIGTERM)", key)
        self._mark(worker, is_stopping=True)
        worker.process.send_signal(signal.SIGTERM)

    def kill_all(self) -> list[str]:
        """Kill all workers, and wait until they have ended; returns their names."""
        self.look()
        running = [worker for worker in self.workers if worker.exit is None]
        for worker in running:
            worker.killed_at = time.time()
            worker.process.kill()
        for worker in running:
            worker.process.wait()
        self.look()
        return [worker.key for worker in running]

    def clear(self) -> None:
        """Forget those that have ended. When none is left, the names begin anew."""
        self.workers = [worker for worker in self.workers if worker.exit is None]
        if not self.workers:
            self._count = 0
        self.changed()

    def set_gates(self, closed: set[str]) -> None:
        """Tell all workers at which gates to hold functions."""
        self.closed_gates = closed
        order = json.dumps({"gates": sorted(closed)}).encode() + b"\n"
        for worker in self.workers:
            assert worker.process.stdin is not None
            with suppress(OSError, ValueError):  # it has ended, or we have seen that it has
                worker.process.stdin.write(order)
                worker.process.stdin.flush()
        self.changed()

    def shown(self) -> list[WorkerProcess]:
        """Those that the page shows: of the dead ones only the last."""
        dead = [worker for worker in self.workers if worker.exit is not None]
        hidden = dead[: max(0, len(dead) - SHOWN_DEAD)]
        return [worker for worker in self.workers if worker not in hidden]

    async def keep_looking(self) -> None:
        """Notice workers that end. Returns never."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_INTERVAL)

    def look(self) -> None:
        """See who has ended. Done by nobody else, so a process id that we signal is still ours."""
        for worker in self.workers:
            if worker.exit is None and (status := worker.process.poll()) is not None:
                self._mark(worker, exit=status, held=[])
                assert worker.process.stdin is not None
                with suppress(OSError):  # what was not written yet has no reader
                    worker.process.stdin.close()
                if worker.killed_at is None:
                    text = f"worker {worker.key} has ended, exit status {status}"
                    self.record.say("died" if worker.error else "ended", text, worker.key)
                self.record.ended(worker.key, worker.killed_at)

    def _mark(self, worker: WorkerProcess, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(worker, name, value)
        worker.since = time.time()
        self.changed()

    def _read(self, worker: WorkerProcess) -> None:
        """Read what a worker writes, in a thread of its own."""
        assert worker.process.stdout is not None
        rest = b""
        # RuntimeError: the loop is closed, the lab is ending.
        with suppress(RuntimeError), worker.process.stdout:
            while data := os.read(worker.process.stdout.fileno(), 65536):
                *lines, rest = (rest + data).split(b"\n")
                self.loop.call_soon_threadsafe(self._hear, worker, lines)
                rest = rest[:MAX_TEXT] if len(rest) > 100 * MAX_TEXT else rest
            self.loop.call_soon_threadsafe(self._hear, worker, [rest] if rest else [])
            self.loop.call_soon_threadsafe(self.look)

    def _hear(self, worker: WorkerProcess, lines: list[bytes]) -> None:
        for raw in lines:
            line = raw.decode(errors="replace").rstrip("\r")
            line, mark, facts = line.partition(MARK)  # a print may have left its line open
            if mark:
                self._learn(worker, json.loads(facts))
                if not line:
                    continue
            self.record.hear(worker.key, line)
            if not LINE.fullmatch(line):
                worker.odd_lines.append(line[:MAX_TEXT])
        self.changed()

    def _learn(self, worker: WorkerProcess, facts: dict[str, Any]) -> None:
        """Take in what a worker tells of itself."""
        if "hello" in facts:
            self._mark(worker, is_alive=True)
            self.started += 1
            worker.facts |= facts["hello"]
        elif "held" in facts:
            worker.held.append(facts["held"])
        elif "left" in facts:
            with suppress(ValueError):
                worker.held.remove(facts["left"])
        else:
            worker.facts |= facts
