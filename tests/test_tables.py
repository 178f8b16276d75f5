"""The tables: columns, types, defaults, and a claim that finished tasks cost nothing."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from helpers import QUEUE, enqueue, execute, get_task
from lesson_loader import LAST, LESSONS
from shared import Connection, Pool, load_queries

# Section 5 of the design: column, type, nullable, does it have a default? By the first lesson.
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
        ("timeout", "interval", True, False),
        ("schedule_timeout_at", "timestamp with time zone", True, False),
        ("priority", "integer", False, True),
        ("worker_id", "uuid", True, False),
        ("attempt", "integer", False, True),
    ],
    7: [("is_durable", "boolean", False, True)],
    10: [("lost_count", "integer", False, True)],
    12: [("wake_at", "timestamp with time zone", True, False)],
    15: [("branch_id", "integer", False, True)],
}
# From lesson 10 on times and intervals are domains.
DOMAINS = {"interval": "readable_interval", "timestamp with time zone": "readable_time"}

FEW = pytest.mark.only(2, 4, 7, 10, 12, 15)  # the lessons in which these tables change

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
async def test_tasks_and_its_model_have_the_columns_of_their_lesson(
    lesson: Any, pool: Pool
) -> None:
    expected = [column for since in TASKS if since <= lesson.number for column in TASKS[since]]
    if lesson.number >= 10:
        expected = [
            (name, DOMAINS.get(type, type), nullable, has_default)
            for name, type, nullable, has_default in expected
        ]
    assert await columns_of(pool, "tasks") == expected
    names = [name for name, *_ in expected]
    assert [field.name for field in fields(lesson.models.Task)] == names, "in another order"


@pytest.mark.since(4)
@FEW
async def test_workers_has_three_columns(lesson: Any, pool: Pool) -> None:
    columns = await columns_of(pool, "workers")
    assert [(name, type, nullable) for name, type, nullable, _ in columns] == WORKERS


@pytest.mark.since(2)
@FEW
async def test_queue_task_name_and_input_make_a_valid_task(lesson: Any, pool: Pool) -> None:
    row = await get_task(pool, await enqueue(pool, "work", {"a": 1}))
    expected: dict[str, Any] = {
        "queue": QUEUE,
        "task_name": "work",
        "input": {"a": 1},
        "status": "QUEUED",
    }
    if lesson.number >= 4:
        expected |= {"retry_count": 0, "max_retries": 0, "attempt": 0, "priority": 1}
    if lesson.number >= 7:
        expected["is_durable"] = False
    if lesson.number >= 10:
        expected["lost_count"] = 0
    if lesson.number >= 15:
        expected["branch_id"] = 1
    assert {name: value for name, value in row.items() if value is not None} == {
        **expected,
        "id": row["id"],
        "inserted_at": row["inserted_at"],
    }


@pytest.mark.since(2)
@FEW
async def test_a_task_without_queue_task_name_or_input_is_refused(lesson: Any, pool: Pool) -> None:
    for columns in ("queue, task_name", "queue, input", "task_name, input"):
        with pytest.raises(psycopg.errors.NotNullViolation):
            await execute(pool, f"INSERT INTO tasks ({columns}) VALUES ('{{}}', '{{}}')")


@pytest.mark.since(2)
@FEW
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


# Or tests that do not run on a lesson, whose code is that of another, would miss something.
SAME_FILES = {
    "02 03": "models.py",
    "03 04": "slots.py",
    "04 05": "worker.py slots.py heartbeat.py",
    "05 06": "worker.py slots.py heartbeat.py",
    "06 07": "slots.py heartbeat.py",
    "07 08": "slots.py rerun.py event_log.py errors.py",
    "08 09": "slots.py heartbeat.py housekeeping.py children.py durable_context.py rerun.py "
    "event_log.py errors.py models.py",
    "09 10": "slots.py heartbeat.py children.py rerun.py event_log.py errors.py",
    "10 11": "heartbeat.py event_log.py errors.py call.py models.py",
    "11 12": "worker.py slots.py heartbeat.py children.py rerun.py event_log.py errors.py call.py "
    "notifications.py",
    "12 13": "heartbeat.py housekeeping.py children.py event_log.py errors.py models.py "
    "notifications.py",
    "13 14": "worker.py slots.py heartbeat.py housekeeping.py children.py event_log.py call.py "
    "models.py notifications.py",
    "14 15": "worker.py slots.py heartbeat.py housekeeping.py children.py durable_context.py "
    "errors.py call.py notifications.py signals.py",
    "15 16": "slots.py heartbeat.py housekeeping.py rerun.py event_log.py errors.py call.py "
    "models.py notifications.py signals.py",
}
# Queries that are not what they are in the lesson before.
CHANGED_QUERIES = {
    "05": "",
    "06": "append_event",
    "09": "",
    "10": "requeue_lost_tasks reset_tasks",
    "11": "create_task",
    "12": "abandon_tasks reset_tasks",
    "13": "abandon_tasks lock_children notify wake_tasks",
    "14": "",
    "15": "append_event get_event get_events lock_children lock_failed_child",
    "16": "",
}
OF_DEMOS = {"create_payment", "get_payments", "get_waits"}


def path_of(number: str) -> Path:
    (path,) = LESSONS.glob(f"{number}-*")
    return path


@pytest.mark.parametrize("numbers", SAME_FILES)
def test_files_that_are_said_to_be_the_same_are_the_same(numbers: str) -> None:
    one, other = map(path_of, numbers.split())
    for name in SAME_FILES[numbers].split():
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("number", CHANGED_QUERIES)
def test_queries_that_are_said_to_be_the_same_are_the_same(number: str) -> None:
    before, after = (load_queries(path_of(f"{n:02}")) for n in (int(number) - 1, int(number)))
    in_both = set(before.available_queries) & set(after.available_queries) - OF_DEMOS
    changed = {
        name
        for name in in_both
        if getattr(after, name).sql != getattr(before, name).sql and not name.endswith("_cursor")
    }
    assert changed == set(CHANGED_QUERIES[number].split())


def scans_of_tasks(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of a plan that read rows of tasks from the table or an index."""
    if plan.get("Relation Name") == "tasks" and "Scan" in plan["Node Type"]:
        yield plan
    for child in plan.get("Plans", []):
        yield from scans_of_tasks(child)


async def explain_claim(conn: Connection, lesson: Any, queries: Any) -> dict[str, Any]:
    """The plan of the lesson's claim of 10 tasks, with actual figures."""
    worker_id = uuid4()
    if lesson.number >= 4:
        await conn.execute("INSERT INTO workers (id, display_name) VALUES (%s, 'w')", [worker_id])
    values = {
        "queue": QUEUE,
        "task_names": ["work", "other work"],
        "limit": 10,
        "worker_id": worker_id,
        "is_durable": False,
        "inactive_after": 3600,
    }
    statement = f"EXPLAIN (ANALYZE, FORMAT JSON) {queries.poll_tasks.sql}"
    row = await (await conn.execute(statement.encode(), values)).fetchone()
    assert row
    (plan,) = row.values()
    result: dict[str, Any] = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
    return result


@pytest.mark.since(3)
@pytest.mark.only(3, 4, LAST)  # lessons with an index, or a claim, of their own
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
