"""Which lessons a test runs on, and on which database.

A test with the fixture `lesson` runs on every lesson; markers narrow that:

    @pytest.mark.since(4)               it holds from lesson 04 on, and does not run before
    @pytest.mark.until(4)               it holds up to lesson 04, and does not run after
    @pytest.mark.flaw(3, reason="...")  it must fail on lesson 03, whose README names that flaw
    @pytest.mark.only(4, LAST)          it is slow; the lessons between run the same code

`pytest --lesson DIRECTORY` runs those tests, and only those, on another directory, a
learner's copy. (The option itself is in shared/pytest_plugin.py.)
"""

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from copy import copy
from functools import cache
from pathlib import Path

import psycopg
import pytest
from fasteners import InterProcessLock  # type: ignore[import-untyped]
from hypothesis import HealthCheck, settings

from lesson_loader import Lesson, all_lessons, lesson_number
from server import DESCRIPTIONS, Databases, Kind, running_server
from shared import EmbeddedPostgres, Pool, Queries, load_queries, open_pool

# The machine may be busy: no test fails for being slow.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SERVER = pytest.StashKey[Kind]()
PREPARED = "TEST_PREPARED_DIRECTORY"  # in the environment, for all processes of a test run
queries_of = cache(load_queries)  # which parses for as long as a small test runs
NOT_COLLECTED = None  # in place of a lesson, where a test holds for none of those chosen


def pytest_configure(config: pytest.Config) -> None:
    # End as on Ctrl-C, so that the server does not stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for path in chosen_lessons(config):
        if not path.is_dir():
            raise pytest.UsageError(f"--lesson: there is no directory {path}")
        try:
            lesson_number(path)
        except ValueError as error:
            raise pytest.UsageError(f"--lesson: {error}") from None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the server before pytest-xdist starts its processes, which share it."""
    if not session.config.option.collectonly:
        stack = ExitStack()
        session.config.add_cleanup(stack.close)
        try:
            kind, url = stack.enter_context(running_server(os.environ))
        except SystemExit as error:  # with one line, which pytest would bury in a traceback
            raise pytest.UsageError(f"{error} (The tests ask for TEST_DATABASE_URL.)") from None
        session.config.stash[SERVER] = kind
        os.environ["TEST_DATABASE_URL"] = url
        if PREPARED not in os.environ:
            place = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            os.environ[PREPARED] = stack.enter_context(place)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"postgres: {DESCRIPTIONS[config.stash[SERVER]]}"] if SERVER in config.stash else []


def chosen_lessons(config: pytest.Config) -> list[Path]:
    paths: list[Path] | None = config.getoption("--lesson")
    return [path.resolve() for path in paths] if paths else all_lessons()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Without the garbage collector, which takes a fifth of that time and finds nothing."""
    gc.disable()
    yield
    gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lesson" not in metafunc.fixturenames:
        return
    first = metafunc.definition.get_closest_marker("since")
    last = metafunc.definition.get_closest_marker("until")
    flaws = {m.args[0]: m.kwargs["reason"] for m in metafunc.definition.iter_markers("flaw")}
    marker = metafunc.definition.get_closest_marker("only")
    only = marker.args if marker and not metafunc.config.getoption("--lesson") else None
    chosen = []
    for path in chosen_lessons(metafunc.config):
        number = lesson_number(path)
        holds = (not first or number >= first.args[0]) and (not last or number <= last.args[0])
        if holds and (only is None or number in only):
            chosen.append(pytest.param(path, id=path.name))
        elif number in flaws:
            fails = pytest.mark.xfail(reason=flaws[number], strict=True)
            chosen.append(pytest.param(path, id=path.name, marks=fails))
    metafunc.parametrize("lesson", chosen or [NOT_COLLECTED], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only_lessons = config.getoption("--lesson")

    def wanted(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        if callspec is None or "lesson" not in callspec.params:
            return not only_lessons
        return callspec.params["lesson"] is not NOT_COLLECTED

    items[:] = filter(wanted, items)
    if hasattr(config, "workerinput"):
        # One process of several, which all need the same order. Mixed, since those of a file are
        # alike: some need the processor, and some only wait.
        random.Random(0).shuffle(items)
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


if sys.platform == "win32":

    def pytest_asyncio_loop_factories() -> dict[str, type[asyncio.AbstractEventLoop]]:
        # psycopg cannot use the one that is the default there.
        return {"selector": asyncio.SelectorEventLoop}


@pytest.fixture(scope="session")
def server_url() -> str:
    """The URL of the test run's Postgres server."""
    return os.environ["TEST_DATABASE_URL"]


@pytest.fixture(scope="session")
def databases(server_url: str) -> Iterator[Databases]:
    """The databases of this process's tests."""
    databases = Databases(server_url)
    with databases.created:
        yield databases


@pytest.fixture
def database(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The connection string of an empty database, this test's alone, which is its DATABASE_URL."""
    with databases.lend() as url:
        monkeypatch.setenv("DATABASE_URL", url)
        yield url


@pytest.fixture
def lesson(request: pytest.FixtureRequest) -> Lesson:
    """A lesson with its modules, freshly loaded: a test may change their globals."""
    return Lesson(request.param)


@pytest.fixture
async def pool(lesson: Lesson, database: str) -> AsyncIterator[Pool]:
    """The lesson's pool, on the test's own database."""
    async with open_pool(lesson.path) as pool:
        yield pool


@pytest.fixture
def queries(lesson: Lesson) -> Queries:
    """The lesson's queries; a test may put others in place of some."""
    return copy(queries_of(lesson.path))


@pytest.fixture(scope="session")
def prepared_directory() -> Path:
    """The directory of an embedded Postgres that does not run; for copying, which is quicker."""
    place = Path(os.environ[PREPARED])
    with InterProcessLock(place / "lock"):
        server = EmbeddedPostgres(place / "postgres")
        if not (place / "is_prepared").exists():
            with psycopg.connect(server.start(), autocommit=True) as conn:
                # Two thirds of all files, and nobody needs them.
                for name in ("template0", "template1"):
                    conn.execute(f"ALTER DATABASE {name} IS_TEMPLATE false".encode())
                    conn.execute(f"DROP DATABASE {name}".encode())
            server.stop()
            (place / "is_prepared").touch()
    return server.directory


@pytest.fixture
def place() -> Iterator[Path]:
    """A temporary directory for servers that a test starts itself.

    Not pytest's own: each run of pytest closes that again, in which root has let the user pgserver.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        yield Path(place)


@pytest.fixture
def directory(prepared_directory: Path, place: Path) -> Iterator[Path]:
    """A directory with an embedded Postgres, which is shut down at the end if it runs."""
    directory = place / "postgres"
    # With its owner, which is not the one of the test if that is root.
    subprocess.run(["cp", "-a", prepared_directory, directory], check=True)
    yield directory
    server = EmbeddedPostgres(directory)
    if server.is_running():
        server.shut_down()


@pytest.fixture
def own_server(directory: Path) -> Iterator[EmbeddedPostgres]:
    """A running server that a test may stop and start as it likes."""
    server = EmbeddedPostgres(directory)
    server.start()
    yield server
    server.stop()
