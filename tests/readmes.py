"""Are the READMEs true? Checks all of them, or those that are named.

python tests/readmes.py check [README ...]     snippets, diffs, links, form, and outputs of commands
python tests/readmes.py refresh [README ...]   run the commands, and write their outputs anew

tests/readme_checks/__init__.py tells how a README is to be written for that. With TEST_DATABASE_URL
the commands use that server, otherwise one as in the tests.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TypeVar

import psycopg

from readme_checks.consoles import Run, Script, run_problems, run_script, scripts
from readme_checks.diagrams import diagram_problems, mermaid_is_missing
from readme_checks.parsing import Problem, Readme, read_readme, readme_names
from readme_checks.snippets import ledger_problems, snippet_problems
from readme_checks.structure import link_problems, structure_problems
from readme_checks.whole import whole_problems
from server import running_server

ROOT = Path(__file__).resolve().parent.parent
PARALLEL = 4
Result = TypeVar("Result")


def static_problems(readme: Readme) -> Iterator[Problem]:
    """What can be seen without running anything."""
    yield from snippet_problems(readme)
    yield from ledger_problems(readme)
    yield from link_problems(readme)
    yield from structure_problems(readme)
    yield from whole_problems(readme)
    if not mermaid_is_missing():
        yield from diagram_problems(readme)


def script_problems(script: Script, server_url: str) -> list[Problem]:
    """What is wrong with the commands of a README or of one of its answers."""
    runs, problems = run_script(script, server_url)
    for run in runs:
        problems.extend(run_problems(script.readme, run))
    return problems


def in_parallel(function: Callable[[Script], Result], todo: list[Script]) -> list[Result]:
    """The results of a function for all scripts, which mostly wait."""
    executor = ThreadPoolExecutor(PARALLEL)
    try:
        return list(executor.map(function, todo))
    finally:
        executor.shutdown(cancel_futures=True)


def check(readmes: list[Readme], server_url: str) -> int:
    """Print what is wrong; return the number of problems."""
    problems = list(chain.from_iterable(map(static_problems, readmes)))
    todo = list(chain.from_iterable(map(scripts, readmes)))
    results = in_parallel(lambda script: script_problems(script, server_url), todo)
    problems += chain.from_iterable(results)
    for problem in sorted(problems):
        print(problem)
    if reason := mermaid_is_missing():
        print(f"diagrams were not checked: {reason}")
    print(f"READMEs: {len(readmes)}, problems: {len(problems)}")
    return len(problems)


def refresh(readmes: list[Readme], server_url: str) -> int:
    """Write outputs anew; print what remains to be done by hand, and return how much that is."""
    todo = list(chain.from_iterable(map(scripts, readmes)))
    results = in_parallel(lambda script: run_script(script, server_url), todo)
    problems = list(chain.from_iterable(problems for _, problems in results))
    for readme in readmes:
        runs = [
            run
            for script, (runs, _) in zip(todo, results, strict=True)
            for run in runs
            if script.readme is readme
        ]
        changed = write_outputs(readme, runs)
        print(f"{readme.name}: blocks changed: {len(changed)}")
        for run in runs:
            problems += run_problems(readme, run)
            if run.block.line in changed and run.status:
                print(f"{readme.name}:{run.command.line}: mind that this ended with {run.status}")
    for problem in sorted(problems):
        print(problem)
    return len(problems)


def write_outputs(readme: Readme, runs: list[Run]) -> set[int]:
    """Renew the blocks in which an output differs; return the lines where they were.

    A block that is still true keeps its times and names, so that nothing changes for no reason.
    """
    stale = {run.block.line for run in runs if run.command.shown and not run.comparison().is_same}
    lines = list(readme.lines)
    offset = 0
    for run in sorted(runs, key=lambda run: run.command.line):
        command = run.command
        command.line += offset
        if run.block.line in stale and command.shown:
            start = run.block.line - 1 + command.first_shown + offset
            end = start + len(command.shown)
            offset -= len(command.shown)
            command.shown = run.comparison().renewed()
            offset += len(command.shown)
            lines[start:end] = [(run.block.indent + line).rstrip() for line in command.shown]
    path = readme.root / readme.name
    if path.read_text(encoding="utf-8").splitlines() != readme.lines:
        raise SystemExit(f"{readme.name} was edited meanwhile, and is left alone: try again")
    if stale:
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["check", "refresh"])
    parser.add_argument("readmes", nargs="*", type=Path, metavar="README")
    arguments = parser.parse_args()
    for path in arguments.readmes:
        if path.suffix != ".md" or not path.is_file() or ROOT not in path.resolve().parents:
            parser.error(f"{path} is not a README of this repository")
    names = [path.resolve().relative_to(ROOT).as_posix() for path in arguments.readmes]
    readmes = [read_readme(ROOT, name) for name in names or readme_names(ROOT)]
    command = check if arguments.what == "check" else refresh
    with running_server(os.environ) as (_, url):
        try:
            psycopg.connect(url).close()
        except psycopg.Error:  # which may quote the password
            sys.exit("There is no Postgres at TEST_DATABASE_URL.")
        sys.exit(1 if command(readmes, url) else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
