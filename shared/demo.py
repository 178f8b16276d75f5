"""What the demos need: waiting for a state of the database, and showing rows."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


async def wait_until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float) -> None:
    """Return as soon as the condition holds; raise SystemExit if it takes longer than that."""
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited in vain for {seconds:g} seconds until {what}")
        await asyncio.sleep(0.05)


def show(title: str, rows: Sequence[Any], columns: str = "") -> None:
    """Print rows, which are dicts or dataclasses, as a table of these columns (default: all)."""
    dicts = [row if isinstance(row, dict) else vars(row) for row in rows]
    names = columns.split() or list(dicts[0] if dicts else ())
    table = Table(*names, box=box.SIMPLE_HEAD)
    for row in dicts:
        table.add_row(*(Text("" if row[name] is None else str(row[name])) for name in names))
    print(f"\n{title}", flush=True)
    # Without a terminal rich would assume one of 80 columns.
    Console(width=None if Console().file.isatty() else 120).print(table)
