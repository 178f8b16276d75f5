"""A live view of one lesson's tables in the terminal. It only reads."""

import asyncio
import math

import psycopg
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shared.database import Connection, connect, conninfo, new_connection
from shared.outages import one_line

Row = dict[str, str | None]

INTERVAL = 0.5  # seconds
MAX_ROWS = 15  # of a table
LINES_ABOVE = 3  # a table's rows: its title, the head, and a rule
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
            ("retry_count", "retries", "NULLIF(retry_count, 0)"),
            ("lost_count", "lost", "NULLIF(lost_count, 0)"),
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
        is_terminal = Console().file.isatty()  # whatever FORCE_COLOR says
        view = await snapshot(conn, schema, Console().height if is_terminal else None)
    if not is_terminal:
        Console(width=WIDTH).print(view)
        return
    with Live(view, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                async with await new_connection(conninfo(schema)) as conn:
                    view = await snapshot(conn, schema, live.console.height)
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


async def snapshot(conn: Connection, schema: str, height: int | None) -> RenderableType:
    """The tables as they are now, in so many lines if the height is given."""
    existing = await existing_columns(conn, schema)
    parts: list[RenderableType] = []
    if ("tasks", "status") in existing:
        parts.append(await status_counts(conn))
    tables: dict[str, list[Row]] = {}
    for name, (order, columns) in VIEWS.items():
        shown = {title: code for column, title, code in columns if (name, column) in existing}
        if shown:
            tables[name] = await newest_rows(conn, name, order, shown)
    room = (height or math.inf) - len(parts) - LINES_ABOVE * len(tables)
    # The oldest rows give way, of tasks last; one row, with nothing in it, is the least.
    while sum(map(len, tables.values())) > max(room, len(tables)):
        max(reversed(tables.values()), key=len).pop()
    return Group(*parts, *(as_table(*item) for item in tables.items()))


async def status_counts(conn: Connection) -> Text:
    """One line with the number of tasks in each status."""
    cursor = await conn.execute(
        "SELECT status, count(*) AS number FROM tasks GROUP BY status ORDER BY status"
    )
    counts = [f"{row['number']} {row['status']}" async for row in cursor]
    return Text(", ".join(counts) or "no tasks")


async def newest_rows(
    conn: Connection, name: str, order: str, columns: dict[str, str]
) -> list[Row]:
    """The newest rows of one table. If it has none, one with nothing in it."""
    expressions = ", ".join(f'({code})::text AS "{title}"' for title, code in columns.items())
    query = f"SELECT {expressions} FROM {name} AS t ORDER BY {order} LIMIT {MAX_ROWS}"
    cursor = await conn.execute(query.encode())
    return await cursor.fetchall() or [dict.fromkeys(columns)]


def as_table(name: str, rows: list[Row]) -> Table:
    """Rows as a table, without the columns in which nothing is."""
    table = Table(
        title=name, title_justify="left", box=SIMPLE_HEAD, show_edge=False, collapse_padding=True
    )
    is_empty = not any(any(row.values()) for row in rows)
    titles = [title for title in rows[0] if is_empty or any(row[title] for row in rows)]
    for title in titles:
        table.add_column(
            one_line_text(title),
            # Where the terminal is narrow, these give way first, and an id never.
            no_wrap=title not in ("input", "output", "payload", "key"),
            min_width=max(len(row[title] or "") for row in rows) if title == "id" else None,
        )
    for row in rows:
        table.add_row(*(one_line_text(row[title]) for title in titles))
    return table


def one_line_text(value: str | None) -> Text:
    return Text(value or "", no_wrap=True, overflow="ellipsis")
