"""The option --lesson of this project's tests; tests/conftest.py acts on it.

It has to be in an installed package: pytest reads its arguments before it has found that file, and
would take the directory after an option that it does not know for one with tests in it.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lesson",
        action="append",
        type=Path,
        metavar="DIRECTORY",
        help="run the lessons' tests on this directory alone, such as 04-my-copy (repeatable)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Begin again with the settings of this project if that directory made pytest miss them.

    It looks for them above the paths it is given, and takes this one for a path to tests.
    """
    if early_config.known_args_namespace.lesson and early_config.inipath is None:
        raise SystemExit(pytest.main(["-c", "pyproject.toml", *args]))
