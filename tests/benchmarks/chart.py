"""The chart "what each lesson buys", from the figures of one run; needs matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found, unused-ignore]
from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

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
        figure = Figure(figsize=(9, 1.6 + 0.6 * len(lessons)), layout="constrained")
        rates, delays = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        draw_rates(rates, lessons, figures["floor"])
        draw_delays(delays, lessons)
        rates.set_yticks(range(len(lessons)), [f"{name}: {BUYS[name]}" for name in lessons])
        rates.invert_yaxis()
        for axes in (rates, delays):
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        figure.suptitle("What each lesson buys, and at what price", weight="bold")
        figure.supxlabel(caption(about, lessons), fontsize=8.5)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def draw_rates(axes: Any, lessons: dict[str, Any], floor: dict[str, Any]) -> None:
    """Bars for the no-op rates, lines below them for their ranges, and one for the floor."""
    for row, figures in enumerate(lessons.values()):
        rate, low, high = (figures[f"noop_per_s{end}"] for end in ("", "_min", "_max"))
        axes.barh(row, rate, height=0.6, color=BAR)
        axes.plot([low, high], [row + 0.4, row + 0.4], color=INK, linewidth=1.5)
        axes.text(0, row, f" {rate:,.0f}", color="white", va="center", weight="bold")
    axes.axvline(floor["noop_per_s"], color=FLOOR, linestyle="--")
    label = f"the same statements\nwithout a worker: {floor['noop_per_s']:,.0f}"
    axes.annotate(
        label,
        (floor["noop_per_s"], 1),
        xycoords=("data", "axes fraction"),
        color=FLOOR,
        ha="center",
        va="bottom",
        fontsize=8.5,
    )
    axes.set_xlim(left=0)
    axes.set_xlabel("no-op tasks a second, one worker\n(median, minimum to maximum)")


def draw_delays(axes: Any, lessons: dict[str, Any]) -> None:
    """Points for the median delay of a task, and lines to the 95th percentile."""
    for row, figures in enumerate(lessons.values()):
        low, high = figures["start_ms_min"], figures["start_ms_p95"]
        axes.plot([low, high], [row, row], color=INK, linewidth=1.5)
        axes.plot(figures["start_ms"], row, "o", color=BAR)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms until an idle worker starts a task\n(median, minimum to p95)")


def caption(about: dict[str, Any], lessons: dict[str, Any]) -> str:
    """The orders of the last lesson, and where it was measured."""
    versions = f"Python {about['python']}, psycopg {about['psycopg']}, Postgres {about['postgres']}"
    where = f"{about['cores']} cores ({about['cpu']}), {versions}, {about['date'][:10]}"
    last, orders = max(lessons.items())
    if "orders_per_s" not in orders:
        return where
    return (
        f"{last} also runs {orders['orders_per_s']:,.0f} durable orders of two steps a second, "
        f"each in {orders['tx_per_order']:.1f} transactions; a single one takes "
        f"{orders['order_ms']:.0f} ms.\n{where}"
    )
