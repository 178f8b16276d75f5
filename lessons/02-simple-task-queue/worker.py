"""A worker: it claims tasks from a queue in Postgres, runs them, and records how they ended.

How many tasks run at once is not limited yet (lesson 03). A task whose worker dies stays RUNNING
for ever, and one whose outcome is lost with a connection may end FAILED (both lesson 04).
"""

import asyncio
import inspect
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from psycopg.types.json import Jsonb

from models import Task
from shared import Pool, Queries, UnreadableJson, error_text

POLL_INTERVAL = 0.1  # seconds between two polls of the queue

TaskFunction = Callable[[Any], Coroutine[Any, Any, Any]]

log = logging.getLogger("worker")


class Worker:
    """Runs the tasks of one queue with the functions registered for their names."""

    def __init__(self, pool: Pool, queries: Queries) -> None:
        self.pool = pool
        self.queries = queries
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
        async with asyncio.TaskGroup() as group:
            while True:
                for task in await self._claim(queue):
                    group.create_task(self._run_task(task))
                await asyncio.sleep(POLL_INTERVAL)

    async def _claim(self, queue: str) -> list[Task]:
        """Take the queued tasks: from here on nobody else will run them."""
        async with self.pool.connection() as conn:
            rows = self.queries.poll_tasks(conn, queue=queue, task_names=list(self._functions))
            return [Task(**row) async for row in rows]

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
        if isinstance(task.input, UnreadableJson):
            raise ValueError(f"cannot read the input: {task.input.reason}")
        return await self._functions[task.task_name](task.input)

    async def _complete(self, task: Task, output: Any) -> None:
        async with self.pool.connection() as conn:
            await self.queries.complete_task(conn, id=task.id, output=Jsonb(output))
        log.info("task %d: COMPLETED", task.id)

    async def _fail(self, task: Task, error: BaseException) -> None:
        output = {"error": error_text(error)}
        async with self.pool.connection() as conn:
            await self.queries.fail_task(conn, id=task.id, output=Jsonb(output))
        log.info("task %d: FAILED, %s", task.id, output["error"])
