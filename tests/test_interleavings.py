"""A worker of lesson 13 is disturbed at every await of a run, each in a run of its own.

The run is that of an order that charges a payment, sleeps, and waits for a durable step with a step
of its own; it is suspended on the way. A run without disturbance tells which points there are:
before and after each statement, BEGIN and COMMIT, and each time that a connection is taken from the
pool or given back. What is done there:

    cancel   `start` is cancelled, and what has to be awaited all the same takes until after the
             next heartbeat; another worker takes the order to its end
    stop     the same, but the worker is told to stop
    lose     the connection breaks, before the statement or after it; the worker goes on by itself
    goodbye  the worker is told to stop during the charge, and then the connection breaks
    late     the connection breaks, and the statement is executed all the same, but later
    zombie   all of the worker stands still, another one takes the order over and completes it; then
             the first comes back
    rival    the same, but it comes back while the other one is at work

Each time the order must be COMPLETED with one charge, one child per event, nothing left RUNNING,
and no retry spent. A normal run plays as many points as 3 s for each of these allow, at random:

    INTERLEAVINGS=all pytest tests/test_interleavings.py            all of them
    INTERLEAVINGS_SEED=42 pytest tests/test_interleavings.py        those of an earlier run
    INTERLEAVINGS="after poll_tasks#2" pytest tests/test_interleavings.py
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from itertools import count
from typing import Any

import psycopg
import pytest
from psycopg_pool import PoolTimeout

from helpers import DEADLINE, enqueue, execute, finished, set_globals, wait_for, working
from lesson_loader import LAST, Lesson
from shared import Connection, Pool, Queries, open_connection
from watched import (
    GENERATORS,
    OF_POOL,
    Point,
    Watch,
    WatchedPool,
    WatchedQueries,
    last_query,
    open_watched,
)

WHICH = os.environ.get("INTERLEAVINGS", "some")
SEED = int(os.environ.get("INTERLEAVINGS_SEED") or random.randrange(10**6))
SECONDS = 3.0  # for the points of one kind of disturbance, in a normal run
AT_ONCE = 4
MIN_REACHED = 5

# No worker judges others here: the test takes their tasks from them, when it wants to.
TIMES = {
    "POLL_INTERVAL": 0.1,
    "HEARTBEAT_INTERVAL": 0.1,
    "INACTIVE_AFTER": 1000.0,
    "SUSPEND_AFTER": 0.1,
    "SHUTDOWN_GRACE": 15.0,
}

NOT_STATEMENTS = {*GENERATORS.values(), *OF_POOL, "charge"}
# These have nothing to write on behalf of a task: they end together with the heartbeat.
OTHER_LOOPS = ("Heartbeat.", "Housekeeping.", "Children.", "Notifications.")

NAMES = ["process_order", "charge_payment", "sleep", "confirm", "send_confirmation_email"]

numbers = count(1)


async def process_order(context: Any, input: Any) -> Any:
    charge = await context.run_task("charge_payment", input)
    await context.sleep(timedelta(seconds=0.1))
    return {"charge": charge, "email": await context.run_task("confirm", input, is_durable=True)}


async def confirm(context: Any, input: Any) -> Any:
    return await context.run_task("send_confirmation_email", input)


class Shop:
    """The world outside, and the means to have workers in it."""

    def __init__(self, lesson: Lesson, pool: Pool, queries: Queries) -> None:
        self.lesson = lesson
        self.pool = pool
        self.queries = queries

    def worker(self, pool: Pool, queries: Queries, charged: Callable[[], Awaitable[None]]) -> Any:
        """A worker; `charged` is awaited once the money has been taken."""

        async def charge_payment(input: Any) -> Any:
            key = self.lesson.worker.current_task.get().id
            async with self.pool.connection() as conn:
                await self.queries.create_payment(conn, idempotency_key=key, **input)
            await charged()
            return {"payment": key}

        async def send_confirmation_email(input: Any) -> Any:
            # Until it has been asked for, and the order and its durable step are suspended.
            await asyncio.sleep(0.25)
            return "sent"

        worker = self.lesson.worker.Worker(pool, queries)
        worker.register("process_order", process_order)
        worker.register("confirm", confirm)
        worker.register("charge_payment", charge_payment)
        worker.register("send_confirmation_email", send_confirmation_email)
        return worker


async def nothing() -> None:
    pass


class Run:
    """One order, a worker that is disturbed at one point, and what comes after."""

    def __init__(self, shop: Shop, disturb: str, target: Point | None) -> None:
        self.shop = shop
        self.disturb = disturb
        self.target = target
        self.queue = f"queue {next(numbers)}"
        self.watch = Watch(self.on_point)
        self.fired = False
        self.is_over = False  # then the worker leaves, and is not disturbed any more
        self.complaint = ""
        self.beats = 0
        self.resume = asyncio.Event()
        self.late: Callable[[], Awaitable[None]] | None = None

    async def play(self) -> None:
        """Raises AssertionError if it does not end as it should."""
        async with open_watched(self.shop.pool, self.queue, self.watch) as pool:
            queries = WatchedQueries(self.shop.queries)
            self.worker = self.shop.worker(pool, queries, self.charged)
            input = {"order_id": self.queue, "amount": 42}
            self.id = await enqueue(
                self.shop.pool, "process_order", input, queue=self.queue, is_durable=True
            )
            self.start = asyncio.create_task(self.worker.start(self.queue))
            try:
                async with asyncio.timeout(2 * DEADLINE):
                    await getattr(self, f"after_{self.disturb}")()
            finally:
                self.resume.set()
                self.start.cancel()
                await asyncio.wait({self.start})
        assert not self.complaint, self.complaint
        await self.check()

    # What happens at the point.

    async def charged(self) -> None:
        async with self.watch.around("charge"):
            pass

    async def on_point(self, point: Point, conn: Connection | None) -> None:
        if self.fired and self.disturb in ("zombie", "rival"):
            await self.resume.wait()
        if point.phase == "after":
            self.beats += point.name == "heartbeat"
            if self.late and point.name == "requeue_own_tasks":
                operation, self.late = self.late, None
                await operation()
        if self.disturb == "goodbye" and point == Point("charge", 1, "after"):
            self.watch.points.clear()
            self.worker.stop()
        if point == self.target and not self.fired and not self.is_over:
            self.fired = True
            await getattr(self, f"do_{self.disturb}")(point, conn)

    async def do_cancel(self, point: Point, conn: Connection | None) -> None:
        self.start.cancel()
        if point.phase == "before":
            await self.next_beat(point)
        else:
            await asyncio.sleep(0)  # here it strikes

    async def do_stop(self, point: Point, conn: Connection | None) -> None:
        self.worker.stop()
        await self.next_beat(point)

    async def next_beat(self, point: Point) -> None:
        """The heartbeat must go on as long as the worker has something to write."""
        coroutine: Any = asyncio.current_task().get_coro()  # type: ignore[union-attr]
        if coroutine.__qualname__.startswith(OTHER_LOOPS):
            return
        before = self.beats
        try:
            await wait_for(lambda: self.beats > before, "the next heartbeat", seconds=10)
        except AssertionError:
            self.complaint = f"the heartbeat had stopped {point}"

    async def do_lose(self, point: Point, conn: Connection | None) -> None:
        if conn:
            conn.pgconn.finish()
            raise psycopg.OperationalError(f"injected {point}")
        raise PoolTimeout(f"injected {point}")

    do_goodbye = do_lose

    async def do_late(self, point: Point, conn: Connection | None) -> None:
        """The statement is executed when the worker has just looked for what it does not know."""
        name, parameters = last_query.get()

        async def execute_late() -> None:
            query = getattr(self.shop.queries, name)
            async with await open_connection(self.shop.pool) as other:
                # A step that the worker has started meanwhile, by another statement, is refused.
                with suppress(psycopg.errors.UniqueViolation):
                    result = query(other, **parameters)
                    if isinstance(result, Awaitable):
                        await result
                    else:
                        _ = [row async for row in result]

        self.late = execute_late
        await self.do_lose(point, conn)

    async def do_zombie(self, point: Point, conn: Connection | None) -> None:
        await self.resume.wait()

    do_rival = do_zombie

    # What has to come of it.

    async def after_nothing(self) -> None:
        await self.completed()
        await self.end()

    async def after_lose(self) -> None:
        """The worker itself must bring it to its end."""
        await self.completed()
        await self.end()
        assert await self.lost_count() == 0

    after_late = after_lose

    async def after_cancel(self) -> None:
        """It leaves nothing behind, and the next worker goes on."""
        await wait_for(lambda: self.start.done() or self.is_missed(), "the worker ends")
        with suppress(asyncio.CancelledError):
            await self.end()
        assert not await self.owned()
        await self.check_has_left()
        async with working(self.new_worker(), queue=self.queue):
            await self.completed()
        assert await self.lost_count() == 0

    after_stop = after_cancel
    after_goodbye = after_cancel

    async def after_zombie(self) -> None:
        """It comes back when all is done, and can change nothing."""
        await wait_for(self.has_fired_or_is_missed, "the worker stands still")
        if self.fired:
            await self.take_over()
            await self.close_its_sessions()
        async with working(self.new_worker(), queue=self.queue):
            await self.completed()
            before = await self.tasks()
            beats = self.beats
            self.resume.set()
            await wait_for(lambda: self.beats > beats + 1, "it beats again")
            await self.end()
            assert await self.tasks() == before

    async def after_rival(self) -> None:
        """It comes back while the other one is at work."""
        await wait_for(self.has_fired_or_is_missed, "the worker stands still")
        if self.fired:
            await self.take_over()
        async with working(self.new_worker(), queue=self.queue):
            if not await self.owned():  # what is locked cannot be taken from it
                await wait_for(self.is_claimed, "another worker has the order")
            self.resume.set()
            await self.completed()
            await self.end()

    def new_worker(self) -> Any:
        return self.shop.worker(self.shop.pool, self.shop.queries, nothing)

    async def completed(self) -> None:
        row = await finished(self.shop.pool, self.id)
        assert row["status"] == "COMPLETED", row["output"]

    async def end(self) -> None:
        self.is_over = True
        self.found = dict(self.watch.points)
        self.worker.stop()
        await self.start

    async def is_missed(self) -> bool:
        """The run has ended, and never came to the point."""
        row = await execute(self.shop.pool, "SELECT status FROM tasks WHERE id = %s", self.id)
        return not self.fired and row[0]["status"] == "COMPLETED"

    async def has_fired_or_is_missed(self) -> bool:
        return self.fired or await self.is_missed()

    async def is_claimed(self) -> bool:
        """By another worker, or it is completed already."""
        order = (await self.tasks())[0]
        return order["worker_id"] not in (None, self.worker.id) or order["status"] == "COMPLETED"

    async def owned(self) -> list[dict[str, Any]]:
        """What the disturbed worker is still said to run."""
        return await execute(
            self.shop.pool,
            "SELECT * FROM tasks WHERE worker_id = %s AND status = 'RUNNING'",
            self.worker.id,
        )

    async def take_over(self) -> None:
        """Let the worker be inactive, and do what others do when they notice."""
        pool, queries = self.shop.pool, self.shop.queries
        await execute(
            pool,
            "UPDATE workers SET last_heartbeat_at = now() - interval '1 day' WHERE id = %s",
            self.worker.id,
        )
        (row,) = await execute(pool, "SELECT now() AS time")
        judgement = {"our_beat": row["time"], "inactive_after": 3600.0}
        async with pool.connection() as conn:
            lost = queries.requeue_lost_tasks(conn, max_lost_workers=20, limit=1000, **judgement)
            _ = [row async for row in lost]
            await queries.delete_inactive_workers(conn, **judgement)

    async def close_its_sessions(self) -> None:
        """What Postgres does by itself if a worker stands still within a transaction."""

        async def nothing_is_owned() -> bool:
            if not await self.owned():
                return True
            await execute(
                self.shop.pool,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = %s",
                self.queue,
            )
            await self.take_over()
            return False

        await wait_for(nothing_is_owned, "its tasks are taken over")

    async def tasks(self) -> list[dict[str, Any]]:
        statement = "SELECT * FROM tasks WHERE queue = %s ORDER BY id"
        return await execute(self.shop.pool, statement, self.queue)

    async def lost_count(self) -> int:
        return sum(row["lost_count"] for row in await self.tasks())

    async def check_has_left(self) -> None:
        statement = "SELECT id FROM workers WHERE id = %s"
        assert not await execute(self.shop.pool, statement, self.worker.id), "its row is left"

    async def check(self) -> None:
        """The order is processed, once."""
        pool = self.shop.pool
        tasks = await self.tasks()
        assert [task["task_name"] for task in tasks] == NAMES
        assert [task["status"] for task in tasks] == 5 * ["COMPLETED"]
        assert [task["retry_count"] for task in tasks] == 5 * [0]
        # A claim for each time that it was suspended, and some for the disturbance.
        assert all(1 <= task["attempt"] <= 9 for task in tasks if task["task_name"] != "sleep")
        order, charge, sleep, step, email = (task["id"] for task in tasks)
        assert tasks[0]["output"] == {"charge": {"payment": charge}, "email": "sent"}
        log = await execute(pool, "SELECT * FROM durable_events ORDER BY task_id, event_id")
        children = {
            (event["task_id"], event["event_id"]): event["child_task_id"]
            for event in log
            if event["task_id"] in (order, step)
        }
        assert children == {
            (order, 1): charge,
            (order, 2): sleep,
            (order, 3): step,
            (step, 1): email,
        }
        charges = await execute(pool, "SELECT * FROM payments WHERE order_id = %s", self.queue)
        assert [payment["idempotency_key"] for payment in charges] == [charge]
        await self.check_has_left()


def suits(disturb: str, point: Point, in_transaction: bool) -> bool:
    """Whether this can happen at that point."""
    if disturb in ("lose", "goodbye"):
        return point.name not in ("putconn", "charge")
    if disturb == "late":
        is_statement = point.name not in NOT_STATEMENTS and not in_transaction
        return is_statement and point.phase == "before"
    return True


async def points(shop: Shop, disturb: str) -> list[Point]:
    """Where to disturb, in random order; the last ones are played first: those at statements."""
    undisturbed = Run(shop, "goodbye" if disturb == "goodbye" else "nothing", None)
    await undisturbed.play()
    found = [p for p, inside in undisturbed.found.items() if suits(disturb, p, inside)]
    random.Random(SEED).shuffle(found)
    found.sort(key=lambda point: point.name not in (*OF_POOL, "release"))
    return found if WHICH in ("some", "all") else [p for p in found if str(p) == WHICH]


@pytest.fixture
def shop(lesson: Lesson, pool: Pool, queries: Queries, monkeypatch: pytest.MonkeyPatch) -> Shop:
    set_globals(lesson, TIMES)
    # Signals are not what this is about, and several workers at once would quarrel over them.
    monkeypatch.setattr(lesson.worker, "stop_signals", lambda *callbacks: nullcontext())

    async def open_own_connection(pool: Pool) -> Connection:
        own: Any = pool.open_connection if isinstance(pool, WatchedPool) else None
        return await (own() if own else open_connection(pool))

    monkeypatch.setattr(lesson.heartbeat, "open_connection", open_own_connection)
    return Shop(lesson, pool, queries)


@pytest.mark.since(13)
@pytest.mark.only(LAST)
@pytest.mark.parametrize(
    "disturb", ["cancel", "stop", "lose", "goodbye", "late", "zombie", "rival"]
)
async def test_an_order_is_completed_wherever_its_worker_is_disturbed(
    shop: Shop, disturb: str
) -> None:
    waiting = await points(shop, disturb)
    deadline = time.monotonic() + SECONDS
    failures: list[str] = []
    runs: list[Run] = []

    def reached() -> int:
        return sum(run.fired for run in runs)

    def is_enough() -> bool:
        """On a busy machine there may not have been many by then."""
        return WHICH == "some" and time.monotonic() >= deadline and reached() >= MIN_REACHED

    async def play_some() -> None:
        while waiting and not is_enough():
            run = Run(shop, disturb, waiting.pop())
            runs.append(run)
            try:
                await run.play()
            except Exception as error:
                rows = [(row["task_name"], row["status"]) for row in await run.tasks()]
                failures.append(f"{disturb} {run.target}: {type(error).__name__} {error}: {rows}")

    await asyncio.gather(*(play_some() for _ in range(AT_ONCE)))
    print(f"{disturb}: {reached()} points of {len(runs) + len(waiting)}, INTERLEAVINGS_SEED={SEED}")
    assert not failures, "\n".join(failures)
    # How often a loop goes round is different each time, so that many of its points are missed.
    assert reached() >= min(MIN_REACHED, len(runs)), "hardly any of the points was reached"
