"""The lesson that the lab shows: where it is, what it can do, and what its tables have."""

import re
from pathlib import Path
from typing import Any

from shared.database import Connection, conninfo, load_queries, new_connection
from shared.lessons import LESSONS
from shared.schema import apply_schema, schema_name
from shared.watch import existing_columns

# What a lesson can do, and what in its tables says so.
COLUMNS = {
    "heartbeats": ("workers", "last_heartbeat_at"),
    "events": ("durable_events", "event_id"),
    "durable": ("tasks", "is_durable"),
    "sleep": ("tasks", "wake_at"),
    "signal": ("signals", "received_by"),
    "payments": ("payments", "order_id"),
}
# And what in its modules. They are read, not imported: a reader's may be faulty, or never end.
CODE = {
    "slots": ("slots.py", r"^class Slots\b"),
    "retry": ("rerun.py", r"^async def retry_task\b"),
    "replay": ("rerun.py", r"^async def replay_task\b"),
    "fork": ("rerun.py", r"^async def fork_task\b"),
    "graceful_stop": ("worker.py", r"\bstop_signals\("),
}
STATUSES = """
    SELECT enumlabel AS status
    FROM pg_enum
    JOIN pg_attribute ON atttypid = enumtypid
    WHERE attrelid = 'tasks'::regclass
      AND attname = 'status'
    ORDER BY enumsortorder
"""


def modules_in(path: Path) -> list[Path]:
    """A lesson's modules, and not what an editor has left there: worker.old.py, .#worker.py."""
    return [file for file in sorted(path.glob("*.py")) if file.stem.isidentifier()]


class OpenLesson:
    """A lesson, or a reader's copy of one."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.schema = schema_name(path)
        self.number = self.schema.removeprefix("lesson_")
        self.name = self.path.name.partition("-")[2]
        self.columns: set[tuple[str, str]] = set()
        self.statuses: list[str] = []  # in the order in which schema.sql has them
        self.abilities: set[str] = set()

    async def connect(self) -> Connection:
        """A new connection that sees the lesson's schema. Raises psycopg.Error if it is away."""
        return await new_connection(conninfo(self.schema))

    async def prepare(self, conn: Connection) -> None:
        """Apply schema.sql and look what there is. Raises SystemExit if a file is faulty."""
        load_queries(self.path)
        await apply_schema(conn, self.schema, self.path / "schema.sql")
        await self.inspect(conn)

    def syntax_error(self) -> str | None:
        """What is wrong with the first of its modules that is not Python."""
        for file in modules_in(self.path):
            try:
                compile(file.read_bytes(), str(file), "exec")
            except (SyntaxError, ValueError) as error:
                return f"{file.name}: {error}"
        return None

    async def inspect(self, conn: Connection) -> None:
        """Look anew what the tables have and the modules can do. A reader may have changed both."""
        self.columns = await existing_columns(conn, self.schema)
        if ("tasks", "status") not in self.columns:
            raise SystemExit(
                f"{self.path.name} has no table `tasks` with a status: the lab shows lessons from "
                "02 on."
            )
        cursor = await conn.execute(STATUSES)
        self.statuses = [row["status"] async for row in cursor]
        self.abilities = self.find_abilities()

    def find_abilities(self) -> set[str]:
        """What this lesson can do of that which not every lesson can."""
        found = {name for name, column in COLUMNS.items() if column in self.columns}
        if "SUSPENDED" in self.statuses:
            found.add("suspension")
        for name, (file, pattern) in CODE.items():
            path = self.path / file
            if path.exists() and re.search(pattern, path.read_text("utf-8", "replace"), re.M):
                found.add(name)
        return found

    @property
    def kinds(self) -> list[str]:
        """The kinds of tasks that one can enqueue, see shared/lab/functions.py."""
        kinds = ["order", "slow_order", "failing_order", "plain"]
        if self.abilities >= {"durable", "sleep"}:
            kinds.append("sleeper")
        if self.abilities >= {"durable", "signal"}:
            kinds.append("approval")
        return kinds

    def has(self, table: str, column: str) -> bool:
        return (table, column) in self.columns

    def summary(self) -> dict[str, Any]:
        """What the page says about the lesson."""
        near = self.path.parent == LESSONS
        return {
            "number": self.number,
            "name": self.name,
            "path": f"lessons/{self.path.name}" if near else str(self.path),
            "abilities": sorted(self.abilities),
            "kinds": self.kinds,
        }
