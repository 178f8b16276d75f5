"""Loading a lesson's modules, whose names are the same in every lesson."""

import importlib
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

LESSONS = Path(__file__).resolve().parent.parent / "lessons"


class Lesson:
    """A lesson's directory with its modules as attributes: lesson.worker, lesson.models, ..."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.number = lesson_number(path)
        self.modules = load_modules(path)

    def __getattr__(self, name: str) -> Any:
        # Only called for what __init__ has not set.
        if name in self.modules:
            return self.modules[name]
        raise AttributeError(f"lesson {self.name} has no {name}.py")


def lesson_number(path: Path) -> int:
    """The number that a lesson's directory begins with; raises ValueError if there is none."""
    number = re.match(r"[0-9]+", path.name)
    if not number:
        raise ValueError(f"{path} does not begin with a lesson's number, as in 07-my-copy")
    return int(number[0])


def all_lessons() -> list[Path]:
    return sorted(LESSONS.glob("[0-9][0-9]-*"))


LAST = lesson_number(all_lessons()[-1])


def load_modules(path: Path) -> dict[str, ModuleType]:
    """Import all modules of a lesson anew, and leave no trace of them in sys.modules."""
    files = sorted(path.glob("*.py"))
    names = [file.stem for file in files if file.stem.isidentifier()]  # not what editors leave
    with without_modules(names), compiling_once():
        sys.path.insert(0, str(path))
        try:
            return {name: importlib.import_module(name) for name in names}
        finally:
            sys.path.remove(str(path))


# Deleted at the end of the process.
CACHE = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)


@contextmanager
def compiling_once() -> Iterator[None]:
    """Within this block what is compiled is kept, but not in the directories of the lessons.

    A lesson is loaded for each of its tests, and to compile it takes longest.
    """
    before = sys.pycache_prefix, sys.dont_write_bytecode
    sys.pycache_prefix, sys.dont_write_bytecode = CACHE.name, False
    try:
        yield
    finally:
        sys.pycache_prefix, sys.dont_write_bytecode = before


@contextmanager
def without_modules(names: list[str]) -> Iterator[None]:
    """Within this block no modules of these names are loaded; afterwards those of before."""
    importlib.invalidate_caches()
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
