"""What a durable task gets as its first argument. Each step is a child task.

The log remembers which child belongs to which step, so that the next attempt finds it, with its
result, in place of running the step again.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakSet

from psycopg.types.json import Jsonb

from children import Children
from errors import ChildTaskError, NonDeterminismError
from event_log import EventLog
from models import Task
from shared import Pool, Queries, UnreadableJson, keep_trying
from shared.jsonb import dumps

MAX_SLEEP = timedelta(days=365_000)

CreateChild = Callable[..., Awaitable[dict[str, Any]]]


class DurableContext:
    """The durable task that is running, in one attempt."""

    def __init__(self, pool: Pool, queries: Queries, children: Children, task: Task) -> None:
        self.task_id = task.id
        self.attempt = task.attempt
        self.pool = pool
        self.queries = queries
        self.children = children
        self._task = task
        self._last_event_id = 0
        self._appending = asyncio.Lock()
        self._callers: WeakSet[asyncio.Task[Any]] = WeakSet()  # those that have started a step
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
        create = partial(
            self.queries.create_child,
            queue=self._task.queue,
            task_name=task_name,
            input=Jsonb(input),
            max_retries=max_retries,
            timeout=timeout,
            priority=self._task.priority,
            is_durable=is_durable,
        )
        self._last_event_id += 1
        return self._run_child(self._last_event_id, "TASK_STARTED", task_name, input, create)

    def sleep(self, delay: timedelta) -> Coroutine[Any, Any, None]:
        """Sleep for that long, whatever happens to workers meanwhile; await the result of this.

        The time to wake up at is recorded once. Later attempts sleep until then, also if they ask
        for another delay. Below zero is zero. Raises TypeError for what is no timedelta, ValueError
        for more than 365,000 days, and what run_task raises.
        """
        self._check_not_ended()
        seconds = seconds_of(delay)
        create = partial(
            self.queries.create_sleep,
            queue=self._task.queue,
            input=Jsonb({"seconds": seconds}),
            seconds=seconds,
        )
        self._last_event_id += 1
        # The delay is not part of the key: a release that changes it must not fail the sleepers.
        return self._run_child(self._last_event_id, "SLEEP_STARTED", "sleep", None, create)

    async def _run_child(
        self, event_id: int, kind: str, task_name: str, input: Any, create: CreateChild
    ) -> Any:
        """Start the child of this event, unless an earlier attempt has, and wait for its end."""
        caller = asyncio.current_task()
        assert caller is not None
        self._callers.add(caller)
        try:
            # One at a time: they lock the same row, and would hold connections while they wait.
            async with self._appending:
                child = await keep_trying(
                    lambda: self._start_child(event_id, kind, task_name, input, create)
                )
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
        if isinstance(child.output, UnreadableJson):
            raise ValueError(f"cannot read the output of task {child.id}: {child.output.reason}")
        return child.output

    async def _start_child(
        self, event_id: int, kind: str, task_name: str, input: Any, create: CreateChild
    ) -> Task:
        """In one transaction, the event and its child: both or neither. Returns the child."""
        async with self.pool.connection() as conn, conn.transaction():
            self._check_not_ended()  # it may have, while we waited for the connection

            async def create_child() -> int:
                return int((await create(conn))["id"])

            event, _ = await EventLog(self.queries).append(
                conn, self._task, event_id, kind, task_name, input, create_child
            )
            return Task(**await self.queries.get_task(conn, id=event.child_task_id))

    def _check_not_ended(self) -> None:
        """An attempt that is being ended writes nothing more: its next one would not ask for it."""
        if self._ended:
            raise RuntimeError(f"attempt {self.attempt} of task {self.task_id} has ended")
        if self._non_determinism is not None:
            raise self._non_determinism

    def end(self) -> set[asyncio.Task[Any]]:
        """Refuse further steps; return the asyncio tasks that have started one."""
        self._ended = True
        return set(self._callers)

    async def run(self, function: Callable[..., Coroutine[Any, Any, Any]]) -> Any:
        """Call the task's function with this context; return its output if the log agrees with it.

        Raises what the function raises, but NonDeterminismError if there was one: a function that
        catches it does not get away with it.
        """
        try:
            output = await function(self, self._task.input)
        except BaseException:
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


def seconds_of(delay: timedelta) -> float:
    """How long that is. Raises TypeError for no timedelta, ValueError for over 365,000 days."""
    if not isinstance(delay, timedelta):
        raise TypeError(f"a timedelta is needed, not {delay!r}")
    if delay > MAX_SLEEP:
        raise ValueError(f"the longest sleep is {MAX_SLEEP.days:,} days, not {delay}")
    return max(0.0, delay.total_seconds())
