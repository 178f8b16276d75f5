"""What is new in a lesson: every new function and statement stands whole in its README."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from readme_checks.parsing import Problem, Readme, lesson_readme_names

# The demo, the rows and the exceptions are shown as far as the text needs them.
NOT_SHOWN = {"main.py", "models.py", "errors.py"}
STATEMENT = re.compile(r"-- name: (\w+)[^\n]*\n(?:--[^\n]*\n)*(.*?;)", re.DOTALL)


def whole_problems(readme: Readme) -> Iterator[Problem]:
    """The functions and statements that the lesson before does not have, and no block shows."""
    if not readme.lesson:
        return
    names = lesson_readme_names(readme.root)
    before = names[: names.index(readme.name)][-1:]
    known = units(readme.root / Path(before[0]).parent) if before else {}
    shown = flat("\n".join(line for block in readme.blocks for line in block.lines))
    for name, text in units(readme.root / readme.lesson).items():
        if name not in known and text not in shown:
            yield readme.problem(1, f"{name} is new in this lesson, and stands nowhere whole")


def units(lesson: Path) -> dict[str, str]:
    """The functions and statements of a lesson by their names, white space made single."""
    found = {}
    for path in sorted(lesson.glob("*.py")):
        if path.name in NOT_SHOWN:
            continue
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.name}: {node.name}"
                found[name] = flat(ast.get_source_segment(source, node) or "")
    queries = lesson / "queries.sql"
    if queries.exists():
        for statement in STATEMENT.finditer(queries.read_text(encoding="utf-8")):
            found[f"queries.sql: {statement[1]}"] = flat(statement[2])
    return found


def flat(text: str) -> str:
    return " ".join(text.split())
