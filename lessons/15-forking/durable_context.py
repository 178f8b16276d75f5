"""What a durable task gets as its first argument. Each step is a child task.

The log remembers which child belongs to which step, so that the next attempt finds it, with its
result, in place of running the step again.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakSet

from psycopg.types.json import Jsonb

from children import Children
from errors import ChildTaskError, NonDeterminismError, SignalTimeoutError
from event_log import EventLog
from models import Task
from shared import Pool, Queries, UnreadableJson, keep_trying
from shared.jsonb import dumps
from slots import Slots

MAX_SLEEP = timedelta(days=365_000)

CreateChild = Callable[..., Awaitable[dict[str, Any]]]


class DurableContext:
    """The durable task that is running, in one attempt."""

    def __init__(
        self, pool: Pool, queries: Queries, children: Children, task: Task, slots: Slots
    ) -> None:
        self.task_id = task.id
        self.attempt = task.attempt
        self.pool = pool
        self.queries = queries
        self.children = children
        self._task = task
        self._last_event_id = 0
        self._appending = asyncio.Lock()
        self.left = asyncio.get_running_loop().create_future()  # done when the row is let go
        self._slots = slots
        self._waiting: set[int] = set()  # children that calls wait for
        self._last_progress = 0.0  # when a call got on, by the clock of the event loop
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

    def wait_for_signal(
        self, name: str, timeout: timedelta | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Wait for a signal of that name, and return its payload; await the result of this call.

        One that came before is received at once, the oldest first; each is received by one wait.
        Raises SignalTimeoutError if none comes within `timeout`, in every later attempt as well.
        The time is recorded once, like that of a sleep. Raises what sleep raises.
        """
        self._check_not_ended()
        seconds = None if timeout is None else seconds_of(timeout)
        create = partial(
            self.queries.create_wait,
            queue=self._task.queue,
            name=name,
            input=Jsonb({"seconds": seconds}),
            seconds=seconds,
        )
        self._last_event_id += 1
        return self._receive(self._last_event_id, name, create)

    async def _receive(self, event_id: int, name: str, create: CreateChild) -> Any:
        output = await self._run_child(event_id, "SIGNAL_AWAITED", name, None, create)
        if "payload" not in output:
            raise SignalTimeoutError(f"no signal {name!r} has come in time")
        return output["payload"]

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
        self._last_progress = asyncio.get_running_loop().time()
        if child.status not in ("COMPLETED", "FAILED"):
            child = await self._wait_for(child)
        if child.status == "FAILED":
            # Somebody may have set it FAILED by hand, with any output or none.
            output = child.output if isinstance(child.output, dict) else {}
            text = output.get("error", "no error is recorded")
            raise ChildTaskError(child.id, child.task_name, text)
        if isinstance(child.output, UnreadableJson):
            raise ValueError(f"cannot read the output of task {child.id}: {child.output.reason}")
        return child.output

    async def _wait_for(self, child: Task) -> Task:
        """Wait for a child's end. A durable or sleeping one takes long: give back the slot."""
        is_long = child.is_durable or child.status == "SLEEPING"
        self._waiting.add(child.id)
        try:
            with self._slots.given_back(self) if is_long else nullcontext():
                return await self.children.wait_for(child)
        finally:
            self._waiting.remove(child.id)
            self._last_progress = asyncio.get_running_loop().time()

    async def suspend_when_idle(self, idle: float) -> None:
        """Suspend the task when for `idle` seconds no call has got on. Returns when it is gone."""
        while not self._ended:
            await asyncio.sleep(idle)
            await self.suspend(idle)

    async def suspend(self, idle: float) -> None:
        """Let go of the row, and so of the slot, if calls wait, and none has got on for so long."""
        # No event is added meanwhile, so `_waiting` is complete.
        async with self._appending:
            is_idle = asyncio.get_running_loop().time() >= self._last_progress + idle
            if self._ended or not self._waiting or not is_idle:
                return
            ids = list(self._waiting)  # once: a child that ends while we try again stays in it
            if outcome := await keep_trying(lambda: self._let_go(ids)):
                self._ended = True
                self.left.set_result(outcome)

    async def _let_go(self, ids: list[int]) -> str | None:
        """Suspend the task, unless there is something to go on with; return how we lost its row."""
        async with self.pool.connection() as conn, conn.transaction():
            owned = await self.queries.lock_task_to_suspend(
                conn, id=self.task_id, worker_id=self._task.worker_id, attempt=self.attempt
            )
            if owned is None:
                return "is not ours any more"
            # Not in the statement that locks: it sees the children as they were before it waited.
            is_suspended = await self.queries.suspend_task(conn, id=self.task_id, ids=ids)
        return "SUSPENDED" if is_suspended else None

    async def _start_child(
        self, event_id: int, kind: str, task_name: str, input: Any, create: CreateChild
    ) -> Task:
        """In one transaction, the event and its child: both or neither. Returns the child."""
        async with self.pool.connection() as conn, conn.transaction():
            self._check_not_ended()  # it may have, while we waited for the connection

            async def create_child() -> int:
                return int((await create(conn))["id"])

            event, is_recorded = await EventLog(self.queries).append(
                conn, self._task, event_id, kind, task_name, input, create_child
            )
            if kind == "SIGNAL_AWAITED" and not is_recorded:  # it may have come before
                await self.queries.deliver_signal(conn, task_id=self.task_id, name=task_name)
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

    async def run(
        self, function: Callable[..., Coroutine[Any, Any, Any]], suspend_after: float
    ) -> Any:
        """Call the task's function with this context; return its output if the log agrees with it.

        Raises what the function raises, but NonDeterminismError if there was one: a function that
        catches it does not get away with it.
        """
        watching = asyncio.create_task(self.suspend_when_idle(suspend_after))
        self._callers.add(watching)  # it ends with them
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
