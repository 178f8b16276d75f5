"""The embedded Postgres: started by the first user, stopped by the last, in spite of crashes."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest

from helpers import wait_for
from programs import outcome, start_program
from shared import EmbeddedPostgres

pytestmark = pytest.mark.as_root

USER = """
import os, psycopg
from pathlib import Path

if len(sys.argv) > 2:
    # Only now, since the interpreter may be where that user may not go.
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
url = EmbeddedPostgres(Path(sys.argv[1])).start()
psycopg.connect(url).close()
print(url, flush=True)
sys.stdin.read()
"""


class User:
    """A program that uses the server in a directory until it is told to end."""

    def __init__(self, directory: Path, user: int = 0) -> None:
        self.process = start_program(USER, directory, *([str(user)] if user else []))
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.process.communicate()

    def end(self) -> str:
        """Let it end by itself; return what it wrote to stderr."""
        end = outcome(self.process)
        assert end.status == 0
        return end.stderr

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def make_table(url: str) -> None:
    with psycopg.connect(url) as conn:
        conn.execute("CREATE TABLE kept ()")


def has_table(url: str) -> bool:
    with psycopg.connect(url) as conn:
        row = conn.execute("SELECT to_regclass('kept') IS NOT NULL").fetchone()
    assert row
    return bool(row[0])


def test_the_data_is_kept_and_the_server_is_not(directory: Path) -> None:
    server = EmbeddedPostgres(directory)
    make_table(server.start())
    server.stop()
    assert not server.is_running()
    assert has_table(server.start())
    server.stop()


def test_a_program_leaves_no_server_and_says_nothing(directory: Path) -> None:
    for _ in range(2):
        assert User(directory).end() == ""
        assert not EmbeddedPostgres(directory).is_running()


def test_the_last_user_stops_it(directory: Path) -> None:
    first = User(directory)
    second = User(directory)
    assert first.url == second.url
    first.end()
    psycopg.connect(second.url).close()
    second.end()
    assert not EmbeddedPostgres(directory).is_running()


def test_users_that_come_at_once_create_one_server(place: Path) -> None:
    programs = [start_program(USER, place / "new") for _ in range(3)]
    ends = [outcome(program) for program in programs]
    assert [end.status for end in ends] == [0, 0, 0], ends


def test_the_user_after_a_killed_one_cleans_up(directory: Path) -> None:
    User(directory).kill()
    server = EmbeddedPostgres(directory)
    assert server.is_running()
    User(directory).end()
    assert not server.is_running()


def test_a_killed_user_does_not_stop_it_for_others(directory: Path) -> None:
    killed, other = User(directory), User(directory)
    killed.kill()
    psycopg.connect(other.url).close()
    other.end()
    assert not EmbeddedPostgres(directory).is_running()


async def test_it_recovers_from_a_crash_of_the_server(directory: Path) -> None:
    server = EmbeddedPostgres(directory)
    make_table(server.start())
    process = psutil.Process(int(server.pid_file_lines()[0]))
    processes = [process, *process.children()]
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it may end by itself, since the server is gone
            process.kill()
    # They may remain as zombies, where nobody waits for orphans.
    await wait_for(
        lambda: all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes),
        "all processes of the server are gone",
    )
    assert has_table(server.start())
    server.stop()


@pytest.mark.parametrize("content", ["{pid}\n/elsewhere\n0\n5432\n/x\n\n1 2\nready\n", "", "x"])
def test_a_stale_pid_file_does_not_matter(content: str, directory: Path) -> None:
    server = EmbeddedPostgres(directory)
    make_table(server.start())
    server.stop()
    # As root: of a process of the server's user, which Postgres would take for another server.
    account = {"user": server.account()["user"]} if server.account() else {}
    with subprocess.Popen(["sleep", "60"], **account) as other:
        server.pid_file.write_text(content.format(pid=other.pid))
        assert not server.is_running()
        assert has_table(server.start())
        server.stop()
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("name", ["x" * 120, "it's 100% $HOME"])
def test_any_path_will_do(name: str, directory: Path) -> None:
    server = EmbeddedPostgres(directory.rename(directory.with_name(name)))
    url = server.start()
    psycopg.connect(url).close()
    socket_directory = Path(server.pid_file_lines()[4])
    assert socket_directory.stat().st_mode & 0o077 == 0  # private
    server.stop()
    assert socket_directory.exists() == (socket_directory == server.data)


def test_an_interrupted_creation_is_begun_anew(place: Path) -> None:
    directory = place / "it's new"
    program = start_program(USER, directory)
    while not list(directory.glob("init-*/*")):
        assert program.poll() is None
    program.kill()
    program.communicate()
    (directory / "data").mkdir(exist_ok=True)
    User(directory).end()
    server = EmbeddedPostgres(directory)
    # What the killed program had started goes on for a moment, and may write after the first time.
    for _ in range(20):
        if not list(directory.glob("init-*")):
            break
        server.start()
        server.stop()
    assert list(directory.glob("init-*")) == []


def test_a_copied_directory_is_another_server(directory: Path, place: Path) -> None:
    server = EmbeddedPostgres(directory)
    url = server.start()
    make_table(url)
    # A copy of a running server's files, its pid file among them.
    subprocess.run(["cp", "-a", directory, place / "copy"], check=True)
    copy = EmbeddedPostgres(place / "copy")
    copy_url = copy.start()
    assert copy_url != url
    assert has_table(copy_url)
    copy.stop()
    assert has_table(url)
    server.stop()


def test_unusable_data_is_one_clear_line(directory: Path) -> None:
    server = EmbeddedPostgres(directory)
    (server.data / "global" / "pg_control").unlink()
    end = outcome(start_program(USER, directory))
    line = end.sole_error_line()
    assert str(server.directory) in line
    assert "delete" in line


def test_data_of_another_version_is_one_clear_line(directory: Path) -> None:
    (directory / "data" / "PG_VERSION").write_text("9\n")
    assert "Postgres 9" in outcome(start_program(USER, directory)).sole_error_line()


INTERRUPTED = """
import asyncio, sys, psycopg
from pathlib import Path
from shared import EmbeddedPostgres, run

async def main():
    url = EmbeddedPostgres(Path(sys.argv[1])).start()
    try:
        await asyncio.sleep(60)
    finally:
        psycopg.connect(url).close()
        print("still there", flush=True)

run(main())
"""


def test_ctrl_c_does_not_stop_the_server_before_its_user(place: Path) -> None:
    directory = place / "new"
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, directory],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while not list(directory.glob("init-*/*")):
            assert process.poll() is None
        # In a terminal the signal reaches the program and all that it has started.
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "still there\n"), stderr
    assert not EmbeddedPostgres(directory).is_running()


@pytest.fixture
def ordinary_user() -> int:
    """The id of a user who is not root; if the tests run as root, another than their own."""
    if os.geteuid() != 0:
        return os.geteuid()
    import pwd

    return pwd.getpwnam("nobody").pw_uid


@pytest.fixture
def open_directory(place: Path, ordinary_user: int) -> Path:
    """A directory, yet to be made, in a place that belongs to that user."""
    os.chown(place, ordinary_user, -1)
    return place / "open"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be both")
def test_root_and_an_ordinary_user(ordinary_user: int, open_directory: Path) -> None:
    # First the user, then root in the directory of the user, then the user again.
    assert User(open_directory, user=ordinary_user).end() == ""
    assert User(open_directory).end() == ""
    assert User(open_directory, user=ordinary_user).end() == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what others may not enter")
def test_the_directory_of_another_user_is_one_clear_line(
    ordinary_user: int, directory: Path
) -> None:
    directory.parent.chmod(0o755)
    program = start_program(USER, directory, str(ordinary_user))
    assert "delete" in outcome(program).sole_error_line()
