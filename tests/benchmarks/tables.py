"""Put the figures of a run into the README, and draw the chart: nothing there is typed by hand.

python tests/benchmarks/tables.py FIGURES.json [PEERS.json]

The files are from `run.py --json` and `peers.py --json`. What stands in the README between
<!-- NAME --> and <!-- end of NAME --> is replaced, where there are figures for it.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from benchmarks.report import text

README = Path(__file__).parent / "README.md"
SVG = Path(__file__).parent / "lessons.svg"
QUIET = 10  # percent
Figures = dict[str, Any]


def row(*cells: str) -> str:
    return "|".join(["", *(f" {cell} " if cell else " " for cell in cells), ""])


def head(*titles: str) -> list[str]:
    return [row(*titles), f"|{'---|' * len(titles)}"]


def value(figures: Figures, name: str, unit: str = "") -> str:
    return f"{text(figures[name])}{unit}" if name in figures else ""


def ranged(figures: Figures, name: str) -> str:
    """Median, minimum and maximum."""
    if name not in figures:
        return ""
    low, high = (text(figures[f"{name}_{end}"]) for end in ("min", "max"))
    return f"{text(figures[name])} ({low} to {high})"


def machine(about: Figures) -> Iterator[str]:
    """Where it was measured, and whether anything else ran there."""
    yield ""
    yield f"{report.where(about)}, {about['platform'].partition('-')[0]}."
    if about["busy_percent_before"] > QUIET:
        yield ""
        yield (
            f"**Something else was running** (the processors were busy for "
            f"{about['busy_percent_before']:.0f} % of the time before): these figures say little."
        )


def lessons(found: Figures) -> Iterator[str]:
    yield from head(
        *("", "tasks a second", "÷ bare, one by one", "÷ bare, in hundreds"),
        *("transactions a task", "statements a second when idle", "a task starts after"),
    )
    floor = found["floor"]
    name = "bare, one by one"
    yield row(name, ranged(floor, "noop_per_s"), "1", "", value(floor, "noop_tx_per_task"), "", "")
    name = "bare, in hundreds"
    cells = ranged(floor, "batched_per_s"), "", "1", value(floor, "batched_tx_per_task")
    yield row(name, *cells, "", "")
    for name, figures in found["lessons"].items():
        yield row(
            name,
            ranged(figures, "noop_per_s"),
            value(figures, "noop_of_floor"),
            value(figures, "noop_of_batched"),
            value(figures, "tx_per_task"),
            value(figures, "idle_statements_per_s"),
            value(figures, "start_ms", " ms"),
        )
    yield from machine(found)


def orders(found: Figures) -> Iterator[str]:
    titles = "orders a second", "÷ lesson 07", "transactions an order", "WAL an order", "one order"
    yield from head("", *titles)
    for name, figures in found["lessons"].items():
        if "orders_per_s" in figures:
            yield row(
                name,
                ranged(figures, "orders_per_s"),
                value(figures, "orders_of_07"),
                value(figures, "tx_per_order"),
                f"{figures['wal_bytes_per_order'] / 1000:.1f} kB",
                value(figures, "order_ms", " ms"),
            )


def growth(found: Figures) -> Iterator[str]:
    last = f"tasks a second, lesson {found['last_lesson']}"
    ratio = "÷ rate without such rows"
    yield from head("", last, ratio, "orders a second", ratio)
    for name, figures in found["growth"].items():
        number, _, rest = name.partition("_")
        title = f"{int(number):,} {rest}" if number.isdecimal() else name.replace("_", " ")
        yield row(
            title.replace("without", "without such rows").replace("1 processes", "1 process"),
            ranged(figures, "noop_per_s"),
            value(figures, "noop_of_without"),
            ranged(figures, "orders_per_s"),
            value(figures, "orders_of_without"),
        )


def enqueue(found: Figures) -> Iterator[str]:
    ratio = "÷ rate without notification"
    yield from head("producers", "tasks a second", "with a notification for each", ratio)
    for name, figures in found["enqueue"].items():
        yield row(
            name.removeprefix("producers_"),
            ranged(figures, "silent_per_s"),
            ranged(figures, "telling_per_s"),
            f"{figures['telling_per_s'] / figures['silent_per_s']:.2f}",
        )


def peers(found: Figures) -> Iterator[str]:
    last = max((name for name in found["peers"] if name.startswith("lesson ")), default="ours")
    ratio = f"{last} divided by it"
    yield from head("", "tasks a second", ratio, "orders a second", ratio)
    for name, figures in found["peers"].items():
        yield row(
            name,
            ranged(figures, "noop_per_s"),
            value(figures, "noop_times"),
            ranged(figures, "orders_per_s"),
            value(figures, "orders_times"),
        )
    for name, why in found["left_out"].items():
        yield row(name, f"not measured: {why}", "", "", "")
    yield ""
    versions = found["versions"].items()
    yield ", ".join(f"{package} {number or 'not installed'}" for package, number in versions) + "."
    yield from machine(found["about"])


TABLES: dict[str, Callable[[Figures], Iterator[str]]] = {
    "lessons": lessons,
    "orders": orders,
    "growth": growth,
    "enqueue": enqueue,
    "peers": peers,
}


def main(files: list[str]) -> None:
    if not files:
        sys.exit(__doc__)
    readme = README.read_text(encoding="utf-8")
    for file in files:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        for name, table in TABLES.items():
            if name in found or (name == "orders" and "lessons" in found):
                place = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
                lines = "\n".join(table(found))
                readme = re.sub(place, rf"\g<1>\n{lines}\n\g<2>", readme, flags=re.DOTALL)
        if "lessons" in found:
            from benchmarks import chart  # needs matplotlib

            chart.draw(SVG, found, found)
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
