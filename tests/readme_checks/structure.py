"""The form of a README: its headings, length, exercises and links."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from readme_checks.parsing import Problem, Readme, read_readme, repository_files, slugs

HEADINGS = [
    "What breaks",
    "The idea",
    "Using it",
    "Building it",
    "Run it",
    "Diff it",
    "What is still wrong",
    "Exercises",
    "Elsewhere",
    "Further reading",
]
# Sections in which <details> folds something other than an answer.
FOLDED = {"Building it", "What is still wrong", "Elsewhere"}
LINES = range(150, 651)
EXERCISES = range(3, 6)


def structure_problems(readme: Readme) -> Iterator[Problem]:
    """Where the README of a lesson deviates from the form of all."""
    if not readme.lesson:
        return
    if (lines := shown_lines(readme)) not in LINES:
        text = f"{lines} lines, not {LINES[0]} to {LINES[-1]}, without what is folded"
        yield readme.problem(len(readme.lines), text)
    if [heading.line for heading in readme.headings if heading.level == 1] != [1]:
        yield readme.problem(1, "a title, and only one, on line 1")
    sections = [heading.text for heading in readme.headings if heading.level == 2]
    if sections != HEADINGS:
        text = f"the headings ## are {'; '.join(sections)}; and should be {'; '.join(HEADINGS)}"
        yield readme.problem(1, text)
    yield from exercise_problems(readme)


def shown_lines(readme: Readme) -> int:
    """How many lines a reader has to go through who unfolds nothing."""
    shown = 0
    is_folded = False
    for line in readme.lines:
        is_folded = is_folded or line.startswith("<details")
        shown += not is_folded
        is_folded = is_folded and not line.rstrip().endswith("</details>")
    return shown


def exercise_problems(readme: Readme) -> Iterator[Problem]:
    section = ""
    exercises = []
    for heading in readme.headings:
        section = heading.text if heading.level <= 2 else section
        if section == "Exercises" and heading.level == 3:
            exercises.append(heading)
            if len(heading.answers) != 1:
                yield readme.problem(heading.line, f"{len(heading.answers)} <details>, not one")
        elif heading.answers and section not in FOLDED:
            where = " or ".join(sorted(FOLDED))
            text = f"<details> is for the answer of an exercise, or for more to read in {where}"
            yield readme.problem(heading.line, text)
    if len(exercises) not in EXERCISES:
        text = f"{len(exercises)} exercises, not {EXERCISES[0]} to {EXERCISES[-1]}"
        yield readme.problem(len(readme.lines), text)


def link_problems(readme: Readme) -> Iterator[Problem]:
    """Links within the repository that lead nowhere. Others are not followed."""
    files = set(repository_files(readme.root))
    directories = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    for link in readme.links:
        parts = urlsplit(link.target)
        if parts.scheme or parts.netloc:
            continue
        directory = posixpath.dirname(readme.name)
        path = posixpath.normpath(posixpath.join(directory, unquote(parts.path)))
        name = path if parts.path else readme.name
        if link.target.startswith("/"):
            yield readme.problem(link.line, f"{link.target} does not begin in this directory")
        elif name not in files | directories:
            yield readme.problem(link.line, f"{link.target}: there is no {name}")
        elif parts.fragment and not has_anchor(readme, name, unquote(parts.fragment)):
            yield readme.problem(link.line, f"{link.target}: {name} has no #{parts.fragment}")


def has_anchor(readme: Readme, name: str, anchor: str) -> bool:
    """Whether GitHub would find this place in a file."""
    if name.endswith(".md"):
        return anchor in slugs(readme if name == readme.name else read_readme(readme.root, name))
    if lines := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
        count = len((readme.root / name).read_text(encoding="utf-8").splitlines())
        return all(0 < int(number) <= count for number in lines.groups() if number)
    return False
