"""A worker: it claims tasks from a queue in Postgres, runs them, and records how they ended.

It claims no more than it has free slots. It is crash-only: an error of the database ends it, and
after INACTIVE_AFTER other workers, or itself once it is started again, take what it left RUNNING.
"""

import asyncio
import inspect
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

from psycopg.types.json import Jsonb

from children import Children
from durable_context import DurableContext
from errors import NonRetryableError, child_error, is_retryable
from heartbeat import Heartbeat
from models import Task
from shared import Pool, Queries, UnreadableJson, error_text, keep_trying, open_connection
from slots import Slots

POLL_INTERVAL = 0.1  # seconds between two polls of the queue

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
        self.display_name = f"{socket.gethostname()}:{os.getpid()}"
        self.pool = pool
        self.queries = queries
        self.slots = {False: Slots(concurrency), True: Slots(durable_concurrency)}  # by is_durable
        self.children = Children(pool, queries)
        self._functions: dict[str, TaskFunction] = {}

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
        """Run the tasks of `queue` until cancelled. An error of the database ends it, too."""
        self.id = uuid4()  # anew: what an earlier start has left RUNNING is not ours any more
        async with await open_connection(self.pool) as conn, asyncio.TaskGroup() as group:
            heartbeat = Heartbeat(conn, self.queries, self.id, self.display_name, self._log)
            await heartbeat.beat()  # before the first claim, or others would take what we claim
            group.create_task(heartbeat.keep_beating())
            group.create_task(self.children.keep_asking(POLL_INTERVAL))
            for is_durable in self.slots:
                group.create_task(self._poll(queue, is_durable, group))

    async def _poll(self, queue: str, is_durable: bool, group: asyncio.TaskGroup) -> None:
        """Claim tasks and start them. Never returns."""
        slots = self.slots[is_durable]
        while True:
            for task in await self._claim(queue, is_durable):
                slots.fill(group.create_task(self._run_task(task)), task)
            await slots.wait(POLL_INTERVAL)

    async def _claim(self, queue: str, is_durable: bool) -> list[Task]:
        """Take the most urgent queued tasks, one for each free slot: nobody else will run them."""
        slots = self.slots[is_durable]
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
            )
            tasks = [Task(**row) async for row in rows]
        slots.more_waiting = len(tasks) == limit
        return tasks

    async def _run_task(self, task: Task) -> None:
        """Run one claimed task and record how it ended."""
        self._log(task, f"RUNNING {task.task_name}")
        run = asyncio.current_task()
        assert run is not None
        context = DurableContext(self.pool, self.queries, self.children, task)
        deadline = asyncio.timeout(None if task.timeout is None else task.timeout.total_seconds())
        try:
            async with deadline:
                # In an asyncio task of its own, so the function cannot change run.cancelling().
                output = await asyncio.create_task(self._call(task, context))
            await self._complete(task, output)
        except (Exception, asyncio.CancelledError) as error:
            if run.cancelling():
                return  # the worker is ending: the row stays RUNNING
            if deadline.expired():
                await self._fail(task, TimeoutError(f"timed out after {task.timeout}"))
            else:  # a TimeoutError that arrives here is the function's own
                await self._fail(task, error)

    async def _call(self, task: Task, context: DurableContext) -> Any:
        """Call the task's function with the task's input."""
        if isinstance(task.input, UnreadableJson):
            raise NonRetryableError(f"cannot read the input: {task.input.reason}")
        function = self._functions[task.task_name]
        current_task.set(task)
        if task.is_durable:
            return await context.run(function)
        return await function(task.input)

    async def _complete(self, task: Task, output: Any) -> None:
        await self._write(self.queries.complete_task, task, output, "COMPLETED")

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

    def _log(self, task: Task, what: str) -> None:
        log.info(
            "worker %s, task %d, attempt %d: %s", self.display_name, task.id, task.attempt, what
        )
