"""A worker: it claims tasks from a queue in Postgres, runs them, and records how they ended.

It has as many slots as it may run tasks at once, and claims no more than it has free slots. A task
whose worker dies still stays RUNNING for ever (lesson 04).
"""

import asyncio
import inspect
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from psycopg.types.json import Jsonb

from models import Task
from shared import Pool, Queries, UnreadableJson, error_text

POLL_INTERVAL = 0.1  # seconds between two polls of an empty queue

TaskFunction = Callable[[Any], Coroutine[Any, Any, Any]]

log = logging.getLogger("worker")


class Worker:
    """Runs the tasks of one queue with the functions registered for their names.

    `concurrency` is the number of slots: how many tasks it runs at once.
    """

    def __init__(self, pool: Pool, queries: Queries, concurrency: int = 100) -> None:
        self.pool = pool
        self.queries = queries
        self.concurrency = concurrency
        self._functions: dict[str, TaskFunction] = {}
        self._running: dict[asyncio.Task[None], Task] = {}
        self._more_waiting = False  # did the last claim fill every slot it found free?
        self._wake = asyncio.Event()  # set when there is a reason to poll at once

    def register(self, task_name: str, function: TaskFunction) -> None:
        """Let this function run the tasks called `task_name`; input and output are JSON values.

        Raises TypeError if it is not `async def`, ValueError if the name is taken.
        """
        if not inspect.iscoroutinefunction(function):
            # A plain function would block the event loop, and with it every other task.
            raise TypeError(f"the function for task {task_name!r} must be an `async def`")
        if task_name in self._functions:
            raise ValueError(f"a function for task {task_name!r} is registered already")
        self._functions[task_name] = function

    async def start(self, queue: str) -> None:
        """Run the tasks of `queue` until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                for task in await self._claim(queue):
                    run = group.create_task(self._run_task(task))
                    self._running[run] = task
                    run.add_done_callback(self._release_slot)
                if not (self._more_waiting and self._free_slots()):
                    await self._pause(POLL_INTERVAL)

    async def _claim(self, queue: str) -> list[Task]:
        """Take the oldest queued tasks, one for each free slot: nobody else will run them."""
        if not self._free_slots():
            return []
        async with self.pool.connection() as conn:
            # Counted here, not before: while we waited for a connection more slots came free.
            limit = self._free_slots()
            rows = self.queries.poll_tasks(conn, queue=queue, limit=limit)
            tasks = [Task(**row) async for row in rows]
        self._more_waiting = len(tasks) == limit
        return tasks

    def _free_slots(self) -> int:
        return self.concurrency - len(self._running)

    def _release_slot(self, run: asyncio.Task[None]) -> None:
        """A task has ended: if others are known to wait, its slot is filled at once."""
        del self._running[run]
        if self._more_waiting:
            self._wake.set()

    async def _pause(self, seconds: float) -> None:
        """Sleep for that long, or until there is a reason to poll at once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _run_task(self, task: Task) -> None:
        """Run one claimed task and record how it ended."""
        log.info("task %d: RUNNING %s", task.id, task.task_name)
        try:
            output = await self._call(task)
            await self._complete(task, output)
        except Exception as error:
            await self._fail(task, error)

    async def _call(self, task: Task) -> Any:
        """Call the task's function with the task's input."""
        function = self._functions.get(task.task_name)
        if function is None:
            raise LookupError(f"no function is registered for task {task.task_name!r}")
        if isinstance(task.input, UnreadableJson):
            raise ValueError(f"cannot read the input: {task.input.reason}")
        return await function(task.input)

    async def _complete(self, task: Task, output: Any) -> None:
        async with self.pool.connection() as conn:
            await self.queries.complete_task(conn, id=task.id, output=Jsonb(output))
        log.info("task %d: COMPLETED", task.id)

    async def _fail(self, task: Task, error: BaseException) -> None:
        output = {"error": error_text(error)}
        async with self.pool.connection() as conn:
            await self.queries.fail_task(conn, id=task.id, output=Jsonb(output))
        log.info("task %d: FAILED, %s", task.id, output["error"])
