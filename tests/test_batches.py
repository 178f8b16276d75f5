"""Batches: what comes while one statement is in flight is the next one's, and nothing gets lost."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from durable_helpers import Lab
from helpers import (
    DEADLINE,
    QUEUE,
    enqueue,
    execute,
    finished,
    get_task,
    set_globals,
    statuses,
    wait_for,
    working,
)
from shared import Connection, Pool, open_connection

pytestmark = pytest.mark.since(16)

OUTCOMES, STEPS = "write_outcomes", "start_steps"


class Watched:
    """The queries. What goes in batches is noted, and can be held up or disturbed."""

    def __init__(self, queries: Any) -> None:
        self.queries = queries
        self.calls: list[str] = []
        self.batches: dict[str, list[list[dict[str, Any]]]] = {OUTCOMES: [], STEPS: []}
        self.may_send = {OUTCOMES: asyncio.Event(), STEPS: asyncio.Event()}
        self.may_answer = {OUTCOMES: asyncio.Event(), STEPS: asyncio.Event()}
        for event in [*self.may_send.values(), *self.may_answer.values()]:
            event.set()
        self.cut: dict[str, str] = {}  # the next such statement is cut off "before" or "after" it

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self.queries, name)

    def write_outcomes(self, conn: Connection, rows: str) -> AsyncIterator[Any]:
        return self._send(OUTCOMES, conn, rows)

    def start_steps(self, conn: Connection, rows: str) -> AsyncIterator[Any]:
        return self._send(STEPS, conn, rows)

    async def _send(self, name: str, conn: Connection, rows: str) -> AsyncIterator[Any]:
        self.batches[name].append(json.loads(rows))
        await self.may_send[name].wait()
        cut = self.cut.pop(name, None)
        if cut == "before":
            await self._lose(conn)
        answer = [row async for row in getattr(self.queries, name)(conn, rows=rows)]
        if cut == "after":
            await self._lose(conn)
        await self.may_answer[name].wait()
        for row in answer:
            yield row

    async def _lose(self, conn: Connection) -> None:
        await conn.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    def sizes(self, name: str) -> list[int]:
        return [len(batch) for batch in self.batches[name]]


class BatchLab(Lab):
    """Tasks that run on a worker that is not there, and what it writes."""

    def __init__(self, lesson: Any, pool: Pool, queries: Any) -> None:
        super().__init__(lesson, pool, Watched(queries))
        self.worker_id = uuid4()
        self.outcomes = lesson.outcomes.Outcomes(pool, self.queries)

    async def running(self, worker_id: UUID | None = None, **columns: Any) -> Any:
        """A task that this worker runs, as the worker sees it."""
        owner = {"status": "RUNNING", "worker_id": worker_id or self.worker_id, "attempt": 1}
        name = columns.pop("task_name", "step")
        id = await enqueue(self.pool, name, **{**owner, **columns})
        return self.lesson.models.Task(**await get_task(self.pool, id))

    async def family(self, status: str = "SUSPENDED") -> int:
        """A durable task; returns its id."""
        owner = self.worker_id if status == "RUNNING" else None
        columns = {"is_durable": True, "status": status, "attempt": 1, "worker_id": owner}
        return await enqueue(self.pool, "parent", **columns)

    async def child(self, parent: int, worker_id: UUID | None = None) -> Any:
        child = await self.running(worker_id)
        await execute(
            self.pool,
            "INSERT INTO durable_events (task_id, event_id, kind, key, child_task_id, branch_id)"
            " SELECT %s, count(*) + 1, 'TASK_STARTED', '', %s, 1 FROM durable_events"
            " WHERE task_id = %s",
            *[parent, child.id, parent],
        )
        return child

    async def write(self, *outcomes: tuple[Any, str, Any]) -> list[Any]:
        """Write these, (task, status, output), in one batch; return what each has got."""
        writes = [asyncio.create_task(self.outcomes.write(*outcome)) for outcome in outcomes]
        await asyncio.sleep(0)
        await self.outcomes.send_all()
        return await asyncio.gather(*writes, return_exceptions=True)

    async def row(self, task: Any) -> dict[str, Any]:
        return await get_task(self.pool, task.id)


@pytest.fixture
async def lab(lesson: Any, pool: Pool, queries: Any) -> BatchLab:
    lab = BatchLab(lesson, pool, queries)
    # No attempt ends because the machine was busy.
    set_globals(lesson, {"INACTIVE_AFTER": 60.0, "SUSPEND_AFTER": 60.0})
    return lab


def completed(*tasks: Any) -> list[tuple[Any, str, Any]]:
    return [(task, "COMPLETED", n) for n, task in enumerate(tasks)]


# Outcomes


async def test_every_way_in_which_an_attempt_ends_is_in_one_batch(lab: BatchLab) -> None:
    done, failed, again = [await lab.running(retry_count=1) for _ in range(3)]
    before = (await lab.row(again))["finished_at"]
    written = await lab.write(
        (done, "COMPLETED", None), (failed, "FAILED", {"error": "x"}), (again, "QUEUED", {"e": 1})
    )
    assert (written, lab.queries.sizes(OUTCOMES)) == ([True] * 3, [3])
    rows = [await lab.row(task) for task in (done, failed, again)]
    assert [row["status"] for row in rows] == ["COMPLETED", "FAILED", "QUEUED"]
    assert [row["output"] for row in rows] == [None, {"error": "x"}, {"e": 1}]
    assert [row["worker_id"] for row in rows] == [lab.worker_id, lab.worker_id, None]
    assert [row["retry_count"] for row in rows] == [1, 1, 2]
    assert [row["finished_at"] is None for row in rows] == [False, False, True]
    assert before is None
    # Jsonb's null, as if it had been written alone: SQL's would be no output at all.
    (is_null,) = await execute(
        lab.pool, "SELECT output IS NULL AS n FROM tasks WHERE id = %s", done.id
    )
    assert not is_null["n"]


async def test_what_comes_while_one_statement_is_in_flight_is_the_next_one_s(lab: BatchLab) -> None:
    tasks = [await lab.running() for _ in range(230)]
    lab.queries.may_send[OUTCOMES].clear()
    sending = asyncio.create_task(lab.outcomes.keep_sending())
    first = asyncio.create_task(lab.outcomes.write(tasks[0], "COMPLETED", 0))
    await wait_for(lambda: lab.queries.batches[OUTCOMES], "the first is on its way")
    rest = [asyncio.create_task(lab.outcomes.write(task, "COMPLETED", 1)) for task in tasks[1:]]
    await asyncio.sleep(0)
    lab.queries.may_send[OUTCOMES].set()
    assert await asyncio.gather(first, *rest) == [True] * 230
    assert lab.queries.sizes(OUTCOMES) == [1, 100, 100, 29]
    sending.cancel()
    assert await statuses(lab.pool) == {"COMPLETED": 230}


async def test_large_outputs_make_small_batches(lab: BatchLab) -> None:
    """Of one million characters, or of one output if that has more."""
    tasks = [await lab.running() for _ in range(7)]
    lengths = [400_000, 400_000, 400_000, 1_100_000, 10, 10, 2_000_000]
    outcomes = [
        (task, "COMPLETED", "x" * length) for task, length in zip(tasks, lengths, strict=True)
    ]
    assert await lab.write(*outcomes) == [True] * 7
    assert lab.queries.sizes(OUTCOMES) == [2, 1, 1, 2, 1]
    assert [len((await lab.row(task))["output"]) for task in tasks] == lengths


@pytest.mark.parametrize("position", range(4))
async def test_an_output_that_postgres_refuses_fails_alone(lab: BatchLab, position: int) -> None:
    tasks = [await lab.running() for _ in range(4)]
    outcomes = completed(*tasks)
    outcomes[position] = (tasks[position], "COMPLETED", "NUL \0")
    written = await lab.write(*outcomes)
    assert isinstance(written.pop(position), psycopg.DataError)
    assert written == [True] * 3
    poisoned = await lab.row(tasks.pop(position))
    assert (poisoned["status"], poisoned["output"]) == ("RUNNING", None)
    assert {(await lab.row(task))["status"] for task in tasks} == {"COMPLETED"}


@pytest.mark.parametrize("output", ["NUL \0", float("nan"), {1}], ids=["NUL", "NaN", "set"])
async def test_a_worker_fails_the_task_whose_output_is_refused_and_no_other(
    lab: BatchLab, output: Any
) -> None:
    may_end = asyncio.Event()
    started: list[int] = []

    async def work(input: Any) -> Any:
        started.append(input)
        await may_end.wait()
        return output if input == 7 else input

    ids = [await enqueue(lab.pool, "work", n) for n in range(20)]
    async with working(lab.worker(work)):
        await wait_for(lambda: len(started) == 20, "all run")
        may_end.set()
        rows = [await finished(lab.pool, id) for id in ids]
    assert [row["status"] for row in rows] == [
        "FAILED" if n == 7 else "COMPLETED" for n in range(20)
    ]
    assert [row["output"] for row in rows if row["status"] == "COMPLETED"] == [
        n for n in range(20) if n != 7
    ]
    assert {row["attempt"] for row in rows} == {1}


async def test_a_zombie_in_a_batch_changes_nothing(lab: BatchLab) -> None:
    ours, lost, taken, also_ours = [await lab.running() for _ in range(4)]
    await execute(lab.pool, "UPDATE tasks SET status = 'QUEUED' WHERE id = %s", lost.id)
    await execute(
        lab.pool,
        "UPDATE tasks SET attempt = 2, worker_id = %s WHERE id = %s",
        *[uuid4(), taken.id],
    )
    before = [await lab.row(lost), await lab.row(taken)]
    assert await lab.write(*completed(ours, lost, taken, also_ours)) == [True, False, False, True]
    assert [await lab.row(lost), await lab.row(taken)] == before
    assert [(await lab.row(task))["output"] for task in (ours, also_ours)] == [0, 3]


@pytest.mark.parametrize("name", [OUTCOMES, STEPS])
async def test_a_task_that_is_taken_while_a_batch_waits_for_it_is_left_out(
    lab: BatchLab, name: str
) -> None:
    """The statement has seen it as ours, and must look again when it has the lock."""
    tasks = [await lab.running(is_durable=True) for _ in range(3)]
    steps = lab.lesson.steps.Steps(lab.pool, lab.queries)
    async with await open_connection(lab.pool) as conn:
        async with conn.transaction():
            taken = "UPDATE tasks SET attempt = 2, worker_id = %s WHERE id = %s"
            await conn.execute(taken, [uuid4(), tasks[1].id])
            if name == OUTCOMES:
                answers = [asyncio.create_task(lab.write(*completed(*tasks)))]
            else:
                answers = start_steps(steps, *tasks)
                await asyncio.sleep(0)
                answers.append(asyncio.create_task(steps.send_all()))
            await wait_for(lambda: is_waiting(lab), "the batch waits for the lock")
        results = await asyncio.gather(*answers)
    assert lab.queries.sizes(name) == [3]
    if name == OUTCOMES:
        assert results == [[True, False, True]]
        rows = [await lab.row(task) for task in tasks]
        assert [row["status"] for row in rows] == ["COMPLETED", "RUNNING", "COMPLETED"]
        assert rows[1]["attempt"] == 2
    else:
        assert [row is None for row in results[:3]] == [False, True, False]
        assert [len(await lab.children(task.id)) for task in tasks] == [1, 0, 1]
        assert len(await lab.tasks()) == 5


@pytest.mark.parametrize("order", [[1, 2], [2, 1]], ids=str)
async def test_of_two_attempts_at_one_task_in_a_batch_the_latest_counts(
    lab: BatchLab, order: list[int]
) -> None:
    """A worker that lost a task and claimed it again may end both attempts at once."""
    task = await lab.running(attempt=2)
    attempts = []
    for attempt in order:
        attempts.append(lab.lesson.models.Task(**await lab.row(task)))
        attempts[-1].attempt = attempt
    written = await lab.write(*[(task, "COMPLETED", task.attempt) for task in attempts])
    assert written == [attempt == 2 for attempt in order]
    assert (await lab.row(task))["output"] == 2


async def test_a_batch_whose_connection_breaks_before_it_is_sent_again(lab: BatchLab) -> None:
    tasks = [await lab.running() for _ in range(3)]
    lab.queries.cut[OUTCOMES] = "before"
    assert await lab.write(*completed(*tasks)) == [True] * 3
    assert lab.queries.sizes(OUTCOMES) == [3, 3]


async def test_a_batch_whose_answer_gets_lost_is_written_once(lab: BatchLab) -> None:
    tasks = [await lab.running(retry_count=0) for _ in range(3)]
    lab.queries.cut[OUTCOMES] = "after"
    assert await lab.write(*[(task, "QUEUED", {}) for task in tasks]) == [False] * 3
    assert [(await lab.row(task))["retry_count"] for task in tasks] == [1, 1, 1]


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_a_parent_learns_of_an_outcome_whose_answer_got_lost(lab: BatchLab, cut: str) -> None:
    """Nobody polls here."""
    set_globals(lab.lesson, {"POLL_INTERVAL": 3600.0, "SUSPEND_AFTER": 3600.0})

    async def order(context: Any, input: Any) -> Any:
        lab.queries.cut[OUTCOMES] = cut
        return await context.run_task("step", 42)

    id = await lab.enqueue(order)
    async with working(lab.worker(order)):
        row = await finished(lab.pool, id)
    assert (row["output"], row["attempt"], lab.calls["42"]) == (42, 1, 1)


async def test_a_writer_that_is_cancelled_loses_nothing(lab: BatchLab) -> None:
    tasks = [await lab.running() for _ in range(3)]
    sending = asyncio.create_task(lab.outcomes.keep_sending())
    async with locked(lab, tasks[1].id):
        writes = [asyncio.create_task(lab.outcomes.write(*each)) for each in completed(*tasks)]
        await wait_for(lambda: lab.queries.batches[OUTCOMES], "they are on their way")
        sending.cancel()
        await asyncio.wait([sending])
    assert not any(write.done() for write in writes)
    async with asyncio.timeout(DEADLINE):
        await lab.outcomes.send_all()
        assert await asyncio.gather(*writes) == [True] * 3


async def test_send_all_waits_for_what_is_in_flight_and_sends_nothing_twice(lab: BatchLab) -> None:
    task = await lab.running()
    lab.queries.may_send[OUTCOMES].clear()
    sending = asyncio.create_task(lab.outcomes.keep_sending())
    write = asyncio.create_task(lab.outcomes.write(task, "COMPLETED", 1))
    await wait_for(lambda: lab.queries.batches[OUTCOMES], "it is on its way")
    sent = asyncio.create_task(lab.outcomes.send_all())
    await asyncio.sleep(0.1)
    assert not sent.done()
    lab.queries.may_send[OUTCOMES].set()
    await sent
    assert await write
    assert lab.queries.sizes(OUTCOMES) == [1]
    sending.cancel()


@asynccontextmanager
async def locked(lab: BatchLab, id: int) -> AsyncIterator[None]:
    """Somebody else holds this row within this block."""
    async with await open_connection(lab.pool) as conn, conn.transaction():
        await conn.execute("SELECT FROM tasks WHERE id = %s FOR UPDATE", [id])
        yield


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_a_worker_that_ends_writes_what_has_ended(lab: BatchLab, how: str) -> None:
    """Also what waits for its turn, behind a statement that is in flight."""
    is_over = asyncio.Event()

    async def work(input: Any) -> Any:
        if input:
            await is_over.wait()
        return input

    async def order(context: Any, input: Any) -> Any:
        await is_over.wait()
        return input

    lab.queries.may_send[OUTCOMES].clear()
    ids = [await enqueue(lab.pool, "work", n) for n in range(10)]
    ids += [await enqueue(lab.pool, "order", n, is_durable=True) for n in range(10, 15)]
    worker = lab.worker(work, order)
    async with working(worker) as start:
        await wait_for(lambda: lab.queries.batches[OUTCOMES], "the first is on its way")
        await wait_for(lambda: sum(map(ended, worker.slots.values())) == 15, "all are claimed")
        is_over.set()
        waiting = worker.outcomes._waiting
        await wait_for(lambda: len(waiting) == 15, "all others have ended")
        worker.stop() if how == "stop" else start.cancel()
        await asyncio.sleep(0.2)
        lab.queries.may_send[OUTCOMES].set()
        await asyncio.wait([start])
    rows = [await get_task(lab.pool, id) for id in ids]
    assert [row["output"] for row in rows] == list(range(15))
    assert {(row["status"], row["attempt"]) for row in rows} == {("COMPLETED", 1)}


def ended(slots: Any) -> int:
    return len(slots.running)


async def test_a_task_keeps_its_slot_until_its_outcome_is_written(lab: BatchLab) -> None:
    lab.queries.may_send[OUTCOMES].clear()
    ids = [await enqueue(lab.pool, "step", n) for n in range(2)]
    async with working(lab.worker(concurrency=1)):
        await wait_for(lambda: lab.queries.batches[OUTCOMES], "the first has ended")
        await asyncio.sleep(0.2)
        assert (await get_task(lab.pool, ids[1]))["status"] == "QUEUED"
        lab.queries.may_send[OUTCOMES].set()
        assert [(await finished(lab.pool, id))["output"] for id in ids] == [0, 1]


async def test_many_tasks_take_few_statements(lab: BatchLab) -> None:
    """One by one it would be 400, and one claim for each."""
    set_globals(lab.lesson, {"HEARTBEAT_INTERVAL": 1.0, "POLL_INTERVAL": 1.0})
    clock = asyncio.get_running_loop().time
    async with lab.pool.connection() as conn:
        await conn.execute(
            "INSERT INTO tasks (queue, task_name, input)"
            " SELECT %s, 'step', to_jsonb(n) FROM generate_series(1, 400) AS n",
            [QUEUE],
        )
    start = clock()
    async with working(lab.worker()):
        await wait_for(lambda: all_completed(lab, 400), "all are done")
    assert sum(lab.queries.sizes(OUTCOMES)) == 400
    assert len(lab.queries.batches[OUTCOMES]) <= 40
    # Two in each second are those that ask whether there is anything.
    assert lab.queries.calls.count("poll_tasks") <= 60 + 2 * (clock() - start)


async def all_completed(lab: BatchLab, count: int) -> bool:
    return await statuses(lab.pool) == {"COMPLETED": count}


@pytest.mark.parametrize("analyzed", [True, False], ids=["analyzed", "not analyzed"])
async def test_finished_tasks_cost_a_batch_nothing(lab: BatchLab, analyzed: bool) -> None:
    """What it reads of tasks it finds by an index, also if Postgres takes the table for small."""
    await execute(lab.pool, "ALTER TABLE tasks SET (autovacuum_enabled = false)")
    await execute(
        lab.pool,
        "INSERT INTO tasks (queue, task_name, input, status)"
        " SELECT 'q', 'step', '1', 'COMPLETED' FROM generate_series(1, 20000)",
    )
    if analyzed:
        await execute(lab.pool, "ANALYZE tasks")
    tasks = [await lab.running(is_durable=True) for _ in range(10)]
    owners = [{"id": t.id, "worker_id": str(t.worker_id), "attempt": t.attempt} for t in tasks]
    step = {"event_id": 1, "key": "", "task_name": "step", "max_retries": 0, "is_durable": False}
    for name, columns in ((STEPS, step), (OUTCOMES, {"status": "COMPLETED"})):
        sql = f"EXPLAIN (ANALYZE) {getattr(lab.queries.queries, name).sql}"
        async with lab.pool.connection() as conn:
            rows = json.dumps([owner | columns for owner in owners])
            cursor = await conn.execute(sql.encode(), {"rows": rows})
            plan = "\n".join(row["QUERY PLAN"] for row in await cursor.fetchall())
        assert "Seq Scan on tasks" not in plan, plan
        assert "Index Scan" in plan
    assert await statuses(lab.pool) == {"COMPLETED": 20010, "QUEUED": 10}


# Parents and children


async def test_a_parent_and_its_child_end_in_one_batch(lab: BatchLab) -> None:
    parent = await lab.family("RUNNING")
    child = await lab.child(parent)
    mother = lab.lesson.models.Task(**await get_task(lab.pool, parent))
    assert await lab.write((mother, "FAILED", {}), (child, "COMPLETED", 1)) == [True, True]
    assert (await get_task(lab.pool, parent))["status"] == "FAILED"
    assert (await lab.row(child))["status"] == "COMPLETED"


async def test_children_that_end_together_wake_their_parent_once(lab: BatchLab) -> None:
    parent = await lab.family()
    children = [await lab.child(parent) for _ in range(3)]
    other = await lab.family("COMPLETED")
    children.append(await lab.child(other))
    assert await lab.write(*completed(*children)) == [True] * 4
    row = await get_task(lab.pool, parent)
    assert (row["status"], row["attempt"]) == ("QUEUED", 1)
    assert (await get_task(lab.pool, other))["status"] == "COMPLETED"


async def test_a_batch_that_waits_with_a_parent_keeps_no_finisher_waiting(lab: BatchLab) -> None:
    """Its lock on the parent is not the one of a suspension."""
    parent = await lab.family("RUNNING")
    mother = lab.lesson.models.Task(**await get_task(lab.pool, parent))
    blocked, child = await lab.running(), await lab.child(parent)
    async with locked(lab, blocked.id):
        waits = asyncio.create_task(lab.write((mother, "FAILED", {}), (blocked, "COMPLETED", 1)))
        await wait_for(lambda: is_waiting(lab), "the batch has the parent, and waits")
        elsewhere = lab.lesson.outcomes.Outcomes(lab.pool, lab.queries)
        async with asyncio.timeout(DEADLINE):
            write = asyncio.create_task(elsewhere.write(child, "COMPLETED", 1))
            await asyncio.sleep(0)
            await elsewhere.send_all()
        assert await write
        assert not waits.done()
    assert await waits == [True, True]


async def is_waiting(lab: BatchLab) -> bool:
    return bool(
        await execute(
            lab.pool,
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
    )


async def test_two_batches_over_each_others_parents_are_both_written(lab: BatchLab) -> None:
    """Each has woken one parent when it comes to the other's: Postgres ends one of the two."""
    await execute(
        lab.pool,
        """
        CREATE FUNCTION pause() RETURNS TRIGGER LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_advisory_xact_lock_shared(16); RETURN NULL; END'
        """,
    )
    await execute(
        lab.pool,
        "CREATE TRIGGER pause AFTER UPDATE ON tasks FOR EACH ROW"
        " WHEN (NEW.task_name = 'pause') EXECUTE FUNCTION pause()",
    )
    parents = [await lab.family(), await lab.family()]
    workers = [lab.outcomes, lab.lesson.outcomes.Outcomes(lab.pool, lab.queries)]
    batches = []
    for first, second in (parents, parents[::-1]):
        child = await lab.child(first)
        pause = await lab.running(task_name="pause")
        batches.append(completed(child, pause, await lab.child(second)))
    async with await open_connection(lab.pool) as conn:
        await conn.execute("SELECT pg_advisory_lock(16)")
        writes = [
            asyncio.create_task(outcomes.write(*outcome))
            for outcomes, batch in zip(workers, batches, strict=True)
            for outcome in batch
        ]
        all_sent = [asyncio.create_task(outcomes.send_all()) for outcomes in workers]

        async def both_wait() -> bool:
            cursor = await conn.execute(
                "SELECT FROM pg_stat_activity WHERE wait_event = 'advisory'"
                " AND datname = current_database()"
            )
            return cursor.rowcount == 2

        await wait_for(both_wait, "both have woken one parent")
        await conn.execute("SELECT pg_advisory_unlock(16)")
        assert await asyncio.gather(*writes) == [True] * 6
        await asyncio.gather(*all_sent)
    assert [(await get_task(lab.pool, id))["status"] for id in parents] == ["QUEUED"] * 2
    assert sorted(lab.queries.sizes(OUTCOMES)) == [3, 3, 3], "there was no deadlock"


# Steps


async def fan_out(context: Any, input: int) -> Any:
    return await asyncio.gather(*[context.run_task("step", n) for n in range(input)])


async def test_the_steps_of_a_fan_out_start_together(lab: BatchLab) -> None:
    id = await lab.enqueue(fan_out, 30)
    row = await lab.finish(id, fan_out)
    assert row["output"] == list(range(30))
    assert sum(lab.queries.sizes(STEPS)) == 30
    assert len(lab.queries.batches[STEPS]) <= 3
    children = await lab.children(id)
    assert [child["event_id"] for child in children] == list(range(1, 31))
    assert [child["input"] for child in children] == list(range(30))
    assert [child["id"] for child in children] == sorted(child["id"] for child in children)


@pytest.mark.parametrize("name", ["\ud83d\ude00", {"step": 1}])
async def test_a_name_of_which_json_would_make_another_fails_its_order(
    lab: BatchLab, name: Any
) -> None:
    """Two halves of a character, and what is no name at all: nobody could run such a step."""

    async def order(context: Any, input: Any) -> Any:
        await context.run_task(name, None)

    id = await lab.enqueue(order)
    row = await lab.finish(id, order)
    assert row["status"] == "FAILED"
    assert await lab.children(id) == []


async def test_a_step_that_is_started_in_a_batch_has_all_that_it_was_given(lab: BatchLab) -> None:
    given = {"max_retries": 3, "timeout": timedelta(days=1, microseconds=1), "is_durable": True}

    async def nested(context: Any, input: Any) -> Any:
        return input

    async def order(context: Any, input: Any) -> Any:
        return [await context.run_task("nested", None, **given), await context.run_task("step", {})]

    id = await lab.enqueue(order, queue=QUEUE, priority=7)
    assert (await lab.finish(id, order, nested))["output"] == [None, {}]
    first, second = await lab.children(id)
    assert {name: first[name] for name in given} == given
    assert [(c["queue"], c["priority"], c["input"]) for c in (first, second)] == [
        (QUEUE, 7, None),
        (QUEUE, 7, {}),
    ]
    assert (second["max_retries"], second["timeout"], second["is_durable"]) == (0, None, False)
    assert lab.queries.sizes(STEPS) == [1, 1]
    key = lab.lesson.event_log.event_key
    assert [first["key"], second["key"]] == [
        key("TASK_STARTED", "nested", None),
        key("TASK_STARTED", "step", {}),
    ]


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_a_batch_of_steps_that_is_in_doubt_starts_each_once(lab: BatchLab, cut: str) -> None:
    lab.queries.cut[STEPS] = cut
    ids = [await lab.enqueue(fan_out, 3) for _ in range(3)]
    async with working(lab.worker(fan_out)):
        rows = [await finished(lab.pool, id) for id in ids]
    assert [row["output"] for row in rows] == [[0, 1, 2]] * 3
    assert {row["attempt"] for row in rows} == {1}
    assert lab.calls == {"0": 3, "1": 3, "2": 3}
    assert len(await lab.tasks()) == 12


async def test_steps_that_postgres_refuses_fail_their_orders_and_no_others(lab: BatchLab) -> None:
    async def order(context: Any, input: Any) -> Any:
        return await context.run_task("step", input)

    lab.queries.may_send[STEPS].clear()
    inputs = [1, 2, "NUL \0", 4, 5]

    async def poisoned(context: Any, input: Any) -> Any:
        return await context.run_task("step", inputs[input])

    ids = [await lab.enqueue(poisoned, n) for n in range(5)]
    worker = lab.worker(poisoned)
    async with working(worker):
        waiting = worker.children.steps._waiting
        await wait_for(lambda: len(waiting) == 5, "all wait")
        lab.queries.may_send[STEPS].set()
        rows = [await finished(lab.pool, id) for id in ids]
    assert [row["status"] for row in rows].count("COMPLETED") == 4
    assert rows[2]["status"] == "FAILED"
    assert "\\u0000" in rows[2]["output"]["error"]
    assert [len(await lab.children(id)) for id in ids] == [1, 1, 0, 1, 1]
    assert len(await lab.tasks()) == 9


async def test_the_step_of_a_zombie_in_a_batch_is_not_started(lab: BatchLab) -> None:
    ours, lost = [await lab.running(is_durable=True) for _ in range(2)]
    await execute(lab.pool, "UPDATE tasks SET attempt = 2 WHERE id = %s", lost.id)
    steps = lab.lesson.steps.Steps(lab.pool, lab.queries)
    starts = start_steps(steps, lost, ours)
    await asyncio.sleep(0)
    await steps.send_all()
    assert [await start is None for start in starts] == [True, False]
    assert lab.queries.sizes(STEPS) == [2]
    assert (await lab.children(lost.id), len(await lab.children(ours.id))) == ([], 1)
    assert len(await lab.tasks()) == 3


def start_steps(steps: Any, *tasks: Any) -> list[asyncio.Task[Any]]:
    """Start a plain step of each of these tasks; the rows of the children, or None."""
    columns = {"max_retries": 0, "timeout": None, "is_durable": False}
    child = {"task_name": "step", "input": Jsonb(1), **columns}
    return [asyncio.create_task(steps.start(task, 1, "key", child)) for task in tasks]


async def test_a_step_that_is_over_when_its_batch_is_sent_again_is_left_out(lab: BatchLab) -> None:
    ours, over = [await lab.running(is_durable=True) for _ in range(2)]
    lab.queries.may_send[STEPS].clear()
    lab.queries.cut[STEPS] = "before"
    steps = lab.lesson.steps.Steps(lab.pool, lab.queries)
    starts = start_steps(steps, over, ours)
    await asyncio.sleep(0)
    sent = asyncio.create_task(steps.send_all())
    await wait_for(lambda: lab.queries.batches[STEPS], "they are on their way")
    starts[0].cancel()
    lab.queries.may_send[STEPS].set()
    await sent
    assert (await starts[1])["status"] == "QUEUED"
    assert lab.queries.sizes(STEPS) == [2, 1]
    assert await lab.children(over.id) == []


@pytest.mark.parametrize("way", ["timeout", "failure"])
async def test_a_waiting_step_whose_attempt_is_over_is_not_started(lab: BatchLab, way: str) -> None:
    """It waits behind a statement that takes its time; another order's."""
    may_fail = asyncio.Event()

    async def other(context: Any, input: Any) -> Any:
        return await context.run_task("step", "other")

    async def order(context: Any, input: Any) -> None:
        if way == "timeout":
            await context.run_task("step", "late")
        else:
            await asyncio.gather(context.run_task("step", "late"), fail())

    async def fail() -> None:
        await may_fail.wait()
        raise ValueError("enough")

    lab.queries.may_send[STEPS].clear()
    worker = lab.worker(other, order)
    async with working(worker):
        first = await lab.enqueue(other)
        await wait_for(lambda: lab.queries.batches[STEPS], "the first is on its way")
        id = await lab.enqueue(order, timeout=timedelta(seconds=0.5) if way == "timeout" else None)
        await wait_for(lambda: len(worker.children.steps._waiting) == 2, "the step waits")
        may_fail.set()
        assert (await finished(lab.pool, id))["status"] == "FAILED"
        lab.queries.may_send[STEPS].set()
        assert (await finished(lab.pool, first))["output"] == "other"
    assert await lab.children(id) == []
    assert lab.queries.sizes(STEPS) == [1]


async def test_no_order_is_suspended_while_a_step_of_it_is_on_its_way(lab: BatchLab) -> None:
    """Its child might have ended before, and then nobody would wake the order."""
    may_end = asyncio.Event()

    async def slow(input: Any) -> None:
        lab.calls["slow"] += 1
        await may_end.wait()

    async def later(context: Any) -> None:
        await wait_for(lambda: may_go.is_set(), "the other step has begun")
        await context.run_task("step", "later")

    async def order(context: Any, input: Any) -> None:
        contexts.append(context)
        await asyncio.gather(context.run_task("slow", None), later(context))

    async def is_suspended() -> bool:
        await contexts[0].suspend(0.0)
        return bool((await get_task(lab.pool, id))["status"] == "SUSPENDED")

    may_go = asyncio.Event()
    contexts: list[Any] = []
    id = await lab.enqueue(order)
    async with working(lab.worker(order, slow)):
        await wait_for(lambda: lab.calls["slow"], "the first has been started")
        # A poll may have found it before the answer to its start was here.
        await wait_for(lambda: contexts[0]._waiting, "the order waits for the first")
        lab.queries.may_answer[STEPS].clear()
        may_go.set()
        await wait_for(lambda: lab.calls["later"], "the second has been done")
        for _ in range(5):
            assert not await is_suspended()
        lab.queries.may_answer[STEPS].set()
        await wait_for(is_suspended, "it knows the second, and is suspended")
        may_end.set()
        assert (await finished(lab.pool, id))["status"] == "COMPLETED"
    assert lab.calls["later"] == 1


# The log


async def test_a_later_attempt_reads_its_log_once(lab: BatchLab) -> None:
    calls_of_attempt: list[list[str]] = []

    async def order(context: Any, input: Any) -> Any:
        lab.queries.calls.clear()
        lab.queries.batches[STEPS].clear()
        outputs = [await context.run_task("step", n) for n in range(5)]
        calls_of_attempt.append(list(lab.queries.calls))
        if context.attempt < 3:
            raise OSError("again")
        return [*outputs, await context.run_task("step", "new")]

    set_globals(lab.lesson, {"SUSPEND_AFTER": 3600.0})
    row = await lab.run(order, max_retries=2)
    assert (row["output"], row["attempt"]) == ([0, 1, 2, 3, 4, "new"], 3)
    assert set(lab.calls.values()) == {1}
    assert lab.queries.sizes(STEPS) == [1], "recorded steps were sent again"
    single = {"lock_task", "get_event", "get_task", "append_event", "get_log"}
    for calls in calls_of_attempt:
        assert not single & set(calls)


# create_tasks


async def create_tasks(lab: BatchLab, inputs: list[Any], **options: Any) -> list[dict[str, Any]]:
    given = {
        "queue": QUEUE,
        "task_name": "step",
        "max_retries": 0,
        "timeout": None,
        "schedule_timeout": None,
        "priority": 1,
        "is_durable": False,
    }
    async with lab.pool.connection() as conn:
        rows = lab.queries.create_tasks(conn, inputs=Jsonb(inputs), **given | options)
        return [row async for row in rows]


async def test_many_tasks_are_created_in_one_statement_and_told_once(lab: BatchLab) -> None:
    inputs = [None, "a", 1, {"b": [2]}, *range(500)]
    options = {
        "max_retries": 2,
        "timeout": timedelta(seconds=9),
        "schedule_timeout": timedelta(hours=1),
        "priority": 5,
        "is_durable": True,
    }
    async with await open_connection(lab.pool) as conn:
        await conn.execute("LISTEN tasks")
        rows = await create_tasks(lab, inputs, **options)
        told = [each async for each in conn.notifies(timeout=DEADLINE, stop_after=1)]
        told += [each async for each in conn.notifies(timeout=0.5)]
    assert len(told) == 1
    assert [row["input"] for row in rows] == inputs
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert {row["status"] for row in rows} == {"QUEUED"}
    assert {
        (row["max_retries"], row["timeout"], row["priority"], row["is_durable"]) for row in rows
    } == {(2, timedelta(seconds=9), 5, True)}
    times = {row["schedule_timeout_at"] - row["inserted_at"] for row in rows}
    assert times == {timedelta(hours=1)}


async def test_tasks_that_are_created_together_run_without_a_poll(lab: BatchLab) -> None:
    set_globals(lab.lesson, {"POLL_INTERVAL": 3600.0})
    async with working(lab.worker()):
        beats = "SELECT id FROM workers"  # before that nothing can be claimed
        await wait_for(lambda: execute(lab.pool, beats), "the worker beats")
        set_globals(lab.lesson, {"HEARTBEAT_INTERVAL": 3600.0})
        await asyncio.sleep(0.3)  # it has looked for the last time
        await create_tasks(lab, list(range(150)))
        await wait_for(lambda: all_completed(lab, 150), "all are done")
    assert await create_tasks(lab, []) == []


async def test_an_input_that_postgres_refuses_creates_no_task(lab: BatchLab) -> None:
    with pytest.raises(psycopg.DataError):
        await create_tasks(lab, [1, "NUL \0"])
    assert await lab.tasks() == []
