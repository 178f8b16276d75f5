"""What a durable task gets as its first argument, and what can be done to one that has finished.

A step of a durable task is a child task. The log remembers which child belongs to which step, so
that the next attempt finds it, with its result, in place of running the step again.
"""

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from errors import ChildTaskError, NonDeterminismError
from event_log import EventLog
from models import Task
from psycopg.types.json import Jsonb

from shared import Pool, Queries, UnreadableJson, keep_trying

if TYPE_CHECKING:
    from worker import Worker


class DurableContext:
    """The durable task that is running, in one attempt."""

    def __init__(self, worker: "Worker", task: Task) -> None:
        self.task_id = task.id
        self.attempt = task.attempt
        self.retry_count = task.retry_count
        self.non_determinism: NonDeterminismError | None = None
        self._task = task
        self._worker = worker
        self._event_log = EventLog(worker.queries)
        self._last_event_id = 0
        self._appending = asyncio.Lock()
        self._steps: set[asyncio.Task[Any]] = set()
        self._ended = False

    def run_task(
        self,
        task_name: str,
        input: Any,
        *,
        max_retries: int = 0,
        timeout: timedelta | None = None,
        is_durable: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """Run a child task and return its output; await the result of this call.

        The event id is taken here, when `run_task` is called: what is called in the same order has
        the same ids in each attempt, whatever order it is awaited in. The child inherits queue and
        priority. Raises ChildTaskError if the child failed, NonDeterminismError if an earlier
        attempt did something else at this point, TaskNotOwnedError if this attempt is over,
        RuntimeError if the function has returned already.
        """
        self._last_event_id += 1
        child = {
            "task_name": task_name,
            "max_retries": max_retries,
            "timeout": timeout,
            "is_durable": is_durable,
        }
        return self._run_child(self._last_event_id, input, child)

    async def _run_child(self, event_id: int, input: Any, child: dict[str, Any]) -> Any:
        """Start the child of this event, unless it has been started before, and wait for it."""
        if self._ended:
            raise RuntimeError(f"run_task: attempt {self.attempt} of task {self.task_id} is over")
        if self.non_determinism is not None:
            raise self.non_determinism
        step = asyncio.current_task()
        assert step is not None
        self._steps.add(step)
        try:
            # One at a time: they lock the same row, and would hold connections while they wait.
            async with self._appending:
                child_id, row = await keep_trying(lambda: self._start_child(event_id, input, child))
            if row is None:
                row = await self._worker.wait_for_child(self._task, child_id, child["is_durable"])
        except NonDeterminismError as error:
            self.non_determinism = error
            raise
        finally:
            self._steps.discard(step)
        return _output_of(row)

    async def _start_child(
        self, event_id: int, input: Any, child: dict[str, Any]
    ) -> tuple[int, dict[str, Any] | None]:
        """In one transaction: the event and its child. Returns the child's id, and its row if it
        has finished already.
        """
        queries, task = self._worker.queries, self._task
        async with self._worker.pool.connection() as conn, conn.transaction():

            async def create_child() -> int:
                created = await queries.create_task(
                    conn,
                    queue=task.queue,
                    input=Jsonb(input),
                    schedule_timeout=None,
                    priority=task.priority,
                    **child,
                )
                return int(created["id"])

            event, already_recorded = await self._event_log.append(
                conn, task, event_id, "TASK_STARTED", child["task_name"], input, create_child
            )
            child_id = event.child_task_id
            if not already_recorded:
                return child_id, None
            finished = [row async for row in queries.get_finished_tasks(conn, ids=[child_id])]
            return child_id, finished[0] if finished else None

    async def check_log_is_used_up(self) -> None:
        """Raise NonDeterminismError if earlier attempts did more than this one, which is done."""
        if self.attempt == 1:
            return  # there was nobody before us

        async def count() -> int:
            async with self._worker.pool.connection() as conn:
                row = await self._worker.queries.count_events(conn, task_id=self.task_id)
                return int(row["events"])

        events = await keep_trying(count)
        if self._last_event_id < events:
            raise NonDeterminismError(
                f"task {self.task_id}, event {self._last_event_id + 1}: recorded are {events} "
                f"events, but the function returned after {self._last_event_id}"
            )

    def end(self) -> set[asyncio.Task[Any]]:
        """Refuse further steps and cancel those left behind, which are returned."""
        self._ended = True
        for step in self._steps:
            step.cancel()
        return self._steps


def _output_of(row: dict[str, Any]) -> Any:
    """The output of a finished child; raises ChildTaskError if it failed."""
    output = row["output"]
    if isinstance(output, UnreadableJson):
        raise ValueError(f"cannot read the output of task {row['id']}: {output.reason}")
    if row["status"] == "FAILED":
        raise ChildTaskError(row["id"], row["task_name"], output["error"])
    return output


async def retry_task(pool: Pool, queries: Queries, id: int) -> None:
    """Go on with a FAILED durable task where it failed: what has completed is not run again.

    Keeps the log and queues the task again, and the child whose failure ended it, and so on down.
    Raises ValueError for a task that is unknown, not durable or not FAILED.
    """
    async with pool.connection() as conn, conn.transaction():
        row = await queries.lock_task_for_reset(conn, id=id)
        _check(row, id, {"FAILED"})
        while row is not None:
            child = await queries.lock_failed_child(conn, id=row["id"])
            await queries.reset_task(conn, id=row["id"])
            row = child


async def replay_task(pool: Pool, queries: Queries, id: int) -> None:
    """Run a COMPLETED or FAILED durable task anew, from the start: its log is deleted.

    The children of the run before stay in `tasks`, but nobody asks for them any more.
    Raises ValueError for a task that is unknown, not durable or not finished.
    """
    async with pool.connection() as conn, conn.transaction():
        row = await queries.lock_task_for_reset(conn, id=id)
        _check(row, id, {"COMPLETED", "FAILED"})
        await queries.delete_events(conn, task_id=id)
        await queries.reset_task(conn, id=id)


def _check(row: dict[str, Any] | None, id: int, states: set[str]) -> None:
    if row is None:
        raise ValueError(f"there is no task {id}")
    if not row["is_durable"]:
        raise ValueError(f"task {id} ({row['task_name']}) is not durable")
    if row["status"] not in states:
        raise ValueError(f"task {id} is {row['status']}, not {' or '.join(sorted(states))}")
