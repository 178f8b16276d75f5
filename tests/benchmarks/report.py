"""From measured values to figures, and how they are shown."""

import os
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from benchmarks.book import Book
from benchmarks.stage import Stage

COSTS = {
    f"{cost}_per_{unit}": f"floor.{cost}_per_task"
    for cost in ("tx", "statements", "wal_bytes", "cpu_us")
    for unit in ("task", "order")
}
# Which figure of the floor another is compared with, by the end of its name.
FLOORS = {
    "_ms": "floor.single_ms",
} | COSTS
OF_A_FIGURE = ("_min", "_max", "_p95", "_ratio", "_ratio_min", "_ratio_max")
# Without a terminal rich would assume a narrow one.
CONSOLE = Console(width=None if sys.stdout.isatty() else 200)


async def about(stage: Stage) -> dict[str, Any]:
    """When and on what this is measured."""
    (row,) = await stage.rows(
        """
        SELECT current_setting('server_version') AS postgres,
            current_setting('fsync') AS fsync,
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
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def figures(book: Book) -> dict[str, Any]:
    """All figures of a book, as nested dicts."""
    found: dict[str, Any] = {}
    for path, values in book.items():
        *parents, name = path.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        if isinstance(values[0], str):
            place[name] = ", ".join(sorted(set(map(str, values))))
        else:
            place.update(summary(name, [float(value) for value in values]))
            place.update(ratio(path, name, book))
    return found


def summary(name: str, values: list[float]) -> Iterator[tuple[str, float]]:
    """Median, minimum and maximum; of latencies also the 95th percentile."""
    yield name, short(statistics.median(values))
    yield f"{name}_min", short(min(values))
    yield f"{name}_max", short(max(values))
    if name.endswith("_ms") and len(values) > 1:
        p95 = statistics.quantiles(values, n=20, method="inclusive")[-1]
        yield f"{name}_p95", short(p95)


def ratio(path: str, name: str, book: Book) -> Iterator[tuple[str, float]]:
    """The ratio to the floor of what is no rate."""
    floor = next((floor for end, floor in FLOORS.items() if name.endswith(end)), "")
    if path != floor and floor in book:
        base = statistics.median(map(float, book[floor]))
        yield from summary(f"{name}_ratio", [float(value) / base for value in book[path]])


def short(value: float) -> float:
    """Five digits are more than any of these is good for."""
    return float(f"{value:.5g}")


def show_all(about: dict[str, Any], figures: dict[str, Any]) -> None:
    """Print all tables."""
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("each figure: median (ratio to the floor), and below it minimum-maximum")
    show("the floor, lesson 03", {"": figures["floor"]})
    show("lesson", figures["lessons"])
    for number, cases in figures.get("growth", {}).items():
        if number != "floor":
            show_growth(number, cases)


def names(columns: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the figures themselves, in the order of their first appearance."""
    found = dict.fromkeys(name for figures in columns for name in figures)
    return [name for name in found if not name.endswith(OF_A_FIGURE)]


def show(title: str, columns: dict[str, dict[str, Any]]) -> None:
    """Print a table of figures: median and ratio to the floor, and below the range."""
    table = Table(title, *columns, box=box.SIMPLE_HEAD)
    for name in names(columns.values()):
        table.add_row(name, *(cell(name, figures) for figures in columns.values()))
    CONSOLE.print(table)


def show_growth(number: str, cases: dict[str, dict[str, Any]]) -> None:
    """The same with a row for each case, without the costs, which hardly differ."""
    columns = [name for name in names(cases.values()) if not name.endswith(tuple(COSTS))]
    title = Column(f"growth, lesson {number}", no_wrap=True)
    table = Table(title, *columns, box=box.SIMPLE_HEAD)
    for case, figures in cases.items():
        table.add_row(case, *(cell(name, figures) for name in columns))
    CONSOLE.print(table)


def cell(name: str, figures: dict[str, Any]) -> str:
    """One figure in a table."""
    value = figures.get(name, "")
    if isinstance(value, str):
        return value
    ratio = figures.get(f"{name.removesuffix('_per_s')}_ratio")
    first = text(value) if ratio is None else f"{text(value)}  ({text(ratio)})"
    p95 = figures.get(f"{name}_p95")
    last = f"{text(figures[f'{name}_min'])}-{text(figures[f'{name}_max'])}"
    return f"{first}\n{last}" if p95 is None else f"{first}\n{last}, p95 {text(p95)}"


def text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
