"""The tests' own scaffolding."""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psycopg
import pytest

from lesson_loader import Lesson, load_modules
from server import Databases, choose_server

TESTS = Path(__file__).parent


def test_a_given_server_comes_first() -> None:
    assert choose_server({"TEST_DATABASE_URL": "postgresql://h/d"}, lambda: True) == (
        "TEST_DATABASE_URL"
    )


def test_docker_comes_before_the_embedded_server() -> None:
    assert choose_server({}, lambda: True) == "Docker"


def test_without_docker_the_server_is_embedded() -> None:
    assert choose_server({"TEST_DATABASE_URL": ""}, lambda: False) == "embedded"


class Engine(BaseHTTPRequestHandler):
    """A Docker engine that answers, but has no image and no way to get one."""

    def do_GET(self) -> None:
        known = {"_ping": b"OK", "version": b'{"ApiVersion": "1.50"}'}
        content = known.get(self.path.rpartition("/")[2])
        self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(content or b'{"message": "no such host:\\nregistry"}')

    do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_docker_that_cannot_get_the_image_is_one_line_and_the_server_is_embedded() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as engine:
        Thread(target=engine.serve_forever, daemon=True).start()
        end = run_one_test(docker=f"tcp://127.0.0.1:{engine.server_port}")
        engine.shutdown()
    assert end.returncode == 0, end
    (line,) = [line for line in end.stderr.splitlines() if "Docker" in line]
    assert "no such host: registry" in line
    assert "postgres: embedded" in end.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_without_any_server_there_is_one_clear_line() -> None:
    # Too little for the files of a Postgres.
    end = run_one_test("sh", "-c", 'ulimit -f 100; exec "$@"', "sh", docker="unix:///nowhere")
    assert end.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = filter(None, end.stderr.splitlines())
    assert line.startswith("ERROR: ")
    assert "embedded Postgres" in line


def run_one_test(*wrapper: str, docker: str) -> subprocess.CompletedProcess[str]:
    """Run pytest, which has to find or start a server, with the Docker at this address."""
    test = [f"{TESTS}/test_scaffolding.py", "-k", "comes_first"]
    return subprocess.run(
        [*wrapper, sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", *test],
        cwd=TESTS.parent,
        env=os.environ | {"DOCKER_HOST": docker, "TEST_DATABASE_URL": ""},
        capture_output=True,
        text=True,
    )


def test_a_database_is_emptied_for_the_next_test(server_url: str) -> None:
    databases = Databases(server_url)
    with databases.created:
        with databases.lend() as url:
            session = psycopg.connect(url, autocommit=True)
            session.execute("CREATE SCHEMA lesson_02 CREATE TABLE tasks (id INT)")
        with databases.lend() as again, psycopg.connect(again) as conn:
            assert again == url
            schemas = conn.execute("SELECT FROM pg_namespace WHERE nspname = 'lesson_02'")
            assert not schemas.fetchall()
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE notes (note TEXT)",
        "CREATE FUNCTION one() RETURNS INT LANGUAGE sql AS 'SELECT 1'",
        "DO $$ BEGIN EXECUTE format("
        "'ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); END $$",
    ],
)
def test_a_database_that_is_not_as_good_as_new_is_not_lent_again(
    server_url: str, statement: str
) -> None:
    databases = Databases(server_url)
    with databases.created:
        with databases.lend() as url, psycopg.connect(url, autocommit=True) as conn:
            conn.execute(statement.encode())
        with databases.lend() as another:
            assert another != url


def make_lesson(parent: Path, name: str) -> Path:
    path = parent / name
    path.mkdir()
    (path / "models.py").write_text(f"NAME = {name!r}\n")
    (path / "worker.py").write_text("from models import NAME\n")
    return path


def test_each_lesson_has_modules_of_its_own(tmp_path: Path) -> None:
    before = list(sys.path), set(sys.modules)
    four, five = [Lesson(make_lesson(tmp_path, name)) for name in ("04-x", "05-x")]
    assert (four.number, four.worker.NAME) == (4, "04-x")
    assert (five.number, five.worker.NAME) == (5, "05-x")
    assert (list(sys.path), set(sys.modules)) == before
    with pytest.raises(AttributeError, match=r"04-x has no event_log\.py"):
        _ = four.event_log


def test_a_lesson_may_be_loaded_again(tmp_path: Path) -> None:
    path = make_lesson(tmp_path, "04-x")
    load_modules(path)["models"].NAME = "changed"  # type: ignore[attr-defined]
    assert load_modules(path)["worker"].NAME == "04-x"


SAMPLE = """
import pytest

@pytest.mark.since(4)
@pytest.mark.flaw(3, reason="named in its README")
def test_holds(lesson):
    assert lesson.number >= 4

@pytest.mark.flaw(3, reason="never")
@pytest.mark.since(4)
def test_has_no_flaw(lesson):
    pass

@pytest.mark.since(5)
def test_comes_later(lesson):
    pass

@pytest.mark.until(2)
def test_came_before(lesson):
    pass

def test_of_something_else():
    pass
"""


def run_sample(directory: Path, *lessons: Path) -> dict[str, str]:
    """Run the sample tests on these lessons; return the outcome of each."""
    (directory / "test_sample.py").write_text(SAMPLE)
    arguments = [f"--lesson={path}" for path in lessons]
    config = TESTS.parent / "pyproject.toml"
    end = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n0",
            "-rA",
            "-p",
            "conftest",
            "-c",
            config,
            *arguments,
            ".",
        ],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(TESTS), "PYTEST_ADDOPTS": "-p no:cacheprovider"},
        capture_output=True,
        text=True,
    )
    summary = end.stdout.partition("short test summary info")[2]
    # "PASSED path/of/file::name - reason", and the path may have spaces.
    lines = [line.partition("::") for line in summary.splitlines() if "::" in line]
    return {after.split()[0]: before.split()[0] for before, _, after in lines}


def test_which_tests_run_on_a_lesson(tmp_path: Path) -> None:
    directory = tmp_path / "wherever it is, ümlaut or not"
    directory.mkdir()
    paths = [make_lesson(directory, name) for name in ("02-a", "03-b", "04-c")]
    # Of what does not hold for a lesson nothing is to be seen, not even as skipped.
    assert run_sample(directory, *paths) == {
        "test_came_before[02-a]": "PASSED",
        "test_holds[03-b]": "XFAIL",
        "test_holds[04-c]": "PASSED",
        "test_has_no_flaw[03-b]": "FAILED",
        "test_has_no_flaw[04-c]": "PASSED",
    }


@pytest.mark.parametrize("name", ["04-nowhere", "my-copy"])
def test_a_directory_that_is_no_lesson(name: str, tmp_path: Path) -> None:
    make_lesson(tmp_path, "my-copy")
    end = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "--lesson", tmp_path / name],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert end.returncode == pytest.ExitCode.USAGE_ERROR
    assert end.stderr.startswith("ERROR: --lesson")
