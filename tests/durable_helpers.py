"""What the tests of durable tasks share: a lesson's engine, and what it has done."""

from collections import Counter
from typing import Any

from helpers import QUICK, enqueue, execute, finished, set_globals, working
from shared import Pool


class Lab:
    """A lesson, its database, and how often each task function has been called there."""

    def __init__(self, lesson: Any, pool: Pool, queries: Any) -> None:
        # Each test has modules of its own: nothing has to be put back.
        set_globals(lesson, QUICK)
        self.lesson = lesson
        self.pool = pool
        self.queries = queries
        self.errors = lesson.errors
        self.calls: Counter[Any] = Counter()

    def worker(self, *functions: Any, **arguments: Any) -> Any:
        """A worker that knows these functions by their names, and those of this class."""
        worker = self.lesson.worker.Worker(self.pool, self.queries, **arguments)
        for function in [*functions, self.step, self.broken]:
            worker.register(function.__name__, function)
        return worker

    async def step(self, input: Any) -> Any:
        """A plain task that returns its input."""
        self.calls[str(input)] += 1
        return input

    async def broken(self, input: Any) -> Any:
        """A plain task that fails until `mended` is among the calls."""
        self.calls[str(input)] += 1
        if not self.calls["mended"]:
            raise OSError(f"{input} is broken")
        return input

    async def enqueue(self, function: Any, input: Any = None, **columns: Any) -> int:
        return await enqueue(self.pool, function.__name__, input, is_durable=True, **columns)

    async def run(self, function: Any, *others: Any, **columns: Any) -> dict[str, Any]:
        """Run a durable task, and other functions as its children, to its end; return its row."""
        id = await self.enqueue(function, **columns)
        return await self.finish(id, function, *others)

    async def finish(self, id: int, *functions: Any) -> dict[str, Any]:
        """Run a task with a new worker until it has finished; return its row."""
        async with working(self.worker(*functions)):
            return await finished(self.pool, id)

    @property
    def of_branch(self) -> tuple[str, str]:
        """One more column, and its value, for an INSERT into durable_events, if there is one."""
        return (", branch_id", ", 1") if self.lesson.number >= 15 else ("", "")

    async def tasks(self) -> list[dict[str, Any]]:
        return await execute(self.pool, "SELECT * FROM tasks ORDER BY id")

    async def children(self, id: int) -> list[dict[str, Any]]:
        """The children of a durable task in the order of its log, with event ids and keys."""
        is_current = "abandoned_in IS NULL" if self.lesson.number >= 15 else "true"
        return await execute(
            self.pool,
            f"""
            SELECT event_id, key, tasks.*
            FROM durable_events
            JOIN tasks ON tasks.id = child_task_id
            WHERE task_id = %s
              AND {is_current}
            ORDER BY event_id
            """,
            id,
        )
