"""Crash-only: a worker that dies of any fault, and is started again, loses nothing.

Up to lesson 07 an error of the database ends the worker. Here a little supervisor starts it again
whenever it has ended, while it is killed, its connections are cut, or the server goes away. In the
end each task must have been done, and have exactly one outcome. A trigger takes down each change of
a status, so that what was overwritten is found, too.
"""

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import QUICK, enqueue, execute, finished, wait_for, worker_process
from shared import EmbeddedPostgres, Pool, open_pool

# The last lesson of each kind of code: plain tasks only, and durable ones too.
pytestmark = [
    pytest.mark.since(4),
    pytest.mark.only(4, 7),
    pytest.mark.skipif(sys.platform == "win32", reason="no such signals and subprocesses"),
]

SCRIPT = Path(__file__).parent / "crash_worker.py"
WORKERS = 2
SETTINGS: dict[str, Any] = QUICK | {
    "HEARTBEAT_INTERVAL": 0.2,
    "INACTIVE_AFTER": 3.0,
    "concurrency": 4,
}
PATIENCE = 60.0  # seconds; reached only by a test that fails

AUDIT = """
    CREATE TABLE audit (task_id BIGINT, attempt INT, status task_status, worker_id UUID);

    CREATE FUNCTION take_down() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO audit VALUES (NEW.id, NEW.attempt, NEW.status, NEW.worker_id);
        RETURN NULL;
    END $$;

    CREATE TRIGGER audit AFTER UPDATE ON tasks
    FOR EACH ROW EXECUTE FUNCTION take_down();
"""


class Shop:
    """Workers under a supervisor, what they are to do, and what they have done."""

    def __init__(self, lesson: Any, pool: Pool, notes: Path) -> None:
        self.lesson = lesson
        self.pool = pool
        self.notes = notes
        self.enqueued = 0
        self.orders = 0
        self.alive: set[int] = set()  # the process ids of workers
        self.ends: list[int] = []  # the exit statuses of those that have ended

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """Within this block there are always WORKERS workers, or about to be."""
        await execute(self.pool, AUDIT)
        supervisors = [asyncio.create_task(self._keep_running()) for _ in range(WORKERS)]
        try:
            yield
        finally:
            for supervisor in supervisors:
                supervisor.cancel()
            await asyncio.wait(supervisors)

    async def _keep_running(self) -> None:
        while True:
            async with worker_process(self.lesson, script=SCRIPT, **SETTINGS) as process:
                self.alive.add(process.pid)
                self.ends.append(await process.wait())
                self.alive.remove(process.pid)
            await asyncio.sleep(0.5)  # as a supervisor does, lest it spins

    async def give_work(self, stubborn: bool = False) -> int:
        """Enqueue some tasks, and wait until a worker runs some; return its process id.

        A task that is RUNNING has been claimed, but its worker may not know yet. A stubborn one has
        begun: else its next attempt, which nobody disturbs, would be the stubborn one.
        """
        await self._enqueue_some(stubborn)
        if stubborn:
            await wait_for(self._stubborn, "the stubborn task has begun", PATIENCE)

        async def at_work() -> list[int]:
            workers = await self._at_work()
            if not workers and await self._all_finished():
                await self._enqueue_some()  # we were too slow to see it
            return workers

        workers: list[int] = await wait_for(at_work, "a worker is at work", PATIENCE)
        return workers[0]

    async def _enqueue_some(self, stubborn: bool = False) -> None:
        for n in range(4):
            await self._enqueue("step", stubborn and n == 0)
            if self.lesson.number >= 7:
                self.orders += 1
                await self._enqueue("order", is_durable=True)

    async def _enqueue(self, name: str, stubborn: bool = False, **columns: Any) -> int:
        self.enqueued += 1
        input = {"file": str(self.notes), "n": self.enqueued, "stubborn": stubborn}
        return await enqueue(self.pool, name, input, **columns)

    async def _at_work(self) -> list[int]:
        """The process ids of workers that live and run a task."""
        rows = await execute(
            self.pool,
            """
            SELECT DISTINCT split_part(display_name, ':', 2)::INT AS pid
            FROM workers
            JOIN tasks ON worker_id = workers.id AND status = 'RUNNING'
            """,
        )
        return [row["pid"] for row in rows if row["pid"] in self.alive]

    def _stubborn(self) -> int | None:
        """The process id of the worker that has begun the first task of all, if one has."""
        for line in self.notes.read_text().splitlines() if self.notes.exists() else []:
            pid, n, what, _ = line.split()
            if (n, what) == ("1", "starts"):
                return int(pid)
        return None

    async def end_of_stubborn(self) -> None:
        """Wait until the worker has ended that ran the stubborn task, which is the first of all."""
        worker = self._stubborn()
        await wait_for(lambda: worker not in self.alive, "it has ended", PATIENCE)

    async def kill(self, victim: int) -> None:
        os.kill(victim, signal.SIGKILL)
        await wait_for(lambda: victim not in self.alive, "it has ended", PATIENCE)

    async def check(self) -> None:
        """In the end all is done, once as far as anybody can tell, and the workers are well."""
        await wait_for(self._all_finished, "all tasks have finished", PATIENCE)
        await finished(self.pool, await self._enqueue("step"))
        await wait_for(self._only_the_living, "the rows of dead workers are gone", PATIENCE)

        tasks = await execute(self.pool, "SELECT * FROM tasks ORDER BY id")
        audit = await execute(self.pool, "SELECT * FROM audit")
        assert {task["status"] for task in tasks} == {"COMPLETED"}
        assert {task["retry_count"] for task in tasks} == {0}
        # Each step of an order once, whatever the attempt.
        assert len(tasks) == self.enqueued + 3 * self.orders

        outcomes = [row for row in audit if row["status"] in ("COMPLETED", "FAILED")]
        assert sorted((row["task_id"], row["attempt"]) for row in outcomes) == [
            (task["id"], task["attempt"]) for task in tasks
        ]
        claims = Counter(row["task_id"] for row in audit if row["status"] == "RUNNING")
        assert claims == {task["id"]: task["attempt"] for task in tasks}
        # Only the end of a worker costs an attempt.
        assert max(claims.values()) <= 1 + len(self.ends)

        notes = [line.split() for line in self.notes.read_text().splitlines()]
        done = {name for _, _, what, name in notes if what == "ends"}
        steps = {task["id"]: task["output"] for task in tasks if task["task_name"] == "step"}
        assert set(steps.values()) <= done
        assert len(set(steps.values())) == len(steps)
        if self.orders:
            await self._check_orders(steps)

        # Else nothing was tried.
        assert max(claims.values()) > 1
        assert set(self.ends) <= {1, -signal.SIGKILL}

    async def _all_finished(self) -> bool:
        return not await execute(self.pool, "SELECT id FROM tasks WHERE finished_at IS NULL")

    async def _only_the_living(self) -> bool:
        return len(await execute(self.pool, "SELECT id FROM workers")) == WORKERS

    async def _check_orders(self, steps: dict[int, Any]) -> None:
        """Each has three steps in its log, and the outputs of these, in their order."""
        rows = await execute(
            self.pool,
            """
            SELECT output,
                   array_agg(event_id ORDER BY event_id) AS event_ids,
                   array_agg(child_task_id ORDER BY event_id) AS children
            FROM tasks
            JOIN durable_events ON task_id = id
            GROUP BY id
            """,
        )
        assert len(rows) == self.orders
        for row in rows:
            assert row["event_ids"] == [1, 2, 3]
            assert row["output"] == [steps[child] for child in row["children"]]


async def test_workers_that_are_killed_one_after_the_other(
    lesson: Any, pool: Pool, tmp_path: Path
) -> None:
    """Each while it runs tasks, with SIGKILL."""
    shop = Shop(lesson, pool, tmp_path / "notes")
    async with shop.supervised():
        for _ in range(5):
            await shop.kill(await shop.give_work())
        await shop.check()


@pytest.mark.until(7)  # later ones survive that
async def test_connections_that_are_cut_every_second(
    lesson: Any, pool: Pool, tmp_path: Path
) -> None:
    """All of the workers' at once: a worker does not outlive that."""
    shop = Shop(lesson, pool, tmp_path / "notes")
    async with shop.supervised():
        for n in range(5):
            await shop.give_work(stubborn=n == 0)
            await execute(
                pool,
                """
                SELECT pg_terminate_backend(pid)
                FROM pg_stat_activity
                WHERE datname = current_database()
                  AND application_name <> current_setting('application_name')
                """,
            )
            await asyncio.sleep(1)
        await shop.end_of_stubborn()
        await shop.check()


@pytest.mark.until(7)  # later ones survive that
@pytest.mark.parametrize(
    ("how", "seconds"),
    [(signal.SIGINT, 0), (signal.SIGQUIT, 0), (signal.SIGINT, 10)],
    ids=["fast restart", "immediate restart", "away for 10 s"],
)
async def test_a_server_that_goes_away_and_comes_back(
    lesson: Any,
    own_server: EmbeddedPostgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
    seconds: float,
) -> None:
    """Workers that are started while it is away cannot even begin."""
    monkeypatch.setenv("DATABASE_URL", own_server.url())
    async with open_pool(lesson.path) as pool:
        shop = Shop(lesson, pool, tmp_path / "notes")
        async with shop.supervised():
            await shop.give_work(stubborn=True)
            os.kill(int(own_server.pid_file.read_text().split()[0]), how)
            await wait_for(lambda: not own_server.is_running(), "the server has stopped")
            await asyncio.sleep(seconds)
            await asyncio.to_thread(own_server.url)  # starts it
            await shop.give_work()
            await shop.end_of_stubborn()
            await shop.check()
