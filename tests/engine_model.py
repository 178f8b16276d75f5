"""What the engine must do, in plain Python and without a database: see test_model.py.

A method of Model is one statement, or one transaction, of the engine. `held` are the rows that
another transaction has locked: some statements pass over them, others wait (then the model is asked
afterwards). `touched` are the rows that the last method locked.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FINISHED = ("COMPLETED", "FAILED")


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
    status: str = "QUEUED"
    output: Any = None
    finished: bool = False
    retry_count: int = 0
    worker: int | None = None
    attempt: int = 0
    lost_count: int = 0


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
    workers: dict[int, str] = field(default_factory=dict)  # fresh, silent or inactive
    touched: set[int] = field(default_factory=set)

    def adopt(self, other: "Model", ids: Iterable[int]) -> None:
        """Take over what another model says of these tasks: its transaction was committed."""
        for id in ids:
            self.tasks[id] = other.tasks[id]
            self.logs[id] = other.logs[id]

    def create(self, task: ModelTask) -> Brief:
        self.tasks[task.id] = task
        self.logs[task.id] = []
        self.touched.add(task.id)
        return brief(task)

    def claim(
        self, worker: int, queue: str, is_durable: bool, limit: int, held: set[int]
    ) -> list[Brief]:
        queued = [
            task
            for task in self._free(held, "QUEUED")
            if task.queue == queue and task.is_durable == is_durable
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
            task.status, task.finished = status, True
        task.output = output
        return self._touch([task])

    def put_back(self, worker: int, known: Iterable[Claim], held: set[int]) -> list[Brief]:
        """Queue again what the worker owns and does not know of."""
        unknown = [
            task
            for task in self._free(held, "RUNNING")
            if task.worker == worker and Claim(task.id, worker, task.attempt) not in known
        ]
        for task in unknown:
            self._queue(task)
        return self._touch(unknown)

    def requeue_lost(self, max_lost_workers: int, held: set[int]) -> list[Brief]:
        lost = [
            task
            for task in self._free(held, "RUNNING")
            if task.worker is None or self.workers.get(task.worker, "inactive") == "inactive"
        ]
        for task in lost:
            self._queue(task)
            task.lost_count += 1
            if task.lost_count >= max_lost_workers:
                task.status, task.output, task.finished = "FAILED", {"error": Text()}, True
        return self._touch(lost)

    def expire(self, held: set[int]) -> list[Brief]:
        expired = [t for t in self._free(held, "QUEUED") if t.attempt == 0 and t.overdue]
        for task in expired:
            task.status, task.output, task.finished = "FAILED", {"error": Text()}, True
        return self._touch(expired)

    def heartbeat(self, worker: int) -> bool:
        """Returns whether the worker was out of touch."""
        was_fresh = self.workers.get(worker) == "fresh"
        self.workers[worker] = "fresh"
        return not was_fresh

    def delete_inactive_workers(self) -> int:
        inactive = [worker for worker, age in self.workers.items() if age == "inactive"]
        for worker in inactive:
            del self.workers[worker]
        return len(inactive)

    def append(self, claim: Claim, event_id: int, event: Event) -> tuple[int, bool]:
        """Returns the child of that event in the log, and whether it was there already."""
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
        log.append(event)
        self.create(
            ModelTask(
                id=event.child,
                queue=parent.queue,
                task_name=event.task_name,
                input=event.input,
                max_retries=1,
                priority=parent.priority,
                is_durable=event.task_name == "order",
            )
        )
        return event.child, False

    def failed_child(self, id: int) -> ModelTask | None:
        """The child that a failed task's output names."""
        output = self.tasks[id].output
        named = output.get("child_task_id") if isinstance(output, dict) else None
        children = [self.tasks[event.child] for event in self.logs[id]]
        failed = (t for t in children if t.id == named and t.status == "FAILED")
        return next(failed, None)

    def retry(self, id: int) -> None:
        task: ModelTask | None = self._resettable(id, "FAILED")
        while task is not None:
            child = self.failed_child(task.id)
            self._reset(task)
            task = child

    def replay(self, id: int) -> None:
        task = self._resettable(id, *FINISHED)
        self.logs[id] = []
        self._reset(task)

    def _resettable(self, id: int, *states: str) -> ModelTask:
        task = self.tasks.get(id)
        if task is not None:
            self._touch([task])
        if task is None or not task.is_durable or task.status not in states:
            raise Refused("ValueError")
        return task

    def _reset(self, task: ModelTask) -> None:
        self._touch([task])
        self._queue(task)
        task.output, task.finished, task.overdue = None, False, None
        task.retry_count = task.lost_count = 0

    def _queue(self, task: ModelTask) -> None:
        task.status, task.worker = "QUEUED", None

    def _free(self, held: set[int], status: str) -> list[ModelTask]:
        """The tasks in this state that no other transaction holds, oldest first."""
        return [t for id, t in sorted(self.tasks.items()) if t.status == status and id not in held]

    def _touch(self, tasks: list[ModelTask]) -> list[Brief]:
        self.touched.update(task.id for task in tasks)
        return [brief(task) for task in tasks]
