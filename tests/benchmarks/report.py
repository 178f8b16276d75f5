"""From measured values to figures, and how they are shown."""

import os
import platform
import statistics
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Book
from benchmarks.stage import Stage

FLOOR = "floor.noop_per_s"


async def about(stage: Stage) -> dict[str, Any]:
    """Where and when this is."""
    (row,) = await stage.rows(
        """
        SELECT current_setting('server_version') AS postgres, current_setting('fsync') AS fsync,
            current_setting('synchronous_commit') AS synchronous_commit
        """
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "cpu": cpu(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "psycopg": version("psycopg"),
        **row,
    }


def cpu() -> str:
    """The name of the CPU where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def summary(name: str, values: list[float]) -> Iterator[tuple[str, float]]:
    yield name, statistics.median(values)
    yield f"{name}_min", min(values)
    yield f"{name}_max", max(values)
    if name.endswith("_ms"):
        yield f"{name}_p95", statistics.quantiles(values, n=20, method="inclusive")[-1]


def figures(book: Book) -> dict[str, Any]:
    """Median, minimum and maximum of all that is in the book, as nested dicts.

    A rate is also given as a ratio to the floor of the same round.
    """
    found: dict[str, Any] = {}
    ratios = {
        f"{name.removesuffix('_per_s')}_ratio": [
            value / floor for value, floor in zip(values, book[FLOOR], strict=True)
        ]
        for name, values in book.items()
        if name.endswith("_per_s") and name != FLOOR
    }
    for path, values in (book | ratios).items():
        *parents, name = path.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place.update((key, round(value, 4)) for key, value in summary(name, values))
    return found


def show(figures: dict[str, Any]) -> None:
    """Print the figures as tables."""
    for title, place in [("the floor", {"": figures["floor"]}), ("lessons", figures["lessons"])]:
        table = Table("", "figure", "median", "min", "max", "p95", title=title, box=box.SIMPLE_HEAD)
        for number, values in place.items():
            for name, value in values.items():
                if f"{name}_min" in values:
                    others = [values.get(f"{name}_{of}") for of in ("min", "max", "p95")]
                    table.add_row(number, name, *map(text, [value, *others]))
        Console(width=None if sys.stdout.isatty() else 120).print(table)


def text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
