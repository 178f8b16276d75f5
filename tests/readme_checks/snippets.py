"""Blocks of code and diffs: they stand in the files, line by line, or are listed as exceptions."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from readme_checks.parsing import (
    OMISSION,
    Block,
    Problem,
    Readme,
    lesson_readme_names,
    repository_files,
    without_blank_ends,
)

CODE = {"sql", "python", "yaml", "toml"}
MARKS = {
    **{kind: {"", "wrong", "typed"} for kind in CODE},
    "console": {"", "unordered", "no-run"},
    "diff": {""},
    "mermaid": {""},
    "text": {""},
    "": {""},
}
LEDGER = Path(__file__).with_name("unchecked_blocks.txt")

Piece = list[str]


def snippet_problems(readme: Readme) -> Iterator[Problem]:
    """What is wrong with the blocks of code, diffs and kinds of blocks."""
    yield from readme.problems
    for block in readme.blocks:
        message = None
        if not block.is_closed:
            message = "this block is not closed"
        elif block.mark not in MARKS.get(block.kind, ()):
            message = f"there is no kind of block {block.info!r}"
        elif block.kind in CODE and not block.mark:
            message = code_problem(readme, block)
        elif block.kind == "diff" and block.answer is None:
            message = diff_problem(readme, block)
        if message:
            yield readme.problem(block.line, message)


def code_problem(readme: Readme, block: Block) -> str | None:
    """Why the block does not stand verbatim in one file of the lesson, or of the repository."""
    pieces = split_at_omissions(block.lines)
    if not all(pieces):
        return f"nothing stands between two lines of {OMISSION}, or nothing but that in the block"
    within = f"{readme.lesson.as_posix()}/" if readme.lesson else ""
    names = [name for name in repository_files(readme.root) if name.startswith(within)]
    files = [file_lines(readme.root / name) for name in names if not name.endswith(".md")]
    if any(holds(lines, pieces, left_out=1) for lines in files):
        return None
    return f"no file {f'of {within}' if within else ''} has this block: {hint(files, pieces)}"


def hint(files: list[Piece], pieces: list[Piece]) -> str:
    """Which piece, or which line of it, is in no file at all."""
    for piece in pieces:
        if any(holds(lines, [piece]) for lines in files):
            continue
        known = {line.strip() for lines in files for line in lines}
        unknown = [line for line in piece if line.strip() not in known]
        return f"see {unknown[0].strip()!r}" if unknown else f"see the piece from {piece[0]!r} on"
    return "each piece is in one, but not all in this order, with something left out between them"


def split_at_omissions(lines: Iterable[str]) -> list[Piece]:
    """The pieces between the lines that are only `...`, without blank lines around them.

    An omission may begin or end a block. A piece is empty where it must not be.
    """
    pieces: list[Piece] = [[]]
    for line in lines:
        if line.strip() == OMISSION:
            pieces.append([])
        else:
            pieces[-1].append(line.rstrip())
    pieces = [without_blank_ends(piece) for piece in pieces]
    if len(pieces) > 1 and not pieces[0]:
        del pieces[0]
    if len(pieces) > 1 and not pieces[-1]:
        del pieces[-1]
    return pieces


def file_lines(path: Path) -> Piece:
    try:
        return [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        return []  # an image


def holds(lines: Piece, pieces: list[Piece], *, left_out: int = 0) -> bool:
    """Whether the pieces stand in these lines, in order, all moved to the right by as much.

    Between two of them at least as many lines as `left_out`.
    """
    first = pieces[0][0]
    indents = {line[: -len(first)] for line in lines if line.endswith(first)}
    return any(
        follow(
            lines, [[indent + line if line else "" for line in piece] for piece in pieces], left_out
        )
        for indent in indents
        if not indent.strip()
    )


def follow(lines: Piece, pieces: list[Piece], left_out: int) -> bool:
    start = 0
    for piece in pieces:
        places = range(start, len(lines) - len(piece) + 1)
        place = next((at for at in places if lines[at : at + len(piece)] == piece), None)
        if place is None:
            return False
        start = place + len(piece) + left_out
    return True


class FileDiff(NamedTuple):
    """What a diff says of one file: names as in its header, and its hunks."""

    old_name: str
    new_name: str
    hunks: list[Piece]


def split_diff(lines: list[str]) -> list[FileDiff]:
    """A diff by files. Names are empty where it has no header."""
    files = [FileDiff("", "", [[]])]
    in_header = False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if in_header:
            in_header = False
            continue
        # Both, since a removed SQL comment looks like the first.
        in_header = line.startswith("--- ") and following.startswith("+++ ")
        if in_header:
            names = [text[4:].split("\t")[0].strip() for text in (line, following)]
            files.append(FileDiff(names[0], names[1], [[]]))
        elif line.startswith("@@") or line.strip() == OMISSION:
            files[-1].hunks.append([])
        elif not line.startswith(("diff ", "index ")):
            files[-1].hunks[-1].append(line or " ")
    return [
        file._replace(hunks=list(filter(None, file.hunks))) for file in files if any(file.hunks)
    ]


def diff_problem(readme: Readme, block: Block) -> str | None:
    """Why the block is not part of the diff between the lesson before and this one."""
    files = split_diff(block.lines)
    lines = [line for file in files for hunk in file.hunks for line in hunk]
    if odd := [line for line in lines if line[0] not in "+- "]:
        return f"each line of a diff begins with +, - or a space, but not {odd[0]!r}"
    if all(line[0] == " " for line in lines):
        return "a diff without any line that begins with + or -"
    for file in files:
        pairs = list(candidate_pairs(readme, file))
        problems = [pair_problem(readme.root, *pair, file.hunks) for pair in pairs]
        if not pairs:
            return f"{file.old_name} and {file.new_name} are not this lesson's and the one before's"
        if None not in problems:
            advice = "no file of the two lessons differs like this; with a header I can say more"
            return problems[0] if file.old_name else advice
    return None


def candidate_pairs(readme: Readme, file: FileDiff) -> Iterator[tuple[str, str]]:
    """Which files, of a lesson and of the one before it, a diff may be about."""
    directories = [Path(name).parent.as_posix() for name in lesson_readme_names(readme.root)]
    for before, after in pairwise(directories):
        if readme.lesson and readme.lesson.as_posix() != after:
            continue
        if file.old_name:
            name = Path(file.new_name).name
            if (file.old_name, file.new_name) == (f"{before}/{name}", f"{after}/{name}"):
                yield file.old_name, file.new_name
        elif readme.lesson:
            paths = [Path(name) for name in repository_files(readme.root)]
            names = [path.name for path in paths if path.parent == Path(after)]
            yield from ((f"{before}/{name}", f"{after}/{name}") for name in names)


def pair_problem(root: Path, old_name: str, new_name: str, hunks: list[Piece]) -> str | None:
    """Why the hunks are not of the diff between these files; one may be missing, as in diff -N."""
    old, new = (
        file_lines(root / name) if (root / name).exists() else [] for name in (old_name, new_name)
    )
    for name, here, there, signs in [(old_name, old, new, " -"), (new_name, new, old, " +")]:
        sides = [[line[1:].rstrip() for line in hunk if line[0] in signs] for hunk in hunks]
        changed = [any(line[0] == signs[1] for line in hunk) for hunk in hunks]
        pieces = [without_blank_ends(side) for side in sides]
        filled = list(filter(None, pieces))
        lines = f"its lines with {signs[1]!r} or ' '"
        if filled and not holds(here, filled):
            return f"{lines} are not those of {name}: {hint([here], filled)}"
        for piece, is_changed in zip(pieces, changed, strict=True):
            if is_changed and piece and holds(there, [piece]):
                return f"{lines} are in both files: see {piece[0].strip()!r}"
    return None


def ledger_entries(readme: Readme) -> list[str]:
    """A line for each block that nothing checks: README, info string, first line."""
    return [
        " | ".join([readme.name, block.info, block.lines[0].strip() if block.lines else ""])
        for block in readme.blocks
        if block.mark in ("wrong", "typed", "no-run") or block.kind in ("", "text")
    ]


def ledger_problems(readme: Readme) -> Iterator[Problem]:
    """Where the list of blocks that nothing checks differs from those that there are."""
    lines = LEDGER.read_text(encoding="utf-8").splitlines()
    listed = Counter(line for line in lines if line.startswith(f"{readme.name} |"))
    found = Counter(ledger_entries(readme))
    for entry in (found - listed).elements():
        yield readme.problem(1, f"not checked, and not in {LEDGER.name}: {entry}")
    for entry in (listed - found).elements():
        yield readme.problem(1, f"in {LEDGER.name}, but not in the README: {entry}")
