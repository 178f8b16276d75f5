"""Two lessons side by side: what has changed, in the order in which the README recommends it."""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from pygments.lexer import Lexer  # type: ignore[import-untyped]
from pygments.lexers import PostgresLexer, PythonLexer  # type: ignore[import-untyped]
from pygments.token import STANDARD_TYPES  # type: ignore[import-untyped]
from rich.box import MINIMAL
from rich.console import Console
from rich.table import Table
from rich.text import Text

CONTEXT = 3  # unchanged lines that are shown on both sides of a change
FOLD_FROM = 4  # so many in between are worth a fold
SIMILAR = 0.6  # two lines are the same line, changed
MANY_PAIRS = 10_000  # of lines, to be compared one by one
WIDTH = 200  # characters, where no terminal says otherwise

LEXERS: dict[str, type[Lexer]] = {".py": PythonLexer, ".sql": PostgresLexer}
STYLES = {"k": "magenta", "s": "green", "c": "dim italic", "n": "", "m": "cyan", "o": "", "p": ""}

# Text, Pygments' short name of its kind, and whether it is among the words that have changed.
Span = tuple[str, str, bool]
Row = dict[str, Any]


def compare(old: Path, new: Path) -> dict[str, Any]:
    """The differences of two lessons, as JSON values; see static/diff.js."""
    names = reading_order(old, new)
    files = {name: [read(path / name) for path in (old, new)] for name in names}
    return {
        "from": title(old),
        "to": title(new),
        "files": [
            {"name": name, "state": state(*texts), "rows": list(rows(name, *texts))}
            for name, texts in files.items()
            if state(*texts) != "same"
        ],
        "same": [name for name, texts in files.items() if state(*texts) == "same"],
    }


def title(lesson: Path) -> dict[str, str]:
    number, _, name = lesson.resolve().name.partition("-")
    return {"number": number, "name": name}


def state(old: str | None, new: str | None) -> str:
    if old is None:
        return "added"
    if new is None:
        return "removed"
    return "same" if old == new else "changed"


def read(path: Path) -> str | None:
    """A file's text; None if there is none. Raises SystemExit if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeError) as error:
        raise SystemExit(f"Cannot read {path}: {error}") from None


def reading_order(old: Path, new: Path) -> list[str]:
    """The code of both, in the order in which the README of the new one names it; main.py last."""
    names = {file.name for path in (old, new) for file in path.iterdir() if file.suffix in LEXERS}
    advice = re.search(r"^## Diff it\n(.*?)^## ", read(new / "README.md") or "", re.M | re.S)
    prose = re.sub(r"```.*?```", "", advice[1], flags=re.S) if advice else ""
    homes = {word: home(word, names, new) for word in re.findall(r"`([\w.]+)`", prose)}
    named = [name for name in homes.values() if name]
    order = [*dict.fromkeys(named), "schema.sql", "queries.sql", *sorted(names)]
    first = [name for name in dict.fromkeys(order) if name in names and name != "main.py"]
    return [*first, *(names & {"main.py"})]


def home(word: str, names: set[str], lesson: Path) -> str | None:
    """The file that a word of a README is about: its name, or a function or query in it."""
    if word in names:
        return word
    pattern = re.compile(rf"^ *(?:async def|def|class|-- name:) {re.escape(word)}\b", re.M)
    files = [name for name in sorted(names) if pattern.search(read(lesson / name) or "")]
    return files[0] if files else None


def rows(name: str, old: str | None, new: str | None) -> Iterator[Row]:
    """The rows of one file, with the unchanged stretches folded."""
    # Not with splitlines: it also ends lines where Pygments does not, at a form feed for example.
    sides = [text.removesuffix("\n").split("\n") if text else [] for text in (old, new)]
    colours = [list(coloured(name, text or "")) for text in (old, new)]
    pairs = list(aligned(*sides))
    stretch: list[Row] = []
    is_first = True
    for i, j in pairs:
        row = make_row(sides, colours, i, j)
        if row["kind"] == "same":
            stretch.append(row)
            continue
        yield from folded(stretch, 0 if is_first else CONTEXT, CONTEXT)
        yield row
        stretch, is_first = [], False
    yield from folded(stretch, CONTEXT, 0)


def folded(stretch: list[Row], before: int, after: int) -> Iterator[Row]:
    """An unchanged stretch, of which the middle is folded if it is long."""
    end = len(stretch) - after
    if end - before < FOLD_FROM:
        yield from stretch
        return
    yield from stretch[:before]
    yield {"kind": "fold", "rows": stretch[before:end]}
    yield from stretch[end:]


def aligned(old: list[str], new: list[str]) -> Iterator[tuple[int | None, int | None]]:
    """The lines of both side by side, by their indexes; None where one has no such line."""
    for _, i, i_end, j, j_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if old[i:i_end] == new[j:j_end]:
            yield from zip(range(i, i_end), range(j, j_end), strict=True)
        else:
            yield from paired(old, new, range(i, i_end), range(j, j_end))


def paired(
    old: list[str], new: list[str], left: range, right: range
) -> Iterator[tuple[int | None, int | None]]:
    """Two stretches that differ: lines that are alike beside each other, around the most alike."""
    best = (SIMILAR, -1, -1)
    if len(left) * len(right) <= MANY_PAIRS:
        for j in right:
            # This one is prepared once for all that it is compared with.
            matcher = SequenceMatcher(None, b=new[j], autojunk=False)
            for i in left:
                matcher.set_seq1(old[i])
                if matcher.quick_ratio() > best[0] and matcher.ratio() > best[0]:
                    best = (matcher.ratio(), i, j)
    _, i, j = best
    if i < 0 or not old[i].strip():
        yield from ((i, None) for i in left)
        yield from ((None, j) for j in right)
        return
    yield from paired(old, new, range(left.start, i), range(right.start, j))
    yield i, j
    yield from paired(old, new, range(i + 1, left.stop), range(j + 1, right.stop))


def make_row(
    sides: list[list[str]], colours: list[list[list[Span]]], i: int | None, j: int | None
) -> Row:
    """One row of the page: a line of each side, or of one."""
    marks: list[set[int]] = [set(), set()]
    if i is None or j is None:
        kind = "added" if i is None else "removed"
    else:
        kind = "same" if sides[0][i] == sides[1][j] else "changed"
        if kind == "changed":
            marks = changed_characters(sides[0][i], sides[1][j])
    cells = [
        None if n is None else {"n": n + 1, "spans": marked(colours[side][n], marks[side])}
        for side, n in enumerate((i, j))
    ]
    return {"kind": kind, "left": cells[0], "right": cells[1]}


def changed_characters(old: str, new: str) -> list[set[int]]:
    """The positions, in each of two lines, of the words that the other has not."""
    words: list[list[str]] = [re.findall(r"\w+|\s+|.", line) for line in (old, new)]
    matcher = SequenceMatcher(None, words[0], words[1], autojunk=False)
    found: list[set[int]] = [set(), set()]
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag != "equal":
            for side, (start, end) in enumerate([(i, i_end), (j, j_end)]):
                before = sum(map(len, words[side][:start]))
                length = sum(map(len, words[side][start:end]))
                found[side] |= set(range(before, before + length))
    return found


def marked(spans: list[Span], marks: set[int]) -> list[Span]:
    """The spans of a line, cut where the marked characters begin and end."""
    result: list[Span] = []
    position = 0
    for text, kind, _ in spans:
        for character in text:
            is_marked = position in marks
            if result and result[-1][1:] == (kind, is_marked):
                result[-1] = (result[-1][0] + character, kind, is_marked)
            else:
                result.append((character, kind, is_marked))
            position += 1
    return result


def coloured(name: str, text: str) -> Iterator[list[Span]]:
    """The lines of a file, each as spans of one kind."""
    lexer = LEXERS[Path(name).suffix](stripnl=False, ensurenl=False)
    line: list[Span] = []
    for kind, part in lexer.get_tokens(text):
        for number, piece in enumerate(part.split("\n")):
            if number:
                yield line
                line = []
            if piece:
                line.append((piece, STANDARD_TYPES.get(kind, ""), False))
    if line:
        yield line


def show(old: Path, new: Path) -> None:
    """Print the differences in the terminal."""
    console = Console(width=None if Console().file.isatty() else WIDTH)  # whatever FORCE_COLOR says
    result = compare(old, new)
    for file in result["files"]:
        table = Table(box=MINIMAL, title=f"{file['name']} ({file['state']})", show_header=False)
        for _ in range(2):
            table.add_column(justify="right")
            table.add_column(ratio=1, overflow="fold")
        for row in file["rows"]:
            if row["kind"] == "fold":
                table.add_row("", Text(f"… {len(row['rows'])} lines", style="dim"), "", "")
            else:
                table.add_row(*cells(row, "left", "red"), *cells(row, "right", "green"))
        console.print(table)
    if result["same"]:
        console.print("the same in both:", ", ".join(result["same"]))


def cells(row: Row, side: str, colour: str) -> tuple[Text, Text]:
    """Number and text of one side of a row."""
    line = row[side]
    if line is None:
        return Text(), Text()
    text = Text()
    for part, kind, is_marked in line["spans"]:
        text.append(part, f"{colour} bold reverse" if is_marked else STYLES.get(kind[:1], ""))
    return Text(str(line["n"]), "dim" if row["kind"] == "same" else f"{colour} bold"), text
