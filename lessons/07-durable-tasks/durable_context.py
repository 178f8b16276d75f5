"""What a durable task gets as its first argument, and what can be done to one that has finished.

A step of a durable task is a child task. The log remembers which child belongs to which step, so
that the next attempt finds it, with its result, in place of running the step again.
"""

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from psycopg.types.json import Jsonb

from errors import ChildTaskError, NonDeterminismError, TaskNotOwnedError
from event_log import EventLog, event_key
from models import Task
from shared import Connection, Pool, Queries, UnreadableJson, keep_trying

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
        self._last_event_id = 0
        self._log_is_known = task.attempt == 1  # does it hold nothing but what we appended?
        self._appending = asyncio.Lock()
        self._callers: WeakSet[asyncio.Task[Any]] = WeakSet()
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
        options = {
            "task_name": task_name,
            "max_retries": max_retries,
            "timeout": timeout,
            "is_durable": is_durable,
        }
        return self._run_child(self._last_event_id, input, options)

    async def _run_child(self, event_id: int, input: Any, options: dict[str, Any]) -> Any:
        """Start the child of this event, unless it has been started before, and wait for it."""
        if self._ended:
            raise RuntimeError(f"run_task: attempt {self.attempt} of task {self.task_id} is over")
        if self.non_determinism is not None:
            raise self.non_determinism
        caller = asyncio.current_task()
        assert caller is not None
        self._callers.add(caller)
        try:
            # One at a time: they lock the same row, and would hold connections while they wait.
            async with self._appending:
                child = await keep_trying(lambda: self._start_child(event_id, input, options))
        except NonDeterminismError as error:
            self.non_determinism = error
            raise
        if child.finished_at is None:
            child = await self._worker.wait_for_child(self._task, child)
        if isinstance(child.output, UnreadableJson):
            raise ValueError(f"cannot read the output of task {child.id}: {child.output.reason}")
        if child.status == "FAILED":
            raise ChildTaskError(child.id, child.task_name, child.output["error"])
        return child.output

    async def _start_child(self, event_id: int, input: Any, options: dict[str, Any]) -> Task:
        """In one transaction, the event and its child; returns the child as it is now."""
        # Until it has worked: if the answer to a commit gets lost, the event may be recorded.
        is_new, self._log_is_known = self._log_is_known, False
        start = self._start_new_child if is_new else self._find_or_start_child
        async with self._worker.pool.connection() as conn:
            child = await start(conn, event_id, input, options)
        self._log_is_known = is_new
        return child

    async def _start_new_child(
        self, conn: Connection, event_id: int, input: Any, options: dict[str, Any]
    ) -> Task:
        """In one statement: nobody has recorded this event, so there is nothing to look for."""
        row = await self._worker.queries.start_child(
            conn,
            task_id=self.task_id,
            worker_id=self._task.worker_id,
            attempt=self.attempt,
            event_id=event_id,
            kind="TASK_STARTED",
            key=event_key("TASK_STARTED", options["task_name"], input),
            input=Jsonb(input),
            **options,
        )
        if row is None:
            raise TaskNotOwnedError(
                f"task {self.task_id} is not owned by attempt {self.attempt} any more"
            )
        return Task(**row)

    async def _find_or_start_child(
        self, conn: Connection, event_id: int, input: Any, options: dict[str, Any]
    ) -> Task:
        """With the log, which may have this event from an earlier attempt."""
        queries, task = self._worker.queries, self._task
        created: Task | None = None

        async def create_child() -> int:
            nonlocal created
            row = await queries.create_task(
                conn,
                queue=task.queue,
                input=Jsonb(input),
                schedule_timeout=None,
                priority=task.priority,
                **options,
            )
            created = Task(**row)
            return created.id

        async with conn.transaction():
            event, _ = await EventLog(queries).append(
                conn, task, event_id, "TASK_STARTED", options["task_name"], input, create_child
            )
            return created or Task(**await queries.get_task(conn, id=event.child_task_id))

    async def check_log_is_used_up(self) -> None:
        """Raise NonDeterminismError if earlier attempts did more than this one, which is done."""
        if self.attempt == 1:
            return  # there was nobody before us

        async def read_log() -> list[Any]:
            async with self._worker.pool.connection() as conn:
                events = self._worker.queries.get_events(conn, task_id=self.task_id)
                return [event async for event in events]

        recorded = max((event["event_id"] for event in await keep_trying(read_log)), default=0)
        if self._last_event_id < recorded:
            raise NonDeterminismError(
                f"task {self.task_id}, event {self._last_event_id + 1}: recorded are events up to "
                f"{recorded}, asked for is nothing: the function returned"
            )

    def end(self) -> set[asyncio.Task[Any]]:
        """Refuse further steps; cancel and return the asyncio tasks that were left behind."""
        self._ended = True
        others = set(self._callers) - {asyncio.current_task()}
        return {caller for caller in others if caller.cancel()}


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
