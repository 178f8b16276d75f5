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

import psutil  # type: ignore[import-untyped]
import psycopg
from rich import box
from rich.console import Console
from rich.table import Column, Table

from benchmarks.measure import Book
from benchmarks.stage import Stage
from shared import database_url

# What a lesson's rates are compared with, round by round.
RATIOS = {
    "noop_of_floor": ("noop_per_s", "floor.noop_per_s"),
    "noop_of_batched": ("noop_per_s", "floor.batched_per_s"),
    "noop_of_07": ("noop_per_s", "lessons.07.noop_per_s"),
    "orders_of_07": ("orders_per_s", "lessons.07.orders_per_s"),
}
# What is compared with the same without such rows.
PILES = ("_finished", "_sleepers", "_suspended")
GROWN = ("noop_per_s", "orders_per_s")
COSTS = ("_per_task", "_per_order")
OF_A_FIGURE = ("_min", "_max", "_p95")
# Without a terminal rich would assume a narrow one.
CONSOLE = Console(width=None if sys.stdout.isatty() else 220)


def about(stage: Stage) -> dict[str, Any]:
    """When and on what this is measured."""
    return {"last_lesson": f"{stage.number:02}", **machine()}


def machine() -> dict[str, Any]:
    """The date, the machine, and how busy it is with other things; and the server."""
    with psycopg.connect(database_url()) as conn:
        postgres, fsync = (
            conn.execute(f"SHOW {name}".encode()).fetchone() for name in ("server_version", "fsync")
        )
    assert postgres
    assert fsync
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "busy_percent_before": psutil.cpu_percent(interval=1),
        "cpu": cpu(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "psycopg": version("psycopg"),
        "postgres": postgres[0],
        "fsync": fsync[0],
    }


def where(about: dict[str, Any]) -> str:
    """On what it was measured, and when."""
    return (
        f"{about['cores']} cores ({about['cpu']}), Python {about['python']}, "
        f"psycopg {about['psycopg']}, Postgres {about['postgres']} with fsync {about['fsync']}, "
        f"{about['date'][:10]}"
    )


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
    for path, values in (book | ratios(book)).items():
        *parents, name = path.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place.update(summary(name, values))
    return found


def ratios(book: Book) -> dict[str, list[float]]:
    """What rates are of others that were measured in the same round."""
    found = {}
    for path, values in book.items():
        parent, _, name = path.rpartition(".")
        if parent.startswith("lessons."):
            for ratio, (numerator, denominator) in RATIOS.items():
                if name == numerator and denominator in book:
                    found[f"{parent}.{ratio}"] = divided(values, book[denominator])
        elif parent.endswith(PILES) and name in GROWN:
            ratio = f"{name.removesuffix('_per_s')}_of_without"
            found[f"{parent}.{ratio}"] = divided(values, book[f"growth.without.{name}"])
    return found


def divided(values: list[float], by: list[float]) -> list[float]:
    return [value / base for value, base in zip(values, by, strict=True)]


def summary(name: str, values: list[float]) -> Iterator[tuple[str, float]]:
    """Median, minimum and maximum; of latencies also the 95th percentile."""
    yield name, short(statistics.median(values))
    yield f"{name}_min", short(min(values))
    yield f"{name}_max", short(max(values))
    if name.endswith("_ms") and len(values) > 1:
        p95 = statistics.quantiles(values, n=20, method="inclusive")[-1]
        yield f"{name}_p95", short(p95)


def short(value: float) -> float:
    """Five digits are more than any of these is good for."""
    return float(f"{value:.5g}")


def show_all(about: dict[str, Any], figures: dict[str, Any]) -> None:
    """Print all tables."""
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("each figure: median, and below it minimum-maximum")
    show("bare statements", {"": figures["floor"]}, costs=False)
    show("lesson", figures["lessons"])
    for title in ("growth", "enqueue"):
        if title in figures:
            title_and_lesson = f"{title}, lesson {about['last_lesson']}"
            show(title_and_lesson, figures[title], by_rows=True, costs=False)


def names(cases: Iterable[dict[str, Any]], costs: bool) -> list[str]:
    """The names of the figures themselves, in the order of their first appearance."""
    found = dict.fromkeys(name for figures in cases for name in figures)
    without = OF_A_FIGURE if costs else OF_A_FIGURE + COSTS
    return [name for name in found if not name.endswith(without)]


def show(
    title: str, cases: dict[str, dict[str, Any]], by_rows: bool = False, costs: bool = True
) -> None:
    """Print a table: a column for each case, or a row."""
    across, down = list(cases), names(cases.values(), costs)
    if by_rows:
        across, down = down, across
    table = Table(Column(title, no_wrap=True), *across, box=box.SIMPLE_HEAD)
    for row in down:
        cells = [(row, column) if by_rows else (column, row) for column in across]
        table.add_row(row, *(cell(name, cases[case]) for case, name in cells))
    CONSOLE.print(table)


def cell(name: str, figures: dict[str, Any]) -> str:
    """One figure in a table."""
    if name not in figures:
        return ""
    range = f"{text(figures[f'{name}_min'])}-{text(figures[f'{name}_max'])}"
    p95 = figures.get(f"{name}_p95")
    return f"{text(figures[name])}\n{range}" + ("" if p95 is None else f", p95 {text(p95)}")


def text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
