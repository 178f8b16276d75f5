"""Little programs and lesson directories for the tests of `shared`."""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

DEADLINE = 60.0  # seconds; generous, since it is only ever reached by a test that fails


@dataclass
class Outcome:
    """How a program ended and what it wrote."""

    status: int
    stdout: str
    stderr: str

    def sole_error_line(self) -> str:
        """The one line on stderr of a program that ended with status 1."""
        assert self.status == 1, self
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        return lines[0]


def small_lesson(directory: Path, schema: str = "CREATE TABLE notes (note TEXT);\n") -> Path:
    """A lesson's directory with a schema.sql and a queries.sql."""
    path = directory / "07-small"
    path.mkdir(parents=True)
    (path / "schema.sql").write_text(schema, encoding="utf-8")
    (path / "queries.sql").write_text("-- name: one()^\nSELECT 1 AS one;\n", encoding="utf-8")
    return path


def start_program(
    code: str, *arguments: str | Path, database_url: str | None = None
) -> subprocess.Popen[str]:
    """Start a Python program that has imported all of `shared`, and asyncio and sys."""
    program = f"import asyncio, sys\nfrom shared import *\n{textwrap.dedent(code)}"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | ({"DATABASE_URL": database_url} if database_url else {}),
        stdin=subprocess.PIPE,  # ends when the test says so; pytest's own is at its end already
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a program to end."""
    try:
        stdout, stderr = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Outcome(process.returncode, stdout, stderr)


def run_program(code: str, *arguments: str | Path, database_url: str | None = None) -> Outcome:
    """start_program, and wait for it to end."""
    return outcome(start_program(code, *arguments, database_url=database_url))
