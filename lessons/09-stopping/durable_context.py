"""What a durable task gets as its first argument. Each step is a child task.

The log remembers which child belongs to which step, so that the next attempt finds it, with its
result, in place of running the step again.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

from psycopg.types.json import Jsonb

from children import Children
from errors import ChildTaskError, NonDeterminismError
from event_log import EventLog
from models import Task
from shared import Pool, Queries, keep_trying
from shared.jsonb import dumps


class DurableContext:
    """The durable task that is running, in one attempt."""

    def __init__(self, pool: Pool, queries: Queries, children: Children, task: Task) -> None:
        self.task_id = task.id
        self.attempt = task.attempt
        self.pool = pool
        self.queries = queries
        self.children = children
        self._task = task
        self._running_in = asyncio.current_task()  # the engine cancels it to end the attempt
        self._last_event_id = 0
        self._appending = asyncio.Lock()
        self._ended = False
        self._non_determinism: NonDeterminismError | None = None

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

        Event id and input are taken here, when `run_task` is called: what is called in the same
        order has the same ids in each attempt, whatever order it is awaited in. The child inherits
        queue and priority. Raises TypeError or ValueError for an input that is not JSON,
        ChildTaskError if the child failed, NonDeterminismError if an earlier attempt did something
        else at this point, TaskNotOwnedError if this attempt has lost its task, RuntimeError if it
        has ended: its function has returned, or is being cancelled.
        """
        self._check_not_ended()
        input = json.loads(dumps(input))
        self._last_event_id += 1
        options = {
            "task_name": task_name,
            "max_retries": max_retries,
            "timeout": timeout,
            "is_durable": is_durable,
        }
        return self._run_child(self._last_event_id, input, options)

    async def _run_child(self, event_id: int, input: Any, options: dict[str, Any]) -> Any:
        """Start the child of this event, unless an earlier attempt has, and wait for its end."""
        try:
            # One at a time: they lock the same row, and would hold connections while they wait.
            async with self._appending:
                child = await keep_trying(lambda: self._start_child(event_id, input, options))
        except NonDeterminismError as error:
            self._non_determinism = error
            raise
        if child.status not in ("COMPLETED", "FAILED"):
            child = await self.children.wait_for(child)
        if child.status == "FAILED":
            # Somebody may have set it FAILED by hand, with any output or none.
            output = child.output if isinstance(child.output, dict) else {}
            text = output.get("error", "no error is recorded")
            raise ChildTaskError(child.id, child.task_name, text)
        return child.output

    async def _start_child(self, event_id: int, input: Any, options: dict[str, Any]) -> Task:
        """In one transaction, the event and its child: both or neither. Returns the child."""
        async with self.pool.connection() as conn, conn.transaction():
            self._check_not_ended()  # it may have, while we waited for the connection

            async def create_child() -> int:
                row = await self.queries.create_task(
                    conn,
                    queue=self._task.queue,
                    input=Jsonb(input),
                    schedule_timeout=None,
                    priority=self._task.priority,
                    **options,
                )
                return int(row["id"])

            event, _ = await EventLog(self.queries).append(
                conn,
                self._task,
                event_id,
                "TASK_STARTED",
                options["task_name"],
                input,
                create_child,
            )
            return Task(**await self.queries.get_task(conn, id=event.child_task_id))

    def _check_not_ended(self) -> None:
        """An attempt that is being ended writes nothing more: its next one would not ask for it."""
        if self._ended or (self._running_in is not None and self._running_in.cancelling()):
            raise RuntimeError(f"attempt {self.attempt} of task {self.task_id} has ended")
        if self._non_determinism is not None:
            raise self._non_determinism

    async def run(self, function: Callable[..., Coroutine[Any, Any, Any]]) -> Any:
        """Call the task's function with this context; return its output if the log agrees with it.

        Raises what the function raises, but NonDeterminismError if there was one: a function that
        catches it does not get away with it.
        """
        try:
            output = await function(self, self._task.input)
        except Exception:
            if self._non_determinism is not None:
                raise self._non_determinism from None
            raise
        finally:
            self._ended = True
        if self._non_determinism is not None:
            raise self._non_determinism
        await self._check_log_is_used_up()
        return output

    async def _check_log_is_used_up(self) -> None:
        """Raise NonDeterminismError if earlier attempts did more than this one, which is done."""

        async def read_log() -> list[Any]:
            async with self.pool.connection() as conn:
                events = self.queries.get_events(conn, task_id=self.task_id)
                return [event["event_id"] async for event in events]

        recorded = max(await keep_trying(read_log), default=0)
        if self._last_event_id < recorded:
            raise NonDeterminismError(
                f"task {self.task_id}, event {self._last_event_id + 1}: recorded are events up to "
                f"{recorded}, asked for is nothing: the function returned"
            )
