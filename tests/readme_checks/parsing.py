"""A README as its parts: blocks, headings, links. It judges nothing.

A block is fenced. A `<details>` is a worked answer; blocks in it know its number.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

OMISSION = "..."
LESSON_README = re.compile(r"lessons/[0-9][0-9]-[^/]+/README\.md")
OTHERS = [
    "README.md",
    "CONTRIBUTING.md",
    "lessons/README.md",
    "shared/README.md",
    "tests/README.md",
    "tests/benchmarks/README.md",
]


class Problem(NamedTuple):
    """What is wrong, and where: a line of a README, counted from 1."""

    readme: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.readme}:{self.line}: {self.text}"


@dataclass
class Block:
    """A fenced block."""

    info: str  # `sql wrong`
    lines: list[str]
    line: int  # of its first line in the README, from 1
    indent: str  # of the block in the README, not part of its lines
    answer: int | None  # the number of the <details> that it is in, from 1
    is_closed: bool

    @property
    def kind(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def mark(self) -> str:
        return self.info.partition(" ")[2]


@dataclass
class Heading:
    level: int
    text: str
    line: int
    answers: list[int] = field(default_factory=list)  # <details> between it and the next one


@dataclass
class Link:
    target: str
    line: int


@dataclass
class Readme:
    """One README, parsed."""

    root: Path  # of the repository
    name: str  # its path from there
    lines: list[str]
    blocks: list[Block] = field(default_factory=list)
    headings: list[Heading] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)  # set by hand, with <a id="...">
    problems: list[Problem] = field(default_factory=list)

    @property
    def lesson(self) -> Path | None:
        """The lesson's directory, from the root of the repository; None if it is of no lesson."""
        return Path(self.name).parent if LESSON_README.fullmatch(self.name) else None

    def problem(self, line: int, text: str) -> Problem:
        return Problem(self.name, line, text)


def read_readme(root: Path, name: str) -> Readme:
    """Parse the README with this path in the repository."""
    text = (root / name).read_text(encoding="utf-8")
    readme = Readme(root, name, text.splitlines())
    answer: int | None = None
    answers = 0
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for number, token in enumerate(tokens):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            readme.blocks.append(parse_block(readme, token, answer))
            if not readme.lines[line - 1].lstrip().startswith(token.markup):
                readme.problems.append(readme.problem(line, "a block begins on a line of its own"))
        elif token.type == "heading_open":
            inline = tokens[number + 1]
            readme.headings.append(Heading(int(token.tag[1]), plain_text(inline), line))
        elif token.type == "inline":
            readme.links.extend(inline_links(token, line))
        elif token.type == "html_block":
            readme.links.extend(html_links(token.content, line))
        if html := html_of(token):
            readme.anchors.update(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", html))
            for tag in re.findall(r"</?details\b", html):
                if (tag == "</details") == (answer is None):
                    readme.problems.append(readme.problem(line, f"{tag}> at the wrong place"))
                if tag == "</details":
                    answer = None
                    continue
                answer = answers = answers + 1
                if readme.headings:
                    readme.headings[-1].answers.append(answer)
            if "```" in html:
                text = "a block in HTML: leave a blank line between the tag and the block"
                readme.problems.append(readme.problem(line, text))
    if answer is not None:
        readme.problems.append(readme.problem(len(readme.lines), "<details> is not closed"))
    return readme


def parse_block(readme: Readme, token: Token, answer: int | None) -> Block:
    assert token.map
    first, end = token.map
    opening = readme.lines[first]
    closing = readme.lines[end - 1].strip("> ")
    return Block(
        info=" ".join(token.info.split()),
        lines=token.content.splitlines(),
        line=first + 2,
        indent=opening[: len(opening) - len(opening.lstrip())],
        answer=answer,
        is_closed=end - first > 1 and closing.startswith(token.markup) and not closing.strip("`~"),
    )


def plain_text(inline: Token) -> str:
    """A heading's text as it is shown."""
    children = inline.children or []
    return "".join(child.content for child in children if child.type in ("text", "code_inline"))


def html_of(token: Token) -> str:
    """The HTML in a token: all of it, or the tags between words."""
    if token.type == "html_block":
        return token.content
    children = token.children or []
    return " ".join(child.content for child in children if child.type == "html_inline")


def inline_links(token: Token, line: int) -> Iterator[Link]:
    for child in token.children or []:
        if child.type in ("softbreak", "hardbreak"):
            line += 1
        if child.type == "html_inline":
            yield from html_links(child.content, line)
        for attribute in ("href", "src"):
            if target := child.attrGet(attribute):
                yield Link(str(target), line)


def html_links(html: str, line: int) -> Iterator[Link]:
    for target in re.findall(r"\b(?:href|src|srcset)=[\"']([^\"']+)[\"']", html):
        yield Link(target, line)


def slugs(readme: Readme) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    seen: dict[str, int] = {}
    found = set(readme.anchors)
    for heading in readme.headings:
        slug = re.sub(r"[^\w\- ]", "", heading.text.lower()).replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def repository_files(root: Path) -> list[str]:
    """The files that git tracks, or would: the work tree as it is now, without what is ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    names = sorted(set(listing.stdout.split("\0")) - {""})
    return [name for name in names if (root / name).is_file()]


def readme_names(root: Path) -> list[str]:
    """What there is to read: the front door, and the READMEs of the lessons."""
    return [name for name in OTHERS if (root / name).is_file()] + lesson_readme_names(root)


def lesson_readme_names(root: Path) -> list[str]:
    """The READMEs of the lessons, in their order."""
    lessons = sorted(root.glob("lessons/[0-9][0-9]-*/README.md"))
    return [path.relative_to(root).as_posix() for path in lessons]


def without_blank_ends(lines: list[str]) -> list[str]:
    """The lines without the blank ones before the first and after the last other one."""
    filled = [number for number, line in enumerate(lines) if line.strip()]
    return lines[filled[0] : filled[-1] + 1] if filled else []
