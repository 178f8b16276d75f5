"""The command line, and the order in which things are measured."""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import MANY_TASKS, report, scaled
from benchmarks.book import Book
from benchmarks.growth import measure_growth
from benchmarks.measure import (
    measure_enqueue,
    measure_floor,
    measure_idle,
    measure_noop,
    measure_orders,
    measure_single,
    measure_variants,
)
from benchmarks.stage import Stage, database, open_stage
from lesson_loader import all_lessons, lesson_number
from shared import run

ROUNDS = scaled(9)
QUICK_ROUNDS = scaled(3)
GROWTH_ROUNDS = scaled(3)


def measurable() -> list[Path]:
    """The lessons that have a worker."""
    return [path for path in all_lessons() if (path / "worker.py").exists()]


(FLOOR,) = (path for path in measurable() if lesson_number(path) == 3)


async def measure_round(book: Book, floor: Stage, stages: list[Stage]) -> None:
    """Each thing once: noise that lasts longer than that hits all alike."""
    await measure_floor(book, floor)
    await measure_variants(book, floor)
    await measure_single(book, floor)
    for stage in stages:
        prefix = f"lessons.{stage.number:02}"
        await measure_floor(book, floor)
        await stage.clear()
        await measure_noop(book, prefix, stage, MANY_TASKS)
        await stage.clear()
        await measure_enqueue(book, prefix, stage, scaled(500))
        if stage.number >= 7:
            await stage.clear()
            await measure_orders(book, prefix, stage, scaled(1000))


async def measure_latencies(book: Book, stages: list[Stage], count: int) -> None:
    """All lessons at once, since their workers are idle nearly all of the time."""
    for task_name, first_lesson in {"moment": 2, "order": 7}.items():
        async with asyncio.TaskGroup() as group:
            for stage in stages:
                if stage.number >= first_lesson:
                    prefix = f"lessons.{stage.number:02}"
                    group.create_task(measure_idle(book, prefix, stage, count, task_name))


async def measure_all(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where and on what it was measured, and the figures."""
    book, growth = Book(), Book()
    async with AsyncExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stages = {}
        for path in sorted({FLOOR, *options.lesson}):
            # Copies, so that the lessons may be worked on meanwhile.
            copy = shutil.copytree(path, place / path.name)
            stages[path] = await stack.enter_async_context(open_stage(copy))
        floor, chosen = stages[FLOOR], [stages[path] for path in options.lesson]
        rounds = QUICK_ROUNDS if options.quick else ROUNDS
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}")
            await measure_round(book, floor, chosen)
        say("latencies")
        await measure_latencies(book, chosen, scaled(15 if options.quick else 50))
        last = chosen[-1]
        for number in range(1, 1 if options.quick else GROWTH_ROUNDS + 1):
            say(f"growth, round {number} of {GROWTH_ROUNDS}, lesson {last.number:02}")
            await measure_growth(growth, floor, last)
        about, figures = await report.about(floor), report.figures(book)
        return about, figures if options.quick else figures | {"growth": report.figures(growth)}


async def measure(options: argparse.Namespace) -> None:
    """Measure, and show and write the figures."""
    with database():
        about, figures = await measure_all(options)
    report.show_all(about, figures)
    if options.svg:
        from benchmarks import chart

        chart.draw(options.svg, about, figures)
    if options.json:
        options.json.write_text(json.dumps(about | figures, indent=2) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Tell how far it has come."""
    print(text, file=sys.stderr, flush=True)


def lesson(text: str) -> Path:
    """The directory of the lesson with this number."""
    for path in measurable():
        if text.isdecimal() and lesson_number(path) == int(text):
            return path
    raise argparse.ArgumentTypeError(f"{text!r} is not the number of a lesson with a worker")


def file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path


def main(description: str | None) -> None:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="leave out how cost grows")
    parser.add_argument("--json", type=file, metavar="FILE", help="write the figures to it")
    parser.add_argument("--svg", type=file, metavar="FILE", help="draw a chart")
    parser.add_argument("--lesson", type=lesson, nargs="+", metavar="NN", help="only these")
    options = parser.parse_args()
    if options.svg and not find_spec("matplotlib"):
        sys.exit("--svg needs matplotlib: pip install -e '.[benchmark]'")
    options.lesson = sorted(set(options.lesson or measurable()))
    run(measure(options))
