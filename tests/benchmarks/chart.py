"""The chart "what each lesson buys", from the figures of one run; needs matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found, unused-ignore]
from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

from benchmarks.report import where

BUYS = {
    "02": "tasks outlive the program\nthat enqueued them",
    "03": "no more run at once\nthan a worker can bear",
    "04": "tasks outlive their worker;\nretries, timeouts, priorities",
    "05": "a log of what was done,\nwritten by the owner only",
    "06": "a function that changed\nmeanwhile is caught",
    "07": "functions of several steps\ngo on where they were",
    "08": "workers outlive a database\nthat goes away",
    "09": "workers that are told to end\nleave nobody waiting",
    "10": "no function can stop\na worker",
    "11": "workers are told,\nand need not ask",
    "12": "a sleep outlives\nits worker",
    "13": "who only waits\nholds no slot",
    "14": "something outside\ncan end a wait",
    "15": "a log can go on\nfrom its middle",
    "16": "many outcomes and steps\nin one statement",
}
# Readable on white and on black.
INK, BAR, FLOOR = "#7d858f", "#3f8fd2", "#d9822b"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "what each lesson buys",  # the same ids each time
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw(path: Path, about: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write the chart to a file."""
    lessons = figures["lessons"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 2.6 + 0.5 * len(lessons)), layout="constrained")
        noops, orders, delays = figure.subplots(1, 3, sharey=True, width_ratios=[3, 2, 2])
        draw_rates(noops, lessons, "noop_per_s", right_of=figures["floor"]["noop_per_s"])
        draw_floors(noops, figures["floor"])
        draw_rates(orders, lessons, "orders_per_s")
        draw_delays(delays, lessons)
        noops.set_xlabel("no-op tasks a second\n(median, minimum to maximum)")
        orders.set_xlabel("orders of two steps a second\n(median, minimum to maximum)")
        labels = [f"{name}: {BUYS.get(name, '')}" for name in lessons]
        noops.set_yticks(range(len(lessons)), labels)
        noops.invert_yaxis()
        for axes in (noops, orders, delays):
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        figure.suptitle("What each lesson buys, and at what price: one worker", weight="bold")
        figure.supxlabel(where(about), fontsize=8.5)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def draw_rates(axes: Any, lessons: dict[str, Any], name: str, right_of: float = 1) -> None:
    """A bar for each rate, a line below it for its range, and the rates in a column beside them."""
    highest = max(right_of, *(figures.get(f"{name}_max", 1) for figures in lessons.values()))
    for row, figures in enumerate(lessons.values()):
        if name in figures:
            rate, low, high = (figures[f"{name}{end}"] for end in ("", "_min", "_max"))
            axes.barh(row, rate, height=0.6, color=BAR)
            axes.plot([low, high], [row + 0.4, row + 0.4], color=INK, linewidth=1.5)
            axes.text(1.08 * highest, row, f"{rate:,.0f}", va="center", fontsize=9)
    axes.set_xlim(0, 1.3 * highest)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def draw_floors(axes: Any, floor: dict[str, Any]) -> None:
    """A line for each: the same statements without a worker."""
    for name, label in {"noop_per_s": "one by one", "batched_per_s": "in hundreds"}.items():
        axes.axvline(floor[name], color=FLOOR, linestyle="--", linewidth=1, zorder=0)
        axes.annotate(
            f"bare statements,\n{label}: {floor[name]:,.0f}",
            (floor[name], 1),
            xycoords=("data", "axes fraction"),
            color=FLOOR,
            ha="center",
            va="bottom",
            fontsize=8.5,
        )
    axes.set_xlim(right=max(axes.get_xlim()[1], 1.1 * floor["batched_per_s"]))


def draw_delays(axes: Any, lessons: dict[str, Any]) -> None:
    """Points for the medians on an idle worker, and lines to the 95th percentile."""
    for name, marker, color, label in [
        ("start_ms", "o", BAR, "until a task starts"),
        ("order_ms", "D", FLOOR, "one order, all of it"),
    ]:
        rows = [row for row, figures in enumerate(lessons.values()) if name in figures]
        found = [figures for figures in lessons.values() if name in figures]
        axes.plot([figures[name] for figures in found], rows, marker, color=color, label=label)
        for row, figures in zip(rows, found, strict=True):
            ends = [figures[f"{name}_min"], figures.get(f"{name}_p95", figures[name])]
            axes.plot(ends, [row, row], color=color, linewidth=1.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("ms on an idle worker\n(median, minimum to p95)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=8.5)
