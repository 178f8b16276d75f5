"""The command line, and the order in which things are measured."""

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks import report
from benchmarks.measure import (
    Book,
    measure_enqueue,
    measure_floor,
    measure_idle,
    measure_noop,
    measure_orders,
)
from benchmarks.stage import CONNECTIONS, Stage, database, open_stage
from lesson_loader import all_lessons, lesson_number
from shared import run

ROUNDS = 5
# For the test of this program, which wants to see it run, not its figures.
SCALE = float(os.environ.get("BENCHMARK_SCALE", "1"))


def scaled(count: int) -> int:
    return max(2, int(count * SCALE))


async def measure_round(book: Book, stages: list[Stage]) -> None:
    """Each thing once: noise that lasts longer than that hits all alike."""
    first, last = stages[0], stages[-1]
    tasks = scaled(5000)
    await measure_floor(book, first, tasks, "noop_per_s", CONNECTIONS)
    await measure_floor(book, first, tasks, "noop_per_s_1_connection", 1)
    await measure_floor(book, last, tasks, f"noop_per_s_{last.number:02}", CONNECTIONS)
    for stage in stages:
        await measure_noop(book, stage, tasks)
        await measure_enqueue(book, stage, scaled(500))
        if stage.number >= 7:
            await measure_orders(book, stage, scaled(1000))


async def measure_latencies(book: Book, stages: list[Stage], count: int) -> None:
    """All lessons at once, since their workers are idle nearly all of the time."""
    async with asyncio.TaskGroup() as group:
        for stage in stages:
            group.create_task(measure_idle(book, stage, count, "moment", stage.number))
    for stage in stages:
        if stage.number >= 7:
            await measure_idle(book, stage, count, "order", stage.number)


async def measure(options: argparse.Namespace) -> None:
    book = Book(list)
    with database():
        async with AsyncExitStack() as stack:
            # A copy, so that the lessons may be worked on meanwhile.
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            paths = [shutil.copytree(path, place / path.name) for path in options.lesson]
            stages = [await stack.enter_async_context(open_stage(path)) for path in paths]
            about = await report.about(stages[0])
            for number in range(1, ROUNDS + 1):
                print(f"round {number} of {ROUNDS}", file=sys.stderr, flush=True)
                await measure_round(book, stages)
            print("latencies", file=sys.stderr, flush=True)
            await measure_latencies(book, stages, scaled(15 if options.quick else 50))
    figures = report.figures(book)
    report.show(figures)
    if options.json:
        options.json.write_text(json.dumps(about | figures, indent=2) + "\n", encoding="utf-8")


def lesson(text: str) -> Path:
    """The directory of the lesson with this number."""
    for path in measurable():
        if text.isdecimal() and lesson_number(path) == int(text):
            return path
    raise argparse.ArgumentTypeError(f"{text!r} is not the number of a lesson with a worker")


def measurable() -> list[Path]:
    return [path for path in all_lessons() if (path / "worker.py").exists()]


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
    options.lesson = sorted(set(options.lesson or measurable()))
    run(measure(options))
