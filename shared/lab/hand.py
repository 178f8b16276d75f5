"""All that one can do in the lab: to workers, to the database, to tasks. The scenes use it, too."""

import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from shared.database import Connection, Queries, embedded, load_queries, without_password
from shared.lab.errors import LabError
from shared.lab.lesson import OpenLesson
from shared.lab.processes import Processes
from shared.lab.record import Record
from shared.lab.worker import Settings
from shared.outages import one_line

CONCURRENCY = 10
DURABLE_CONCURRENCY = 20
MOST_TASKS = 1000
MOST_SLOTS = 1000
ACT_TIMEOUT = 30.0  # seconds
LAST_WORDS = 5.0
LOOK_INTERVAL = 0.05
NOTICE = 0.5  # seconds until each page has heard of a restart, which is over sooner than that
# What one can enqueue: the task's name, and what is special in its input.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "order": ("process_order", {}),
    "slow_order": ("process_order", {"seconds": 5.0}),
    "failing_order": ("process_order", {"fails": True}),
    "plain": ("pack_parcel", {}),
    "sleeper": ("process_order", {"sleep": 10}),
    "approval": ("process_order", {"approval": True}),
}


def check_number(name: str, value: Any, least: int, most: int) -> None:
    """Raise LabError if this is no whole number between these two."""
    if type(value) is not int or not least <= value <= most:
        raise LabError(f"{name} must be a whole number from {least} to {most}.")


class Hand:
    """One run of the lab. Each method raises LabError with one line if it cannot do its work."""

    def __init__(self, lesson: OpenLesson, touch: Callable[[], None]) -> None:
        self.lesson = lesson
        self.queue = f"lab-{os.getpid()}-{secrets.token_hex(2)}"  # its own: it hinders nothing
        self.touch = touch  # lets the page have what is new
        self.record = Record()
        self.processes = Processes(lesson.path, self.queue, self.record, touch)
        self.constants: dict[str, float] = json.loads(os.environ.get("LAB_SETTINGS", "{}"))
        self.chosen: int | None = None  # what a scene wants the page to show
        self.is_restarting = False  # Postgres, by us

    @property
    def embedded(self) -> bool:
        """Whether Postgres is ours, and ours to restart."""
        return not os.environ.get("DATABASE_URL")

    def choose(self, task: int | None) -> None:
        """Let the pages show this task."""
        self.chosen = task
        self.touch()

    async def start_worker(
        self,
        functions: list[str] | None = None,
        concurrency: int = CONCURRENCY,
        durable_concurrency: int = DURABLE_CONCURRENCY,
    ) -> str:
        """Start a worker, wait until it works, and return its key."""
        slots = {"concurrency": concurrency, "durable_concurrency": durable_concurrency}
        for name, number in slots.items():
            check_number(name, number, 0, MOST_SLOTS)
        gates = sorted(self.processes.closed_gates)
        settings = Settings(functions=functions, slots=slots, constants=self.constants, gates=gates)
        worker = self.processes.start(settings)
        await self.wait_for(lambda: worker.state != "starting", f"worker {worker.key} works")
        if worker.state == "dead":
            # Its last words come by another way than its end. Its children may keep that open.
            await asyncio.to_thread(worker.reader.join, LAST_WORDS)
            reason = (worker.error or "").splitlines()
            raise LabError(f"Worker {worker.key} has not started: {reason[-1] if reason else ''}")
        return worker.key

    async def kill(self, key: str) -> None:
        """kill -9; returns when the process has ended."""
        worker = self.processes.get(key)
        self.processes.kill(key)
        await self.wait_for(lambda: worker.state == "dead", f"worker {key} is dead")

    async def freeze(self, key: str) -> None:
        self.processes.freeze(key)

    async def thaw(self, key: str) -> None:
        self.processes.thaw(key)

    async def stop(self, key: str) -> None:
        self.processes.stop(key)

    async def stop_all(self) -> None:
        """Begin with an empty stage: no workers, no gates."""
        if ended := self.processes.kill_all():
            workers = "workers" if len(ended) > 1 else "worker"
            self.record.say("ended", f"ended {workers} {' and '.join(ended)}")
        self.processes.clear()
        await self.release()

    async def open_tasks(self) -> int:
        """How many tasks of the lab are not finished."""
        (row,) = await self.rows(
            "SELECT count(*) AS number FROM tasks "
            "WHERE queue = %(queue)s AND status NOT IN ('COMPLETED', 'FAILED')"
        )
        return int(row["number"])

    async def empty(self) -> None:
        """Delete the lab's tasks. The workers are killed first: they may have some of these."""
        await self.stop_all()
        async with await self.connect() as conn:
            await conn.execute("DELETE FROM tasks WHERE queue = %s", [self.queue])
        self.record.say("reset", "reset the lab: its tasks are gone, and its workers begin with A")
        self.choose(None)

    async def clear(self) -> None:
        """Forget workers that are dead."""
        self.processes.clear()

    async def cut_connections(self, key: str) -> None:
        """Terminate all of a worker's connections to the database."""
        self.processes.get(key)
        cut = await self.rows(
            "SELECT pg_terminate_backend(pid) AS cut FROM pg_stat_activity "
            "WHERE application_name = %(name)s",
            {"name": self.processes.application_name(key)},
        )
        self.record.say("cut", f"cut {len(cut)} connections of worker {key}", key)
        self.touch()

    async def restart_postgres(self) -> None:
        """Restart the embedded Postgres."""
        if not self.embedded:
            raise LabError("Postgres is not ours to restart: it is the one in DATABASE_URL.")
        if self.is_restarting:
            raise LabError("Postgres is being restarted already.")
        self.record.say("restart", "restarts Postgres")
        self.is_restarting = True
        self.touch()
        await asyncio.sleep(NOTICE)
        try:
            await asyncio.to_thread(embedded().restart)
        except (OSError, subprocess.SubprocessError) as error:
            raise LabError(f"Postgres does not restart: {one_line(error)}") from None
        finally:
            self.is_restarting = False
        self.record.say("restart", "Postgres has been restarted")
        self.touch()

    async def hold(self, *gates: str) -> None:
        """Hold functions at these gates from now on."""
        self.processes.set_gates(self.processes.closed_gates | set(gates))

    async def release(self, *gates: str) -> None:
        """Let go what is held at these gates, or at all, and hold no more."""
        self.processes.set_gates(self.processes.closed_gates - set(gates) if gates else set())

    async def reached(
        self, gate: str, whose: Callable[[], Awaitable[set[int]]], seconds: float = 20
    ) -> None:
        """Wait until the function of one of these tasks is held at a gate."""

        async def find() -> bool:
            workers = self.processes.workers
            held = {each["task"] for w in workers for each in w.held if each["gate"] == gate}
            return bool(held) and bool(held & await whose())

        await self.wait_for(find, f"a function is at {gate}", seconds)

    @asynccontextmanager
    async def locked(self, table: str) -> AsyncIterator[None]:
        """Within this block who inserts a row into the table waits. Reading goes on."""
        async with await self.connect() as conn, conn.transaction():
            # It may wait for the reader as long as it takes.
            await conn.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            statement = sql.SQL("LOCK TABLE {} IN SHARE MODE").format(sql.Identifier(table))
            await conn.execute(statement)
            yield

    async def enqueue(self, kind: str, count: int = 1, **input: Any) -> list[int]:
        """Enqueue tasks of one kind, in one transaction; return their ids."""
        if kind not in self.lesson.kinds:
            raise LabError(f"Lesson {self.lesson.number} has no tasks of the kind {kind!r}.")
        check_number("count", count, 1, MOST_TASKS)
        task_name, more = KINDS[kind]
        is_durable = task_name == "process_order" and "durable" in self.lesson.abilities
        seconds = 1.0 if count <= 10 else 0.1  # of a step
        # Before lesson 07 nobody can retry a task by hand.
        retries = 1 if kind == "failing_order" and not is_durable else 0
        columns = {"is_durable": is_durable, "max_retries": retries}
        queries, ids = self._queries(), []
        async with await self.connect() as conn, conn.transaction():
            for _ in range(count):
                order = {"order_id": f"order-{secrets.token_hex(4)}", "amount": 42}
                values = {**order, "seconds": seconds, **more, **input}
                ids.append(await self._create_task(conn, queries, task_name, values, columns))
        self.touch()
        return ids

    async def _create_task(
        self,
        conn: Connection,
        queries: Queries,
        task_name: str,
        input: Any,
        columns: dict[str, Any],
    ) -> int:
        """With the lesson's own statement, which from 11 on tells the workers."""
        values = {"queue": self.queue, "task_name": task_name, "input": Jsonb(input), **columns}
        if hasattr(queries, "create_task"):
            others = {"timeout": None, "schedule_timeout": None, "priority": 1}
            row = await queries.create_task(conn, **values, **others)
        else:
            values = {name: v for name, v in values.items() if self.lesson.has("tasks", name)}
            statement = sql.SQL("INSERT INTO tasks ({}) VALUES ({}) RETURNING id").format(
                sql.SQL(", ").join(map(sql.Identifier, values)),
                sql.SQL(", ").join(map(sql.Placeholder, values)),
            )
            row = await (await conn.execute(statement, values)).fetchone()
        return int(row["id"])

    async def retry(self, id: int) -> None:
        await self._act("retry", id, {"id": id})

    async def replay(self, id: int) -> None:
        await self._act("replay", id, {"id": id})

    async def fork(self, id: int, event: int) -> None:
        await self._act("fork", id, {"id": id, "from_event": event}, f" from event {event}")

    async def send_signal(self, id: int, name: str, payload: Any) -> None:
        arguments = {"task_id": id, "name": name, "payload": payload}
        await self._act("signal", id, arguments, f" {name!r}")

    async def _act(self, action: str, id: int, arguments: dict[str, Any], what: str = "") -> None:
        """Let the lesson's own code do it, see act.py."""
        if action not in self.lesson.abilities:
            raise LabError(f"Lesson {self.lesson.number} has no {action} yet.")
        command = [sys.executable, "-m", "shared.lab.act", str(self.lesson.path), action]
        try:
            result = await asyncio.to_thread(
                subprocess.run,
                command,
                input=json.dumps(arguments).encode(),  # too long for a command line
                capture_output=True,
                timeout=ACT_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise LabError(
                f"The {action} has not ended within {ACT_TIMEOUT:g} s: maybe somebody holds a lock."
            ) from None
        if result.returncode:
            lines = result.stderr.decode(errors="replace").strip().splitlines()
            raise LabError(lines[-1] if lines else f"{action} has failed.")
        at = float(result.stdout.split()[0])
        self.record.say(action, f"{action} of task {id}{what}", task=id, at=at)
        self.touch()

    async def connect(self) -> Connection:
        """A new connection in the lesson's schema."""
        try:
            return await self.lesson.connect()
        except psycopg.Error as error:
            reason = without_password(one_line(error))
            raise LabError(f"The database is away: {reason}") from None

    async def rows(self, statement: str, parameters: dict[str, Any] | None = None) -> list[Any]:
        """The rows of one statement, in which %(queue)s is the lab's queue."""
        async with await self.connect() as conn:
            cursor = await conn.execute(
                statement.encode(), {"queue": self.queue, **(parameters or {})}
            )
            return await cursor.fetchall()

    async def until(
        self, statement: str, parameters: dict[str, Any] | None, what: str, seconds: float = 30
    ) -> Any:
        """Wait until a statement's first row has a true first column; return that row."""

        async def find() -> Any:
            rows = await self.rows(statement, parameters)
            return next((row for row in rows[:1] if next(iter(row.values()))), None)

        return await self.wait_for(find, what, seconds)

    async def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        """Return the condition's value as soon as it is true. It may be a coroutine function."""
        deadline = time.monotonic() + seconds
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            if time.monotonic() > deadline:
                raise LabError(f"Waited in vain for {seconds:g} s until {what}.")
            await asyncio.sleep(LOOK_INTERVAL)

    def _queries(self) -> Any:
        try:
            return load_queries(self.lesson.path)
        except SystemExit as error:
            raise LabError(str(error)) from None
