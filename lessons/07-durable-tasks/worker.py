"""A worker: it claims tasks from a queue in Postgres, runs them, and records how they ended.

It has as many slots as it may run tasks at once, and claims no more than it has free slots. Workers
watch each other's heartbeats: a task whose worker dies is run by another. A durable task then goes
on from its event log; a plain task starts anew.
"""

import asyncio
import inspect
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from psycopg.types.json import Jsonb

from durable_context import DurableContext
from errors import ChildTaskError, NonRetryableError, is_retryable, leaves
from models import Task
from shared import (
    Connection,
    Pool,
    Queries,
    UnreadableJson,
    error_text,
    keep_trying,
    open_connection,
    stop_signals,
    surviving_outage,
)

POLL_INTERVAL = 0.1  # seconds between two polls of an empty queue
HEARTBEAT_INTERVAL = 1.0  # seconds between two heartbeats
INACTIVE_AFTER = 5.0  # seconds without a heartbeat until inactive; more than two intervals
SHUTDOWN_GRACE = 5.0  # seconds for a task to end by itself, and again to obey its cancellation
MAX_LOST_WORKERS = 20  # a task that lost so many workers fails: it may be what kills them

TaskFunction = Callable[..., Coroutine[Any, Any, Any]]

log = logging.getLogger("worker")

# The task that is running: its id is the idempotency key of whatever its function does.
current_task: ContextVar[Task] = ContextVar("current_task")


class Worker:
    """Runs the tasks of one queue with the functions registered for their names.

    A durable task's function gets a DurableContext before its input. `concurrency` is the number of
    slots: how many tasks run at once. Durable tasks, which mostly wait, have `durable_concurrency`
    slots of their own.
    """

    def __init__(
        self,
        pool: Pool,
        queries: Queries,
        concurrency: int = 100,
        durable_concurrency: int = 1000,
    ) -> None:
        self.id = uuid4()
        self.display_name = f"{socket.gethostname()}:{os.getpid()}"
        self.pool = pool
        self.queries = queries
        self._slots = {False: concurrency, True: durable_concurrency}  # by is_durable
        self._functions: dict[str, TaskFunction] = {}
        self._running: dict[asyncio.Task[None], Task] = {}
        self._more_waiting = {False: False, True: False}  # is there reason to think so?
        self._wake = asyncio.Event()  # set when there is a reason to poll at once
        self._stopping = False
        self._giving_up: dict[bool, asyncio.Future[None]]  # done when running tasks must not go on
        self._registered = asyncio.Event()  # set by the first heartbeat, or to stop
        self._beats_in_touch = 0  # heartbeats in a row that came in time
        # Who waits for whom: by the child's id, the parents (two if one is our zombie), and
        # the child as each has seen it.
        self._waits: dict[int, dict[asyncio.Future[Task], tuple[Task, Task]]] = {}
        self._ended_here: list[int] = []  # awaited children that ended here since we last asked
        self._ask = asyncio.Event()  # set when there are any

    def register(self, task_name: str, function: TaskFunction) -> None:
        """Let this function run the tasks called `task_name`; input and output are JSON values.

        Raises TypeError if it is not `async def`, ValueError if the name is taken.
        """
        if not inspect.iscoroutinefunction(function):
            # A plain function would block the event loop, and with it every other task.
            raise TypeError(f"the function for task {task_name!r} must be an `async def`")
        if task_name in self._functions:
            raise ValueError(f"a function for task {task_name!r} is registered already")
        self._functions[task_name] = function

    async def start(self, queue: str) -> None:
        """Run the tasks of `queue` until `stop`, SIGINT or SIGTERM.

        Running tasks get SHUTDOWN_GRACE to end, what is left goes back to the queue. Durable tasks
        get no grace: their progress is in the log. Cancelling `start`, which a second signal does
        too, is the same without the grace.
        """
        loop = asyncio.get_running_loop()
        self._giving_up = {False: loop.create_future(), True: loop.create_future()}
        myself = asyncio.current_task()
        assert myself is not None
        with stop_signals(self.stop, myself.cancel):
            try:
                async with asyncio.TaskGroup() as group:
                    heartbeat = group.create_task(self._keep_beating())
                    watcher = group.create_task(self._watch_children())
                    try:
                        await self._poll(queue, group)
                        self._giving_up[True].set_result(None)
                        await self._wait_for_running(SHUTDOWN_GRACE)
                    finally:
                        for giving_up in self._giving_up.values():
                            if not giving_up.done():
                                giving_up.set_result(None)
                        await self._wait_for_running(2 * SHUTDOWN_GRACE)
                        for run in self._running:
                            run.cancel()  # the database is away, their outcomes cannot be written
                        # Only now: a worker without heartbeat loses the tasks it still runs.
                        heartbeat.cancel()
                        watcher.cancel()
            finally:
                await self._leave()

    def stop(self) -> None:
        """Claim no more tasks; `start` returns when the running ones have ended."""
        self._stopping = True
        self._wake.set()
        self._registered.set()

    async def _wait_for_running(self, seconds: float) -> None:
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)

    async def _poll(self, queue: str, group: asyncio.TaskGroup) -> None:
        """Claim tasks and start them, until told to stop."""
        clock = asyncio.get_running_loop().time
        check_at = poll_at = 0.0
        await self._registered.wait()
        while not self._stopping:
            self._wake.clear()
            if clock() >= poll_at:
                self._more_waiting = dict.fromkeys(self._slots, True)  # it is time to look
                poll_at = clock() + POLL_INTERVAL
            answered = False
            with surviving_outage(f"worker {self.display_name}: cannot poll"):
                if clock() >= check_at:
                    # A claim may have been committed although its answer got lost.
                    await self._put_back(self._running.values(), "its claim got lost")
                    check_at = clock() + HEARTBEAT_INTERVAL
                for is_durable in self._slots:
                    for task in await self._claim(queue, is_durable):
                        run = group.create_task(self._run_task(task))
                        self._running[run] = task
                        run.add_done_callback(self._release_slot)
                answered = True
            if not answered:
                check_at = poll_at = 0.0
                await self._pause(HEARTBEAT_INTERVAL)
            elif not any(
                self._more_waiting[kind] and self._free_slots(kind) for kind in self._slots
            ):
                await self._pause(poll_at - clock())

    async def _claim(self, queue: str, is_durable: bool) -> list[Task]:
        """Take the most urgent queued tasks, one for each free slot: nobody else will run them."""
        if not (self._more_waiting[is_durable] and self._free_slots(is_durable)):
            return []
        self._more_waiting[is_durable] = False  # wait_for_child may set it during the claim
        async with self.pool.connection() as conn:
            # Counted here, not before: while we waited for a connection more slots came free.
            limit = self._free_slots(is_durable)
            rows = self.queries.poll_tasks(
                conn, queue=queue, is_durable=is_durable, limit=limit, worker_id=self.id
            )
            tasks = [Task(**row) async for row in rows]
        if len(tasks) == limit:
            self._more_waiting[is_durable] = True
        return tasks

    def _free_slots(self, is_durable: bool) -> int:
        """A task that waits for a durable child has given its slot back, or they might all wait."""
        parked = {
            (parent.id, parent.attempt)
            for waits in self._waits.values()
            for parent, child in waits.values()
            if child.is_durable
        }
        busy = [
            task
            for task in self._running.values()
            if task.is_durable == is_durable and (task.id, task.attempt) not in parked
        ]
        return max(0, self._slots[is_durable] - len(busy))

    def _release_slot(self, run: asyncio.Task[None]) -> None:
        """A task has ended: if others are known to wait, its slot is filled at once."""
        task = self._running.pop(run)
        if self._more_waiting[task.is_durable]:
            self._wake.set()

    async def _pause(self, seconds: float) -> None:
        """Sleep for that long, or until there is a reason to poll at once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _run_task(self, task: Task) -> None:
        """Run one claimed task and record how it ended.

        The function has an asyncio task of its own, so that one which ignores its cancellation
        can be left behind.
        """
        self._log(task, f"RUNNING {task.task_name}")
        timeout = None if task.timeout is None else task.timeout.total_seconds()
        call = asyncio.create_task(self._call(task))
        giving_up = self._giving_up[task.is_durable]
        ends: list[asyncio.Future[Any]] = [call, giving_up]
        try:
            await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            interrupted = call.cancel()  # False if it has ended
        if interrupted:
            timed_out = not giving_up.done()
            await asyncio.wait({call}, timeout=SHUTDOWN_GRACE)
            if timed_out:
                await self._fail(task, TimeoutError(f"timed out after {task.timeout}"))
            # Else the worker shuts down, and puts back all that it still owns at the end.
        elif call.cancelled():  # it returned while a cancellation of its own was due
            await self._fail(task, asyncio.CancelledError("the function cancelled itself"))
        else:
            output, error = call.result()
            if error is None:
                await self._complete(task, output)
            else:
                await self._fail(task, error)

    async def _call(self, task: Task) -> tuple[Any, BaseException | None]:
        """Call the task's function. Its error is returned: raised, a SystemExit stops the loop."""
        try:
            function = self._functions.get(task.task_name)
            if function is None:
                raise NonRetryableError(f"no function is registered for task {task.task_name!r}")
            if isinstance(task.input, UnreadableJson):
                raise NonRetryableError(f"cannot read the input: {task.input.reason}")
            current_task.set(task)
            if task.is_durable:
                return await self._call_durable(function, task), None
            return await function(task.input), None
        except BaseException as error:
            return None, error

    async def _call_durable(self, function: TaskFunction, task: Task) -> Any:
        """Call a durable task's function; its context ends with it."""
        context = DurableContext(self, task)
        try:
            output = await function(context, task.input)
            await context.check_log_is_used_up()
            return output
        finally:
            if left_behind := context.end():
                await asyncio.wait(left_behind, timeout=SHUTDOWN_GRACE)
            if context.non_determinism is not None:  # even if the function has caught it
                raise context.non_determinism

    async def _complete(self, task: Task, output: Any) -> None:
        try:
            await self._write(self.queries.complete_task, task, output, "COMPLETED")
        except Exception as error:  # the output is not JSON, or nothing that jsonb takes
            await self._fail(task, error)

    async def _fail(self, task: Task, error: BaseException) -> None:
        """Record a failure: the task goes back to the queue if it has retries left."""
        can_retry = is_retryable(error) and task.retry_count < task.max_retries
        query = self.queries.requeue_failed_task if can_retry else self.queries.fail_task
        text = error_text(error)
        what = f"{'QUEUED' if can_retry else 'FAILED'}, {text}"
        output: dict[str, Any] = {"error": text}
        # Exactly that class: a subclass of the user's may lack the id.
        child_errors = (leaf for leaf in leaves(error) if type(leaf) is ChildTaskError)
        if child_error := next(child_errors, None):
            output["child_task_id"] = child_error.child_task_id
        await self._write(query, task, output, what)

    async def _write(
        self, query: Callable[..., Awaitable[int]], task: Task, output: Any, what: str
    ) -> None:
        """Write the outcome of an attempt, and log it, however long the database is away.

        The attempt is the fencing token: if the task has been taken from us, no row matches.
        """

        async def write() -> int:
            async with self.pool.connection() as conn:
                return await query(
                    conn,
                    id=task.id,
                    worker_id=task.worker_id,
                    attempt=task.attempt,
                    output=Jsonb(output),
                )

        if not await keep_trying(write):
            what = "is not ours any more, its outcome is dropped"
        elif task.id in self._waits:
            self._ended_here.append(task.id)
            self._ask.set()
        self._log(task, what)

    async def _put_back(self, running: Collection[Task], why: str) -> None:
        """Queue again all tasks that this worker owns, except the running ones."""
        async with self.pool.connection() as conn:
            rows = self.queries.requeue_own_tasks(
                conn,
                worker_id=self.id,
                ids=[task.id for task in running],
                attempts=[task.attempt for task in running],
            )
            async for row in rows:
                self._log(Task(**row), f"QUEUED, {why}")

    async def _keep_beating(self) -> None:
        """Beat every HEARTBEAT_INTERVAL, on a connection of our own: the pool may be busy."""
        while True:
            with surviving_outage(f"worker {self.display_name}: no heartbeat"):
                async with await open_connection(self.pool) as conn:
                    while True:
                        await self._beat(conn)
                        await asyncio.sleep(HEARTBEAT_INTERVAL)
            await asyncio.sleep(HEARTBEAT_INTERVAL)

    async def _beat(self, conn: Connection) -> None:
        """Say that we are alive, then look after those who are not."""
        beat = await self.queries.heartbeat(
            conn,
            id=self.id,
            display_name=self.display_name,
            max_silence=INACTIVE_AFTER / 2,
        )
        self._registered.set()
        # After an outage everybody's heartbeat is old: let the others beat before judging them.
        self._beats_in_touch = 0 if beat["was_out_of_touch"] else self._beats_in_touch + 1
        if self._beats_in_touch * HEARTBEAT_INTERVAL >= INACTIVE_AFTER:
            await self._take_from_inactive_workers(conn, beat["last_heartbeat_at"])
        async for row in self.queries.expire_tasks(conn):
            self._log(Task(**row), f"FAILED, {row['output']['error']}")

    async def _take_from_inactive_workers(self, conn: Connection, our_beat: datetime) -> None:
        """Others are judged by our own last heartbeat: if that was held up, so were theirs."""
        active_since = our_beat - timedelta(seconds=INACTIVE_AFTER)
        rows = self.queries.requeue_lost_tasks(
            conn, active_since=active_since, max_lost_workers=MAX_LOST_WORKERS
        )
        async for row in rows:
            self._log(Task(**row), f"{row['status']}, its worker is inactive")
        await self.queries.delete_inactive_workers(conn, active_since=active_since)

    async def _leave(self) -> None:
        """Put back what is left and say goodbye: nobody must wait for our heartbeat to grow old."""

        async def leave() -> None:
            await self._put_back([], "its worker shuts down")
            async with self.pool.connection() as conn:
                await self.queries.delete_worker(conn, id=self.id)

        with suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_GRACE):
                await keep_trying(leave)

    async def wait_for_child(self, parent: Task, child: Task) -> Task:
        """Wait until the child has finished; returns it with its outcome."""
        finished: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        waits = self._waits.setdefault(child.id, {})
        waits[finished] = (parent, child)
        self._more_waiting[child.is_durable] = True
        self._wake.set()  # there is a child to claim, and perhaps a slot
        try:
            return await finished
        finally:
            del waits[finished]
            if not waits:
                del self._waits[child.id]

    async def _watch_children(self) -> None:
        """Ask for awaited children: at once for those that ended here, by the clock for all."""
        clock = asyncio.get_running_loop().time
        poll_at = 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(poll_at):
                    await self._ask.wait()
            self._ask.clear()
            ids, self._ended_here = self._ended_here, []
            if clock() >= poll_at:
                ids = list(self._waits)  # other workers run some of them
                poll_at = clock() + POLL_INTERVAL
            if not ids:
                continue
            with surviving_outage(f"worker {self.display_name}: cannot ask for children"):
                async with self.pool.connection() as conn:
                    async for row in self.queries.get_finished_tasks(conn, ids=ids):
                        self._task_finished(row)

    def _task_finished(self, row: dict[str, Any]) -> None:
        """Wake those who wait for this task, unless retry_task has queued it again meanwhile."""
        for finished, (_, child) in self._waits.get(row["id"], {}).items():
            # Seen QUEUED, its last attempt (0 is none) is over: an outcome of that is out of date.
            next_attempt = child.attempt + (child.status == "QUEUED" and child.attempt > 0)
            if next_attempt <= row["attempt"] and not finished.done():
                finished.set_result(replace(child, **row))

    def _log(self, task: Task, what: str) -> None:
        log.info(
            "worker %s, task %d, attempt %d: %s", self.display_name, task.id, task.attempt, what
        )
