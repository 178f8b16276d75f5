"""Durable sleep: a timer is a child task that no worker runs, so nothing that happens to workers,
before, meanwhile or when it is due, makes it longer or has it begin anew.
"""

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from durable_helpers import Lab
from helpers import (
    enqueue,
    execute,
    finished,
    get_task,
    kill,
    set_globals,
    statuses,
    wait_for,
    wait_for_status,
    worker_process,
    working,
)
from lesson_loader import LAST
from shared import Pool, open_connection

pytestmark = [pytest.mark.since(12), pytest.mark.only(12, LAST)]
SCRIPT = Path(__file__).parent / "waiting_process.py"
HOUR = timedelta(hours=1)
ONCE = pytest.mark.only(12)  # what the next lesson does not touch


@pytest.fixture
def lab(lesson: Any, pool: Pool, queries: Any) -> Lab:
    lab = Lab(lesson, pool, queries)
    # Nobody here is taken for dead because the machine was busy.
    set_globals(lesson, {"INACTIVE_AFTER": 60.0})
    return lab


async def sleepers(pool: Pool) -> list[dict[str, Any]]:
    """The rows of all sleeps, with how long they are to last in seconds, as Postgres counts."""
    return await execute(
        pool,
        """
        SELECT *, extract(epoch FROM wake_at - inserted_at)::float AS seconds
        FROM tasks
        WHERE wake_at IS NOT NULL
        ORDER BY id
        """,
    )


async def wait_for_sleeper(pool: Pool) -> dict[str, Any]:
    """Wait until there is a sleep; return the first."""
    rows: list[dict[str, Any]] = await wait_for(lambda: sleepers(pool), "a sleep has begun")
    return rows[0]


async def make_sleepers(lab: Lab, count: int, wake_at: str, per_parent: int = 1) -> None:
    """Parents that run nowhere, and their sleeps; `wake_at` is an SQL expression over n."""
    column, value = lab.of_branch
    async with lab.pool.connection() as conn:
        await conn.execute(
            f"""
            WITH parents AS (
                INSERT INTO tasks (queue, task_name, input, is_durable, status, attempt, worker_id)
                SELECT 'elsewhere', 'parent', '{{}}', true, 'RUNNING', 1, gen_random_uuid()
                FROM generate_series(1, {count // per_parent})
                RETURNING id
            ), children AS (
                INSERT INTO tasks (queue, task_name, input, output, status, wake_at)
                SELECT 'elsewhere', 'sleep', '{{}}', 'null', 'SLEEPING', {wake_at}
                FROM generate_series(1, {count}) AS n
                RETURNING id
            )
            INSERT INTO durable_events (task_id, event_id, kind, key, child_task_id{column})
            SELECT
                parent.id, (child.n - 1) / {count // per_parent} + 1, 'SLEEP_STARTED', '', child.id
                {value}
            FROM (SELECT id, row_number() OVER () AS n FROM children) AS child
            JOIN (SELECT id, row_number() OVER () AS n FROM parents) AS parent
              ON parent.n = (child.n - 1) % {count // per_parent} + 1
            """.encode()
        )


# The row


async def test_a_sleep_is_a_child_task_that_nobody_runs(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        return [await context.sleep(timedelta(seconds=0.5)), await context.run_task("step", 1)]

    async def sleep(input: Any) -> None:
        """A task of this name has nothing to do with it."""
        lab.calls["sleep"] += 1

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent, sleep)):
        row = await wait_for_sleeper(lab.pool)
        assert (row["task_name"], row["queue"], row["seconds"]) == ("sleep", "q", 0.5)
        assert (await finished(lab.pool, id))["output"] == [None, 1]
    slept, step = await lab.children(id)
    assert (slept["status"], slept["attempt"], slept["worker_id"]) == ("COMPLETED", 0, None)
    assert slept["finished_at"] >= slept["wake_at"]
    assert step["inserted_at"] >= slept["finished_at"]
    assert lab.calls == {"1": 1}
    kinds = await execute(lab.pool, "SELECT kind FROM durable_events ORDER BY event_id")
    assert [row["kind"] for row in kinds] == ["SLEEP_STARTED", "TASK_STARTED"]


@ONCE
async def test_event_and_sleep_are_written_in_one_transaction(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> None:
        await context.sleep(timedelta(0))

    await lab.enqueue(parent)
    async with working(lab.worker(parent)):
        await wait_for_sleeper(lab.pool)
        rows = await execute(
            lab.pool,
            """
            SELECT sleep.xmin = event.xmin AS at_once
            FROM durable_events AS event
            JOIN tasks AS sleep ON sleep.id = event.child_task_id
            WHERE sleep.status = 'SLEEPING'
            """,
        )
        await wait_for(lambda: is_all_over(lab.pool), "it is over")
    assert rows in ([{"at_once": True}], [])  # it may have been woken before


async def is_all_over(pool: Pool) -> bool:
    return set(await statuses(pool)) <= {"COMPLETED", "FAILED"}


@ONCE
@pytest.mark.parametrize(
    ("delay", "seconds"),
    [
        (timedelta(0), 0),
        (timedelta(microseconds=1), 0.000001),
        (timedelta(days=-1), 0),
        (timedelta.min, 0),
        (timedelta(days=365_000), 365_000 * 86_400),
    ],
    ids=["zero", "a microsecond", "negative", "as negative as can be", "the longest"],
)
async def test_any_delay_up_to_a_thousand_years_is_recorded(
    lab: Lab, delay: timedelta, seconds: float
) -> None:
    async def parent(context: Any, input: Any) -> None:
        await context.sleep(delay)

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent)):
        assert (await wait_for_sleeper(lab.pool))["seconds"] == seconds
        if seconds < 1:
            assert (await finished(lab.pool, id))["status"] == "COMPLETED"
    assert len(await lab.children(id)) == 1


@ONCE
@pytest.mark.parametrize(
    ("delay", "error", "text"),
    [
        (5, TypeError, "a timedelta is needed, not 5"),
        (None, TypeError, "a timedelta is needed, not None"),
        ("1 hour", TypeError, "a timedelta is needed, not '1 hour'"),
        (float("nan"), TypeError, "a timedelta is needed, not nan"),
        (timedelta(days=365_000, seconds=1), ValueError, "the longest sleep is 365,000 days"),
        (timedelta.max, ValueError, "the longest sleep is 365,000 days"),
    ],
)
async def test_what_is_no_delay_is_refused_at_the_call_and_takes_no_event_id(
    lab: Lab, delay: Any, error: type[Exception], text: str
) -> None:
    async def parent(context: Any, input: Any) -> Any:
        with pytest.raises(error, match=text):
            context.sleep(delay)  # not awaited
        return await context.run_task("step", 1)

    row = await lab.run(parent)
    assert (row["status"], row["output"]) == ("COMPLETED", 1)
    assert [child["event_id"] for child in await lab.children(row["id"])] == [1]


@ONCE
async def test_a_day_has_24_hours_in_every_time_zone(lab: Lab) -> None:
    """Two in the year would have an hour more or less, were days counted in a zone."""
    days = range(30, 360, 30)  # one of these ends on the other side of a change, on any day
    async with await open_connection(lab.pool) as conn:
        await conn.execute("SET TimeZone = 'America/New_York'")
        for n in days:
            await lab.queries.create_sleep(
                conn, queue="q", input=Jsonb(None), seconds=timedelta(days=n).total_seconds()
            )
    # Compared in SQL: Python forgets the change between two times of one zone.
    assert [row["seconds"] for row in await sleepers(lab.pool)] == [n * 86_400 for n in days]


@ONCE
async def test_a_time_that_python_cannot_read_is_refused(lab: Lab) -> None:
    """It would end every worker that wakes the sleeper, or asks for it."""
    for time in ("infinity", "-infinity"):
        with pytest.raises(psycopg.errors.CheckViolation):
            await enqueue(lab.pool, "sleep", wake_at=time)


# Attempts


async def test_each_attempt_has_the_same_time_to_wake_up(lab: Lab) -> None:
    """Also after a release that asks for another delay, shorter or longer."""
    seen: list[Any] = []

    async def parent(context: Any, input: Any) -> str:
        delay = {1: 3600, 2: 0, 3: 7200}[context.attempt]
        sleep = asyncio.ensure_future(context.sleep(timedelta(seconds=delay)))
        if context.attempt < 3:
            seen.append((await wait_for_sleeper(lab.pool))["wake_at"])
            await asyncio.sleep(0.3)  # time to wake it, if it took the second delay
            assert not sleep.done()
            raise OSError("again")
        await execute(lab.pool, "UPDATE tasks SET wake_at = now() WHERE status = 'SLEEPING'")
        await sleep
        return "awake"

    id = await lab.enqueue(parent, max_retries=2)
    if lab.lesson.number >= 13:  # it does not only wait
        set_globals(lab.lesson, {"SUSPEND_AFTER": 60.0})
    async with working(lab.worker(parent)):
        row = await finished(lab.pool, id)
    assert (row["output"], row["attempt"]) == ("awake", 3)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert len(await sleepers(lab.pool)) == 1


async def test_sleeps_and_steps_at_once(lab: Lab) -> None:
    """They share the numbers of events, and none waits for the others."""
    order: list[str] = []

    async def branch(name: str, call: Any) -> Any:
        result = await call
        order.append(name)
        return result

    async def parent(context: Any, input: Any) -> Any:
        return await asyncio.gather(
            branch("long", context.sleep(HOUR)),
            branch("step", context.run_task("step", 2)),
            branch("short", context.sleep(timedelta(seconds=0.2))),
        )

    set_globals(lab.lesson, {"SUSPEND_AFTER": 60.0})
    id = await lab.enqueue(parent)
    async with working(lab.worker(parent)):
        await wait_for(lambda: sorted(order) == ["short", "step"], "two of them are over")
        await execute(lab.pool, "UPDATE tasks SET wake_at = now() WHERE status = 'SLEEPING'")
        row = await finished(lab.pool, id)
    assert row["output"] == [None, 2, None]
    kinds = {child["event_id"]: child["task_name"] for child in await lab.children(row["id"])}
    assert kinds == {1: "sleep", 2: "step", 3: "sleep"}
    assert order[2:] == ["long"]
    assert lab.calls == {"2": 1}


@ONCE
@pytest.mark.parametrize("sleeps_first", [False, True])
async def test_a_sleep_in_the_place_of_a_task_is_non_determinism(
    lab: Lab, sleeps_first: bool
) -> None:
    async def parent(context: Any, input: Any) -> None:
        if sleeps_first == (context.attempt == 1):
            await context.sleep(timedelta(0))
        else:
            await context.run_task("sleep", None)
        raise OSError("again")

    async def sleep(input: Any) -> None:
        pass

    row = await lab.run(parent, sleep, max_retries=5)
    assert (row["status"], row["attempt"]) == ("FAILED", 2)
    asked = ["recorded is TASK_STARTED 'sleep'", "asked for is SLEEP_STARTED 'sleep'"]
    if sleeps_first:
        asked = ["recorded is SLEEP_STARTED 'sleep'", "asked for is TASK_STARTED 'sleep'"]
    assert all(text in row["output"]["error"] for text in asked), row["output"]


@ONCE
async def test_an_attempt_that_has_ended_cannot_go_to_sleep(lab: Lab) -> None:
    errors: list[str] = []

    async def parent(context: Any, input: Any) -> Any:
        try:
            await asyncio.sleep(3600)
        finally:
            try:
                context.sleep(HOUR).close()
            except RuntimeError as error:
                errors.append(str(error))

    row = await lab.run(parent, timeout=timedelta(seconds=0.2))
    assert row["output"]["error"].endswith("timed out after 0:00:00.200000")
    assert errors == [f"attempt 1 of task {row['id']} has ended"]
    assert await sleepers(lab.pool) == []


# Workers that die


def input_of(directory: Path, seconds: float) -> dict[str, Any]:
    return {"file": str(directory / "notes"), "seconds": seconds}


def notes(directory: Path) -> list[str]:
    """Who did what: in the order of their beginnings, 0 for the first process."""
    lines = [line.split() for line in (directory / "notes").read_text().splitlines()]
    pids = list(dict.fromkeys(pid for pid, _ in lines))
    return [f"{pids.index(pid)} {word}" for pid, word in lines]


@ONCE
async def test_killed_before_the_commit_there_is_neither_event_nor_sleep(
    lab: Lab, tmp_path: Path
) -> None:
    """Its worker dies between the INSERT of the sleep and that of the event."""
    await execute(
        lab.pool,
        """
        CREATE FUNCTION stall() RETURNS TRIGGER AS $$
        BEGIN
            PERFORM pg_advisory_xact_lock(1);
            RETURN NEW;
        END
        $$ LANGUAGE plpgsql
        """,
    )
    on_event = "CREATE TRIGGER stall BEFORE INSERT ON durable_events FOR EACH ROW"
    await execute(lab.pool, f"{on_event} EXECUTE FUNCTION stall()")

    async def stalls() -> bool:
        sql = """
            SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = database
            WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted
        """
        return (await conn.execute(sql.encode())).rowcount == 1

    id = await enqueue(lab.pool, "sleepy", input_of(tmp_path, 0.2), is_durable=True)
    async with await open_connection(lab.pool) as conn:
        await conn.execute("SELECT pg_advisory_lock(1)")
        async with worker_process(lab.lesson, script=SCRIPT) as victim:
            await wait_for(stalls, "the sleep is written, and the event is not")
            victim.kill()
            await victim.wait()
    await execute(lab.pool, "DROP TRIGGER stall ON durable_events")
    assert await sleepers(lab.pool) == []
    assert await lab.children(id) == []
    async with worker_process(lab.lesson, script=SCRIPT):
        row = await finished(lab.pool, id)
    assert row["status"] == "COMPLETED"
    assert len(await sleepers(lab.pool)) == 1
    assert notes(tmp_path)[:2] == ["0 begins", "1 begins"]


async def test_killed_after_the_commit_it_does_not_sleep_anew(lab: Lab, tmp_path: Path) -> None:
    id = await enqueue(lab.pool, "sleepy", input_of(tmp_path, 3), is_durable=True)
    async with worker_process(lab.lesson, script=SCRIPT) as victim:
        before = await wait_for_sleeper(lab.pool)
        victim.kill()
        await victim.wait()
    async with worker_process(lab.lesson, script=SCRIPT):
        row = await finished(lab.pool, id)
    (after,) = await sleepers(lab.pool)
    assert (row["status"], row["output"]) == ("COMPLETED", row["attempt"])
    assert (after["id"], after["wake_at"]) == (before["id"], before["wake_at"])


async def test_it_wakes_up_late_if_there_was_nobody_to_wake_it(lab: Lab, tmp_path: Path) -> None:
    id = await enqueue(lab.pool, "sleepy", input_of(tmp_path, 3600), is_durable=True)
    async with worker_process(lab.lesson, script=SCRIPT) as victim:
        sleeper = await wait_for_sleeper(lab.pool)
        await kill(lab.pool, victim)  # it must not wake it with its last statement
    # An hour later.
    await execute(lab.pool, "UPDATE tasks SET wake_at = now() WHERE id = %s", sleeper["id"])
    assert (await get_task(lab.pool, sleeper["id"]))["status"] == "SLEEPING"
    async with worker_process(lab.lesson, script=SCRIPT):
        assert (await finished(lab.pool, id))["status"] == "COMPLETED"
    assert notes(tmp_path)[-1] == "1 wakes"


# Waking


async def test_two_workers_wake_each_sleeper_once(lab: Lab) -> None:
    """Whoever comes second takes what the first has not locked, and waits for nobody."""
    await make_sleepers(lab, 20, "now() - n * interval '1 s'")
    async with (
        await open_connection(lab.pool) as one,
        await open_connection(lab.pool) as other,
        one.transaction(),
    ):
        first = [row["wake_at"] async for row in lab.queries.wake_tasks(one, limit=12)]
        async with asyncio.timeout(30):
            second = [row["wake_at"] async for row in lab.queries.wake_tasks(other, limit=12)]
            assert [row async for row in lab.queries.wake_tasks(other, limit=12)] == []
    assert (len(first), len(second)) == (12, 8)
    assert max(first) < min(second), "the oldest come first"
    assert await statuses(lab.pool) == {"COMPLETED": 20, "RUNNING": 20}


async def test_orders_that_wake_on_two_workers_go_on_once(lab: Lab) -> None:
    async def parent(context: Any, input: int) -> Any:
        await context.sleep(timedelta(seconds=0.3))
        return await context.run_task("step", input)

    ids = [await lab.enqueue(parent, n) for n in range(20)]
    async with working(lab.worker(parent), lab.worker(parent)):
        assert [(await finished(lab.pool, id))["output"] for id in ids] == list(range(20))
    assert lab.calls == {str(n): 1 for n in range(20)}
    assert await statuses(lab.pool) == {"COMPLETED": 60}


async def test_many_that_are_due_at_once_are_woken_in_batches_and_no_beat_is_late(lab: Lab) -> None:
    """Each row takes 2 ms here, a batch 0.4 s: four heartbeats."""
    await execute(
        lab.pool,
        """
        CREATE FUNCTION take_time() RETURNS TRIGGER AS $$
        BEGIN
            PERFORM pg_sleep(0.002);
            RETURN NEW;
        END
        $$ LANGUAGE plpgsql
        """,
    )
    await execute(
        lab.pool,
        """
        CREATE TRIGGER take_time BEFORE UPDATE OF status ON tasks
        FOR EACH ROW WHEN (OLD.status = 'SLEEPING')
        EXECUTE FUNCTION take_time()
        """,
    )
    set_globals(lab.lesson, {"BATCH_SIZE": 200})
    await make_sleepers(lab, 1000, "now() - interval '1 s'", per_parent=5)
    happened: list[str] = []
    queries = lab.queries

    class Watched:
        def __getattr__(self, name: str) -> Any:
            query = getattr(queries, name)

            def call(*arguments: Any, **keywords: Any) -> Any:
                happened.append(name)
                return query(*arguments, **keywords)

            return call

    lab.queries = Watched()
    async with working(lab.worker()):
        await wait_for(lambda: "expire_tasks" in happened, "all have been woken")
    until_then = happened[: happened.index("expire_tasks")]
    assert (await statuses(lab.pool))["COMPLETED"] == 1000
    # Asked for once more: the last batch was full.
    assert until_then.count("wake_tasks") == 6
    first, last = (until_then.index("wake_tasks"), len(until_then))
    assert until_then[first:last].count("heartbeat") >= 5


async def explained(pool: Pool, statement: str, **parameters: Any) -> list[dict[str, Any]]:
    """The nodes of a statement's plan, with what they have really read. It is rolled back."""
    async with pool.connection() as conn, conn.transaction(force_rollback=True):
        sql = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}".encode()
        row = await (await conn.execute(sql, parameters)).fetchone()
    assert row
    (plan,) = row.values()

    def nodes(node: dict[str, Any]) -> list[dict[str, Any]]:
        return [node, *(each for child in node.get("Plans", []) for each in nodes(child))]

    return nodes((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"])


def rows_read(nodes: list[dict[str, Any]]) -> float:
    """How many rows the scans of a plan have read from tables and indexes."""
    read = [
        (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        for node in nodes
        if "Scan" in node["Node Type"] and "Relation Name" in node
    ]
    return float(sum(read))


@pytest.mark.parametrize("analyzed", [True, False], ids=["analyzed", "not analyzed"])
async def test_sleepers_that_are_not_due_cost_nobody_anything(lab: Lab, analyzed: bool) -> None:
    """The plans are the same with 20,000 and with a million."""
    for table in ("tasks", "durable_events"):  # which is analyzed here, or not
        await execute(lab.pool, f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    await make_sleepers(lab, 20_000, "now() + interval '1 hour' + n * interval '1 s'")
    await make_sleepers(lab, 10, "now() - n * interval '1 s'")
    await execute(
        lab.pool,
        """
        INSERT INTO tasks (queue, task_name, input)
        SELECT 'q', 'step', '{}'
        FROM generate_series(1, 10)
        """,
    )
    worker_id = (
        await execute(
            lab.pool,
            "INSERT INTO workers (id, display_name) VALUES (gen_random_uuid(), 'w') RETURNING id",
        )
    )[0]["id"]
    if analyzed:
        await execute(lab.pool, "ANALYZE")
    claim = await explained(
        lab.pool,
        lab.queries.poll_tasks.sql,
        queue="q",
        is_durable=False,
        task_names=["step"],
        limit=100,
        worker_id=worker_id,
        inactive_after=5.0,
    )
    wake = await explained(lab.pool, lab.queries.wake_tasks.sql, limit=1000)
    for nodes, most in ((claim, 30), (wake, 60)):
        assert not [
            node
            for node in nodes
            if node["Node Type"] == "Seq Scan"
            and node["Relation Name"] in ("tasks", "durable_events")
        ], nodes
        assert rows_read(nodes) <= most, nodes


# Retry and replay


async def test_a_retry_goes_on_with_the_same_sleep(lab: Lab) -> None:
    """A branch fails while another one sleeps."""

    async def parent(context: Any, input: Any) -> Any:
        return await asyncio.gather(context.sleep(HOUR), context.run_task("broken", 1))

    failed = await lab.run(parent)
    (before,) = await sleepers(lab.pool)
    assert (failed["status"], before["status"]) == ("FAILED", "SLEEPING")
    lab.calls["mended"] = 1
    await lab.lesson.rerun.retry_task(lab.pool, lab.queries, failed["id"])
    async with working(lab.worker(parent)):
        await wait_for(lambda: lab.calls["1"] == 2, "the step has been tried again")
        (after,) = await sleepers(lab.pool)
        assert (after["id"], after["wake_at"]) == (before["id"], before["wake_at"])
        await execute(lab.pool, "UPDATE tasks SET wake_at = now() WHERE id = %s", after["id"])
        assert (await finished(lab.pool, failed["id"]))["output"] == [None, 1]


async def test_a_retry_of_a_sleep_that_was_ended_by_hand_sleeps_on(lab: Lab) -> None:
    """In the queue nobody would ever take it."""

    async def parent(context: Any, input: Any) -> str:
        await context.sleep(HOUR)
        return "awake"

    id = await lab.enqueue(parent)
    async with working(lab.worker(parent)):
        sleeper = await wait_for_sleeper(lab.pool)
        by_hand = "UPDATE tasks SET status = 'FAILED', finished_at = now() WHERE id = %s"
        await execute(lab.pool, by_hand, sleeper["id"])
        failed = await finished(lab.pool, id)
        assert failed["output"]["error"].endswith("(sleep) failed: no error is recorded")
        await execute(
            lab.pool,
            "UPDATE tasks SET wake_at = now() + interval '0.3 s' WHERE id = %s",
            sleeper["id"],
        )
        await lab.lesson.rerun.retry_task(lab.pool, lab.queries, id)
        assert (await finished(lab.pool, id))["output"] == "awake"
    (row,) = await sleepers(lab.pool)
    assert (row["id"], row["status"], row["output"]) == (sleeper["id"], "COMPLETED", None)


async def test_a_replay_abandons_what_sleeps_and_sleeps_anew(lab: Lab) -> None:
    async def parent(context: Any, input: Any) -> Any:
        delay = HOUR if context.attempt == 1 else timedelta(0)
        return await asyncio.gather(context.sleep(delay), context.run_task("broken", 1))

    failed = await lab.run(parent)
    assert failed["status"] == "FAILED"
    lab.calls["mended"] = 1
    await lab.lesson.rerun.replay_task(lab.pool, lab.queries, failed["id"])
    (old,) = await sleepers(lab.pool)
    error = "abandoned: its parent does not ask for it any more"
    assert (old["status"], old["output"]) == ("FAILED", {"error": error})
    row = await lab.finish(failed["id"], parent)
    assert row["output"] == [None, 1]
    _, new = await sleepers(lab.pool)
    assert (new["status"], new["seconds"]) == ("COMPLETED", 0)
    # Its time comes, and it stays what it is.
    await execute(lab.pool, "UPDATE tasks SET wake_at = now() WHERE id = %s", old["id"])
    async with lab.pool.connection() as conn:
        assert [row async for row in lab.queries.wake_tasks(conn, limit=9)] == []
    assert (await wait_for_status(lab.pool, old["id"], "FAILED"))["output"] == {"error": error}
