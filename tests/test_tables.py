"""The tables: columns, types, defaults, and a claim that finished tasks cost nothing."""

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from helpers import QUEUE, enqueue, execute, get_task
from lesson_loader import LESSONS
from shared import Connection, Pool, load_queries

# Section 4 of the design: column, type, nullable, does it have a default? By the first lesson.
# The types of the two timeouts are domains, of INTERVAL and of TIMESTAMPTZ.
TASKS = {
    2: [
        ("id", "bigint", False, True),
        ("inserted_at", "timestamp with time zone", False, True),
        ("queue", "text", False, False),
        ("task_name", "text", False, False),
        ("input", "jsonb", False, False),
        ("output", "jsonb", True, False),
        ("status", "task_status", False, True),
        ("finished_at", "timestamp with time zone", True, False),
    ],
    4: [
        ("retry_count", "integer", False, True),
        ("max_retries", "integer", False, True),
        ("timeout", "timeout_interval", True, False),
        ("schedule_timeout_at", "timeout_time", True, False),
        ("priority", "integer", False, True),
        ("worker_id", "uuid", True, False),
        ("attempt", "integer", False, True),
        ("lost_count", "integer", False, True),
    ],
    5: [("is_durable", "boolean", False, True)],
}

WORKERS = [
    ("id", "uuid", False),
    ("display_name", "text", False),
    ("last_heartbeat_at", "timestamp with time zone", False),
]


async def columns_of(pool: Pool, table: str) -> list[tuple[str, str, bool, bool]]:
    rows = await execute(
        pool,
        """
        SELECT attname, format_type(atttypid, NULL) AS type, NOT attnotnull AS nullable,
               atthasdef OR attidentity <> '' AS has_default
        FROM pg_attribute
        WHERE attrelid = %s::regclass
          AND attnum > 0
          AND NOT attisdropped
        ORDER BY attnum
        """,
        table,
    )
    return [(row["attname"], row["type"], row["nullable"], row["has_default"]) for row in rows]


@pytest.mark.since(2)
async def test_tasks_has_the_columns_of_its_lesson(lesson: Any, pool: Pool) -> None:
    expected = [column for since in TASKS if since <= lesson.number for column in TASKS[since]]
    assert await columns_of(pool, "tasks") == expected


@pytest.mark.since(2)
async def test_the_model_has_the_columns_in_their_order(lesson: Any, pool: Pool) -> None:
    names = [name for name, *_ in await columns_of(pool, "tasks")]
    assert [field.name for field in fields(lesson.models.Task)] == names


@pytest.mark.since(4)
async def test_workers_has_three_columns(lesson: Any, pool: Pool) -> None:
    columns = await columns_of(pool, "workers")
    assert [(name, type, nullable) for name, type, nullable, _ in columns] == WORKERS


@pytest.mark.since(2)
async def test_queue_task_name_and_input_make_a_valid_task(lesson: Any, pool: Pool) -> None:
    row = await get_task(pool, await enqueue(pool, "work", {"a": 1}))
    expected: dict[str, Any] = {
        "queue": QUEUE,
        "task_name": "work",
        "input": {"a": 1},
        "status": "QUEUED",
    }
    if lesson.number >= 4:
        counts = {"retry_count": 0, "max_retries": 0, "attempt": 0, "lost_count": 0}
        expected |= counts | {"priority": 1}
    if lesson.number >= 5:
        expected["is_durable"] = False
    assert {name: value for name, value in row.items() if value is not None} == {
        **expected,
        "id": row["id"],
        "inserted_at": row["inserted_at"],
    }


@pytest.mark.since(2)
async def test_a_task_without_queue_task_name_or_input_is_refused(lesson: Any, pool: Pool) -> None:
    for columns in ("queue, task_name", "queue, input", "task_name, input"):
        with pytest.raises(psycopg.errors.NotNullViolation):
            await execute(pool, f"INSERT INTO tasks ({columns}) VALUES ('{{}}', '{{}}')")


@pytest.mark.since(2)
async def test_tasks_get_ids_in_order(lesson: Any, pool: Pool) -> None:
    ids = [await enqueue(pool, "work") for _ in range(3)]
    assert ids == sorted(set(ids))


def test_schema_sql_works_alone_on_an_empty_database(lesson: Any, database: str) -> None:
    """As `psql -f schema.sql` does it: in the schema public, all in one go."""
    script = (lesson.path / "schema.sql").read_bytes()
    with psycopg.connect(database) as conn:
        conn.execute(script)
        tables = conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert ("greetings" if lesson.number == 1 else "tasks",) in tables.fetchall()


@pytest.mark.parametrize("name", ["05-durable-event-log", "06-tracking-non-determinism"])
def test_the_worker_and_its_queries_are_those_of_lesson_04(name: str) -> None:
    """Or tests marked as only(4, 7) would miss something."""
    lesson_04, later = LESSONS / "04-task-queue-improvements", LESSONS / name
    assert (later / "worker.py").read_bytes() == (lesson_04 / "worker.py").read_bytes()
    old, new = load_queries(lesson_04), load_queries(later)
    for query in set(old.available_queries) - {"create_task"}:  # which has is_durable now
        assert getattr(new, query).sql == getattr(old, query).sql


def scans_of_tasks(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of a plan that read rows of tasks from the table or an index."""
    if plan.get("Relation Name") == "tasks" and "Scan" in plan["Node Type"]:
        yield plan
    for child in plan.get("Plans", []):
        yield from scans_of_tasks(child)


async def explain_claim(conn: Connection, lesson: Any, queries: Any) -> dict[str, Any]:
    """The plan of the lesson's claim of 10 tasks, with actual figures."""
    values = {"queue": QUEUE, "limit": 10, "worker_id": uuid4(), "is_durable": False}
    statement = f"EXPLAIN (ANALYZE, FORMAT JSON) {queries.poll_tasks.sql}"
    row = await (await conn.execute(statement.encode(), values)).fetchone()
    assert row
    (plan,) = row.values()
    result: dict[str, Any] = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
    return result


@pytest.mark.since(2)
@pytest.mark.only(2, 4, 7)  # the lessons with an index of their own
async def test_finished_tasks_cost_the_claim_nothing(lesson: Any, pool: Pool, queries: Any) -> None:
    """The claim reads as many rows as it returns, and not one of 200,000 finished ones."""
    async with pool.connection() as conn:
        for status, rows in [("COMPLETED", 200_000), ("QUEUED", 1_000)]:
            await conn.execute(
                """
                INSERT INTO tasks (queue, task_name, input, status)
                SELECT %s, 'work', '{}', %s
                FROM generate_series(1, %s)
                """,
                [QUEUE, status, rows],
            )
        await conn.execute("ANALYZE tasks")
        scans = list(scans_of_tasks(await explain_claim(conn, lesson, queries)))
    first, *by_key = scans
    assert "Index" in first["Node Type"], first
    assert first["Actual Rows"] + first.get("Rows Removed by Filter", 0) == 10, first
    # The update finds the claimed rows again by their primary keys, or in one scan at worst.
    read = sum(scan["Actual Rows"] * scan["Actual Loops"] for scan in by_key)
    assert all("Seq" not in scan["Node Type"] for scan in by_key), by_key
    assert read <= 10, by_key
