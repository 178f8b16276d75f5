"""The READMEs are true: what they quote stands in the files, what they show is what is printed.

`python tests/readmes.py check` tells the same, `refresh` writes outputs anew.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from readme_checks.consoles import Script, scripts
from readme_checks.diagrams import diagram_problems, mermaid_is_missing
from readme_checks.parsing import Problem, Readme, read_readme, readme_names
from readme_checks.snippets import LEDGER, ledger_problems, snippet_problems
from readme_checks.structure import link_problems, structure_problems
from readme_checks.whole import whole_problems
from readmes import ROOT, script_problems

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="which files belong to the repository is known to git only"
)

READMES = [read_readme(ROOT, name) for name in readme_names(ROOT)]
SCRIPTS = [script for readme in READMES for script in scripts(readme)]

each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.name)


def marked(script: Script) -> Any:
    """That of a whole README takes longer than those of its answers."""
    return pytest.param(script, marks=[] if script.answer else pytest.mark.long)


def assert_none(problems: Iterable[Problem]) -> None:
    found = "\n".join(map(str, problems))
    if found:
        pytest.fail(
            f"{found}\n(python tests/readmes.py refresh writes outputs anew)", pytrace=False
        )


@each_readme
def test_snippets_and_diffs(readme: Readme) -> None:
    assert_none(snippet_problems(readme))


@each_readme
def test_what_is_not_checked_is_listed(readme: Readme) -> None:
    assert_none(ledger_problems(readme))


def test_the_list_is_of_readmes_that_there_are() -> None:
    names = {line.partition(" | ")[0] for line in LEDGER.read_text(encoding="utf-8").splitlines()}
    assert names <= {readme.name for readme in READMES}


@each_readme
def test_links(readme: Readme) -> None:
    assert_none(link_problems(readme))


@each_readme
def test_the_tests_that_it_names_are_there(readme: Readme) -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {path.stem for path in files}
    for path in files:
        known.update(re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8")))
    assert set(re.findall(r"\btest_\w+", "\n".join(readme.lines))) <= known


@each_readme
def test_form(readme: Readme) -> None:
    assert_none(structure_problems(readme))


@each_readme
def test_what_is_new_stands_whole(readme: Readme) -> None:
    assert_none(whole_problems(readme))


@each_readme
def test_diagrams(readme: Readme) -> None:
    if reason := mermaid_is_missing():
        pytest.skip(reason)
    assert_none(diagram_problems(readme))


@pytest.mark.skipif(sys.platform == "win32", reason="the commands are for bash")
@pytest.mark.parametrize(
    "script", [marked(script) for script in SCRIPTS], ids=lambda script: script.name
)
def test_commands(script: Script, server_url: str) -> None:
    """What a command prints may depend on who was quicker: what is shown is to come of it again."""
    problems = list(script_problems(script, server_url))
    if problems:
        print("at first:", *problems, sep="\n")
        problems = list(script_problems(script, server_url))
    assert_none(problems)
