"""The benchmark runs; its figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.peer.command import figures
from lesson_loader import all_lessons, lesson_number

BENCHMARKS = Path(__file__).parent / "benchmarks"
LAST = max(map(lesson_number, all_lessons()))


def run(program: str, *arguments: str | Path) -> None:
    subprocess.run(
        [sys.executable, BENCHMARKS / program, *arguments],
        env=os.environ | {"BENCHMARK_SCALE": "0.002"},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def check_table(table: list[str]) -> None:
    """Markdown, in which all rows have as many cells."""
    rows = [line for line in table if line.startswith("|")]
    assert len(rows) > 2
    assert len({line.count("|") for line in rows}) == 1


def check_range(figures: dict[str, Any], name: str) -> None:
    assert 0 < figures[f"{name}_min"] <= figures[name] <= figures[f"{name}_max"]


def test_the_benchmark_has_its_figures(database: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    # The first that has a worker, the first with durable tasks, and the last.
    run("run.py", "--quick", "--lesson", "2", "7", str(LAST), "--json", file)
    found = json.loads(file.read_text(encoding="utf-8"))
    check_range(found["floor"], "noop_per_s")
    check_range(found["floor"], "batched_per_s")
    # Else it would not be the one in hundreds.
    assert found["floor"]["batched_statements_per_task"] < 1 < found["floor"]["noop_tx_per_task"]
    assert list(found["lessons"]) == ["02", "07", f"{LAST:02}"]
    for number, lesson in found["lessons"].items():
        names = ["noop_per_s", "noop_of_floor", "noop_of_batched", "noop_of_07", "start_ms"]
        if number >= "07":
            names += ["orders_per_s", "orders_of_07", "order_ms"]
            assert lesson["tx_per_order"] > 0
        if number in ("02", "07"):
            # Less is impossible: a task is completed by a transaction of its own.
            assert lesson["tx_per_task"] > 1
            assert lesson["statements_per_task"] > 1
        for name in names:
            check_range(lesson, name)
        assert lesson["idle_statements_per_s"] >= 0
    check_table(list(tables.lessons(found)))
    check_table(list(tables.orders(found)))


def test_the_last_lesson_races_as_one_of_the_peers(database: str, tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    run("peers.py", "--rounds", "1", "--only", f"lesson {LAST:02}", "--json", file)
    found = json.loads(file.read_text(encoding="utf-8"))
    (lesson,) = found["peers"].values()
    check_range(lesson, "noop_per_s")
    check_range(lesson, "orders_per_s")
    check_table(list(tables.peers(found)))


def test_peers_are_compared_round_by_round() -> None:
    book: Any = {
        "lesson 07": {"noop_per_s": [1.0, 1.0, 1.0]},
        "lesson 16": {"noop_per_s": [10.0, 100.0, 1000.0], "orders_per_s": [6.0]},
        "other": {"noop_per_s": [5.0, 20.0, 2000.0], "orders_per_s": [2.0]},
    }
    other = figures(book)["other"]
    assert (other["noop_times_min"], other["noop_times"], other["noop_times_max"]) == (0.5, 2, 5)
    assert other["orders_times"] == 3
    assert "noop_times" not in figures(book)["lesson 16"]


def test_a_directory_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--json", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"{tmp_path} is a directory" in result.stderr
