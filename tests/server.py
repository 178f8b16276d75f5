"""The Postgres server of a test run, and a database of its own for each test."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal
from uuid import uuid4

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from shared import EmbeddedPostgres
from shared.embedded import forget_other_servers

Kind = Literal["TEST_DATABASE_URL", "Docker", "embedded"]
DESCRIPTIONS: dict[Kind, str] = {
    "TEST_DATABASE_URL": "the server at TEST_DATABASE_URL",
    "Docker": "a container (Docker answers, and TEST_DATABASE_URL is not set)",
    "embedded": "embedded, in a temporary directory (no TEST_DATABASE_URL, no Docker to use)",
}
IMAGE = "postgres:18"
# The tests kill Postgres, but not the machine it runs on. And several tests with twenty workers
# each may run at the same time.
SETTINGS = {"fsync": "off", "max_connections": "300"}


def docker_answers() -> bool:
    """Whether there is a Docker engine for testcontainers to use."""
    # A dependency of testcontainers, and slow to import.
    import docker  # type: ignore[import-untyped]

    try:
        docker.from_env(timeout=10).ping()
    except Exception:
        # No socket, no permission, no engine behind it, a misspelt DOCKER_HOST: all mean no.
        return False
    return True


def choose_server(environ: Mapping[str, str], docker: Callable[[], bool]) -> Kind:
    """Which server the tests are to use."""
    if environ.get("TEST_DATABASE_URL"):
        return "TEST_DATABASE_URL"
    return "Docker" if docker() else "embedded"


@contextmanager
def running_server(environ: Mapping[str, str]) -> Iterator[tuple[Kind, str]]:
    """The kind and the URL of a server, gone after the block if it was started for it."""
    kind = choose_server(environ, docker_answers)
    with ExitStack() as stack:
        if kind == "TEST_DATABASE_URL":
            url = environ["TEST_DATABASE_URL"]
        elif kind == "Docker":
            try:
                url = stack.enter_context(container())
            except Exception as error:
                reason = " ".join(str(error).split())
                print(
                    f"Docker answers, but cannot run {IMAGE}: {reason}; the tests use the embedded "
                    "Postgres.",
                    file=sys.stderr,
                )
                kind = "embedded"
        if kind == "embedded":
            url = stack.enter_context(embedded_server())
        yield kind, url


def configure(url: str) -> None:
    """Give a server the settings of the tests. It has to be restarted afterwards."""
    with psycopg.connect(url, autocommit=True) as conn:
        for name, value in SETTINGS.items():
            conn.execute(f"ALTER SYSTEM SET {name} = {value}".encode())


@contextmanager
def container() -> Iterator[str]:
    """The URL of a server in a container."""
    from testcontainers.community.postgres import PostgresContainer
    from testcontainers.core.wait_strategies import ExecWaitStrategy

    with PostgresContainer(IMAGE, driver=None) as container:
        configure(container.get_connection_url())
        container.get_wrapped_container().restart()
        ExecWaitStrategy(["pg_isready", "-h", "127.0.0.1"]).wait_until_ready(container)
        yield container.get_connection_url()  # its port is another one now


@contextmanager
def embedded_server() -> Iterator[str]:
    """The URL of an embedded server."""
    forget_other_servers()
    # On Windows a program that is just ending may still have a file open.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        server = EmbeddedPostgres(Path(directory))
        url = server.start()
        try:
            configure(url)
            server.restart()
            yield url
        finally:
            server.stop()


@contextmanager
def new_database(server_url: str, options: str = "") -> Iterator[str]:
    """The connection string of a new and empty database, which is dropped after the block.

    Options are those of CREATE DATABASE.
    """
    name = f"test_{uuid4().hex[:12]}"
    with psycopg.connect(server_url, autocommit=True) as conn:
        # template0 since nobody can be connected to it, which would make this fail.
        conn.execute(f"CREATE DATABASE {name} TEMPLATE template0 {options}".encode())
        try:
            yield make_conninfo(server_url, dbname=name)
        finally:
            if conn.broken:  # by a test that restarts the server
                conn = psycopg.connect(server_url, autocommit=True)
            drop_database(conn, name)


def drop_database(conn: psycopg.Connection, name: str) -> None:
    """Drop a database, and end the sessions in it, however long a busy machine takes for that."""
    deadline = time.monotonic() + 60
    while True:
        try:
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
            return
        except psycopg.errors.ObjectInUse:  # Postgres waits for five seconds
            if time.monotonic() > deadline:
                raise


class Databases:
    """Empty databases, lent to one test after the other.

    To empty one takes a tenth of the time that it takes to create and drop one.
    """

    def __init__(self, server_url: str) -> None:
        self.server_url = server_url
        self.created = ExitStack()
        self.empty: list[str] = []

    @contextmanager
    def lend(self) -> Iterator[str]:
        """The connection string of an empty database, for this block alone."""
        if not self.empty:
            self.empty.append(self.created.enter_context(new_database(self.server_url)))
        url = self.empty.pop()
        yield url
        if emptied(url):
            self.empty.append(url)


# Whatever is not as in a new database, other than schemas.
UNUSUAL = """
SELECT FROM pg_db_role_setting JOIN pg_database ON setdatabase = pg_database.oid
WHERE datname = current_database()
UNION ALL SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""
END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend'
    AND pid <> pg_backend_pid()
"""
SCHEMAS = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^(pg_.*|information_schema|public)$'"


def emptied(url: str) -> bool:
    """End the sessions of a database and drop its schemas. Whether it is as good as new then."""
    deadline = time.monotonic() + 30
    try:
        with psycopg.connect(url, autocommit=True) as conn:
            while conn.execute(END_OTHERS).fetchall():
                if time.monotonic() > deadline:  # somebody connects again and again
                    return False
                time.sleep(0.005)
            if conn.execute(UNUSUAL).fetchall():
                return False
            for row in conn.execute(SCHEMAS).fetchall():
                conn.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(*row)))
            return True
    except psycopg.Error:
        return False
