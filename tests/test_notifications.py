"""LISTEN and NOTIFY: who is told what, and that whatever is not told costs time, never a task.

In most of these tests no worker looks by itself: POLL_INTERVAL is an hour from the start, and
HEARTBEAT_INTERVAL as soon as all workers listen. What completes then does so because somebody was
told.
"""

import asyncio
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from helpers import (
    DEADLINE,
    QUEUE,
    QUICK,
    ended,
    enqueue,
    execute,
    finished,
    get_task,
    make_worker,
    set_globals,
    statuses,
    wait_for,
    wait_for_status,
    worker_process,
    working,
)
from lesson_loader import LAST, Lesson
from shared import EmbeddedPostgres, Pool, load_queries, open_pool

# notifications.py is the same file in all of them, and the worker of 12 is that of 11.
pytestmark = [pytest.mark.since(11), pytest.mark.only(11, LAST)]

NEVER = 3600.0  # seconds
EARS_ONLY = QUICK | dict.fromkeys(["POLL_INTERVAL", "INACTIVE_AFTER", "SUSPEND_AFTER"], NEVER)
SCRIPT = Path(__file__).parent / "mute_process.py"
OPTIONS: dict[str, Any] = {
    "max_retries": 0,
    "timeout": None,
    "schedule_timeout": None,
    "priority": 1,
    "is_durable": False,
}


async def create(
    pool: Pool, queries: Any, task_name: str, input: Any = None, queue: str = QUEUE, **options: Any
) -> int:
    """What a program does that enqueues a task: unlike `enqueue` it tells the workers."""
    async with pool.connection() as conn:
        row = await queries.create_task(
            conn, queue=queue, task_name=task_name, input=Jsonb(input), **OPTIONS | options
        )
    return int(row["id"])


async def echo(input: Any) -> Any:
    return input


async def order(context: Any, input: Any) -> Any:
    return [await context.run_task("echo", n) for n in range(input)]


class Spied:
    """A lesson's queries, some of which are another's; `calls` says how often each was called."""

    def __init__(self, queries: Any) -> None:
        self.queries = queries
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self.queries, name)


async def listeners(pool: Pool) -> list[int]:
    """The processes of Postgres whose clients have begun to listen."""
    rows = await execute(
        pool,
        """
        SELECT pid
        FROM pg_stat_activity
        WHERE datname = current_database()
          AND query ~ 'AS TEXT\\)\\) AS topic'
          AND state = 'idle'
          AND pid <> pg_backend_pid()
        """,
    )
    return [row["pid"] for row in rows]


@asynccontextmanager
async def told(
    lesson: Any, pool: Pool, *workers: Any, queue: str = QUEUE
) -> AsyncIterator[asyncio.Task[None]]:
    """`working` with workers that, within this block, only do what they are told to do."""
    async with working(*workers, queue=queue) as start:
        await be_all_ears(lesson, pool, len(workers))
        yield start


async def be_all_ears(lesson: Any, pool: Pool, workers: int) -> None:
    """Wait until that many listen and have looked, and then let nobody look by himself any more."""

    async def all_listen() -> bool:
        return len(await listeners(pool)) == workers

    async def all_beat() -> bool:
        return len(await execute(pool, "SELECT id FROM workers")) >= workers

    await wait_for(all_listen, "all workers listen")
    await wait_for(all_beat, "all workers beat")
    set_globals(lesson, {"HEARTBEAT_INTERVAL": NEVER})
    await asyncio.sleep(3 * QUICK["HEARTBEAT_INTERVAL"])  # the waits that had begun are over


# Told is told


@pytest.mark.parametrize("number", [1, 3])
async def test_without_polls_everything_completes_all_the_same(
    lesson: Any, pool: Pool, queries: Any, number: int
) -> None:
    """Steps, steps at once, retries, durable steps, slots that are taken, and other releases."""
    calls: Counter[Any] = Counter()

    async def flaky(input: Any) -> Any:
        calls[input] += 1
        if calls[input] < 3:
            raise ConnectionError("not yet")
        return input

    async def slow(input: Any) -> Any:
        await asyncio.sleep(NEVER)

    async def nest(context: Any, input: Any) -> Any:
        if not input:
            return await context.run_task("echo", "in the nest")
        return await context.run_task("nest", input - 1, is_durable=True)

    async def trip(context: Any, input: Any) -> Any:
        first = await context.run_task("echo", input)
        many = await asyncio.gather(*(context.run_task("echo", n) for n in range(10)))
        again = await context.run_task("flaky", f"step of {input}", max_retries=5)
        return [first, many, again, await context.run_task("nest", 3, is_durable=True)]

    async def fails_once(context: Any, input: Any) -> Any:
        result = await context.run_task("echo", input)
        if context.attempt == 1:
            raise ConnectionError("not yet")
        return result

    functions = [echo, order, flaky, slow, nest, trip, fails_once]
    slots = {"concurrency": 3, "durable_concurrency": 30}
    workers = [
        make_worker(lesson, pool, queries, *functions, **slots, **EARS_ONLY) for _ in range(number)
    ]
    async with told(lesson, pool, *workers):
        durable: dict[str, Any] = {"is_durable": True}
        made = {
            await create(pool, queries, "trip", n, **durable): [n, [*range(10)], f"step of {n}"]
            for n in range(5)
        }
        ids = [await create(pool, queries, "echo", n) for n in range(20)]
        ids += [await create(pool, queries, "flaky", n, max_retries=2) for n in range(5)]
        ids += [
            await create(pool, queries, "fails_once", n, max_retries=1, **durable) for n in "ab"
        ]
        late = await create(pool, queries, "slow", timeout=timedelta(seconds=0.2), max_retries=1)
        for id in [*ids, *made]:
            row = await finished(pool, id)
            assert row["status"] == "COMPLETED", row["output"]
            assert row["output"][:3] == made[id] if id in made else True
        assert (await finished(pool, late))["attempt"] == 2


async def test_a_parent_on_another_worker_is_told(lesson: Any, pool: Pool, queries: Any) -> None:
    """And so is the worker that can run its steps."""
    parents = make_worker(lesson, pool, queries, order, echo, concurrency=0, **EARS_ONLY)
    steps = make_worker(lesson, pool, queries, order, echo, durable_concurrency=0, **EARS_ONLY)
    async with told(lesson, pool, parents, steps):
        row = await finished(pool, await create(pool, queries, "order", 5, is_durable=True))
    assert row["output"] == [0, 1, 2, 3, 4]


async def test_a_step_that_only_another_worker_knows_is_told(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """A worker with free slots, which does not have the function."""
    parents = make_worker(lesson, pool, queries, order, **EARS_ONLY)
    steps = make_worker(lesson, pool, queries, echo, **EARS_ONLY)
    async with told(lesson, pool, parents, steps):
        row = await finished(pool, await create(pool, queries, "order", 3, is_durable=True))
    assert row["output"] == [0, 1, 2]


async def test_a_failure_with_retries_left_wakes_its_own_worker(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Nobody else is told: who has run it has a slot for it."""
    calls: list[Any] = []

    async def flaky(input: Any) -> None:
        calls.append(input)
        if len(calls) < 3:
            raise ConnectionError("not yet")

    async with told(lesson, pool, make_worker(lesson, pool, queries, flaky, **EARS_ONLY)):
        row = await finished(pool, await create(pool, queries, "flaky", max_retries=2))
    assert (row["status"], row["attempt"]) == ("COMPLETED", 3)


@pytest.mark.parametrize("how", ["retry_task", "replay_task"])
async def test_a_task_that_is_to_run_again_is_told(
    lesson: Any, pool: Pool, queries: Any, how: str
) -> None:
    mended = False

    async def parent(context: Any, input: Any) -> Any:
        await context.run_task("echo", input)
        if not mended:
            raise ValueError("no luck")
        return input

    worker = make_worker(lesson, pool, queries, echo, parent, **EARS_ONLY)
    async with told(lesson, pool, worker):
        id = await create(pool, queries, "parent", 1, is_durable=True)
        assert (await finished(pool, id))["status"] == "FAILED"
        mended = True
        await getattr(lesson.rerun, how)(pool, queries, id)
        row = await wait_for_status(pool, id, "COMPLETED")
    assert row["attempt"] == 2


async def test_what_a_worker_puts_back_at_its_end_is_told(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    runs: list[Any] = []

    async def long_at_first(input: Any) -> None:
        runs.append(input)
        if len(runs) == 1:
            await asyncio.sleep(NEVER)

    first, second = [make_worker(lesson, pool, queries, long_at_first, **EARS_ONLY) for _ in "ab"]
    set_globals(lesson, {"SHUTDOWN_GRACE": 4.0})  # also the time to put back and to tell
    async with working(first) as start:
        id = await create(pool, queries, "long_at_first")
        await wait_for(lambda: runs, "the first one has it")
        async with working(second):
            await be_all_ears(lesson, pool, 2)
            first.stop()
            await start
            row = await finished(pool, id)
    assert (row["status"], row["attempt"], row["worker_id"]) == ("COMPLETED", 2, second.id)


async def test_a_queue_may_have_a_very_long_name(lesson: Any, pool: Pool, queries: Any) -> None:
    """A payload may not: it would be the enqueue that fails."""
    queue = "q" * 9_000
    worker = make_worker(lesson, pool, queries, order, echo, **EARS_ONLY)
    async with told(lesson, pool, worker, queue=queue):
        id = await create(pool, queries, "order", 2, queue=queue, is_durable=True)
        assert (await finished(pool, id))["output"] == [0, 1]


# Nobody is told too much


def poll_counts(spies: list[Spied]) -> list[int]:
    return [spy.calls["poll_tasks"] for spy in spies]


async def settled_poll_counts(pool: Pool, spies: list[Spied]) -> list[int]:
    """Once nobody has asked for a second: twenty workers take their time on a slow machine."""

    async def settled() -> bool:
        before = [dict(spy.calls) for spy in spies]
        await asyncio.sleep(1)
        # If all of us, or Postgres, stood still for that second: what was due comes now.
        await execute(pool, "SELECT 1")
        await asyncio.sleep(0.2)
        return [dict(spy.calls) for spy in spies] == before

    await wait_for(settled, "nobody asks any more", 60)
    return poll_counts(spies)


async def test_an_enqueue_that_is_rolled_back_wakes_nobody(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    spy = Spied(queries)
    async with told(lesson, pool, make_worker(lesson, pool, spy, echo, **EARS_ONLY)):
        before = await settled_poll_counts(pool, [spy])
        values = {"queue": QUEUE, "task_name": "echo", "input": Jsonb(1), **OPTIONS}
        async with pool.connection() as conn:
            async with conn.transaction(force_rollback=True):
                await queries.create_task(conn, **values)
            await asyncio.sleep(0.5)
            assert poll_counts([spy]) == before
            async with conn.transaction():
                id = (await queries.create_task(conn, **values))["id"]
                await asyncio.sleep(0.3)
                assert poll_counts([spy]) == before, "it was told before the commit"
        assert (await finished(pool, id))["status"] == "COMPLETED"


async def test_other_queues_and_other_schemas_are_no_news(
    lesson: Any, pool: Pool, queries: Any, tmp_path: Path
) -> None:
    """The channel is that of the database. In a schema of its own a queue is another queue."""
    other = shutil.copytree(lesson.path, tmp_path / "99-other")
    other_queries = load_queries(other)
    spy = Spied(queries)
    async with open_pool(other) as other_pool:
        stranger = make_worker(Lesson(other), other_pool, other_queries, echo, **EARS_ONLY)
        async with told(lesson, pool, make_worker(lesson, pool, spy, echo, **EARS_ONLY)):
            before = await settled_poll_counts(pool, [spy])
            await create(pool, queries, "echo", queue="another queue")
            id = await create(other_pool, other_queries, "echo")
            await asyncio.sleep(0.5)
            assert poll_counts([spy]) == before
            await finished(pool, await create(pool, queries, "echo"))
        assert (await get_task(other_pool, id))["status"] == "QUEUED"
        async with working(stranger):
            assert (await finished(other_pool, id))["status"] == "COMPLETED"


async def test_of_twenty_idle_workers_one_gets_the_task_and_nobody_spins(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    runs: list[Any] = []

    async def note(input: Any) -> None:
        runs.append(input)

    spies = [Spied(queries) for _ in range(20)]
    workers = [make_worker(lesson, pool, spy, note, **EARS_ONLY) for spy in spies]
    async with told(lesson, pool, *workers):
        before = await settled_poll_counts(pool, spies)
        await finished(pool, await create(pool, queries, "note", 1))
        after = await settled_poll_counts(pool, spies)
        polls = [number - b for number, b in zip(after, before, strict=True)]
        # Each looks once for each kind of tasks; who got it may look once more.
        assert sum(polls) <= 20 * 2 + 4, polls
        assert min(polls) >= 1, "somebody was not told"
    assert runs == [1]


async def test_full_workers_do_not_wake_each_other_for_ever(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Each has an order whose step nobody has a slot for."""
    may_end = asyncio.Event()
    busy = 0

    async def gated(input: Any) -> Any:
        nonlocal busy
        busy += 1
        await may_end.wait()

    spies = [Spied(queries) for _ in range(2)]
    workers = [
        make_worker(lesson, pool, spy, gated, order, echo, concurrency=1, **EARS_ONLY)
        for spy in spies
    ]
    async with told(lesson, pool, *workers):
        for _ in workers:
            await create(pool, queries, "gated")
        await wait_for(lambda: busy == 2, "all slots are taken")
        ids = [await create(pool, queries, "order", 1, is_durable=True) for _ in range(4)]

        async def all_wait() -> bool:
            return (await statuses(pool)).get("QUEUED") == 4

        await wait_for(all_wait, "the steps wait")
        await settled_poll_counts(pool, spies)
        may_end.set()
        for id in ids:
            assert (await finished(pool, id))["status"] == "COMPLETED"


async def test_what_ends_within_an_interval_is_told_together(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Here one after the other, which alone keeps nobody from telling each of them."""
    spy = Spied(queries)
    worker = make_worker(lesson, pool, spy, echo, TELL_INTERVAL=1.0, **EARS_ONLY)
    async with told(lesson, pool, worker):
        clock = asyncio.get_running_loop().time
        began = clock()
        for n in range(50):
            await finished(pool, await create(pool, queries, "echo", n))
        assert 1 <= spy.calls["notify"] <= 2 + (clock() - began)


def test_who_notifies_writes_nothing(queries: Any) -> None:
    """But for those that create tasks, which others may put into a transaction of their own."""
    names = [name for name in queries.available_queries if not name.endswith("_cursor")]
    notifying = {name for name in names if "pg_notify" in getattr(queries, name).sql}
    assert notifying - {"create_tasks"} == {"create_task", "notify"}
    assert not any(word in queries.notify.sql for word in ("INSERT", "UPDATE", "DELETE"))


# What is not told, or not heard


@pytest.mark.parametrize("interval", [0.3, NEVER])
async def test_a_lost_notification_costs_at_most_one_interval(
    lesson: Any, pool: Pool, queries: Any, interval: float
) -> None:
    """An INSERT by hand tells nobody. Without polls nobody comes; see that these tests mean it."""
    spy = Spied(queries)
    worker = make_worker(lesson, pool, spy, echo, **EARS_ONLY | {"POLL_INTERVAL": interval})
    async with working(worker):
        await be_all_ears(lesson, pool, 1)
        if interval == NEVER:
            await settled_poll_counts(pool, [spy])
        id = await enqueue(pool, "echo")
        if interval == NEVER:
            await asyncio.sleep(1)
            assert (await get_task(pool, id))["status"] == "QUEUED"
        else:
            assert (await finished(pool, id))["status"] == "COMPLETED"


class IsMute(Spied):
    """What it wants to tell does not get through."""

    async def notify(self, conn: Any, **values: Any) -> None:
        self.calls["notify"] += 1
        raise psycopg.OperationalError("server closed the connection unexpectedly")


async def test_a_worker_that_cannot_tell_ends_as_it_should(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """It puts back its tasks, says goodbye, and does not try again until its grace is over."""
    started = asyncio.Event()

    async def long(context: Any, input: Any) -> None:
        started.set()
        await asyncio.sleep(NEVER)

    mute = IsMute(queries)
    settings = QUICK | {"SHUTDOWN_GRACE": NEVER}
    worker = make_worker(lesson, pool, mute, long, **settings)
    async with working(worker) as start:
        id = await create(pool, queries, "long", is_durable=True)
        await started.wait()
        worker.stop()
        await asyncio.wait_for(start, DEADLINE)
    assert mute.calls["notify"] >= 1
    assert (await get_task(pool, id))["status"] == "QUEUED"
    assert await execute(pool, "SELECT * FROM workers") == []


async def test_a_parent_that_is_not_told_looks_after_one_interval(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    mute = IsMute(queries)
    settings = EARS_ONLY | {"POLL_INTERVAL": 0.3}
    parents = make_worker(lesson, pool, queries, order, concurrency=0, **settings)
    steps = make_worker(lesson, pool, mute, echo, durable_concurrency=0, **settings)
    async with told(lesson, pool, parents, steps):
        row = await finished(pool, await create(pool, queries, "order", 2, is_durable=True))
    assert (row["output"], row["attempt"]) == ([0, 1], 1)
    assert mute.calls["notify"] >= 1


@pytest.mark.only(11, 13, 15)
@pytest.mark.parametrize("how", ["retry_task", "replay_task"])
async def test_a_notification_that_fails_after_the_commit_fails_nothing(
    lesson: Any, pool: Pool, queries: Any, how: str
) -> None:
    mute = IsMute(queries)
    id = await enqueue(pool, "order", 1, is_durable=True, status="FAILED", attempt=1)
    await getattr(lesson.rerun, how)(pool, mute, id)
    assert mute.calls["notify"] == 1
    assert (await get_task(pool, id))["status"] == "QUEUED"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
async def test_a_worker_that_is_killed_between_its_commit_and_telling(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """Its outcome is there, and the parent on another worker finds it after one interval."""
    settings: dict[str, Any] = QUICK | {
        "POLL_INTERVAL": 0.5,
        "INACTIVE_AFTER": NEVER,
        "SUSPEND_AFTER": NEVER,
    }
    parents = make_worker(lesson, pool, queries, order, concurrency=0, **settings)
    async with (
        working(parents),
        worker_process(lesson, script=SCRIPT, **settings) as victim,
    ):
        id = await create(pool, queries, "order", 1, is_durable=True)
        assert await ended(victim) == -signal.SIGKILL
        row = await finished(pool, id)
    assert (row["status"], row["output"], row["attempt"]) == ("COMPLETED", [0], 1)
    (child,) = await execute(pool, "SELECT * FROM tasks WHERE NOT is_durable")
    assert (child["status"], child["attempt"]) == ("COMPLETED", 1)


async def cut(pool: Pool) -> None:
    """Terminate those who listen, and wait until they are gone."""
    for pid in await listeners(pool):
        await execute(pool, "SELECT pg_terminate_backend(%s, 5000)", pid)


async def test_a_listener_that_is_cut_off_listens_again(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """And first of all looks for what it has missed."""
    worker = make_worker(lesson, pool, queries, order, echo, LISTEN_AGAIN=0.5, **EARS_ONLY)
    async with told(lesson, pool, worker):
        for _ in range(3):
            await cut(pool)
            missed = await create(pool, queries, "order", 1, is_durable=True)
            assert (await finished(pool, missed))["status"] == "COMPLETED"
            heard = await create(pool, queries, "order", 2, is_durable=True)
            assert (await finished(pool, heard))["output"] == [0, 1]


async def test_a_child_that_ends_while_the_listener_of_its_parent_is_cut_off(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    release = asyncio.Event()
    started = asyncio.Event()

    async def gated(input: Any) -> Any:
        started.set()
        await release.wait()
        return input

    async def parent(context: Any, input: Any) -> Any:
        return await context.run_task("gated", input)

    deaf = EARS_ONLY | {"LISTEN_AGAIN": 1.0}
    parents = make_worker(lesson, pool, queries, parent, concurrency=0, **deaf)
    async with told(lesson, pool, parents):
        id = await create(pool, queries, "parent", 7, is_durable=True)
        steps = make_worker(lesson, pool, queries, gated, durable_concurrency=0, **deaf)
        beat = "INSERT INTO workers (id, display_name) VALUES (%s, 'steps')"
        await execute(pool, beat, steps.id)
        async with working(steps):
            await started.wait()
            await cut(pool)  # both
            release.set()
            row = await finished(pool, id)
    assert (row["output"], row["attempt"]) == (7, 1)


@pytest.fixture
def own_url(own_server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DATABASE_URL", own_server.url())
    return own_server.url()


@pytest.mark.only(11)
@pytest.mark.skipif(sys.platform == "win32", reason="Postgres is stopped by a signal")
async def test_after_a_restart_of_the_server_workers_listen_again(
    lesson: Any, queries: Any, own_server: EmbeddedPostgres, own_url: str
) -> None:
    async with open_pool(lesson.path) as pool:
        worker = make_worker(lesson, pool, queries, order, echo, LISTEN_AGAIN=0.2, **EARS_ONLY)
        async with working(worker):
            await be_all_ears(lesson, pool, 1)
            set_globals(lesson, QUICK | {"POLL_INTERVAL": NEVER, "INACTIVE_AFTER": NEVER})
            os.kill(int(own_server.pid_file.read_text().split()[0]), signal.SIGINT)
            await wait_for(lambda: not own_server.is_running(), "the server has stopped")
            await asyncio.to_thread(own_server.url)  # starts it

            async def listens() -> bool:
                try:
                    return len(await listeners(pool)) == 1
                except psycopg.OperationalError:
                    return False

            await wait_for(listens, "it listens again", 3 * DEADLINE)
            id = await create(pool, queries, "order", 2, is_durable=True)
            assert (await finished(pool, id))["output"] == [0, 1]


async def fill_the_queue_of_notifications(pool: Pool) -> None:
    for _ in range(100):  # a page of 8 KiB each
        await execute(pool, "SELECT pg_notify('others', repeat('x', 7000))")


@pytest.mark.only(11, LAST)
async def test_a_full_queue_of_notifications_fails_nothing_that_is_committed(
    lesson: Any, queries: Any, own_server: EmbeddedPostgres, own_url: str
) -> None:
    """Somebody listens and does not read, and Postgres keeps for him as much as it may."""
    async with await psycopg.AsyncConnection.connect(own_url, autocommit=True) as conn:
        await conn.execute("ALTER SYSTEM SET max_notify_queue_pages = 64")  # the fewest
    await asyncio.to_thread(own_server.restart)
    async with (
        open_pool(lesson.path) as pool,
        await psycopg.AsyncConnection.connect(own_url) as idler,
    ):
        await idler.execute("LISTEN others")
        await idler.commit()
        await idler.execute("SELECT 'does not read before this transaction ends'")
        with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="NOTIFY"):
            await fill_the_queue_of_notifications(pool)
        # None of them can do all by itself, so they have much to tell each other.
        parents = make_worker(lesson, pool, queries, order, concurrency=0, **QUICK)
        steps = make_worker(lesson, pool, queries, echo, durable_concurrency=0, **QUICK)
        id = await enqueue(pool, "order", 2, is_durable=True)
        async with working(parents), working(steps):
            assert (await finished(pool, id))["output"] == [0, 1]
        for status, how in (("FAILED", "retry_task"), ("COMPLETED", "replay_task")):
            id = await enqueue(pool, "order", 1, is_durable=True, status=status, attempt=1)
            await getattr(lesson.rerun, how)(pool, queries, id)
            assert (await get_task(pool, id))["status"] == "QUEUED"


class ListensLate(Spied):
    """A task is created when its connection stands and it has not said LISTEN yet."""

    def __init__(self, queries: Any, pool: Pool) -> None:
        super().__init__(queries)
        self.pool = pool
        self.may_listen = asyncio.Event()
        self.id = 0

    async def listen(self, conn: Any) -> None:
        await self.may_listen.wait()
        self.id = await create(self.pool, self.queries, "echo", "in the gap")
        await self.queries.listen(conn)


async def test_a_task_that_comes_between_connect_and_listen_is_found(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    spy = ListensLate(queries, pool)
    worker = make_worker(lesson, pool, spy, echo, **EARS_ONLY)
    async with working(worker):
        await finished(pool, await create(pool, queries, "echo"))
        set_globals(lesson, {"HEARTBEAT_INTERVAL": NEVER})
        await asyncio.sleep(3 * QUICK["HEARTBEAT_INTERVAL"])  # it has polled for the last time
        spy.may_listen.set()
        await wait_for(lambda: spy.id, "the task is there")
        assert (await finished(pool, spy.id))["output"] == "in the gap"


class AnswersLate(Spied):
    """After the answer of a claim, and before it is read, something happens."""

    meanwhile: Any = None

    async def poll_tasks(self, conn: Any, **values: Any) -> AsyncIterator[Any]:
        rows = [row async for row in self.queries.poll_tasks(conn, **values)]
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            await meanwhile()
        for row in rows:
            yield row


async def test_news_that_comes_during_a_claim_is_not_lost(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """The claim has found nothing, and says so when there is something."""
    late = AnswersLate(queries)
    ids: list[int] = []

    async def create_one() -> None:
        ids.append(await create(pool, queries, "echo", "meanwhile"))
        await asyncio.sleep(0.3)

    worker = make_worker(lesson, pool, late, echo, durable_concurrency=0, **EARS_ONLY)
    async with told(lesson, pool, worker):
        late.meanwhile = create_one
        await create(pool, queries, "nobody has this function")  # and so the worker claims
        await wait_for(lambda: ids, "there is another task")
        assert (await finished(pool, ids[0]))["output"] == "meanwhile"


async def test_a_child_that_ends_before_its_parent_begins_to_wait(
    lesson: Any, pool: Pool, queries: Any
) -> None:
    """The parent's worker was told when nobody there waited for it yet."""
    parents = make_worker(lesson, pool, queries, order, concurrency=0, **EARS_ONLY)
    wait_for_child = parents.children.wait_for

    async def late(child: Any) -> Any:
        await finished(pool, child.id)
        await asyncio.sleep(0.2)  # so long that the notification has come and gone
        return await wait_for_child(child)

    parents.children.wait_for = late
    async with told(lesson, pool, parents):
        id = await create(pool, queries, "order", 1, is_durable=True)
        await wait_for(lambda: tasks_named(pool, "echo"), "the child is there")
        steps = make_worker(lesson, pool, queries, echo, durable_concurrency=0, **EARS_ONLY)
        beat = "INSERT INTO workers (id, display_name) VALUES (%s, 'steps')"
        await execute(pool, beat, steps.id)
        async with working(steps):
            row = await finished(pool, id)
    assert (row["output"], row["attempt"]) == ([0], 1)


async def tasks_named(pool: Pool, name: str) -> list[dict[str, Any]]:
    return await execute(pool, "SELECT * FROM tasks WHERE task_name = %s", name)
