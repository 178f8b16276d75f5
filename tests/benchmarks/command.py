"""The command line, and the order in which things are measured."""

import argparse
import json
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import report, scaled
from benchmarks.enqueue import FIRST_TELLING, measure_enqueue
from benchmarks.growth import PILES, measure_growth, measure_piles, pile_up
from benchmarks.measure import (
    Book,
    measure_floors,
    measure_idle,
    measure_latency,
    measure_rates,
)
from benchmarks.stage import Stage, database, open_stage
from lesson_loader import all_lessons, lesson_number
from shared import run

ROUNDS = scaled(5)
QUICK_ROUNDS = scaled(3)
GROWTH_ROUNDS = scaled(3)
LATENCIES = scaled(20)


def measurable() -> list[Path]:
    """The lessons that have a worker."""
    return [path for path in all_lessons() if (path / "worker.py").exists()]


# Whose bare statements are the floors.
(THIRD,) = (path for path in measurable() if lesson_number(path) == 3)
LATEST = measurable()[-1]


async def measure_all(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where and on what it was measured, and the figures."""
    book = Book(list)
    async with AsyncExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        async def stage(path: Path, prefix: str = "10") -> Stage:
            # A copy, so that the lesson may be worked on meanwhile, in a schema of its own.
            copy = shutil.copytree(path, place / f"{prefix}{path.name}")
            return await stack.enter_async_context(open_stage(lesson_number(path), copy))

        floors = await stage(THIRD, "20"), await stage(LATEST, "20")
        stages = [await stage(path) for path in options.lesson]
        about = report.about(stages[-1])
        await measure_lessons(book, floors, stages, options.quick)
        if not options.quick:
            piles = {
                name: await stage(options.lesson[-1], str(30 + number))
                for number, (name, (first_lesson, _)) in enumerate(PILES.items())
                if stages[-1].number >= first_lesson
            }
            await measure_last(book, stages[-1], piles)
    return about, report.figures(book)


async def measure_lessons(
    book: Book, floors: tuple[Stage, Stage], stages: list[Stage], is_quick: bool
) -> None:
    """What is measured of each lesson."""
    lessons = {f"lessons.{stage.number:02}": stage for stage in stages}
    rounds = QUICK_ROUNDS if is_quick else ROUNDS
    share = 2 if is_quick else 1
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}")
        await measure_floors(book, *floors, share)
        for prefix, stage in lessons.items():
            await stage.clear()
            await measure_rates(book, prefix, stage, share)
    say("latencies, and what idle workers do")
    for prefix, stage in lessons.items():
        await measure_latency(book, prefix, stage, max(1, LATENCIES // share))
    await measure_idle(book, lessons)


async def measure_last(book: Book, stage: Stage, piles: dict[str, Stage]) -> None:
    """How cost grows, which is measured of the last lesson only."""
    say(f"lesson {stage.number:02}: a million rows of each kind")
    for name, pile in piles.items():
        await pile_up(pile, PILES[name][1])
    for number in range(1, GROWTH_ROUNDS + 1):
        say(f"growth, round {number} of {GROWTH_ROUNDS}")
        await measure_piles(book, stage, piles)
        await measure_growth(book, stage)
        if stage.number >= FIRST_TELLING:
            await measure_enqueue(book, stage)


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
    """The directory of the lesson with this number, or a reader's own lesson."""
    for path in measurable():
        if text.isdecimal() and lesson_number(path) == int(text):
            return path
    path = Path(text).resolve()
    if (path / "worker.py").exists() and path.name[:1].isdecimal():
        return path
    raise argparse.ArgumentTypeError(f"{text!r} is not the number of a lesson with a worker")


def file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory")
    return path


def main(description: str | None) -> None:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="leave out how cost grows")
    parser.add_argument("--json", type=file, metavar="FILE", help="write the figures to it")
    parser.add_argument("--svg", type=file, metavar="FILE", help="draw a chart")
    parser.add_argument(
        "--lesson", type=lesson, nargs="+", metavar="NN", help="only these; numbers, or directories"
    )
    options = parser.parse_args()
    if options.svg and not find_spec("matplotlib"):
        sys.exit("--svg needs matplotlib: pip install -e '.[benchmark]'")
    options.lesson = sorted(set(options.lesson or measurable()), key=lesson_number)
    if len(set(map(lesson_number, options.lesson))) < len(options.lesson):
        sys.exit("--lesson: two of these have one number; measure them one after the other")
    run(measure(options))
