"""Running what a README tells its reader to type, on a copy of the repository."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from readme_checks.masking import Comparison, compare, is_omission
from readme_checks.parsing import (
    Block,
    Problem,
    Readme,
    repository_files,
    without_blank_ends,
)
from server import new_database
from shared import EmbeddedPostgres

DEADLINE = 180.0  # seconds for one command; generous, since only one that hangs ever reaches it
WRITES = re.compile(r"\$ (cat|sed) .*> /tmp/\S+")  # a file, and nothing else
HEREDOC = re.compile(r"(?<!<)<<-?\s*['\"]?([A-Za-z_]\w*)")

# Python writes to a terminal line by line. Not with -u, which would split a line in two.
SITECUSTOMIZE = "import sys\nsys.stdout.reconfigure(line_buffering=True)\n"


@dataclass
class Command:
    """A command in a console block, and what the block shows of its output."""

    text: str
    line: int  # in the README
    shown: list[str] = field(default_factory=list)
    first_shown: int = 0  # number of the first shown line in the block


@dataclass
class Script:
    """What runs in one copy: a README's blocks outside of answers, or those of one answer.

    An answer's begin with those of its exercise that write a file.
    """

    readme: Readme
    answer: int | None
    blocks: list[Block]

    @property
    def name(self) -> str:
        lesson = self.readme.lesson
        place = lesson.name if lesson else self.readme.name.removesuffix(".md").replace("/", "-")
        return f"{place}-answer-{self.answer}" if self.answer else place


@dataclass
class Run:
    """A command that was run."""

    block: Block
    command: Command
    output: list[str]
    status: int | None  # None: it did not end in time

    def comparison(self) -> Comparison:
        unordered = self.block.mark == "unordered"
        return compare(self.command.shown, self.output, unordered=unordered)


def scripts(readme: Readme) -> list[Script]:
    """What there is to run in a README."""
    runnable = [
        block
        for block in readme.blocks
        if (block.kind == "console" and block.mark != "no-run")
        or (block.kind == "diff" and block.answer is not None)
    ]
    answers = sorted({block.answer for block in runnable}, key=lambda answer: answer or 0)
    return [
        Script(readme, answer, [block for block in runnable if is_part(readme, block, answer)])
        for answer in answers
    ]


def is_part(readme: Readme, block: Block, answer: int | None) -> bool:
    return block.answer == answer or (answer is not None and is_given(readme, block, answer))


def is_given(readme: Readme, block: Block, answer: int) -> bool:
    """Whether a block writes a file that whoever reads this answer has by now, and no more."""
    commands = [line for line in block.lines if line.startswith("$ ")]
    if block.answer or len(commands) != 1 or not WRITES.match(commands[0]):
        return False
    end = min(other.line for other in readme.blocks if other.answer == answer)
    exercises = [heading for heading in readme.headings if answer in heading.answers]
    return any(heading.line < block.line < end for heading in exercises)


def parse_console(block: Block) -> list[Command]:
    """The commands of a console block. Raises ValueError with what is wrong with it."""
    commands: list[Command] = []
    unfinished = False
    for number, line in enumerate(block.lines):
        if unfinished:
            commands[-1].text += f"\n{line}"
        elif line.startswith("$ "):
            commands.append(Command(line[2:], block.line + number))
        elif commands:
            commands[-1].shown.append(line)
            continue
        elif line.strip():
            raise ValueError(f"output without a command: {line.strip()!r}")
        if commands:
            commands[-1].first_shown = number + 1
            unfinished = goes_on(commands[-1].text)
    if unfinished or not commands:
        raise ValueError("a command that does not end" if unfinished else "there is no command")
    for command in commands:
        trim(command)
    return commands


def goes_on(text: str) -> bool:
    """Whether a shell would ask for another line of this command."""
    if heredoc := HEREDOC.search(text):
        return heredoc[1] not in text.splitlines()[1:]
    try:
        shlex.split(text, comments=True)
    except ValueError:  # a quotation that is not closed, or a backslash at the end
        return True
    return False


def trim(command: Command) -> None:
    """Leave out blank lines around what is shown."""
    shown = command.shown
    command.shown = without_blank_ends(shown)
    command.first_shown += next((n for n, line in enumerate(shown) if line.strip()), 0)


class Sandbox:
    """A copy of these files of the repository, with a database, for the commands of one script."""

    def __init__(self, directory: Path, root: Path, names: list[str], database: str) -> None:
        self.copy = directory / "copy"
        self.tmp = directory / "tmp"
        self.tmp.mkdir()
        self.database = database
        for name in names:
            (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, self.copy / name)
        site = directory / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.environment = {
            **{name: os.environ[name] for name in ("HOME", "USER") if name in os.environ},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(self.copy), str(site)]),
            "DATABASE_URL": database,
            "TMPDIR": str(self.tmp),
            "LC_ALL": "en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8",
            "COLUMNS": "100",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "TZ": "UTC",
            "PGTZ": "UTC",
            "PSQLRC": os.devnull,
        }
        # It keeps the process group that everything here runs in, so that its number stays ours.
        self.keeper = subprocess.Popen(["cat"], stdin=subprocess.PIPE, process_group=0)

    def close(self) -> None:
        """End whatever still runs."""
        os.killpg(self.keeper.pid, signal.SIGKILL)
        self.keeper.communicate()
        server = EmbeddedPostgres(self.copy / ".postgres")  # of commands without DATABASE_URL
        if server.is_running():
            server.shut_down()

    def run_block(self, block: Block) -> Iterator[Run]:
        """Run the commands of a block, as long as each comes to an end."""
        for command in parse_console(block):
            run = Run(block, command, *self.run(command.text))
            yield run
            if run.status is None:
                raise ValueError("the rest is not run, after a command that has not ended")

    def run(self, command: str) -> tuple[list[str], int | None]:
        """Run a command in bash; return what a terminal would show, and its exit status."""
        command = re.sub(r"(?<![\w.~/-])/tmp/", f"{self.tmp}/", command)
        # Not a pipe, which a process in the background would keep open.
        with tempfile.TemporaryFile("ab+") as file:
            process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.copy,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=self.keeper.pid,
            )
            try:
                status = process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                status = None
            file.seek(0)
            output = file.read().decode(errors="replace")
        return self.as_shown(output, status), status

    def as_shown(self, output: str, status: int | None) -> list[str]:
        """An output as in the terminal of a reader who has the repository in /repo."""
        name = conninfo_to_dict(self.database)["dbname"]
        host = re.escape(socket.gethostname())
        for pattern, substitute in [
            (re.escape(str(self.copy)), "/repo"),
            (re.escape(str(self.tmp)), "/tmp"),
            (re.escape(sys.prefix), "/repo/.venv"),
            (rf"\b{name}\b", "postgres"),
            (rf"\b{host}:(?=\d)", "vm:"),
            # What only a shell that is not interactive adds.
            (r"(?m)^\S*bash: line \d+: +\d+ (Killed|Terminated)\b.*$", r"\1"),
            (r"(?m)^\S*bash: line \d+: ", "bash: "),
        ]:
            output = re.sub(pattern, substitute, output)
        lines = without_blank_ends([line.rstrip() for line in output.split("\n")])
        # With a single command bash becomes that command, and cannot tell how it ended.
        if status in (-signal.SIGKILL, -signal.SIGTERM):
            lines.append("Killed" if status == -signal.SIGKILL else "Terminated")
        return lines

    def patch(self, directory: Path, block: Block) -> str | None:
        """Apply an answer's diff to the lesson; return why that fails, if it does."""
        end = subprocess.run(
            ["patch", "-p1", "-F0", "--batch"],
            cwd=self.copy / directory,
            input="\n".join([*block.lines, ""]),
            capture_output=True,
            text=True,
        )
        return None if end.returncode == 0 else " ".join((end.stdout + end.stderr).split())


def needed_files(script: Script) -> list[str]:
    """Of the repository what is not of a lesson that the script does not name; it is a lot."""
    names = repository_files(script.readme.root)
    text = "\n".join(line for block in script.blocks for line in block.lines)
    own = script.readme.lesson
    if not own or "lessons" in re.sub(r"lessons/\d\d-", "", text):
        return names
    numbers = {own.name[:2], *re.findall(r"\b\d\d\b", text)}
    tests = "test" in text

    def is_needed(name: str) -> bool:
        lesson = re.match(r"lessons/(\d\d)-", name)
        return lesson[1] in numbers if lesson else tests or not name.startswith("tests/")

    return [name for name in names if is_needed(name)]


@contextmanager
def sandbox(script: Script, server_url: str) -> Iterator[Sandbox]:
    """A new copy and an empty database, both gone after the block."""
    with (
        new_database(server_url) as database,
        tempfile.TemporaryDirectory(prefix="readme-", ignore_cleanup_errors=True) as directory,
    ):
        root, names = script.readme.root, needed_files(script)
        box = Sandbox(Path(directory).resolve(), root, names, database)
        try:
            yield box
        finally:
            box.close()


def run_script(script: Script, server_url: str) -> tuple[list[Run], list[Problem]]:
    """Run the blocks in their order; return the commands, and why others could not be run."""
    readme = script.readme
    runs: list[Run] = []
    problems: list[Problem] = []
    with sandbox(script, server_url) as box:
        for block in script.blocks:
            try:
                if block.kind == "console":
                    runs.extend(box.run_block(block))
                elif not readme.lesson:
                    raise ValueError("a diff to apply, but this is not the README of a lesson")
                elif failure := box.patch(readme.lesson, block):
                    raise ValueError(f"patch -p1 in {readme.lesson} fails: {failure}")
            except ValueError as error:
                problems.append(readme.problem(block.line, str(error)))
                break
    if script.blocks[-1].kind == "diff":
        text = "no console block after this diff shows that the answer works"
        problems.append(readme.problem(script.blocks[-1].line, text))
    return runs, problems


def run_problems(readme: Readme, run: Run) -> Iterator[Problem]:
    """What is wrong with the output that a README shows of a command, or with its absence."""
    command = run.command
    title = f"$ {command.text.splitlines()[0]}"
    # A failure that is meant is shown, not hidden by what is left out.
    shows_end = bool(command.shown) and not is_omission(command.shown[-1])
    if run.status is None:
        yield readme.problem(command.line, f"{title}\n  did not end within {DEADLINE:g} seconds")
    elif run.status and not shows_end and not is_difference(command.text, run.status):
        output = "\n".join(f"  {line}" for line in run.output[-20:] or ["(no output)"])
        yield readme.problem(command.line, f"{title}\n  ended with {run.status}:\n{output}")
    comparison = run.comparison()
    if command.shown and not comparison.is_same:
        report = "\n".join(f"  {line}" for line in comparison.report())
        yield readme.problem(
            command.line, f"{title}\n  prints something else (- README, + output):\n{report}"
        )


def is_difference(command: str, status: int) -> bool:
    """Whether this is a diff that has found a difference, which is not a failure."""
    return status == 1 and command.startswith(("diff ", "git diff "))
