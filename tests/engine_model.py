"""What the engine must do, in plain Python and without a database: see test_model.py.

A method of Model is one statement, or one transaction, of the engine. `held` are the rows that
another transaction has locked: some statements pass over them, others wait (then the model is asked
afterwards). `locks` are the rows that the last method locked, and how; it `may_hold_more`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FINISHED = ("COMPLETED", "FAILED")

SIGNALS = ("approval", "news")
TIMERS = ("sleep", *SIGNALS)  # children that no worker runs

# Postgres's row locks, as far as the engine takes them: FOR KEY SHARE, NO KEY UPDATE, UPDATE.
KEY_SHARE, NO_KEY_UPDATE, UPDATE = 1, 2, 3


def in_conflict(one: int, other: int) -> bool:
    return one + other > UPDATE


Locks = dict[int, int]


class Refused(Exception):
    """The engine must raise the exception of this name, and change nothing."""


class Claim(NamedTuple):
    """What a worker has been given, and believes for ever."""

    id: int
    worker: int
    attempt: int


class Event(NamedTuple):
    """An entry of a log; its position there is its id."""

    task_name: str
    input: Any
    child: int
    branch: int  # in which it was written


class Branch(NamedTuple):
    """One that was left: where, with what outcome, and the events that the next one lacks."""

    from_event: int
    status: str
    output: Any
    abandoned: list[Event]


@dataclass
class Signal:
    """What a task was sent, and the wait that has received it."""

    name: str
    payload: Any
    idempotency_key: str | None
    received_by: int | None = None


class Text:
    """Equal to every text that says something: error messages are free to change."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) or (isinstance(other, str) and bool(other))

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "Text()"


@dataclass
class ModelTask:
    """A row of `tasks`, with numbers for workers and without times."""

    id: int
    queue: str
    task_name: str
    input: Any
    max_retries: int
    priority: int
    is_durable: bool
    overdue: bool | None = None  # has its schedule timeout passed? None: there is none
    is_due: bool | None = None  # has the time to wake it up come? None: it has none
    status: str = "QUEUED"
    output: Any = None
    finished: bool = False
    retry_count: int = 0
    worker: int | None = None
    attempt: int = 0
    lost_count: int = 0
    branch_id: int = 1


class Brief(NamedTuple):
    """What a statement tells of a task that it changed."""

    id: int
    status: str
    worker: int | None
    attempt: int
    retry_count: int
    lost_count: int


def brief(task: ModelTask) -> Brief:
    return Brief(task.id, task.status, task.worker, task.attempt, task.retry_count, task.lost_count)


@dataclass
class Model:
    tasks: dict[int, ModelTask] = field(default_factory=dict)
    logs: dict[int, list[Event]] = field(default_factory=dict)
    branches: dict[int, list[Branch]] = field(default_factory=dict)
    signals: dict[int, list[Signal]] = field(default_factory=dict)
    workers: dict[int, str] = field(default_factory=dict)  # fresh, silent, inactive or ahead
    locks: Locks = field(default_factory=dict)
    may_hold_more: bool = False
    now: int = 0  # when the transaction began; like the next two, only for comparison
    started: dict[int, int] = field(default_factory=dict)  # the event of which child
    ended: dict[int, int] = field(default_factory=dict)

    def adopt(self, other: "Model", ids: Iterable[int]) -> None:
        """Take over what another model says of these tasks: its transaction was committed."""
        for id in ids:
            self.tasks[id] = other.tasks[id]
            self.logs[id] = other.logs[id]
            self.branches[id] = other.branches[id]
            self.signals[id] = other.signals[id]
            for mine, theirs in ((self.started, other.started), (self.ended, other.ended)):
                mine.update({id: theirs[id]} if id in theirs else {})

    def create(self, task: ModelTask) -> Brief:
        self.tasks[task.id] = task
        self.logs[task.id] = []
        self.branches[task.id] = []
        self.signals[task.id] = []
        self._touch([task])
        return brief(task)

    def claim(
        self,
        worker: int,
        queue: str,
        is_durable: bool,
        task_names: tuple[str, ...],
        limit: int,
        held: set[int],
    ) -> list[Brief]:
        """A worker whose heartbeat is missing or too old gets nothing."""
        if self.workers.get(worker) not in ("fresh", "silent"):
            return []
        queued = [
            task
            for task in self._free(held, "QUEUED")
            if task.queue == queue and task.is_durable == is_durable
            if task.task_name in task_names
            if task.attempt > 0 or not task.overdue
        ]
        claimed = sorted(queued, key=lambda task: (-task.priority, task.id))[:limit]
        for task in claimed:
            task.status, task.worker, task.attempt = "RUNNING", worker, task.attempt + 1
        return self._touch(claimed)

    def owned(self, claim: Claim) -> ModelTask | None:
        """The claim's task, if that attempt still owns it."""
        task = self.tasks[claim.id]
        owner = (task.id, task.worker, task.attempt)
        return task if task.status == "RUNNING" and owner == claim else None

    def end(self, claim: Claim, status: str, output: Any) -> list[Brief]:
        """The outcome of an attempt; status is QUEUED after a failure with retries left."""
        task = self.owned(claim)
        if task is None:
            return []
        if status == "QUEUED":
            self._queue(task)
            task.retry_count += 1
        else:
            task.status = status
            self._finish(task)
        task.output = output
        return self._touch_and_wake_parents([task])

    def put_back(
        self, worker: int, is_durable: bool, known: Iterable[Claim], held: set[int]
    ) -> list[Brief]:
        """Queue again what of one kind the worker owns and does not know of."""
        unknown = [
            task
            for task in self._free(held, "RUNNING")
            if task.worker == worker and task.is_durable == is_durable
            if Claim(task.id, worker, task.attempt) not in known
        ]
        for task in unknown:
            self._queue(task)
        return self._touch(unknown)

    def requeue_lost(self, max_lost_workers: int, limit: int, held: set[int]) -> list[Brief]:
        lost = [
            task
            for task in self._free(held, "RUNNING")
            if task.worker is None or self.workers.get(task.worker) not in ("fresh", "silent")
        ][:limit]
        for task in lost:
            self._queue(task)
            task.lost_count += 1
            if task.lost_count >= max_lost_workers:
                self._fail(task)
        return self._touch_and_wake_parents(lost)

    def expire(self, limit: int, held: set[int]) -> list[Brief]:
        expired = [t for t in self._free(held, "QUEUED") if t.attempt == 0 and t.overdue][:limit]
        for task in expired:
            self._fail(task)
        return self._touch_and_wake_parents(expired)

    def wake(self, held: set[int]) -> list[Brief]:
        """Complete the sleeps that are over, unless somebody else holds them or their parents."""
        due = [
            task
            for task in self._free(held, "SLEEPING")
            if task.is_due and self._parent_of(task).id not in held
        ]
        for task in due:
            task.status = "COMPLETED"
            self._finish(task)
        self._touch([self._parent_of(task) for task in due])
        return self._touch_and_wake_parents(due)

    def _parent_of(self, sleep: ModelTask) -> ModelTask:
        parent = self.parent(sleep.id)
        assert parent is not None
        return parent

    def suspend(self, claim: Claim, awaited: list[int]) -> bool:
        """Unless one of these has finished. Returns whether the claim has lost its task."""
        task = self.owned(claim)
        if task is None:
            return True
        self._touch([task], UPDATE)
        if any(self.tasks[id].status in FINISHED for id in awaited):
            return False
        task.status, task.worker, task.output = "SUSPENDED", None, None
        return True

    def heartbeat(self, worker: int) -> bool:
        """Returns whether the worker was in touch."""
        was_fresh = self.workers.get(worker) == "fresh"
        self.workers[worker] = "fresh"
        return was_fresh

    def delete_inactive_workers(self) -> int:
        inactive = [w for w, age in self.workers.items() if age not in ("fresh", "silent")]
        for worker in inactive:
            del self.workers[worker]
        return len(inactive)

    def append(
        self, claim: Claim, event_id: int, event: Event, seconds: float | None = 0
    ) -> tuple[int, bool]:
        """Returns the child of that event in the log, and whether it was there already.

        A sleep, or a wait for a signal, is recorded without its `seconds`.
        """
        parent = self.owned(claim)
        if parent is None:
            raise Refused("TaskNotOwnedError")
        self._touch([parent])
        log = self.logs[parent.id]
        if event_id <= len(log):
            recorded = log[event_id - 1]
            if recorded[:2] != event[:2]:
                raise Refused("NonDeterminismError")
            return recorded.child, True
        log.append(event._replace(branch=parent.branch_id))
        self.started[event.child] = self.now
        if event.task_name in TIMERS:
            input = {"seconds": seconds}
            child = ModelTask(event.child, parent.queue, event.task_name, input, 0, 1, False)
            child.status = "SLEEPING"
            child.is_due = None if seconds is None else seconds == 0
            child.output = None if event.task_name == "sleep" else {"timed_out": True}
        else:
            child = ModelTask(
                id=event.child,
                queue=parent.queue,
                task_name=event.task_name,
                input=event.input,
                max_retries=1,
                priority=parent.priority,
                is_durable=event.task_name == "order",
            )
        self.create(child)
        if event.task_name in SIGNALS:
            self._deliver(parent, event.task_name, set())
        return event.child, False

    def send(self, id: int, signal: Signal, held: set[int]) -> None:
        """A repeated key changes nothing, whatever state the task is in."""
        task = self.tasks.get(id)
        if task is None:
            raise Refused("ValueError")
        self._touch([task])
        keys = {sent.idempotency_key for sent in self.signals[id]} - {None}
        if signal.idempotency_key in keys:
            return
        if not task.is_durable or task.status in FINISHED:
            raise Refused("ValueError")
        self.signals[id].append(signal)
        self._deliver(task, signal.name, held)

    def _deliver(self, task: ModelTask, name: str, held: set[int]) -> None:
        """The oldest signal that is left, to the oldest wait that nobody holds."""
        waits = [self.tasks[event.child] for event in self.logs[task.id] if event.task_name == name]
        free = [wait for wait in waits if wait.status == "SLEEPING" and wait.id not in held]
        unreceived = [s for s in self.signals[task.id] if s.name == name and s.received_by is None]
        # Whether a wait is locked that gets no signal, depends on which Postgres looks for first.
        self.may_hold_more |= not unreceived and any(w.id not in self.locks for w in free[:1])
        for wait, signal in zip(free[:1], unreceived, strict=False):
            signal.received_by = wait.id
            wait.status, wait.output = "COMPLETED", {"payload": signal.payload}
            self._finish(wait)
            self._touch_and_wake_parents([wait])

    def failed_child(self, id: int) -> ModelTask | None:
        """The child that a failed task's output names."""
        output = self.tasks[id].output
        named = output.get("child_task_id") if isinstance(output, dict) else None
        children = [self.tasks[event.child] for event in self.logs[id]]
        failed = (t for t in children if t.id == named and t.status == "FAILED")
        return next(failed, None)

    def retry(self, id: int) -> None:
        task: ModelTask | None = self._resettable(id, "FAILED")
        tasks = []
        while task is not None:
            tasks.append(task)
            child = self.failed_child(task.id)
            if child is not None:
                self._touch([child])
                if any(self.started[e.child] > self.ended[child.id] for e in self.logs[task.id]):
                    raise Refused("ValueError")  # the function went on from that failure
            task = child
        for each in tasks:
            self._reset(each)
        for each in tasks:
            if each.task_name in SIGNALS:
                parent = self.parent(each.id)
                assert parent is not None
                self._deliver(parent, each.task_name, set())

    def fork(self, id: int, from_event: int, held: set[int]) -> None:
        """It does not wait for children that others hold, who may be finishing them."""
        task = self._resettable(id, *FINISHED)
        log = self.logs[id]
        if not 1 <= from_event <= len(log) + 1:
            raise Refused("ValueError")
        kept, left = log[: from_event - 1], log[from_event - 1 :]
        events = left
        abandoned: list[ModelTask] = []
        while events:
            children = [self.tasks[event.child] for event in events]
            self._touch([child for child in children if child.id not in held])
            if any(child.status == "RUNNING" or child.id in held for child in children):
                raise Refused("ValueError")
            abandoned += [child for child in children if child.status not in FINISHED]
            events = [event for child in children for event in self.logs[child.id]]
        for child in abandoned:
            self._fail(child)
        self._wake_parents(abandoned)
        self.branches[id].append(Branch(from_event, task.status, task.output, left))
        self.logs[id] = kept
        task.branch_id += 1
        self._reset(task)

    def _resettable(self, id: int, *states: str) -> ModelTask:
        task = self.tasks.get(id)
        parent = self.parent(id)
        # The child of one that has not finished may be ending, and waits for its parent then.
        is_free = parent is None or parent.status in FINISHED
        self._touch([each for each in (parent, task if is_free else None) if each is not None])
        if task is None or not task.is_durable or task.status not in states:
            raise Refused("ValueError")
        if self._is_abandoned(id):
            raise Refused("ValueError")
        if parent is not None and parent.status not in FINISHED:
            raise Refused("ValueError")
        return task

    def parent(self, id: int) -> ModelTask | None:
        """The task whose log, on whatever branch, has this one as a child."""
        parents = (p for p in self.tasks if any(e.child == id for e in self._all_events(p)))
        return next((self.tasks[p] for p in parents), None)

    def _all_events(self, id: int) -> list[Event]:
        return self.logs[id] + [e for branch in self.branches[id] for e in branch.abandoned]

    def _is_abandoned(self, id: int) -> bool:
        """Whether it, or one that it descends from, is on a branch that was left."""
        parent = self.parent(id)
        if parent is None:
            return False
        is_current = any(event.child == id for event in self.logs[parent.id])
        return not is_current or self._is_abandoned(parent.id)

    def _reset(self, task: ModelTask) -> None:
        self._touch([task])
        self._queue(task)
        task.output, task.finished, task.overdue = None, False, None
        if task.task_name in TIMERS:
            task.status = "SLEEPING"  # no worker runs it
        if task.task_name in SIGNALS:
            task.output = {"timed_out": True}
        task.retry_count = task.lost_count = 0

    def _fail(self, task: ModelTask) -> None:
        task.status, task.output = "FAILED", {"error": Text()}
        self._finish(task)

    def _finish(self, task: ModelTask) -> None:
        task.finished = True
        self.ended[task.id] = self.now

    def _queue(self, task: ModelTask) -> None:
        task.status, task.worker = "QUEUED", None

    def _free(self, held: set[int], status: str) -> list[ModelTask]:
        """The tasks in this state that no other transaction holds, oldest first."""
        return [t for id, t in sorted(self.tasks.items()) if t.status == status and id not in held]

    def _touch(self, tasks: list[ModelTask], lock: int = NO_KEY_UPDATE) -> list[Brief]:
        for task in tasks:
            self.locks[task.id] = max(lock, self.locks.get(task.id, lock))
        return [brief(task) for task in tasks]

    def _touch_and_wake_parents(self, tasks: list[ModelTask]) -> list[Brief]:
        self._touch(tasks)
        self._wake_parents(tasks)
        return [brief(task) for task in tasks]

    def _wake_parents(self, tasks: list[ModelTask]) -> None:
        """What the trigger does for those of them that have finished."""
        for task in tasks:
            parent = self.parent(task.id)
            if task.status in FINISHED and parent is not None:
                self._touch([parent], KEY_SHARE)
                if parent.status == "SUSPENDED":
                    self._queue(parent)
                    self._touch([parent])
