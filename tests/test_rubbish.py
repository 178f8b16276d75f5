"""Rubbish of any kind in, through and out of tasks: every row ends, and the worker lives.

Hypothesis makes up batches of tasks whose names, inputs, outputs, errors and deeds are as bad as
can be (see rubbish.py), and puts an innocent one among them. They run on a live worker, the same
for all batches. Each row must end, with its output or with an error that says what was wrong; the
innocent task completes, and so does one more afterwards.

    RUBBISH_SECONDS=600 pytest -n 2 -o faulthandler_timeout=0 tests/test_rubbish.py

runs for ten minutes in place of some seconds, and with batches that nobody has tried before.
Without it they are the same each time, so that a change is not blamed for what it has not done. A
failure prints the batch that led to it, and the next run begins with that. With RUBBISH_SECONDS set
it is made as small as possible first, which takes minutes.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from psycopg import sql

from helpers import (
    DEADLINE,
    QUEUE,
    QUICK,
    enqueue,
    execute,
    make_worker,
    statuses,
    wait_for,
    working,
)
from lesson_loader import LAST, Lesson
from rubbish import (
    DEEDS,
    ENDS,
    INPUTS,
    NASTY,
    STORABLE_TEXTS,
    TIMEOUT,
    Job,
    Raise,
    Raw,
    Return,
    Step,
    batches,
    make,
    singles,
)
from shared import Connection, Pool, UnreadableJson, error_text, load_queries, open_pool
from shared.errors import MAX_ERROR_CHARACTERS
from shared.runtime import close_loop

# Nothing that a function does harms others: that is lesson 10.
pytestmark = [
    pytest.mark.since(10),
    pytest.mark.only(10, LAST),
    # Coroutines that nobody awaits and errors that nobody sees are what is wanted here.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

IS_LONG = "RUBBISH_SECONDS" in os.environ
SECONDS = float(os.environ.get("RUBBISH_SECONDS", "2.5"))
ROUND = settings(
    max_examples=10,
    deadline=None,
    print_blob=True,
    phases=[phase for phase in Phase if phase != Phase.shrink or IS_LONG],
    suppress_health_check=list(HealthCheck),
)
# Nothing is suspended because the machine is busy: what a function is asked twice it may do twice.
QUICKER = QUICK | {"SHUTDOWN_GRACE": 0.05, "SUSPEND_AFTER": 60.0}
BATCH_SIZE = 50
UNHARMED = ["un", {"harmed": True}]


class Outcome(NamedTuple):
    """What a function returned, or else the name of the type of what it raised."""

    output: Any
    error: str | None


class Run:
    """A batch of tasks while it runs: their functions, and what they have done."""

    def __init__(self, errors: Any, jobs: list[Job]) -> None:
        self.errors = errors
        self.jobs = {job.task_name: job for job in jobs}
        self.outcomes: dict[str, Outcome] = {}
        self.has_seen_unreadable = False
        self.is_over = False

    async def call(self, name: str, context: Any, input: Any) -> Any:
        """The function of all tasks."""
        self.has_seen_unreadable |= isinstance(input, UnreadableJson)
        if name == "innocent" or self.is_over:
            return input
        if name == "failing":
            raise ValueError("a step that fails")
        if name == "another":
            return await self.end(next(iter(self.jobs.values())).end)
        try:
            output = await self.perform(self.jobs[name], context, input)
        except BaseException as error:
            self.outcomes[name] = Outcome(None, type(error).__name__)
            raise
        self.outcomes[name] = Outcome(output, None)
        return output

    async def perform(self, job: Job, context: Any, input: Any) -> Any:
        for deed in job.deeds:
            if isinstance(deed, Step):
                await self.take(deed, context)
            else:
                await DEEDS[deed](input)
        return await self.end(job.end)

    async def take(self, step: Step, context: Any) -> None:
        """Run a child. What is wrong with it, or with the call, is an error like any other."""
        name, input, options = make([step.task_name, step.input, step.options])
        with suppress(Exception):
            child = context.run_task(name, input, **options)  # an input that is no JSON fails here
            if not step.is_left:
                await child
                return
            asyncio.ensure_future(child).add_done_callback(lambda child: None)
            await asyncio.sleep(0)

    async def end(self, end: Return | Raise | str) -> Any:
        if isinstance(end, Return):
            return make(end.value)
        if isinstance(end, Raise):
            raise make(end.error, self.errors)
        return await ENDS[end](lambda: self.is_over)


class Bench:
    """A database with a lesson's tables, and an event loop with one worker at a time."""

    def __init__(self, lesson: Lesson) -> None:
        self.lesson = lesson
        self.errors = lesson.modules.get("errors")
        self.queries = load_queries(lesson.path)
        self.is_open = False

    def examine(self, check: Coroutine[Any, Any, None]) -> None:
        """Run a check to its end; if it fails, the next one begins with an event loop anew."""
        if not self.is_open:
            self.loop = asyncio.SelectorEventLoop()
            # Its own would look at the values, of which some raise SystemExit at that.
            self.loop.set_exception_handler(lambda loop, context: None)
            self.loop.run_until_complete(self.open())
        try:
            self.loop.run_until_complete(check)
        except BaseException as error:
            self.is_open = False
            self.run.is_over = True
            close_loop(self.loop)
            if isinstance(error, SystemExit | KeyboardInterrupt):
                raise AssertionError(f"{error!r} has stopped the event loop") from None
            raise

    async def open(self) -> None:
        self.stack = AsyncExitStack()
        self.pool: Pool = await self.stack.enter_async_context(open_pool(self.lesson.path))
        self.start: asyncio.Task[None] | None = None
        self.run = Run(self.errors, [])
        await execute(self.pool, "TRUNCATE tasks CASCADE")
        self.is_open = True

    def close(self) -> None:
        if self.is_open:
            self.examine(self.stop())
            self.examine(self.stack.aclose())
            close_loop(self.loop)

    async def begin(self, queue: str) -> None:
        """Start a worker."""
        self.queue = queue
        self.names: set[str] = set()
        # Few, so that none may be lost.
        slots = {"concurrency": BATCH_SIZE + 1, "durable_concurrency": BATCH_SIZE + 1}
        self.worker = make_worker(self.lesson, self.pool, self.queries, **QUICKER, **slots)
        for name in ("innocent", "another", "failing"):
            self.register(name)
        self.start = asyncio.create_task(self.worker.start(queue))

    def register(self, name: str) -> None:
        async def function(*arguments: Any) -> Any:
            context = arguments[0] if len(arguments) > 1 else None
            return await self.run.call(name, context, arguments[-1])

        if name not in self.names:
            self.names.add(name)
            self.worker.register(name, function)

    async def stop(self) -> None:
        """Tell the worker to stop, which it must."""
        if self.start is None:
            return
        self.worker.stop()
        await asyncio.wait({self.start}, timeout=DEADLINE)
        assert self.start.done(), "the worker does not stop"
        if not self.start.cancelled():
            assert not self.start.exception(), self.why()
        self.start = None

    def why(self) -> str:
        """Why the worker has ended."""
        assert self.start
        try:
            error = self.start.exception()
            return error_text(error) if error else "it has returned"
        except BaseException:
            return "for a reason that cannot be put in words"

    async def enqueue(self, jobs: list[Job], limit: timedelta = TIMEOUT) -> list[int]:
        """Enqueue jobs, and an innocent task after them, for one claim; return their ids."""
        self.run = Run(self.errors, jobs)
        rows = [(self.columns(job, limit), await self.input_text(job)) for job in jobs]
        rows.append(({"task_name": "innocent"}, json.dumps(UNHARMED)))
        async with self.pool.connection() as conn, conn.transaction():
            return [await self.insert(conn, columns, input) for columns, input in rows]

    def columns(self, job: Job, limit: timedelta) -> dict[str, Any]:
        if job.is_registered:
            self.register(job.task_name)
        return {
            "task_name": job.name,
            "max_retries": job.max_retries,
            "timeout": limit if job.is_endless else None,
            "is_durable": job.is_durable,
        }

    async def insert(self, conn: Connection, columns: dict[str, Any], input: str) -> int:
        columns = {"queue": self.queue, **columns, "input": input}
        statement = sql.SQL("INSERT INTO tasks ({}) VALUES ({}) RETURNING id").format(
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.SQL(", ").join(sql.Placeholder() * len(columns)),
        )
        row = await (await conn.execute(statement, list(columns.values()))).fetchone()
        assert row
        return int(row["id"])

    async def input_text(self, job: Job) -> str:
        """The JSON of a job's input; what is not JSON must be refused, and is null."""
        if isinstance(job.input, Raw):
            return INPUTS[job.input.name]
        text = await self.json_text(make(job.input))
        if text is None:
            assert await self.refuses(make(job.input)), "an input that is not JSON is enqueued"
        return text or "null"

    async def json_text(self, value: Any) -> str | None:
        """The JSON of a value, by Python's and Postgres's own judgement; None if it is not JSON."""
        try:
            text = json.dumps(value, allow_nan=False)
            await execute(self.pool, "SELECT CAST(%s AS JSONB) IS NULL", text)
        except BaseException:  # the value may raise anything
            return None
        return text

    async def refuses(self, input: Any) -> bool:
        try:
            await enqueue(self.pool, "innocent", input, queue="refused")
        except BaseException:
            return True
        return False

    async def ended(self, first_id: int) -> list[dict[str, Any]]:
        """Wait until all tasks from this one on have ended, children too; return their rows.

        All but those that nobody may claim.
        """

        async def none_is_left() -> bool:
            if self.start is None or self.start.done():
                raise AssertionError(f"the worker has ended: {self.why()}")
            return not await execute(self.pool, UNFINISHED, first_id)

        try:
            await wait_for(none_is_left, "all tasks have ended")
        except AssertionError as error:
            left = await execute(self.pool, UNFINISHED, first_id)
            raise AssertionError(f"{error}; left are {left}") from None
        return await execute(self.pool, "SELECT * FROM tasks WHERE id >= %s ORDER BY id", first_id)

    async def is_output(self, id: int, text: str) -> bool:
        query = "SELECT output = CAST(%s AS JSONB) AS same FROM tasks WHERE id = %s"
        return bool((await execute(self.pool, query, text, id))[0]["same"])


# Names that nobody has registered end with a question mark; their tasks must stay QUEUED.
UNFINISHED = """
SELECT task_name, status
FROM tasks
WHERE id >= %s
  AND status NOT IN ('COMPLETED', 'FAILED')
  AND NOT (task_name LIKE '%%?' AND status = 'QUEUED')
"""


@pytest.fixture
def bench(lesson: Lesson, database: str) -> Iterator[Bench]:
    bench = Bench(lesson)
    yield bench
    bench.close()


async def check_batch(bench: Bench, jobs: list[Job]) -> None:
    if bench.start is None:
        await bench.begin("q")
    ids = await bench.enqueue(jobs)
    rows = await bench.ended(ids[0])
    bench.run.is_over = True
    assert not bench.run.has_seen_unreadable
    for row in rows:
        check_row(row)
        assert row["attempt"] <= 1 + max(0, row["max_retries"]), "it was put back"
    *guilty, innocent = rows[: len(ids)]
    assert (innocent["status"], innocent["output"]) == ("COMPLETED", UNHARMED)
    for job, row in zip(jobs, guilty, strict=True):
        if job.is_registered:
            await check_outcome(bench, job, row)
    *_, last = await bench.ended((await bench.enqueue([]))[0])
    assert last["output"] == UNHARMED


def check_row(row: dict[str, Any]) -> None:
    """What is true of every row that has ended, or that nobody may claim."""
    if row["task_name"].endswith("?"):
        assert (row["status"], row["attempt"]) == ("QUEUED", 0)
        return
    assert row["finished_at"]
    if row["status"] == "FAILED":
        error = row["output"]["error"]
        assert re.match("[A-Za-z]+(: |$)", error), "it does not begin with the type of an error"
        assert len(error) <= MAX_ERROR_CHARACTERS


async def check_outcome(bench: Bench, job: Job, row: dict[str, Any]) -> None:
    """Whether a row tells what its function did."""
    error = row["output"]["error"] if row["status"] == "FAILED" else None
    outcome = bench.run.outcomes.get(job.task_name)
    if job.is_unreadable or (outcome is None and not job.is_endless):
        assert error
        assert "cannot read the input" in error
    elif job.is_endless:
        assert error
        assert "timed out" in error or isinstance(job.input, Raw)
    elif job.end == "return_cancelled":
        assert error is None or "CancelledError" in error
    else:
        assert outcome
        if outcome.error:
            assert error
            assert error.startswith(outcome.error)
        elif text := await bench.json_text(outcome.output):
            assert error is None
            assert await bench.is_output(row["id"], text), "the output is not what was returned"
        else:
            assert error, "what is not JSON was stored"
            assert ": " in error


async def check_stop(bench: Bench, queue: str, jobs: list[Job], seconds: float) -> None:
    await bench.begin(queue)
    ids = await bench.enqueue(jobs, limit=timedelta(minutes=10))
    await asyncio.sleep(seconds)
    await bench.stop()
    # From now on all functions are innocent, and those that are still running end.
    bench.run.is_over = True
    await bench.begin(queue)
    for name in bench.run.jobs:
        bench.register(name)
    rows = await bench.ended(ids[0])
    for row in rows:
        check_row(row)
    assert rows[len(jobs)]["output"] == UNHARMED
    await bench.stop()


def rounds(check: Callable[[], None], seconds: float) -> None:
    """Rounds, since Hypothesis counts examples, which take ten times as long on a busy machine."""
    deadline = time.monotonic() + seconds
    for number in count():
        if time.monotonic() > deadline:
            break
        if not IS_LONG:
            seed(number)(check)
        check()


def test_rubbish_ends_its_own_task_and_harms_no_other(bench: Bench) -> None:
    @ROUND
    @given(batches())
    def check(jobs: list[Job]) -> None:
        bench.examine(check_batch(bench, jobs))

    rounds(check, SECONDS)


def test_each_kind_of_rubbish_alone(bench: Bench) -> None:
    jobs = singles()
    for n in range(0, len(jobs), BATCH_SIZE):
        bench.examine(check_batch(bench, jobs[n : n + BATCH_SIZE]))


def test_a_worker_full_of_rubbish_stops_when_told_to(bench: Bench) -> None:
    queues = st.sampled_from(NASTY) | STORABLE_TEXTS

    @ROUND
    @given(queues, batches(), st.sampled_from([0.0, 0.05, 0.15]))
    def check(queue: str, jobs: list[Job], seconds: float) -> None:
        bench.examine(check_stop(bench, queue, jobs, seconds))

    rounds(check, SECONDS / 3)


async def test_fifteen_megabytes(lesson: Lesson, pool: Pool, queries: Any) -> None:
    async def echo(input: str) -> str:
        return input

    async def fail(input: int) -> None:
        raise ValueError("x" * input)

    async with working(make_worker(lesson, pool, queries, echo, fail)):
        await execute(
            pool,
            """
            INSERT INTO tasks (queue, task_name, input)
            VALUES (%s, 'echo', to_jsonb(repeat('x', 15000000))), (%s, 'fail', '15000000')
            """,
            QUEUE,
            QUEUE,
        )

        async def all_have_ended() -> bool:
            return await statuses(pool) == {"COMPLETED": 1, "FAILED": 1}

        await wait_for(all_have_ended, "all tasks have ended", seconds=100)
    lengths = "SELECT input = output AS same, length(output ->> 'error') AS length FROM tasks"
    echoed, failed = await execute(pool, lengths + " ORDER BY id")
    assert echoed["same"]
    assert failed["length"] == MAX_ERROR_CHARACTERS
