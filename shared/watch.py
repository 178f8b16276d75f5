"""A live view of one lesson's tables in the terminal. It only reads."""

import asyncio

import psycopg
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shared.database import Connection, connect, conninfo, new_connection
from shared.outages import one_line

INTERVAL = 0.5  # seconds
MAX_ROWS = 15
WIDTH = 150  # characters, where no terminal says otherwise

# For each table the order of its rows, and its columns with their titles and the SQL that shows
# them. An early lesson has only some of them.
VIEWS = {
    "tasks": (
        "t.id DESC",
        [
            ("id", "id", "id"),
            ("task_name", "task_name", "task_name"),
            ("status", "status", "status"),
            ("is_durable", "durable", "CASE WHEN is_durable THEN 'yes' END"),
            ("priority", "prio", "priority"),
            ("attempt", "attempt", "attempt"),
            ("retry_count", "retries", "retry_count"),
            ("lost_count", "lost", "lost_count"),
            ("wake_at", "wake_at", "to_char(wake_at, 'YYYY-MM-DD HH24:MI:SS')"),
            ("input", "input", "left(input::text, 60)"),
            ("output", "output", "left(output::text, 60)"),
        ],
    ),
    "workers": (
        "t.last_heartbeat_at DESC",
        [
            ("id", "id", "id"),
            ("display_name", "display_name", "display_name"),
            (
                "last_heartbeat_at",
                "last heartbeat",
                "round(extract(epoch FROM clock_timestamp() - last_heartbeat_at), 1) || ' s ago'",
            ),
        ],
    ),
    "durable_events": (
        "t.inserted_at DESC, t.event_id DESC",
        [
            ("task_id", "task_id", "task_id"),
            ("event_id", "event_id", "event_id"),
            ("kind", "kind", "kind"),
            ("child_task_id", "child_task_id", "child_task_id"),
            ("branch_id", "branch_id", "branch_id"),
            ("abandoned_in", "abandoned_in", "abandoned_in"),
            ("inserted_at", "inserted_at", "to_char(inserted_at, 'HH24:MI:SS.MS')"),
            ("key", "key", "left(key, 16)"),
        ],
    ),
    "signals": (
        "t.id DESC",
        [
            ("id", "id", "id"),
            ("task_id", "task_id", "task_id"),
            ("name", "name", "left(name, 40)"),
            ("payload", "payload", "left(payload::text, 60)"),
            ("received_by", "received_by", "received_by"),
        ],
    ),
}


async def watch(schema: str) -> None:
    """Show a lesson's tables until cancelled, or once if stdout is not a terminal.

    Raises SystemExit with one line if the lesson has no tables.
    """
    async with await connect(schema) as conn:
        if not await existing_columns(conn, schema):
            raise SystemExit(f"There is no schema {schema} with tables: has that lesson been run?")
        view = await snapshot(conn, schema)
    if not Console().file.isatty():  # whatever FORCE_COLOR says
        Console(width=WIDTH).print(view)
        return
    with Live(view, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                async with await new_connection(conninfo(schema)) as conn:
                    view = await snapshot(conn, schema)
            except psycopg.Error as error:
                view = Text(one_line(error))
            live.update(view, refresh=True)


async def existing_columns(conn: Connection, schema: str) -> set[tuple[str, str]]:
    """(table, column) of all columns in the schema."""
    cursor = await conn.execute(
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = %s",
        [schema],
    )
    return {(row["table_name"], row["column_name"]) async for row in cursor}


async def snapshot(conn: Connection, schema: str) -> RenderableType:
    """The tables as they are now."""
    existing = await existing_columns(conn, schema)
    parts: list[RenderableType] = []
    if ("tasks", "status") in existing:
        parts.append(await status_counts(conn))
    for name, (order, columns) in VIEWS.items():
        shown = {title: code for column, title, code in columns if (name, column) in existing}
        if shown:
            parts.append(await newest_rows(conn, name, order, shown))
    return Group(*parts)


async def status_counts(conn: Connection) -> Text:
    """One line with the number of tasks in each status."""
    cursor = await conn.execute(
        "SELECT status, count(*) AS number FROM tasks GROUP BY status ORDER BY status"
    )
    counts = [f"{row['number']} {row['status']}" async for row in cursor]
    return Text(", ".join(counts) or "no tasks")


async def newest_rows(conn: Connection, name: str, order: str, columns: dict[str, str]) -> Table:
    """The newest rows of one table."""
    expressions = ", ".join(f'({code})::text AS "{title}"' for title, code in columns.items())
    query = f"SELECT {expressions} FROM {name} AS t ORDER BY {order} LIMIT {MAX_ROWS}"
    table = Table(title=name, title_justify="left", box=SIMPLE_HEAD)
    for title in columns:
        # Where the terminal is narrow, these give way first.
        table.add_column(title, no_wrap=title not in ("input", "output", "key"))
    async for row in await conn.execute(query.encode()):
        cells = (Text(value or "", no_wrap=True, overflow="ellipsis") for value in row.values())
        table.add_row(*cells)
    return table
