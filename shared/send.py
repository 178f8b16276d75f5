"""Sending a signal by hand, with the lesson's own send_signal."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import psycopg

from shared.database import connect, load_queries
from shared.outages import one_line
from shared.schema import schema_name
from shared.watch import existing_columns

LESSONS = Path(__file__).resolve().parent.parent / "lessons"


async def send(number: str, task_id: str, name: str, payload: str) -> None:
    """Send a signal to a durable task of the lesson with this number. The payload is JSON text.

    Raises SystemExit with one line if the lesson has no signals, or if they do not go there.
    """
    lesson = next(LESSONS.glob(f"{int(number):02}-*"), None)
    if lesson is None or not (lesson / "signals.py").exists():
        raise SystemExit(f"There are no signals in lesson {number}: the first that has them is 14.")
    if not task_id.isdecimal():
        raise SystemExit(f"TASK_ID is a number, not {task_id!r}.")
    value = read(payload)
    sys.path.insert(0, str(lesson))
    signals: Any = importlib.import_module("signals")
    schema = schema_name(lesson)
    async with await connect(schema) as conn:
        if not await existing_columns(conn, schema):
            raise SystemExit(f"There is no schema {schema} with tables: has that lesson been run?")
        try:
            await signals.send_signal(conn, load_queries(lesson), int(task_id), name, value)
        except (ValueError, psycopg.DataError) as error:
            raise SystemExit(one_line(error)) from None
    print(f"sent {name!r} to task {int(task_id)}")


def read(payload: str) -> Any:
    """The value of a JSON text. Raises SystemExit with one line if it is none."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise SystemExit(
            f"The payload is not JSON: {one_line(error)}. A text needs two kinds of quotes: "
            """'"yes"'."""
        ) from None
