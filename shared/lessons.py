"""Where the lessons are."""

import os
import re
from pathlib import Path

LESSONS = Path(__file__).resolve().parent.parent / "lessons"


def all_lessons() -> list[Path]:
    """The lessons' directories, in their order."""
    return sorted(LESSONS.glob("[0-9][0-9]-*"))


def find_lesson(name: str) -> Path:
    """The directory of a lesson, by its number or by a path to it or to a copy.

    Raises SystemExit with one line if there is none.
    """
    if name.isdecimal():
        found = next(iter(LESSONS.glob(f"{int(name):02}-*")), None)
        if found is None:
            last = all_lessons()[-1].name[:2] if all_lessons() else "none"
            raise SystemExit(f"There is no lesson {name}; the last one is {last}.")
        return found
    path = Path(name)
    # Not with Path.is_dir, which may raise: for a name that is too long, or where one may not look.
    if not os.path.isdir(path):
        raise SystemExit(f"There is no directory {name}.")
    if not os.access(path, os.R_OK | os.X_OK):
        raise SystemExit(f"The directory {name} may not be read.")
    if not re.match("[0-9]", path.resolve().name):
        raise SystemExit(
            f"{path.resolve().name}: the name of a lesson's directory must begin with its number, "
            "as in 07-my-copy."
        )
    return path.resolve()
