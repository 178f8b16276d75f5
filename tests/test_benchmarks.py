"""The benchmark runs; its figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parent / "benchmarks" / "run.py"


def test_the_benchmark_has_its_figures(database: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command: list[str | Path] = [sys.executable, RUN, "--quick", "--lesson", "7", "--json", file]
    environment = os.environ | {"BENCHMARK_SCALE": "0.002"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["floor"]["noop_per_s"] > 0
    lesson = figures["lessons"]["07"]
    for name in ["noop_per_s", "start_ms", "orders_per_s", "order_ms"]:
        assert 0 < lesson[f"{name}_min"] <= lesson[name] <= lesson[f"{name}_max"]
    # Less is impossible: a task is completed by a transaction of its own, an order has two steps.
    assert lesson["tx_per_task"] > 1
    assert lesson["statements_per_task"] > 1
    assert lesson["tx_per_order"] > 3
