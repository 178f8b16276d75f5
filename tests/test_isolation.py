"""What stays apart: values from SQL, lessons from each other, the databases from other people."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from helpers import enqueue, execute, finished, make_worker, working
from lesson_loader import LAST, all_lessons, lesson_number
from shared import EmbeddedPostgres, Pool, open_pool
from shared.embedded import programs
from shared.schema import schema_name

COMPOSE = Path(__file__).parents[1] / "docker-compose.yml"

# What has a meaning in SQL, in psycopg, in aiosql or in Python's own formatting.
NASTY = ["'", '"', "''", "\\", "%", "%s", "%(id)s", "%%", ":id", "::", ";", "$$", "$1", "--", "/*"]
NASTY += ["{0}", "E'\\x", "\n", "'; DROP TABLE tasks; --", "$$; DROP TABLE tasks; $$"]
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
TEXTS = st.lists(st.sampled_from(NASTY) | CHARACTERS, max_size=8).map("".join)
VALUES = st.recursive(
    TEXTS | st.integers(-(2**70), 2**70) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
TASKS = st.dictionaries(TEXTS, VALUES, min_size=1, max_size=8)  # input by task_name
ALL_NASTY: dict[str, Any] = {text: {text: text} for text in NASTY}

few_examples = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


async def echo(input: Any) -> Any:
    return [input]


def worker_for(names: Any, lesson: Any, pool: Pool, queries: Any, *functions: Any) -> Any:
    """A worker that echoes the input of all tasks with these names."""
    worker = make_worker(lesson, pool, queries, *functions, POLL_INTERVAL=0.02)
    for name in names:
        worker.register(name, echo)
    return worker


@pytest.mark.since(2)
@pytest.mark.only(2, 4, LAST)
@few_examples
@example("'; DROP TABLE tasks; --", ALL_NASTY)
@given(TEXTS, TASKS)
async def test_names_inputs_and_outputs_are_never_sql(
    lesson: Any, pool: Pool, queries: Any, queue: str, tasks: dict[str, Any]
) -> None:
    ids = [await enqueue(pool, name, tasks[name], queue=queue) for name in tasks]
    async with working(worker_for(tasks, lesson, pool, queries), queue=queue):
        rows = [await finished(pool, id) for id in ids]
    found = [(row["queue"], row["task_name"], row["input"], row["output"]) for row in rows]
    assert found == [(queue, name, input, [input]) for name, input in tasks.items()]


@pytest.mark.since(7)
@pytest.mark.only(7, LAST)
@few_examples
@example("'; DROP TABLE tasks; --", ALL_NASTY)
@given(TEXTS, TASKS)
async def test_names_and_inputs_of_children_are_never_sql(
    lesson: Any, pool: Pool, queries: Any, queue: str, tasks: dict[str, Any]
) -> None:
    async def parent(context: Any, input: Any) -> Any:
        return [await context.run_task(name, input) for name, input in tasks.items()]

    id = await enqueue(pool, "parent", queue=queue, is_durable=True)
    async with working(worker_for(tasks, lesson, pool, queries, parent), queue=queue):
        row = await finished(pool, id)
    assert row["output"] == [[input] for input in tasks.values()]
    children = await execute(
        pool,
        """
        SELECT queue, task_name, input
        FROM durable_events
        JOIN tasks ON id = child_task_id
        WHERE task_id = %s
        ORDER BY event_id
        """,
        id,
    )
    assert [tuple(child.values()) for child in children] == [
        (queue, name, input) for name, input in tasks.items()
    ]


async def make_schemas(lessons: list[Path]) -> None:
    """The schemas of lessons, each with a task that is queued, if it has tasks."""
    for path in lessons:
        async with open_pool(path) as pool:
            if lesson_number(path) >= 2:
                await enqueue(pool, "nobody's", {})


def snapshot(database: str, except_schema: str) -> dict[str, Any]:
    """All schemas but this one: their relations, and the rows in those."""
    with psycopg.connect(database) as conn:
        relations = conn.execute(
            """
            SELECT nspname, relname, relkind, pg_class.oid
            FROM pg_namespace
            LEFT JOIN pg_class ON relnamespace = pg_namespace.oid
            WHERE nspname <> %s
              AND nspname !~ '^pg_|^information_schema$'
            ORDER BY nspname, relname
            """,
            [except_schema],
        ).fetchall()
        with_rows = [(schema, name) for schema, name, kind, _ in relations if kind in ("r", "S")]
        rows = {
            name: conn.execute(
                sql.SQL("SELECT * FROM {} ORDER BY 1").format(sql.Identifier(*name))
            ).fetchall()
            for name in with_rows
        }
    return {"relations": relations, "rows": rows}


@pytest.mark.only(1, 2, 7)
def test_a_program_touches_no_schema_but_its_own(lesson: Any, database: str) -> None:
    asyncio.run(make_schemas([p for p in all_lessons() if lesson_number(p) != lesson.number]))
    own = schema_name(lesson.path)
    before = snapshot(database, except_schema=own)
    assert before["rows"]
    program = subprocess.run(
        [sys.executable, "-B", lesson.path / "main.py"], capture_output=True, text=True
    )
    assert program.returncode == 0, program
    assert snapshot(database, except_schema=own) == before


@pytest.mark.as_root
@pytest.mark.skipif(sys.platform == "win32", reason="there it has to use TCP")
def test_the_embedded_server_listens_on_no_tcp_port(own_server: EmbeddedPostgres) -> None:
    postmaster = psutil.Process(int(own_server.pid_file_lines()[0]))
    for process in [postmaster, *postmaster.children()]:
        assert process.net_connections("inet") == []
    assert postmaster.net_connections("unix") != []  # so we would have seen it


@pytest.mark.as_root
@pytest.mark.skipif(sys.platform == "win32", reason="there it has neither mode bits nor sockets")
def test_the_embedded_servers_files_are_for_its_user_only(own_server: EmbeddedPostgres) -> None:
    assert own_server.data.stat().st_mode & 0o077 == 0
    assert (own_server.data / ".s.PGSQL.5432").is_socket()


@pytest.mark.as_root
@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root can try as another user"
)
def test_another_user_reaches_neither_files_nor_socket(own_server: EmbeddedPostgres) -> None:
    commands: list[list[str | Path]] = [
        ["cat", own_server.data / "PG_VERSION"],
        [programs() / "psql", own_server.url(), "-c", "SELECT 1"],
    ]
    import pwd

    nobody = pwd.getpwnam("nobody")
    for command in commands:
        assert subprocess.run(command).returncode == 0
        program = subprocess.run(
            command,
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
        )
        assert program.returncode != 0
        assert "Permission denied" in program.stderr


def test_the_database_in_docker_is_for_this_machine_only() -> None:
    lines = [line.partition("#")[0].strip() for line in COMPOSE.read_text().splitlines()]
    published = [line for line in lines if re.match(r'- "?[\d.:]*\d+"?$', line)]
    assert published
    for line in published:
        assert re.match(r'- "?127\.0\.0\.1:\d+:\d+"?$', line), line
    assert not any(line.startswith("network_mode") for line in lines)
