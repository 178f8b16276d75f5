"""Which outputs are the same but for times, process ids and the like."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

from readme_checks.parsing import OMISSION

# What differs in each run, and means nothing.
NOISE = [
    (r"datetime\.datetime\([^()]*(?:\([^()]*\))?[^()]*\)", "<time>"),
    (
        r"\b\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?: ?[+-]\d\d(?::?\d\d)?|Z)?)?",
        "<time>",
    ),
    (r"\b\d\d:\d\d:\d\d(?:\.\d+)?\b", "<time>"),
    (r"\b\d+(?:\.\d+)? ms\b|\b\d+\.\d+ ?s(?:ec|econds?)?\b", "<duration>"),
    (r"cost=\S+ rows=\d+ width=\d+", "cost=<estimate>"),
    (r"actual time=[\d.]+", "actual time=<time>"),
    (r"(?<=rows=)(\d+)\.00\b", r"\1"),  # since Postgres 18
    (r"\bBuffers: .*", "Buffers: <number>"),
    (r"\bMemory: \d+kB", "Memory: <number>"),
    # Distributions, and the official image, add theirs: 18.6 (Debian 18.6-1.pgdg13+2).
    (r"^(Python|psycopg|aiosql|Postgres)( +)\d\S*(?: \(.*\))?$", r"\1 <version>"),
]
# What differs in each run, and is the same wherever it is the same in that run.
NAMES = [
    r"\bvm:\d+",
    r"(?<=process )\d+",
    r"(?<=pid )\d+",
    r"(?<=demo-)\d+",
    r"(?<=lesson_\d\d:)\d+",
    r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b",
    r"(?<=order-)[0-9a-f]{8}\b",
    r"\b[0-9a-f]{16,}\b",
]
NAME = re.compile("|".join(NAMES))


class Masked(NamedTuple):
    """A line without what differs in each run, and the names in it."""

    shape: str
    names: tuple[str, ...] = ()


Piece = list[tuple[int, Masked]]
START, END = Masked("<start>"), Masked("<end>")
MAX_LINES = 40
CONTEXT = 3
FAR = "  (...)"


def mask(line: str) -> Masked:
    for pattern, substitute in NOISE:
        line = re.sub(pattern, substitute, line)
    names = tuple(name.removeprefix("vm:") for name in NAME.findall(line))
    return Masked(without_padding(NAME.sub("<name>", line)), names)


def without_padding(line: str) -> str:
    """A line of a table whatever the width of its columns; other lines keep their indentation."""
    line = re.sub(r"([-─━])\1{2,}", r"\1", line.rstrip())
    indent = line[: len(line) - len(line.lstrip())]
    if re.search(r" \| |-\+-|QUERY PLAN", line):
        indent = ""
    return indent + re.sub(" {2,}", " ", line.lstrip())


@dataclass
class Comparison:
    """What is shown of an output, and the output."""

    shown: list[str]
    output: list[str]
    unordered: bool
    found: dict[int, int]  # which line that is shown is which line of the output
    is_same: bool

    def report(self) -> list[str]:
        """How they differ, as a diff for people."""
        if self.unordered:
            return self.report_unordered()
        lines: list[str] = []
        position = 0
        may_skip = False
        for number, line in enumerate(self.shown):
            if is_omission(line):
                may_skip = True
                lines.append(f"  {line}")
            elif number not in self.found:
                may_skip = False
                lines.append(f"- {line}")
            else:
                lines += [] if may_skip else plus(self.output[position : self.found[number]])
                lines.append(f"  {line}")
                position = self.found[number] + 1
                may_skip = False
        lines += [] if may_skip else plus(self.output[position:])
        if not any(line[0] in "+-" for line in lines):
            lines = ["  who is who differs (process ids, hex numbers); the output is:"]
            lines += plus([line for line in self.output if mask(line).names])
        return near_changes(lines)

    def report_unordered(self) -> list[str]:
        missing = [f"- {line}" for line in self.missing()]
        others = set(range(len(self.output))) - set(self.found.values())
        return missing + plus([self.output[number] for number in sorted(others)])

    def missing(self) -> list[str]:
        """The lines that are shown and not in the output."""
        lines = [line for number, line in enumerate(self.shown) if number not in self.found]
        return [line for line in lines if not is_omission(line)]

    def renewed(self) -> list[str]:
        """What is to be shown of this output; lines that are not in it stay as they are."""
        if not any(map(is_omission, self.shown)):
            return self.output
        lines = list(self.shown)
        for number, place in self.found.items():
            lines[number] = self.output[place]
        return lines


def is_omission(line: str) -> bool:
    return line.strip() == OMISSION


def plus(lines: list[str]) -> list[str]:
    """Lines as additions in a diff, of which nobody reads more than MAX_LINES."""
    rest = len(lines) - MAX_LINES
    return [f"+ {line}" for line in lines[:MAX_LINES]] + ([f"+ ({rest} more)"] if rest > 0 else [])


def near_changes(lines: list[str]) -> list[str]:
    """A diff without what is far from all changes."""
    changes = [number for number, line in enumerate(lines) if line[0] in "+-"]
    near = {change + offset for change in changes for offset in range(-CONTEXT, CONTEXT + 1)}
    kept: list[str] = []
    for number, line in enumerate(lines):
        if number in near:
            kept.append(line)
        elif kept[-1:] != [FAR]:
            kept.append(FAR)
    return kept


def compare(shown: list[str], output: list[str], *, unordered: bool = False) -> Comparison:
    """Find what is shown in an output; `...` stands for any number of lines, also none."""
    before, after = [mask(line) for line in shown], [mask(line) for line in output]
    if unordered:
        found = anywhere(before, after)
        all_of_it = any(map(is_omission, shown)) or len(found) == len(output)
        is_same = all_of_it and len(found) == sum(not is_omission(line) for line in shown)
    else:
        # So that what is not after an omission can only be at the beginning; likewise the end.
        pieces = split([START, *before, END])
        places = place(pieces, [START, *after, END], 0, {})
        is_same = places is not None
        found = at_places(pieces, places) if places is not None else by_shape(before, after)
    return Comparison(shown, output, unordered, found, is_same)


def anywhere(before: list[Masked], after: list[Masked]) -> dict[int, int]:
    """Each line anywhere in the output, each line of the output only once."""
    left = [line.shape for line in after]
    found = {}
    for number, line in enumerate(before):
        if line.shape in left and line.shape != OMISSION:
            found[number] = left.index(line.shape)
            left[found[number]] = OMISSION  # taken
    return found


def by_shape(before: list[Masked], after: list[Masked]) -> dict[int, int]:
    """As many lines as possible in their order, whoever is who."""
    matcher = SequenceMatcher(None, shapes(before), shapes(after), autojunk=False)
    return {
        block.a + offset: block.b + offset
        for block in matcher.get_matching_blocks()
        for offset in range(block.size)
    }


def shapes(lines: list[Masked]) -> list[str]:
    return [line.shape for line in lines]


def split(lines: list[Masked]) -> list[Piece]:
    """The lines between omissions, each with its number; that of START is -1."""
    pieces: list[Piece] = [[]]
    for number, line in enumerate(lines, start=-1):
        if is_omission(line.shape):
            pieces.append([])
        else:
            pieces[-1].append((number, line))
    return [piece for piece in pieces if piece]


def place(
    pieces: list[Piece], output: list[Masked], start: int, names: dict[tuple[str, str], str]
) -> list[int] | None:
    """The places of all pieces in the output, one after the other; None if there are none.

    A name in the pieces must be the same one in the output each time, and the other way round.
    """
    if not pieces:
        return []
    piece, *others = pieces
    for at in range(start, len(output) - len(piece) + 1):
        part = output[at : at + len(piece)]
        more = unify([line for _, line in piece], part, names)
        if more is None:
            continue
        rest = place(others, output, at + len(piece), more)
        if rest is not None:
            return [at, *rest]
        if more == names:
            return None  # further on there would only be less room for the others
    return None


def unify(
    shown: list[Masked], output: list[Masked], names: dict[tuple[str, str], str]
) -> dict[tuple[str, str], str] | None:
    """The names, with those of these lines added; None if lines or names do not correspond."""
    if shapes(shown) != shapes(output):
        return None
    names = dict(names)
    for line, other in zip(shown, output, strict=True):
        for name, real in zip(line.names, other.names, strict=True):
            if names.setdefault(("shown", name), real) != real:
                return None
            if names.setdefault(("real", real), name) != name:
                return None
    return names


def at_places(pieces: list[Piece], places: list[int]) -> dict[int, int]:
    """Line by line what `place` has found; there START was line 0 of the output."""
    return {
        number: at + offset - 1
        for piece, at in zip(pieces, places, strict=True)
        for offset, (number, line) in enumerate(piece)
        if line not in (START, END)
    }
