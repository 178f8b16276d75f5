"""Half a minute of chaos. The long form: python tests/chaos/run.py --minutes 20"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lesson_loader import LAST, all_lessons

RUN = Path(__file__).parent / "chaos" / "run.py"


@pytest.mark.long
@pytest.mark.since(7)
@pytest.mark.only(LAST)  # test_crash_only.py is for lesson 07
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot stop a process")
def test_no_crash_loses_or_repeats_a_step_of_an_order(lesson: Any) -> None:
    """The environment variable CHAOS_SEED gives the faults of an earlier run again.

    In lesson 07 the workers are crash-only: that somebody starts them again is all they need.
    """
    seed = os.environ.get("CHAOS_SEED") or str(random.randrange(1_000_000))
    command = [sys.executable, RUN, "--seed", seed, "--lesson", lesson.path]
    if lesson.number == 7:  # each outage costs INACTIVE_AFTER
        command += ["--orders", "60"]
    # If this test is interrupted, it must not kill the program: that ends its workers.
    chaos = subprocess.Popen(command, start_new_session=True)
    try:
        status = chaos.wait()
    finally:
        chaos.terminate()
        chaos.wait()
    assert status == 0, f"CHAOS_SEED={seed} gives the same faults again"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lesson", "lessons"],
        ["--lesson", all_lessons()[2]],
        ["--workers", "0"],
        ["--inactive-after", "0"],
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments: list[str | Path]) -> None:
    result = subprocess.run([sys.executable, RUN, *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert "run.py: error: " in result.stderr
