"""What the lesson's tables say, as the page gets it. It only reads.

A lesson has only some of the columns. What is not there is left out, not made up.
"""

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from shared.database import Connection
from shared.jsonb import UnreadableJson
from shared.lab.hand import KINDS
from shared.lab.lesson import OpenLesson
from shared.lab.processes import Processes
from shared.lab.record import Record

NEWEST = 30  # tasks on the page
MAX_CHILDREN = 200
MAX_JSON = 2000  # characters of an input or output

ENQUEUED = {task_name for task_name, _ in KINDS.values()}

Row = dict[str, Any]

# Of a task, in each list.
BRIEF = ["is_durable", "attempt", "worker_id", "retry_count", "lost_count"]
# And of one that is looked at.
FULL = ["inserted_at", "finished_at", "wake_at", "input", "output", "branch_id"]


class Stage:
    """Reads the tables for the page."""

    def __init__(
        self, lesson: OpenLesson, queue: str, record: Record, processes: Processes
    ) -> None:
        self.lesson = lesson
        self.queue = queue
        self.record = record
        self.processes = processes
        self._keys: dict[str, str] = {}  # of workers, by their ids
        self._first_id = 0  # older tasks are not ours: to pass over them would take long

    async def begin(self, conn: Connection) -> None:
        """Look where the lab's own tasks begin, whenever the tables may be other ones."""
        (row,) = await self._rows(
            conn,
            "SELECT coalesce(min(id) FILTER (WHERE queue = %s), max(id), 0) AS id FROM tasks",
            [self.queue],
        )
        self._first_id = row["id"]

    async def read(self, conn: Connection, looked_at: set[int]) -> dict[str, Any]:
        """All but the details of the chosen tasks, which are in the list, however old they are."""
        workers = await self._workers(conn)
        return {
            "now": await self._now(conn),
            "workers": workers,
            "queue": await self._counts(conn),
            "tasks": await self._listed(conn, looked_at),
        }

    async def read_chosen(self, conn: Connection, id: int) -> dict[str, Any] | None:
        """All about one task; None if there is no such task."""
        rows = await self._rows(conn, f"SELECT * FROM ({self._tasks()}) AS t WHERE id = %s", [id])
        if not rows:
            return None
        events = await self._events(conn, id)
        chosen: dict[str, Any] = {
            "lanes": self.record.lanes(id),
            "events": events,
            "children": await self._children(conn, id),
        }
        if self.lesson.has("signals", "received_by"):
            chosen["signals"] = await self._rows(
                conn,
                "SELECT id, name, payload, inserted_at AS at, received_by FROM signals "
                "WHERE task_id = %s ORDER BY id",
                [id],
            )
        if self.lesson.has("task_branches", "branch_id"):
            chosen["branches"] = await self._rows(
                conn,
                "SELECT branch_id AS branch, from_event, status, output, finished_at "
                "FROM task_branches WHERE task_id = %s ORDER BY branch_id",
                [id],
            )
        if self.lesson.has("payments", "order_id"):
            chosen["payments"] = await self._payments(conn, rows[0])
        ids = [id, *(child["id"] for child in chosen["children"])]
        chosen["moments"] = self.record.moments_of(ids)
        shown = {name: plain(value) for name, value in chosen.items()}
        return {"task": self._task(rows[0], FULL), **shown}

    async def _now(self, conn: Connection) -> float:
        (row,) = await self._rows(conn, "SELECT clock_timestamp() AS now")
        now: float = row["now"].timestamp()
        return now

    async def _workers(self, conn: Connection) -> list[Row]:
        """The processes, each with the time of its heartbeat, if it has one."""
        shown = self.processes.shown()
        views = [worker.view() for worker in shown]
        if "heartbeats" not in self.lesson.abilities:
            return views
        names = {w.facts.get("display_name"): w.key for w in self.processes.workers}
        beats = {}
        rows = "SELECT id::text, display_name, last_heartbeat_at AS at FROM workers"
        for row in await self._rows(conn, rows):
            if row["display_name"] in names:
                key = names[row["display_name"]]
                self._keys[row["id"]] = key
                beats[key] = row["at"].timestamp()
        for view in views:
            if view["key"] in beats:
                view["heartbeat_at"] = beats[view["key"]]
            if "id" in view:
                self._keys[view["id"]] = view["key"]
        return views

    async def _counts(self, conn: Connection) -> dict[str, int]:
        rows = await self._rows(
            conn,
            "SELECT status::text, count(*) AS number FROM tasks "
            "WHERE id >= %s AND queue = %s GROUP BY status",
            [self._first_id, self.queue],
        )
        numbers = {row["status"]: row["number"] for row in rows}
        return {status: numbers.get(status, 0) for status in self.lesson.statuses or numbers}

    async def _listed(self, conn: Connection, looked_at: set[int]) -> list[Row]:
        """Tasks that are no children: those looked at, then what failed, what runs, the newest."""
        top = ""
        if self.lesson.has("durable_events", "child_task_id"):
            top = "AND NOT EXISTS (SELECT FROM durable_events WHERE child_task_id = t.id)"
        rows = await self._rows(
            conn,
            f"SELECT * FROM ({self._tasks()}) AS t WHERE id >= %s AND queue = %s {top} "
            "ORDER BY id = ANY (%s) DESC, status = 'FAILED' DESC, status = 'RUNNING' DESC, id DESC "
            f"LIMIT {NEWEST}",
            [self._first_id, self.queue, list(looked_at)],
        )
        tasks = [self._task(row, []) for row in rows]
        # Steps that no event leads to any more: a replay has emptied their parent's log.
        left = [number for number, row in enumerate(rows) if row["task_name"] not in ENQUEUED]
        if top and left:
            parents = await self._by_order(conn, [order_id(rows[number]) for number in left])
            for number in left:
                tasks[number] |= {"is_left": True, "left_by": parents.get(order_id(rows[number]))}
        return tasks

    async def _by_order(self, conn: Connection, order_ids: list[Any]) -> dict[Any, int]:
        """The tasks that were enqueued for these orders: the lab's steps have their inputs."""
        rows = await self._rows(
            conn,
            "SELECT id, input FROM tasks WHERE id >= %s AND queue = %s AND task_name = ANY (%s) "
            "AND input ->> 'order_id' = ANY (%s)",
            [self._first_id, self.queue, list(ENQUEUED), order_ids],
        )
        return {order_id(row): row["id"] for row in rows}

    async def _events(self, conn: Connection, id: int) -> list[Row]:
        """The event log, with the names of the children where it has children."""
        if "events" not in self.lesson.abilities:
            return []
        names = {"event_id": "event_id", "kind": "kind::text", "inserted_at": "inserted_at AS at"}
        names |= {"key": "left(key, 16) AS key", "child_task_id": "child_task_id AS child"}
        names |= {"branch_id": "branch_id AS branch", "abandoned_in": "abandoned_in"}
        columns = [sql for name, sql in names.items() if self.lesson.has("durable_events", name)]
        return await self._rows(
            conn,
            f"SELECT {', '.join(columns)} FROM durable_events WHERE task_id = %s "
            "ORDER BY event_id, inserted_at",
            [id],
        )

    async def _children(self, conn: Connection, id: int) -> list[Row]:
        if not self.lesson.has("durable_events", "child_task_id"):
            return []
        names = ["event_id", "abandoned_in"]
        columns = [f"e.{name}" for name in names if self.lesson.has("durable_events", name)]
        if self.lesson.has("durable_events", "branch_id"):
            columns.append("e.branch_id AS branch")
        rows = await self._rows(
            conn,
            f"SELECT t.*, {', '.join(columns)} FROM ({self._tasks()}) AS t "
            "JOIN durable_events AS e ON e.child_task_id = t.id "
            f"WHERE e.task_id = %s ORDER BY e.event_id, t.id LIMIT {MAX_CHILDREN}",
            [id],
        )
        children = []
        for row in rows:
            child = self._task(row, [*FULL, "event_id", "branch", "abandoned_in"])
            children.append({**child, "lanes": self.record.lanes(row["id"])})
        return children

    async def _payments(self, conn: Connection, row: Row) -> list[Row]:
        """What the customer of an order was charged."""
        key = "idempotency_key, " if self.lesson.has("payments", "idempotency_key") else ""
        return await self._rows(
            conn,
            f"SELECT {key}order_id, amount, inserted_at AS at FROM payments "
            "WHERE order_id = %s ORDER BY inserted_at",
            [order_id(row)],
        )

    def _tasks(self) -> str:
        """The tasks, and from lesson 07 on the parent of each."""
        parent = "NULL::bigint"
        if self.lesson.has("durable_events", "child_task_id"):
            parent = "(SELECT task_id FROM durable_events WHERE child_task_id = tasks.id)"
        return f"SELECT *, {parent} AS parent FROM tasks"

    def _task(self, row: Row, more: Iterable[str]) -> Row:
        """A task as the page gets it."""
        task = {"id": row["id"], "name": row["task_name"], "status": row["status"]}
        if row["parent"] is not None:
            task["parent"] = row["parent"]
        for name in [*BRIEF, *more]:
            if row.get(name) is not None:
                task[name.removesuffix("_id") if name == "branch_id" else name] = row[name]
        owner = self._keys.get(str(task.pop("worker_id", None)))
        if owner is None and not self.lesson.has("tasks", "worker_id"):
            owner = next((x["worker_key"] for x in self.record.lanes(row["id"])[-1:]), None)
        if owner is not None:
            task["worker_key"] = owner
        return {name: plain(value) for name, value in task.items()}

    async def _rows(self, conn: Connection, statement: str, parameters: Any = None) -> list[Row]:
        cursor = await conn.execute(statement.encode(), parameters)
        return await cursor.fetchall()


def order_id(row: Row) -> Any:
    """Which order a task is about; None if its input does not say so."""
    input = row["input"]
    return input.get("order_id") if isinstance(input, dict) else None


def plain(value: Any) -> Any:
    """A value of a row as JSON can have it: times in seconds, and of long ones the beginning."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{name: plain(each) for name, each in row.items()} for row in value]
    if isinstance(value, dict | list):
        text = json.dumps(value, default=str)
        return value if len(text) <= MAX_JSON else text[:MAX_JSON] + "…"
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, UnreadableJson):
        return f"(unreadable: {value.reason})"
    if isinstance(value, str):
        return value if len(value) <= MAX_JSON else value[:MAX_JSON] + "…"
    return value if isinstance(value, int | float | bool | None) else str(value)
