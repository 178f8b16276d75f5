"""Random interleavings of all that the last engine does to its rows, against a model.

Hypothesis makes up sequences of steps: tasks are enqueued, claimed, ended, lost, requeued,
suspended, woken, sent signals, retried and forked by three workers, of which some fall silent and
come back as zombies. Each step is executed by the lesson's own queries.sql, schema.sql and modules
in a real Postgres and by engine_model.py; after each of them every row must be what the model says.
A step may be left in an open transaction while others go on, so that rows are locked and statements
pass over them or wait.

    MODEL_SECONDS=600 pytest -o faulthandler_timeout=0 tests/test_model.py

runs for ten minutes in place of 20 s, and with sequences that nobody has tried before. Without it
they are the same each time, so that a change is not blamed for what it has not done. A failure
prints the sequence that leads to it, and the next run begins with that. With MODEL_SECONDS set it
is made as short as possible first, which takes minutes.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.types.json import Jsonb

from engine_model import (
    FINISHED,
    KEY_SHARE,
    SIGNALS,
    TIMERS,
    Branch,
    Brief,
    Claim,
    Event,
    Model,
    ModelTask,
    Refused,
    Signal,
    brief,
    in_conflict,
)
from helpers import DEADLINE, wait_for, write_outcome
from lesson_loader import LAST, Lesson
from shared import Connection, load_queries, open_connection, open_pool

Rule = TypeVar("Rule", bound=Callable[..., None])

IS_LONG = "MODEL_SECONDS" in os.environ
SECONDS = float(os.environ.get("MODEL_SECONDS", "20"))
ROUND = settings(
    max_examples=10,
    stateful_step_count=60,
    deadline=None,
    print_blob=True,
    phases=[phase for phase in Phase if phase != Phase.shrink or IS_LONG],
    suppress_health_check=list(HealthCheck),
)

INACTIVE_AFTER = 600.0  # seconds; a worker's silence is made by changing its row, not by waiting
SILENCE = {  # "ahead": the clock was set back
    "silent": INACTIVE_AFTER * 0.75,
    "inactive": INACTIVE_AFTER * 2,
    "ahead": -INACTIVE_AFTER * 2,
}
WORKERS = (1, 2, 3)
UNKNOWN_ID = 999
REFUSALS = ("ValueError", "TaskNotOwnedError", "NonDeterminismError")

# How states may change (section 5 of the design), and what retry_task and fork_task may do.
ARROWS = {
    ("QUEUED", "RUNNING"),
    ("RUNNING", "COMPLETED"),
    ("RUNNING", "QUEUED"),
    ("RUNNING", "FAILED"),
    ("QUEUED", "FAILED"),
    ("RUNNING", "SUSPENDED"),
    ("SUSPENDED", "QUEUED"),
    ("SUSPENDED", "FAILED"),  # with its parent's fork
    ("SLEEPING", "COMPLETED"),
    ("SLEEPING", "FAILED"),
}
ABANDONED = {"error": "abandoned: its parent does not ask for it any more"}
RESETS = {"retry_task": {"FAILED"}, "fork_task": set(FINISHED)}

workers = st.sampled_from(WORKERS)
queues = st.sampled_from(["a", "a", "a", "b"])
seldom = st.sampled_from([False, False, False, True])
limits = st.sampled_from([1, 1000, 1000])
names = st.sampled_from([("order", "step"), ("order", "step"), ("order",), ("step",), ()])


class Bench:
    """Three connections to the test's database, on an event loop of its own."""

    def __init__(self, lesson: Lesson, loop: asyncio.AbstractEventLoop) -> None:
        self.lesson = lesson
        self.queries = load_queries(lesson.path)
        self.loop = loop

    async def open(self) -> None:
        async with open_pool(self.lesson.path) as pool:
            self.main, self.holding, self.waiting = [await open_connection(pool) for _ in range(3)]
        # What should not wait for a row lock must not hang, but fail.
        await self.main.execute("SET lock_timeout = '10s'")
        # What is held is held until the test lets go of it, however slow the machine is.
        await self.holding.execute("SET idle_in_transaction_session_timeout = 0")

    async def close(self) -> None:
        for conn in (self.main, self.holding, self.waiting):
            await conn.close()

    async def reset(self) -> None:
        await self.holding.execute("ROLLBACK")
        await self.main.execute("TRUNCATE tasks, workers, durable_events RESTART IDENTITY CASCADE")


class OnePool:
    """What retry_task and fork_task take for a pool."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        yield self.conn


@dataclass
class Step:
    """One thing that the engine does: in SQL, and what it is in the model."""

    name: str
    sql: Callable[[Connection], Awaitable[Any]]
    model: Callable[[Model, set[int]], Any]
    waits: bool = True  # for rows that are locked, else it passes over them
    then: Callable[[Any], None] = lambda result: None  # called once it is committed
    began: int = 0  # which of all steps it is, as for the model: its transaction began then

    def expected(self, model: Model, held: set[int]) -> Any:
        """What it returns, or the name of what it raises."""
        model.locks, model.may_hold_more = {}, False
        model.now = self.began
        try:
            return self.model(model, held)
        except Refused as refusal:
            return str(refusal)

    async def actual(self, conn: Connection) -> Any:
        try:
            return await self.sql(conn)
        except Exception as error:
            if type(error).__name__ not in REFUSALS:
                raise
            return type(error).__name__


class Held(NamedTuple):
    """A step whose transaction is open."""

    step: Step
    result: Any
    after: Model


class Snapshot(NamedTuple):
    tasks: dict[int, ModelTask]
    logs: dict[int, list[Event]]
    branches: dict[int, list[Branch]]
    signals: dict[int, list[Signal]]
    workers: dict[int, str]
    event_ids: dict[int, list[int]]
    keys: dict[int, str]


def pick(of: Callable[[Any], list[Any]]) -> Any:
    """A strategy: one of what this method of the machine returns."""
    return st.runner().flatmap(lambda machine: st.sampled_from(of(machine)))


def has(of: Callable[[Any], list[Any]]) -> Callable[[Rule], Rule]:
    """The precondition of `pick`."""
    return precondition(lambda machine: bool(of(machine)))


class Engine(RuleBasedStateMachine):
    """The engine and its model, side by side."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench
        self.queries = bench.queries
        self.model = Model()
        self.held: Held | None = None
        self.claims: dict[Claim, Any] = {}  # all there ever were, with the rows that came with them
        self.last_id = 0
        self.clock = count(1)
        self.steps: list[str] = []  # since the last look at all rows
        self.wait(bench.reset())
        self.before = self.wait(self.snapshot())

    def teardown(self) -> None:
        self.wait(self.bench.holding.execute("ROLLBACK"))

    # What rules pick from.

    def live(self) -> list[Claim]:
        return [claim for claim in self.claims if self.model.owned(claim)]

    def stale(self) -> list[Claim]:
        """Those of which the same worker has a newer one count most: they are easily confused."""
        stale = [claim for claim in self.claims if not self.model.owned(claim)]
        owned = {(claim.id, claim.worker) for claim in self.live()}
        return stale + 5 * [claim for claim in stale if (claim.id, claim.worker) in owned]

    def live_and_held(self) -> list[Claim]:
        return [claim for claim in self.live() if claim.id in self.held_ids()]

    def live_durable(self) -> list[Claim]:
        return [claim for claim in self.live() if self.model.tasks[claim.id].is_durable]

    def failed_by_child(self) -> list[tuple[Claim, int]]:
        """Live claims, each with a failed child in its log."""
        return [
            (claim, event.child)
            for claim in self.live_durable()
            for event in self.model.logs[claim.id]
            if self.model.tasks[event.child].status == "FAILED"
        ]

    def with_children(self) -> list[Claim]:
        return [claim for claim in self.live_durable() if self.model.logs[claim.id]]

    def asleep(self) -> list[int]:
        """Those that may sleep on."""
        tasks = [t for t in self.with_status("SLEEPING") if t.id not in self.held_ids()]
        return [task.id for task in tasks if task.is_due is False]

    def due(self) -> list[int]:
        return [task.id for task in self.with_status("SLEEPING") if task.is_due]

    def suspended_with_live_children(self) -> list[Claim]:
        """Whose end wakes a parent."""
        return [claim for claim in self.live() if self.has_suspended_parent(claim.id)]

    def has_suspended_parent(self, id: int) -> bool:
        parent = self.model.parent(id)
        return parent is not None and parent.status == "SUSPENDED"

    def logged(self) -> list[tuple[Claim, int]]:
        """Live claims, each with an event of its log."""
        return [
            (claim, event_id)
            for claim in self.live_durable()
            for event_id in range(1, len(self.model.logs[claim.id]) + 1)
        ]

    def waiting(self) -> list[int]:
        """Unfinished tasks with a schedule timeout that has not passed."""
        tasks = [t for id, t in self.model.tasks.items() if id not in self.held_ids()]
        return [t.id for t in tasks if t.overdue is False and t.status not in FINISHED]

    def with_status(self, *states: str) -> list[ModelTask]:
        return [task for task in self.model.tasks.values() if task.status in states]

    def queued(self) -> list[tuple[str, bool]]:
        return [(task.queue, task.is_durable) for task in self.with_status("QUEUED")]

    def expired(self) -> list[int]:
        return [t.id for t in self.with_status("QUEUED") if t.overdue and t.attempt == 0]

    def active(self) -> list[int]:
        return [w for w, age in self.model.workers.items() if age in ("fresh", "silent")]

    def inactive(self) -> list[int]:
        return [w for w in self.model.workers if w not in self.active()]

    def unheard(self) -> list[int]:
        return [worker for worker in WORKERS if self.model.workers.get(worker) != "fresh"]

    def owners(self) -> list[int]:
        return sorted({claim.worker for claim in self.live()})

    def lost(self) -> list[Claim]:
        return [claim for claim in self.live() if claim.worker not in self.active()]

    def failed(self) -> list[int]:
        """Durable tasks that have failed, or are just failing."""
        tasks = self.with_status("FAILED")
        return [t.id for t in tasks if t.is_durable] + sorted(self.held_ids() & {*self.model.tasks})

    def finished(self) -> list[int]:
        tasks = self.with_status(*FINISHED)
        return [t.id for t in tasks if t.is_durable] + sorted(self.held_ids() & {*self.model.tasks})

    def all_ids(self) -> list[int]:
        return [*self.model.tasks, UNKNOWN_ID]

    # The rules: what happens.

    @initialize(count=st.integers(1, 4), claimed=st.integers(0, 3))
    def some_orders(self, count: int, claimed: int) -> None:
        for number in range(count):
            self.enqueue("a", True, number % 2, number % 3, None)
        for worker in WORKERS:
            self.heartbeat(worker)
        for worker in WORKERS[:claimed]:
            self.claim(worker, ("a", True), ("order",), 1, False)

    @rule(
        queue=queues,
        is_durable=st.booleans(),
        priority=st.integers(0, 2),
        max_retries=st.integers(0, 2),
        overdue=st.sampled_from([None, None, False, True]),
    )
    def enqueue(
        self, queue: str, is_durable: bool, priority: int, max_retries: int, overdue: bool | None
    ) -> None:
        name = "order" if is_durable else "step"
        task = ModelTask(
            self.last_id + 1, queue, name, 0, max_retries, priority, is_durable, overdue
        )
        seconds = {None: None, False: "1 hour", True: "-1 hour"}[overdue]

        async def create(conn: Connection) -> Brief:
            return await self.create_task(conn, task, seconds)

        self.do(Step("create_task", create, lambda model, held: model.create(deepcopy(task))))

    @has(waiting)
    @rule(id=pick(waiting))
    def time_passes(self, id: int) -> None:
        self.model.tasks[id].overdue = True
        self.execute(
            "UPDATE tasks SET schedule_timeout_at = now() - interval '1 s' WHERE id = %s", id
        )

    @has(queued)
    @rule(worker=workers, kind=pick(queued), names=names, limit=st.integers(0, 3), hold=seldom)
    def claim(
        self,
        worker: int,
        kind: tuple[str, bool],
        names: tuple[str, ...],
        limit: int,
        hold: bool,
    ) -> None:
        queue, is_durable = kind
        rows: list[dict[str, Any]] = []

        async def poll(conn: Connection) -> list[Brief]:
            found = self.queries.poll_tasks(
                conn,
                queue=queue,
                is_durable=is_durable,
                task_names=list(names),
                limit=limit,
                worker_id=UUID(int=worker),
                inactive_after=INACTIVE_AFTER,
            )
            rows.extend([row async for row in found])
            return [brief_row(row) for row in rows]

        def claim(model: Model, held: set[int]) -> list[Brief]:
            return model.claim(worker, queue, is_durable, names, limit, held)

        step = Step("poll_tasks", poll, claim, waits=False, then=lambda _: self.hand_out(rows))
        self.do(step, hold)

    @has(live)
    @rule(claim=pick(live), output=st.integers(0, 3), hold=seldom, commit=st.booleans())
    def complete(self, claim: Claim, output: int, hold: bool, commit: bool) -> None:
        self.do(self.ending(claim, "COMPLETED", output), hold, commit)

    @has(live)
    @rule(claim=pick(live), is_retryable=st.booleans(), hold=seldom, commit=st.booleans())
    def fail(self, claim: Claim, is_retryable: bool, hold: bool, commit: bool) -> None:
        """An error, or a timeout."""
        row = self.claims[claim]
        can_retry = is_retryable and row["retry_count"] < row["max_retries"]
        status = "QUEUED" if can_retry else "FAILED"
        self.do(self.ending(claim, status, {"error": "oops"}), hold, commit)

    @has(failed_by_child)
    @rule(claim_and_child=pick(failed_by_child), compensates=st.booleans(), retries=st.booleans())
    def fail_by_child(
        self, claim_and_child: tuple[Claim, int], compensates: bool, retries: bool
    ) -> None:
        claim, child = claim_and_child
        if compensates:
            self.append(claim, "step", 0, False, True)
        output = {"error": "its child failed", "child_task_id": child}
        self.do(self.ending(claim, "FAILED", output), commit=True)
        if retries:
            self.retry_task(claim.id, False, True)

    @has(live_and_held)
    @rule(
        claim=pick(live_and_held),
        what=st.sampled_from(["COMPLETED", "FAILED", "QUEUED", "append"]),
        commit=st.booleans(),
    )
    def write_while_locked(self, claim: Claim, what: str, commit: bool) -> None:
        """It waits, and is refused if the task has been taken away meanwhile."""
        if what == "append":
            step = self.appending(claim, len(self.model.logs[claim.id]) + 1, "step", 0)
        else:
            step = self.ending(claim, what, {"error": "perhaps"})
        self.do(step, commit=commit)

    @has(stale)
    @rule(
        claim=pick(stale),
        late=st.sampled_from(["COMPLETED", "FAILED", "QUEUED", "append", "suspend"]),
        event_id=st.integers(1, 3),
    )
    def zombie(self, claim: Claim, late: str, event_id: int) -> None:
        """What a former owner writes changes nothing, and waits for nobody."""
        if late == "append":
            step = self.appending(claim, event_id, "step", 0)
        elif late == "suspend":
            step = self.suspending(claim, [claim.id])
        else:
            step = self.ending(claim, late, "from a former owner")
        self.do(step, may_wait=False)
        after = self.wait(self.snapshot())
        assert after == self.before, f"{claim} is not the owner, but changed something"

    @has(live_durable)
    @rule(
        claim=pick(live_durable),
        name=st.sampled_from(["step", "step", "order"]),
        input=st.integers(0, 1),
        hold=seldom,
        commit=st.booleans(),
    )
    def append(self, claim: Claim, name: str, input: int, hold: bool, commit: bool) -> None:
        event_id = len(self.model.logs[claim.id]) + 1
        self.do(self.appending(claim, event_id, name, input), hold, commit)

    @has(live_durable)
    @precondition(lambda self: self.held is None)
    @rule(claim=pick(live_durable), commit=st.booleans())
    def append_twice_at_once(self, claim: Claim, commit: bool) -> None:
        """The connection broke during COMMIT, and on the next one the first is still at work."""
        event_id = len(self.model.logs[claim.id]) + 1
        self.do(self.appending(claim, event_id, "step", 0), hold=True)
        self.do(self.appending(claim, event_id, "step", 0), commit=commit)

    @has(live_durable)
    @rule(
        claim=pick(live_durable),
        seconds=st.sampled_from([0.0, 3600.0]),
        hold=seldom,
        commit=st.booleans(),
    )
    def fall_asleep(self, claim: Claim, seconds: float, hold: bool, commit: bool) -> None:
        event_id = len(self.model.logs[claim.id]) + 1
        self.do(self.appending(claim, event_id, "sleep", None, seconds), hold, commit)

    @has(live_durable)
    @rule(
        claim=pick(live_durable),
        name=st.sampled_from(SIGNALS),
        seconds=st.sampled_from([None, 0.0, 3600.0]),
        hold=seldom,
        commit=st.booleans(),
    )
    def await_signal(
        self, claim: Claim, name: str, seconds: float | None, hold: bool, commit: bool
    ) -> None:
        """It may have come already."""
        event_id = len(self.model.logs[claim.id]) + 1
        self.do(self.appending(claim, event_id, name, None, seconds), hold, commit)

    @has(with_children)
    @rule(
        claim=pick(with_children),
        name=st.sampled_from(SIGNALS),
        key=st.sampled_from([None, "k", "l"]),
        hold=seldom,
        commit=st.booleans(),
    )
    def send(self, claim: Claim, name: str, key: str | None, hold: bool, commit: bool) -> None:
        self.do(self.sending(claim.id, name, key), hold, commit)

    @rule(id=pick(all_ids), key=st.sampled_from([None, "k", "l"]))
    def send_to_any_task(self, id: int, key: str | None) -> None:
        """Often it has finished, or is not durable: then only a repeated key is no error."""
        self.do(self.sending(id, "approval", key))

    @has(live_durable)
    @precondition(lambda self: self.held is None)
    @rule(
        claim=pick(live_durable),
        is_suspended=st.booleans(),
        first=st.sampled_from(["send", "wake", "send twice"]),
        commit=st.booleans(),
    )
    def signal_meets_timeout(
        self, claim: Claim, is_suspended: bool, first: str, commit: bool
    ) -> None:
        """Its time is up when the signal comes: one of the two happens, and no signal is lost."""
        event_id = len(self.model.logs[claim.id]) + 1
        self.do(self.appending(claim, event_id, "approval", None, 3600.0))
        wait = self.model.logs[claim.id][event_id - 1].child
        if self.model.tasks[wait].status in FINISHED:
            return  # the signal was there before
        if is_suspended:
            self.do(self.suspending(claim, [wait]))
        self.night_passes(wait)
        self.rows_are_what_the_model_says()
        if first == "wake":
            self.wake(True)
        else:
            self.do(self.sending(claim.id, "approval", None), hold=True)
        if first == "send":
            self.wake(False)
        else:
            self.do(self.sending(claim.id, "approval", None), commit=commit)

    @has(live_durable)
    @rule(claim=pick(live_durable), sent=st.integers(1, 3), awaited=st.integers(0, 2))
    def signals_and_waits(self, claim: Claim, sent: int, awaited: int) -> None:
        """More of the one than of the other: the oldest come first, and the rest is kept."""
        for _ in range(awaited):
            event_id = len(self.model.logs[claim.id]) + 1
            self.do(self.appending(claim, event_id, "news", None, None))
        for _ in range(sent):
            self.do(self.sending(claim.id, "news", None))
        event_id = len(self.model.logs[claim.id]) + 1
        self.do(self.appending(claim, event_id, "news", None, None))

    @has(asleep)
    @rule(id=pick(asleep))
    def night_passes(self, id: int) -> None:
        self.model.tasks[id].is_due = True
        self.execute("UPDATE tasks SET wake_at = now() - interval '1 s' WHERE id = %s", id)

    @has(due)
    @rule(hold=seldom)
    def wake(self, hold: bool) -> None:
        """Whatever else is going on, it waits for nobody."""

        async def wake(conn: Connection) -> list[Brief]:
            rows = self.queries.wake_tasks(conn, limit=1000)
            return sorted([brief_row(row) async for row in rows])

        step = Step("wake_tasks", wake, lambda model, held: model.wake(held), waits=False)
        self.do(step, hold, may_wait=False)

    @has(with_children)
    @rule(
        claim=pick(with_children),
        which=st.sampled_from(["unfinished", "unfinished", "all", "last"]),
        hold=st.booleans(),
        commit=st.booleans(),
    )
    def suspend(self, claim: Claim, which: str, hold: bool, commit: bool) -> None:
        """Its worker believes that these children have not finished."""
        children = [event.child for event in self.model.logs[claim.id]]
        unfinished = [id for id in children if self.model.tasks[id].status not in FINISHED]
        awaited = {"unfinished": unfinished, "all": children, "last": children[-1:]}[which]
        self.do(self.suspending(claim, awaited or children), hold, commit)

    @has(live_durable)
    @precondition(lambda self: self.held is None)
    @rule(
        claim=pick(live_durable),
        ends=st.sampled_from(["COMPLETED", "FAILED", "QUEUED"]),
        first=st.booleans(),
        commits=st.booleans(),
    )
    def suspend_while_a_child_ends(
        self, claim: Claim, ends: str, first: bool, commits: bool
    ) -> None:
        """Whichever comes first, the other one waits for its commit, and sees what it has done."""
        self.append(claim, "step", 0, False, True)
        child = self.model.logs[claim.id][-1].child
        self.heartbeat(claim.worker)
        self.claim(claim.worker, (self.model.tasks[child].queue, False), ("step",), 50, False)
        self.rows_are_what_the_model_says()
        steps = [self.ending(each, ends, 1) for each in self.live() if each.id == child]
        steps.insert(0 if first else 1, self.suspending(claim, [child]))
        self.do(steps[0], hold=True)
        for step in steps[1:]:
            self.do(step, commit=commits)

    @has(live_durable)
    @precondition(lambda self: self.held is None)
    @rule(claim=pick(live_durable))
    def two_children_end_at_once(self, claim: Claim) -> None:
        """Neither waits for the other, as long as their parent is not suspended."""
        for _ in range(2):
            self.append(claim, "step", 0, False, True)
        children = [event.child for event in self.model.logs[claim.id]]
        self.heartbeat(claim.worker)
        self.claim(claim.worker, (self.model.tasks[claim.id].queue, False), ("step",), 50, False)
        self.rows_are_what_the_model_says()
        for child in [each for each in self.live() if each.id in children][:2]:
            self.do(self.ending(child, "COMPLETED", 1), hold=True)

    @has(suspended_with_live_children)
    @rule(claim=pick(suspended_with_live_children), hold=st.booleans(), commit=st.booleans())
    def end_under_a_suspended_parent(self, claim: Claim, hold: bool, commit: bool) -> None:
        self.do(self.ending(claim, "FAILED", {"error": "no"}), hold, commit)

    @has(logged)
    @rule(
        claim_and_id=pick(logged),
        change=st.sampled_from(["nothing", "nothing", "name", "input"]),
        hold=seldom,
        commit=st.booleans(),
    )
    def append_again(
        self, claim_and_id: tuple[Claim, int], change: str, hold: bool, commit: bool
    ) -> None:
        """An event that the log has already, or another one in its place."""
        claim, event_id = claim_and_id
        name, input, *_ = self.model.logs[claim.id][event_id - 1]
        if change == "name":
            name, input = "something else", input or 0
        elif change == "input" and name not in TIMERS:
            input = 7
        # Another delay is no other event.
        seconds = 7.0 if change == "input" else 3600.0
        self.do(self.appending(claim, event_id, name, input, seconds), hold, commit)

    @has(live_durable)
    @precondition(lambda self: self.held is None)
    @rule(claim=pick(live_durable))
    def append_without_child(self, claim: Claim) -> None:
        """The child cannot be created: then there is no event either."""
        event_id = len(self.model.logs[claim.id]) + 1

        async def fail_after_create() -> int:
            await self.create_child(self.bench.main, claim, "step", 0)
            raise ZeroDivisionError

        async def append(conn: Connection) -> None:
            with pytest.raises(ZeroDivisionError):
                await self.append_event(conn, claim, event_id, "step", 0, fail_after_create)

        self.do(Step("append", append, lambda model, held: None))

    @has(unheard)
    @rule(worker=pick(unheard))
    def beat_again(self, worker: int) -> None:
        self.heartbeat(worker)

    def heartbeat(self, worker: int) -> None:
        async def beat(conn: Connection) -> bool:
            row = await self.queries.heartbeat(
                conn, id=UUID(int=worker), display_name="w", max_silence=INACTIVE_AFTER / 2
            )
            return bool(row["was_in_touch"])

        self.do(Step("heartbeat", beat, lambda model, held: model.heartbeat(worker)))

    @has(active)
    @rule(worker=pick(active), age=st.sampled_from(["silent", "inactive", "inactive", "ahead"]))
    def fall_silent(self, worker: int, age: str) -> None:
        self.model.workers[worker] = age
        self.execute(
            "UPDATE workers SET last_heartbeat_at = now() - make_interval(secs => %s)"
            " WHERE id = %s",
            SILENCE[age],
            UUID(int=worker),
        )

    @has(active)
    @rule(worker=pick(active))
    def leave(self, worker: int) -> None:
        """A worker shuts down: it puts back what it owns, and deletes its row."""
        for is_durable in (False, True):
            self.put_back(worker, is_durable, 0, hold=False)
        self.model.workers.pop(worker, None)
        self.wait(self.queries.delete_worker(self.bench.main, id=UUID(int=worker)))

    @has(owners)
    @rule(
        worker=pick(owners),
        is_durable=st.booleans(),
        knows=st.sampled_from([0, 1, 1, 2]),
        hold=seldom,
    )
    def put_back(self, worker: int, is_durable: bool, knows: int, hold: bool) -> None:
        """A worker puts back what it does not run: it knows of none, of half or of all its claims,
        of which some are over.
        """
        claims = [claim for claim in self.claims if claim.worker == worker]
        known = [[], claims[::2], claims][knows]

        async def requeue(conn: Connection) -> list[Brief]:
            rows = self.queries.requeue_own_tasks(
                conn,
                worker_id=UUID(int=worker),
                is_durable=is_durable,
                ids=[claim.id for claim in known],
                attempts=[claim.attempt for claim in known],
            )
            return sorted([brief_row(row) async for row in rows])

        def put_back(model: Model, held: set[int]) -> list[Brief]:
            return model.put_back(worker, is_durable, known, held)

        self.do(Step("requeue_own_tasks", requeue, put_back, waits=False), hold)

    @has(live)
    @rule(
        claim=pick(live), worker=workers, late=st.sampled_from(["COMPLETED", "append", "suspend"])
    )
    def impostor(self, claim: Claim, worker: int, late: str) -> None:
        """A write with the right attempt and another worker's id changes nothing either."""
        other = Claim(claim.id, worker, claim.attempt)
        if worker != claim.worker:
            self.claims[other] = {**self.claims[claim], "worker_id": UUID(int=worker)}
            self.zombie(other, late, event_id=1)
            del self.claims[other]

    @has(live_durable)
    @precondition(lambda self: self.held is None)
    @rule(
        claim=pick(live_durable),
        name=st.sampled_from(["step", "order"]),
        twice=st.booleans(),
        reset=st.sampled_from([None, "retry_task", "fork_task"]),
    )
    def steps_fail(self, claim: Claim, name: str, twice: bool, reset: str | None) -> None:
        """Steps are started, claimed, and fail: what retry_task is for, but not of them."""
        task = self.model.tasks[claim.id]
        for _ in range(1 + twice):
            self.append(claim, name, 0, False, True)
        children = [event.child for event in self.model.logs[claim.id]]
        self.heartbeat(claim.worker)
        self.claim(claim.worker, (task.queue, name == "order"), (name,), 50, False)
        for child in self.live():
            if child.id in children:
                self.do(self.ending(child, "FAILED", {"error": "no"}))
                if reset is not None:
                    self.reset(reset, child.id, False, True)

    @has(live_durable)
    @precondition(lambda self: self.held is None)
    @rule(claim=pick(live_durable), compensates=st.booleans())
    def fails_and_is_retried(self, claim: Claim, compensates: bool) -> None:
        self.steps_fail(claim, "step", False, None)
        pairs = [pair for pair in self.failed_by_child() if pair[0] == claim]
        if pairs:
            self.fail_by_child(pairs[-1], compensates, True)

    @has(live_durable)
    @rule(
        claim=pick(live_durable),
        name=st.sampled_from(["step", "order", "sleep"]),
        then=st.sampled_from(["waits", "runs", "is suspended"]),
        from_event=st.integers(1, 3),
        hold=seldom,
    )
    def give_up_and_fork(
        self, claim: Claim, name: str, then: str, from_event: int, hold: bool
    ) -> None:
        """A task fails while some of what it has started waits, runs, sleeps, or is suspended."""
        input = None if name == "sleep" else 0
        event_id = len(self.model.logs[claim.id]) + 1
        self.do(self.appending(claim, event_id, name, input, 3600.0))
        child = self.model.logs[claim.id][-1].child if self.model.logs[claim.id] else 0
        if then != "waits":
            self.heartbeat(claim.worker)
            kind = self.model.tasks[claim.id].queue, name == "order"
            self.claim(claim.worker, kind, (name,), 50, False)
        if then == "is suspended":
            for order in self.live_durable():
                if order.id == child:
                    self.do(self.appending(order, 1, "sleep", None, 3600.0))
                    self.do(self.suspending(order, [self.model.logs[child][0].child]))
        self.do(self.ending(claim, "FAILED", {"error": "no"}))
        self.reset("fork_task", claim.id, hold, True, from_event)

    @has(live_durable)
    @precondition(lambda self: self.held is None)
    @rule(claim=pick(live_durable), from_event=st.integers(1, 3), ends=st.booleans())
    def fork_and_go_on(self, claim: Claim, from_event: int, ends: bool) -> None:
        """The next attempt is on the new branch. What the old one left is never run again."""
        for _ in range(2):
            self.append(claim, "order", 0, False, True)
        children = [event.child for event in self.model.logs[claim.id]]
        self.do(self.ending(claim, "FAILED", {"error": "no", "child_task_id": children[0]}))
        self.reset("fork_task", claim.id, False, True, from_event)
        self.rows_are_what_the_model_says()
        self.heartbeat(claim.worker)
        self.claim(claim.worker, (self.model.tasks[claim.id].queue, True), ("order",), 50, False)
        for again in self.live_durable():
            if again.id == claim.id:
                self.append(again, "step", 0, False, True)
                self.rows_are_what_the_model_says()
                if ends:
                    self.do(self.ending(again, "COMPLETED", 1))
                    self.rows_are_what_the_model_says()
        for child in children:
            for name in ("retry_task", "fork_task"):
                self.reset(name, child, False, True)

    @has(live)
    @rule(claim=pick(live), hold=seldom)
    def worker_dies(self, claim: Claim, hold: bool) -> None:
        """Its last heartbeat grows old, others notice, and its row is still there."""
        self.heartbeat(claim.worker)
        self.fall_silent(claim.worker, "inactive")
        self.requeue_lost(3, 1000, hold)

    @has(live)
    @rule(claim=pick(live))
    def claim_again(self, claim: Claim) -> None:
        """A worker that never got the answer to its claim puts back what it owns, and polls."""
        task = self.model.tasks[claim.id]
        self.heartbeat(claim.worker)
        self.put_back(claim.worker, task.is_durable, 0, hold=False)
        kind = task.queue, task.is_durable
        self.claim(claim.worker, kind, ("order", "step"), 3, hold=False)

    @has(lost)
    @rule(max_lost_workers=st.integers(2, 4), limit=limits, hold=seldom)
    def requeue_lost(self, max_lost_workers: int, limit: int, hold: bool) -> None:
        async def requeue(conn: Connection) -> list[Brief]:
            rows = self.queries.requeue_lost_tasks(
                conn, max_lost_workers=max_lost_workers, limit=limit, **await self.judgement()
            )
            return sorted([brief_row(row) async for row in rows])

        def requeue_lost(model: Model, held: set[int]) -> list[Brief]:
            return model.requeue_lost(max_lost_workers, limit, held)

        self.do(Step("requeue_lost_tasks", requeue, requeue_lost, waits=False), hold)

    @has(inactive)
    @rule()
    def delete_inactive_workers(self) -> None:
        async def delete(conn: Connection) -> int:
            return int(await self.queries.delete_inactive_workers(conn, **await self.judgement()))

        step = Step("delete_workers", delete, lambda model, held: model.delete_inactive_workers())
        self.do(step)

    @has(expired)
    @rule(limit=limits, hold=seldom)
    def expire(self, limit: int, hold: bool) -> None:
        async def expire(conn: Connection) -> list[Brief]:
            rows = self.queries.expire_tasks(conn, limit=limit)
            return sorted([brief_row(row) async for row in rows])

        def model_expire(model: Model, held: set[int]) -> list[Brief]:
            return model.expire(limit, held)

        self.do(Step("expire_tasks", expire, model_expire, waits=False), hold)

    @has(failed)
    @rule(id=pick(failed), hold=seldom, commit=st.booleans())
    def retry_task(self, id: int, hold: bool, commit: bool) -> None:
        self.reset("retry_task", id, hold, commit)

    @has(finished)
    @rule(id=pick(finished), from_event=st.integers(1, 4), hold=seldom, commit=st.booleans())
    def fork_task(self, id: int, from_event: int, hold: bool, commit: bool) -> None:
        self.reset("fork_task", id, hold, commit, from_event)

    @has(finished)
    @precondition(lambda self: self.held is None)
    @rule(id=pick(finished), commit=st.booleans())
    def fork_twice_at_once(self, id: int, commit: bool) -> None:
        """The second waits for the first, and is refused if that commits."""
        self.reset("fork_task", id, True, True)
        self.reset("fork_task", id, False, commit)

    @rule(name=st.sampled_from(["retry_task", "fork_task"]), id=pick(all_ids))
    def reset_any_task(self, name: str, id: int) -> None:
        """Most of them are in no state for it."""
        self.reset(name, id, False, True)

    @has(finished)
    @rule()
    def ask_for_finished_tasks(self) -> None:
        async def get(conn: Connection) -> list[tuple[int, str]]:
            rows = self.queries.get_finished_tasks(conn, ids=self.all_ids())
            return sorted([(row["id"], row["status"]) async for row in rows])

        def known(model: Model, held: set[int]) -> list[tuple[int, str]]:
            return sorted((task.id, task.status) for task in self.with_status(*FINISHED))

        self.do(Step("get_finished_tasks", get, known))

    @precondition(lambda self: self.held is not None)
    @rule(commit=st.sampled_from([True, True, False]))
    def end_transaction(self, commit: bool) -> None:
        self.wait(self.end_held(commit))

    # After each of them.

    @invariant()
    def rows_are_what_the_model_says(self) -> None:
        now = self.wait(self.snapshot())
        assert now.tasks == self.model.tasks
        assert now.logs == self.model.logs
        assert now.branches == self.model.branches
        assert now.signals == self.model.signals
        assert now.workers == self.model.workers
        for task in self.with_status("SUSPENDED"):
            children = [self.model.tasks[event.child] for event in self.model.logs[task.id]]
            assert any(child.status not in FINISHED for child in children), "nobody will wake it"
        self.check_promises(self.before, now)
        self.before = now
        self.steps.clear()

    def check_promises(self, old: Snapshot, new: Snapshot) -> None:
        """What holds whatever the model says."""
        resets = [step for step in self.steps if step in RESETS]
        may_reset = {state for step in resets for state in RESETS[step]}
        for id, before in old.tasks.items():
            after = new.tasks[id]
            assert after.attempt >= before.attempt
            is_reset = before.status in may_reset and after.status == "QUEUED"
            # A reset that was held is committed, and the fork that had to wait for it abandons
            # the task at once.
            if len(resets) > 1 and before.status in may_reset and after.output == ABANDONED:
                is_reset = True
            arrow = (before.status, after.status)
            assert before.status == after.status or arrow in ARROWS or is_reset, arrow
            if before.status in FINISHED and not is_reset:
                assert after == before, "a finished task has changed"
            if before.worker != after.worker and after.worker is not None:
                assert after.attempt == before.attempt + 1, "a new owner without a new attempt"
        for ids in new.event_ids.values():
            assert ids == list(range(1, len(ids) + 1))
        children = [event.child for log in new.logs.values() for event in log]
        assert len(children) == len(set(children))
        assert old.keys.items() <= new.keys.items(), "what a log says has changed"

    # How a rule is executed.

    def do(
        self, step: Step, hold: bool = False, commit: bool = True, may_wait: bool = True
    ) -> None:
        """Execute a step in the database and in the model, which must agree.

        `hold` leaves its transaction open, if the model knows all that it locks. If it has to wait
        for one that is open already, that is then ended, by commit or rollback.
        """
        self.steps.append(step.name)
        step.began = next(self.clock)
        scratch = deepcopy(self.model)
        step.expected(scratch, self.held_ids())
        if any(in_conflict(lock, self.lock_held(id)) for id, lock in scratch.locks.items()):
            assert may_wait
            self.wait(self.contend(step, commit))
        elif hold and self.held is None and not scratch.may_hold_more:
            self.wait(self.hold(step))
        else:
            self.finish(step, self.wait(step.actual(self.bench.main)))

    def finish(self, step: Step, result: Any, held: set[int] | None = None) -> None:
        """The step is committed: it must have done what the model does."""
        held = self.held_ids() if held is None else held
        assert result == step.expected(self.model, held)
        self.last_id = max([self.last_id, *self.model.tasks])
        step.then(result)

    async def hold(self, step: Step) -> None:
        await self.bench.holding.execute("BEGIN")
        result = await step.actual(self.bench.holding)
        after = deepcopy(self.model)
        assert result == step.expected(after, set())
        self.last_id = max([self.last_id, *after.tasks])
        if result in REFUSALS:
            await self.bench.holding.execute("ROLLBACK")
        else:
            self.held = Held(step, result, after)

    async def end_held(self, commit: bool) -> None:
        assert self.held is not None
        step, result, after = self.held
        self.held = None
        await self.bench.holding.execute("COMMIT" if commit else "ROLLBACK")
        if commit:
            self.steps.append(step.name)
            # Others may have written what it has only kept from being locked.
            self.model.adopt(after, [id for id, lock in after.locks.items() if lock > KEY_SHARE])
            step.then(result)

    async def contend(self, step: Step, commit: bool) -> None:
        """The step has to wait for the transaction that is open."""
        # What it has passed over it does not see again.
        held = set() if step.waits else self.held_ids()
        waiting = asyncio.ensure_future(step.actual(self.bench.waiting))
        try:
            await wait_for(partial(self.is_waiting, waiting), f"{step.name} waits for a lock")
            await self.end_held(commit)
            result = await asyncio.wait_for(waiting, DEADLINE)
        finally:
            waiting.cancel()
        self.finish(step, result, held)

    async def is_waiting(self, step: asyncio.Future[Any]) -> bool:
        assert not step.done(), f"it should have waited for a lock, but returned {step.result()}"
        pid = self.bench.waiting.info.backend_pid
        cursor = await self.bench.main.execute(
            "SELECT FROM pg_locks WHERE pid = %s AND NOT granted", [pid]
        )
        return await cursor.fetchone() is not None

    def held_ids(self) -> set[int]:
        """The rows that a statement with SKIP LOCKED passes over."""
        locks = self.held.after.locks.items() if self.held else ()
        return {id for id, lock in locks if lock > KEY_SHARE}

    def lock_held(self, id: int) -> int:
        return self.held.after.locks.get(id, 0) if self.held else 0

    def hand_out(self, rows: list[dict[str, Any]]) -> None:
        """A claim is committed: nobody has ever had it before."""
        for row in rows:
            claim = Claim(row["id"], row["worker_id"].int, row["attempt"])
            assert not any(
                (old.id, old.attempt) == (claim.id, claim.attempt) for old in self.claims
            )
            self.claims[claim] = row

    def ending(self, claim: Claim, status: str, output: Any) -> Step:
        owner = (claim.id, UUID(int=claim.worker), claim.attempt)

        async def write(conn: Connection) -> list[Brief]:
            changed = await write_outcome(self.queries, conn, *owner, status, output)
            return [brief_row(await self.queries.get_task(conn, id=claim.id))] if changed else []

        return Step(status, write, lambda model, held: model.end(claim, status, output))

    def suspending(self, claim: Claim, awaited: list[int]) -> Step:
        async def let_go(conn: Connection) -> bool:
            lesson, pool = self.bench.lesson, OnePool(conn)
            task = lesson.models.Task(**self.claims[claim])
            context = lesson.durable_context.DurableContext(pool, self.queries, None, task, None)
            context._waiting.update(awaited)
            async with asyncio.timeout(DEADLINE):
                await context.suspend(0.0)
            return bool(context.left.done())

        return Step("suspend", let_go, lambda model, held: model.suspend(claim, awaited))

    def sending(self, id: int, name: str, key: str | None) -> Step:
        payload = next(self.clock)

        async def send(conn: Connection) -> None:
            send_signal = self.bench.lesson.signals.send_signal
            await send_signal(conn, self.queries, id, name, payload, key)

        return Step(
            "send_signal",
            send,
            lambda model, held: model.send(id, Signal(name, payload, key), held),
        )

    def appending(
        self, claim: Claim, event_id: int, name: str, input: int | None, seconds: float | None = 0
    ) -> Step:
        event = Event(name, input, self.last_id + 1, 1)

        async def append(conn: Connection) -> tuple[int, bool]:
            created: list[int] = []

            async def create_child() -> int:
                created.append(await self.create_child(conn, claim, name, input, seconds))
                return created[-1]

            result = await self.append_event(conn, claim, event_id, name, input, create_child)
            assert bool(created) != result[1], "a child for an event that had one, or none"
            return result

        def model_append(model: Model, held: set[int]) -> tuple[int, bool]:
            return model.append(claim, event_id, event, seconds)

        return Step("append", append, model_append)

    def reset(self, name: str, id: int, hold: bool, commit: bool, from_event: int = 1) -> None:
        async def reset(conn: Connection) -> None:
            rerun = self.bench.lesson.rerun
            if name == "retry_task":
                await rerun.retry_task(OnePool(conn), self.queries, id)
            elif from_event == 1:
                await rerun.replay_task(OnePool(conn), self.queries, id)
            else:
                await rerun.fork_task(OnePool(conn), self.queries, id, from_event)

        def model_reset(model: Model, held: set[int]) -> None:
            if name == "retry_task":
                model.retry(id)
            else:
                model.fork(id, from_event, held)

        self.do(Step(name, reset, model_reset), hold, commit)

    async def append_event(
        self,
        conn: Connection,
        claim: Claim,
        event_id: int,
        name: str,
        input: int | None,
        create_child: Callable[[], Awaitable[int]],
    ) -> tuple[int, bool]:
        task = self.bench.lesson.models.Task(**self.claims[claim])
        log = self.bench.lesson.event_log.EventLog(self.queries)
        kind = "SLEEP_STARTED" if name == "sleep" else "TASK_STARTED"
        kind = "SIGNAL_AWAITED" if name in SIGNALS else kind
        async with conn.transaction():
            event, already_recorded = await log.append(
                conn, task, event_id, kind, name, input, create_child
            )
            if name in SIGNALS and not already_recorded:
                await self.queries.deliver_signal(conn, task_id=claim.id, name=name)
        return event.child_task_id, already_recorded

    async def create_child(
        self,
        conn: Connection,
        claim: Claim,
        name: str,
        input: int | None,
        seconds: float | None = 0,
    ) -> int:
        parent = self.claims[claim]
        timer = {"queue": parent["queue"], "input": Jsonb({"seconds": seconds}), "seconds": seconds}
        if name == "sleep":
            row = await self.queries.create_sleep(conn, **timer)
        elif name in SIGNALS:
            row = await self.queries.create_wait(conn, name=name, **timer)
        else:
            row = await self.queries.create_child(
                conn,
                queue=parent["queue"],
                task_name=name,
                input=Jsonb(input),
                max_retries=1,
                timeout=None,
                priority=parent["priority"],
                is_durable=name == "order",
            )
        self.last_id = max(self.last_id, row["id"])
        return int(row["id"])

    async def create_task(
        self, conn: Connection, task: ModelTask, schedule_timeout: str | None
    ) -> Brief:
        row = await self.queries.create_task(
            conn,
            queue=task.queue,
            task_name=task.task_name,
            input=Jsonb(task.input),
            max_retries=task.max_retries,
            timeout=None,
            schedule_timeout=schedule_timeout,
            priority=task.priority,
            is_durable=task.is_durable,
        )
        self.last_id = max(self.last_id, row["id"])
        return brief_row(row)

    def wait(self, operation: Coroutine[Any, Any, Any]) -> Any:
        return self.bench.loop.run_until_complete(operation)

    def execute(self, statement: str, *parameters: Any) -> None:
        self.wait(self.bench.main.execute(statement.encode(), parameters))

    async def snapshot(self) -> Snapshot:
        """All rows, as another connection sees them."""
        tasks = {row["id"]: model_task(row) for row in await self.rows(TASKS)}
        logs: dict[int, list[Event]] = {id: [] for id in tasks}
        event_ids: dict[int, list[int]] = {id: [] for id in tasks}
        keys: dict[int, str] = {}
        branches: dict[int, list[Branch]] = {id: [] for id in tasks}
        for row in await self.rows(BRANCHES):
            branches[row["task_id"]].append(
                Branch(row["from_event"], row["status"], row["output"], [])
            )
        for row in await self.rows(EVENTS):
            child = tasks[row["child_task_id"]]
            input = None if child.task_name in TIMERS else child.input
            event = Event(child.task_name, input, child.id, row["branch_id"])
            if row["abandoned_in"] is None:
                logs[row["task_id"]].append(event)
                event_ids[row["task_id"]].append(row["event_id"])
            else:
                branches[row["task_id"]][row["abandoned_in"] - 2].abandoned.append(event)
            keys[child.id] = row["key"]
        signals: dict[int, list[Signal]] = {id: [] for id in tasks}
        for row in await self.rows(SENT):
            signals[row.pop("task_id")].append(Signal(**row))
        workers = {row["id"].int: row["age"] for row in await self.rows(AGES)}
        return Snapshot(tasks, logs, branches, signals, workers, event_ids, keys)

    async def judgement(self) -> dict[str, Any]:
        """By which workers are judged: our own beat is one of just now."""
        (row,) = await self.rows("SELECT now() AS time")
        return {"our_beat": row["time"], "inactive_after": INACTIVE_AFTER}

    async def rows(self, query: str) -> list[dict[str, Any]]:
        return await (await self.bench.main.execute(query.encode())).fetchall()


TASKS = """
SELECT *, finished_at IS NOT NULL AS finished, schedule_timeout_at <= now() AS overdue,
    wake_at <= now() AS is_due
FROM tasks
ORDER BY id
"""
BRANCHES = "SELECT * FROM task_branches ORDER BY task_id, branch_id"
SENT = """
SELECT task_id, name, payload, idempotency_key, received_by
FROM signals
ORDER BY id
"""
EVENTS = "SELECT * FROM durable_events ORDER BY task_id, branch_id, event_id"
AGES = f"""
SELECT id, CASE
    WHEN last_heartbeat_at <= now() - interval '{INACTIVE_AFTER} s' THEN 'inactive'
    WHEN last_heartbeat_at > now() + interval '{INACTIVE_AFTER} s' THEN 'ahead'
    WHEN last_heartbeat_at <= now() - interval '{INACTIVE_AFTER / 2} s' THEN 'silent'
    ELSE 'fresh'
END AS age
FROM workers
"""


def model_task(row: dict[str, Any]) -> ModelTask:
    worker = row["worker_id"] and row["worker_id"].int
    return ModelTask(
        worker=worker, **{f.name: row[f.name] for f in fields(ModelTask) if f.name != "worker"}
    )


def brief_row(row: dict[str, Any]) -> Brief:
    return brief(model_task({"finished": None, "overdue": None, "is_due": None, **row}))


@pytest.fixture
def bench(lesson: Lesson, database: str) -> Iterator[Bench]:
    loop = asyncio.SelectorEventLoop()
    bench = Bench(lesson, loop)
    loop.run_until_complete(bench.open())
    yield bench
    loop.run_until_complete(bench.close())
    loop.close()


@pytest.mark.since(15)
@pytest.mark.only(LAST)
def test_whatever_happens_every_row_is_what_the_model_says(bench: Bench) -> None:
    # Rounds, since Hypothesis counts examples, which take ten times as long on a busy machine.
    deadline = time.monotonic() + SECONDS
    for number in count():
        if time.monotonic() > deadline:
            break
        engine = cast(Any, lambda: Engine(bench))
        run_state_machine_as_test(engine if IS_LONG else seed(number)(engine), settings=ROUND)
