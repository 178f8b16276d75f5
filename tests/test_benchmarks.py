"""The benchmark runs; its figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parent / "benchmarks" / "run.py"

# The first that has a worker, the first with durable tasks, and the last.
LESSONS = ["2", "7", "10"]


def test_the_benchmark_has_its_figures(database: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(RUN), "--quick", "--lesson", *LESSONS, "--json", str(file)]
    environment = os.environ | {"BENCHMARK_SCALE": "0.002"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["floor"]["noop_per_s"] > 0
    assert list(figures["lessons"]) == ["02", "07", "10"]
    for number, lesson in figures["lessons"].items():
        names = ["noop_per_s", "start_ms"]
        if number >= "07":
            names += ["orders_per_s", "order_ms"]
            assert lesson["tx_per_order"] > 3  # it has two steps
        for name in names:
            assert 0 < lesson[f"{name}_min"] <= lesson[name] <= lesson[f"{name}_max"]
        # Less is impossible: a task is completed by a transaction of its own.
        assert lesson["tx_per_task"] > 1
        assert lesson["statements_per_task"] > 1
