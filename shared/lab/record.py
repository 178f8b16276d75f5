"""What the lab has heard from its workers and done to them: log, lanes, moments.

A lane is one attempt of a task, as its worker's own log lines tell it. The tables cannot: they have
only the last attempt.
"""

import re
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MAX_ENTRIES = 20_000  # of the log: a thousand orders with their steps
MAX_TASKS = 20_000  # with lanes
MAX_MOMENTS = 500
MAX_TEXT = 2000  # characters of a line

LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} (?P<level>[A-Z]+) +(?P<text>.*)")
TASK = re.compile(
    r"(?:worker \S+, )?task (?P<task>\d+)(?:, attempt (?P<attempt>\d+))?: (?P<what>.*)"
)
OUTCOME = re.compile("COMPLETED|FAILED|QUEUED|SUSPENDED")


@dataclass
class Lane:
    """One attempt of a task on one worker."""

    attempt: int
    worker_key: str
    start: float
    to: float | None = None
    end: str | None = None
    text: str | None = None

    def view(self) -> dict[str, Any]:
        """As the page gets it: what is not known is left out."""
        entries = {
            "attempt": self.attempt,
            "worker_key": self.worker_key,
            "from": self.start,
            "to": self.to,
            "end": self.end,
            "text": self.text,
        }
        return {name: value for name, value in entries.items() if value is not None}


@dataclass
class Moment:
    """Something that happened to workers or tasks. `tasks` None: to all of them."""

    at: float
    what: str
    text: str
    worker_key: str | None
    tasks: set[int] | None

    def view(self) -> dict[str, Any]:
        view = {"at": self.at, "what": self.what, "text": self.text}
        return view if self.worker_key is None else view | {"worker_key": self.worker_key}


class Record:
    """The memory of one run of the lab."""

    def __init__(self) -> None:
        self.entries: deque[dict[str, Any]] = deque(maxlen=MAX_ENTRIES)
        self.moments: deque[Moment] = deque(maxlen=MAX_MOMENTS)
        self._number = 0
        self._lanes: OrderedDict[int, list[Lane]] = OrderedDict()  # by task
        # What runs in each worker's process, whoever owns it by now.
        self._running: defaultdict[str, dict[tuple[int, int], Lane]] = defaultdict(dict)

    def lanes(self, task: int) -> list[dict[str, Any]]:
        return [lane.view() for lane in self._lanes.get(task, [])]

    def moments_of(self, tasks: Iterable[int]) -> list[dict[str, Any]]:
        """What happened to these tasks."""
        wanted = set(tasks)
        return [m.view() for m in self.moments if m.tasks is None or m.tasks & wanted]

    def newer_than(self, number: int) -> list[dict[str, Any]]:
        """The entries of the log after this one."""
        missing = min(max(self._number - number, 0), len(self.entries))
        return list(self.entries)[len(self.entries) - missing :]

    @property
    def last_number(self) -> int:
        return self._number

    def say(
        self,
        what: str,
        text: str,
        worker: str | None = None,
        task: int | None = None,
        at: float | None = None,
    ) -> None:
        """Note what the lab itself did, to a worker, to a task or to all; by default just now."""
        tasks = {task} if task else self._of(worker) if worker else None
        self.moments.append(Moment(at or time.time(), what, text, worker, tasks))
        entry = {"worker": "lab", "level": "INFO", "text": text, "task": task, "what": what}
        self._add(entry | {"at": at} if at else entry)

    def _of(self, worker: str) -> set[int]:
        """What runs on a worker, and what it has let go of: that this leaves alone is news, too."""
        starts = [m.at for m in self.moments if (m.what, m.worker_key) == ("start", worker)]
        last = ((id, lanes[-1]) for id, lanes in self._lanes.items())
        let_go = {
            id
            for id, lane in last
            if (lane.worker_key, lane.end) == (worker, "SUSPENDED")
            and lane.start >= max(starts, default=0.0)  # not by an earlier worker of its name
        }
        return let_go | {id for id, _ in self._running[worker]}

    def hear(self, worker: str, line: str) -> None:
        """Note a line that a worker has written."""
        line = line[:MAX_TEXT]
        match = LINE.fullmatch(line)
        text, level = (match["text"], match["level"]) if match else (line, "")
        entry: dict[str, Any] = {"worker": worker, "level": level, "text": text}
        if about := TASK.fullmatch(text):
            # Lessons 02 and 03 have one attempt only, and no number for it.
            task, attempt = int(about["task"]), int(about["attempt"] or 1)
            entry |= {"task": task, "attempt": attempt, "what": about["what"]}
            self._note(worker, task, attempt, about["what"])
        self._add(entry)

    def ended(self, worker: str, killed_at: float | None) -> None:
        """Note that a worker's process has ended, and with it what ran in it."""
        for lane in self._running.pop(worker, {}).values():
            if lane.end is None:
                lane.to = killed_at or time.time()
                lane.end = "killed" if killed_at else "worker ended"

    def _add(self, entry: dict[str, Any]) -> None:
        self._number += 1
        known = {name: value for name, value in entry.items() if value is not None}
        self.entries.append({"n": self._number, "at": time.time(), **known})

    def _note(self, worker: str, task: int, attempt: int, what: str) -> None:
        """Let a line begin or end a lane."""
        if what.startswith("RUNNING "):
            self._begin(worker, task, attempt)
            return
        outcome = OUTCOME.match(what)
        own = self._running[worker].get((task, attempt))
        if outcome and own:
            self._end(worker, own, task, outcome[0], what)
        elif own and what.startswith("is not ours any more"):
            self._end(worker, own, task, "fenced off", what)
            self._moment("fenced", f"{worker}'s attempt {attempt} is fenced off", worker, task)
        elif outcome and outcome[0] == "QUEUED":
            # Said by another worker, of one that is silent.
            lane = next((i for i in self._lanes.get(task, []) if i.attempt == attempt), None)
            if lane and lane.end is None:
                lane.to, lane.end, lane.text = time.time(), "requeued", what
            self._moment("requeued", f"{worker} queued it again", worker, task)

    def _begin(self, worker: str, task: int, attempt: int) -> None:
        lanes = self._lanes.setdefault(task, [])
        if lanes and lanes[-1].end == "SUSPENDED":
            self._moment("woken", f"woken, attempt {attempt} on {worker}", worker, task)
        lane = Lane(attempt, worker, time.time())
        lanes.append(lane)
        self._running[worker][task, attempt] = lane
        if len(self._lanes) > MAX_TASKS:
            self._lanes.popitem(last=False)

    def _end(self, worker: str, lane: Lane, task: int, end: str, text: str) -> None:
        del self._running[worker][task, lane.attempt]
        lane.to, lane.end, lane.text = time.time(), end, text
        if end == "SUSPENDED":
            self._moment("suspended", f"{worker} has let go of it", worker, task)

    def _moment(self, what: str, text: str, worker: str, task: int) -> None:
        self.moments.append(Moment(time.time(), what, text, worker, {task}))
