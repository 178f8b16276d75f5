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
