"""A worker: it claims tasks from a queue in Postgres, runs them, and records how they ended.

It claims no more than it has free slots. While the database is away it keeps running, and then puts
right what may have gone wrong meanwhile. Told to stop, it ends what runs and puts back the rest.
"""

import asyncio
import inspect
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

from psycopg.types.json import Jsonb

import heartbeat
from call import call
from children import Children
from durable_context import DurableContext
from errors import NonRetryableError, child_error, is_retryable
from heartbeat import Heartbeat
from housekeeping import Housekeeping
from models import Task
from notifications import Notifications
from shared import (
    Pool,
    Queries,
    UnreadableJson,
    error_text,
    keep_trying,
    stop_signals,
    surviving_outage,
)
from slots import Slots

POLL_INTERVAL = 1.0  # seconds between two polls of the queue, should a notification get lost
SUSPEND_AFTER = 1.0  # seconds for which a durable task does nothing but wait
SHUTDOWN_GRACE = 5.0  # seconds for a task to end by itself, and again to obey its cancellation

TaskFunction = Callable[..., Coroutine[Any, Any, Any]]

log = logging.getLogger("worker")

# The task that is running: its id is the idempotency key of whatever its function does.
current_task: ContextVar[Task] = ContextVar("current_task")


class Worker:
    """Runs the tasks of one queue with the functions registered for their names.

    A durable task's function gets a DurableContext before its input. `concurrency` is the number of
    slots: how many tasks it runs at once. Durable tasks, which mostly wait, have
    `durable_concurrency` slots of their own.
    """

    def __init__(
        self, pool: Pool, queries: Queries, concurrency: int = 100, durable_concurrency: int = 1000
    ) -> None:
        self.id = uuid4()
        self.display_name = f"{socket.gethostname()}:{os.getpid()}"
        self.pool = pool
        self.queries = queries
        self.slots = {False: Slots(concurrency), True: Slots(durable_concurrency)}  # by is_durable
        self.children = Children(pool, queries, self._child_is_queued)
        self.notifications = Notifications(
            pool, queries, self.id, list(self.slots.values()), self.children
        )
        self.heartbeat = Heartbeat(pool, queries, self.id, self.display_name)
        self.housekeeping = Housekeeping(
            pool, queries, self.heartbeat, self._log, self.notifications.changed
        )
        self._functions: dict[str, TaskFunction] = {}
        self._told_to_stop = asyncio.Event()

    def register(self, task_name: str, function: TaskFunction) -> None:
        """Let this function run the tasks called `task_name`; input and output are JSON values.

        Tasks with other names are left alone. Raises TypeError if the function is not `async def`,
        ValueError if the name is taken.
        """
        if not inspect.iscoroutinefunction(function):
            # A plain function would block the event loop, and with it every other task.
            raise TypeError(f"the function for task {task_name!r} must be an `async def`")
        if task_name in self._functions:
            raise ValueError(f"a function for task {task_name!r} is registered already")
        self._functions[task_name] = function

    async def start(self, queue: str) -> None:
        """Run the tasks of `queue` until `stop`, SIGINT or SIGTERM.

        Plain tasks get SHUTDOWN_GRACE to end, durable ones none: their progress is in the log. What
        is left goes back to the queue. Cancelling `start`, which a second signal does too, is the
        same without the grace.
        """
        this_task = asyncio.current_task()
        assert this_task is not None
        with stop_signals(self.stop, this_task.cancel):
            try:
                await self._work(queue)
            finally:
                await self._in_time(self._leave)

    async def _work(self, queue: str) -> None:
        """All that a worker does, at once, until it has to end; and then in this order."""
        plain, durable = self.slots[False].running, self.slots[True].running
        async with asyncio.TaskGroup() as group:
            beating = group.create_task(self.heartbeat.keep_beating())
            housekeeping = group.create_task(self.housekeeping.keep_house())
            asking = group.create_task(self.children.keep_asking(POLL_INTERVAL))
            listening = group.create_task(self.notifications.keep_listening(queue))
            telling = group.create_task(self.notifications.keep_telling())
            polls = [group.create_task(self._poll(queue, kind, group)) for kind in self.slots]
            try:
                await self._told_to_stop.wait()
                await self._end(polls)
                await self._end(durable)
                await self._in_time(self._put_back_all)  # others go on with these at once
                if plain:
                    await asyncio.wait(plain, timeout=SHUTDOWN_GRACE)
            finally:
                await self._end([*polls, *durable, *plain])
                # Only now: a worker without a heartbeat loses what it still runs.
                await self._end([beating, housekeeping, asking, listening, telling])

    def stop(self) -> None:
        """Claim no more tasks; `start` returns when the running ones have ended."""
        self._told_to_stop.set()

    async def _end(self, tasks: Collection[asyncio.Task[None]]) -> None:
        """Cancel these, and wait until they have ended, but not for ever."""
        for task in tasks:
            task.cancel()
        if tasks:
            # Twice: a run itself waits one grace for its function.
            await asyncio.wait(tasks, timeout=2 * SHUTDOWN_GRACE)

    async def _put_back_all(self) -> None:
        for is_durable in self.slots:
            await self._put_back(is_durable, "its worker is stopping")

    async def _leave(self) -> None:
        """Put back the rest and say goodbye: nobody must wait for our heartbeat to grow old."""
        await self._put_back_all()
        await self.notifications.tell()
        async with self.pool.connection() as conn:
            await self.queries.delete_worker(conn, id=self.id)

    async def _in_time(self, operation: Callable[[], Awaitable[None]]) -> None:
        """Do it if the database is there in time. If not, others take over when we are gone."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_GRACE):
                await keep_trying(operation)

    async def _poll(self, queue: str, is_durable: bool, group: asyncio.TaskGroup) -> None:
        """Claim tasks and start them. Never returns."""
        slots = self.slots[is_durable]
        clock = asyncio.get_running_loop().time
        check_at = 0.0
        while True:
            answered = False
            with surviving_outage(f"worker {self.display_name}: cannot poll"):
                if clock() >= check_at:
                    # A claim may have been committed although its answer got lost.
                    await self._put_back(is_durable, "its claim got lost")
                    check_at = clock() + heartbeat.HEARTBEAT_INTERVAL
                for task in await self._claim(queue, is_durable):
                    slots.fill(group.create_task(self._run_task(task)), task)
                answered = True
            if answered:
                await slots.wait(min(POLL_INTERVAL, heartbeat.HEARTBEAT_INTERVAL))
            else:
                slots.more_waiting = False
                await slots.wait(heartbeat.HEARTBEAT_INTERVAL)

    async def _put_back(self, is_durable: bool, why: str) -> None:
        """Queue again the tasks of one kind that this worker owns and does not run.

        Not while a claim is on its way: what it takes is ours, and does not run yet.
        """
        running = self.slots[is_durable].running.values()
        async with self.pool.connection() as conn:
            rows = self.queries.requeue_own_tasks(
                conn,
                worker_id=self.id,
                is_durable=is_durable,
                ids=[task.id for task in running],
                attempts=[task.attempt for task in running],
            )
            async for row in rows:
                self._log(Task(**row), f"QUEUED, {why}")
                self.notifications.available(row["queue"])

    async def _claim(self, queue: str, is_durable: bool) -> list[Task]:
        """Take the most urgent queued tasks, one for each free slot: nobody else will run them."""
        slots = self.slots[is_durable]
        slots.more_waiting = False  # news that comes while we claim sets it again
        async with self.pool.connection() as conn:
            # Counted here, not before: while we waited for a connection more slots came free.
            limit = slots.free
            rows = self.queries.poll_tasks(
                conn,
                queue=queue,
                is_durable=is_durable,
                task_names=list(self._functions),
                limit=limit,
                worker_id=self.id,
                inactive_after=heartbeat.INACTIVE_AFTER,
            )
            tasks = [Task(**row) async for row in rows]
        if len(tasks) == limit:
            slots.more_waiting = True
        return tasks

    async def _run_task(self, task: Task) -> None:
        """Run one claimed task and record how it ended."""
        self._log(task, f"RUNNING {task.task_name}")
        context = DurableContext(self.pool, self.queries, self.children, task, self.slots[True])
        coroutine = self._call(task, context)
        output, error = await call(coroutine, context, task.timeout, SHUTDOWN_GRACE)
        if context.left.done():
            self._log(task, context.left.result())
        elif error is None:
            await self._complete(task, output)
        else:
            await self._fail(task, error)

    async def _call(self, task: Task, context: DurableContext) -> Any:
        """Call the task's function with the task's input."""
        if isinstance(task.input, UnreadableJson):
            raise NonRetryableError(f"cannot read the input: {task.input.reason}")
        function = self._functions[task.task_name]
        current_task.set(task)
        if task.is_durable:
            return await context.run(function, SUSPEND_AFTER)
        return await function(task.input)

    async def _complete(self, task: Task, output: Any) -> None:
        try:
            await self._write(self.queries.complete_task, task, output, "COMPLETED")
        except Exception as error:  # the output is not JSON, or nothing that jsonb takes
            await self._fail(task, error)
        else:
            self.notifications.ended(task)

    async def _fail(self, task: Task, error: BaseException) -> None:
        """Record a failure: the task goes back to the queue if it has retries left."""
        output: dict[str, Any] = {"error": error_text(error)}
        if child := child_error(error):
            output["child_task_id"] = child.child_task_id  # for retry_task
        if is_retryable(error) and task.retry_count < task.max_retries:
            query, status = self.queries.requeue_failed_task, "QUEUED"
        else:
            query, status = self.queries.fail_task, "FAILED"
        await self._write(query, task, output, f"{status}, {output['error']}")
        if status == "QUEUED":
            self.slots[task.is_durable].news()
        else:
            self.notifications.ended(task)

    async def _write(
        self, query: Callable[..., Awaitable[int]], task: Task, output: Any, what: str
    ) -> None:
        """Write the outcome of an attempt, and log it; try again if the connection breaks.

        The attempt is the fencing token: if the task has been taken from us, no row matches.
        """

        async def write() -> int:
            async with self.pool.connection() as conn:
                return await query(
                    conn,
                    id=task.id,
                    worker_id=task.worker_id,
                    attempt=task.attempt,
                    output=Jsonb(output),
                )

        if not await keep_trying(write):
            what = "is not ours any more, its outcome is dropped"
        self._log(task, what)

    def _child_is_queued(self, child: Task) -> None:
        """A task of ours waits for it: we run it, or if we cannot do so at once, others may."""
        slots = self.slots[child.is_durable]
        slots.news()
        if not slots.free or child.task_name not in self._functions:
            self.notifications.available(child.queue)

    def _log(self, task: Task, what: str) -> None:
        log.info(
            "worker %s, task %d, attempt %d: %s", self.display_name, task.id, task.attempt, what
        )
