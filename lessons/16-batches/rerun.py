"""Running a finished durable task again: where it failed, from an event on, or from the start."""

from typing import Any

from psycopg import AsyncConnection

from notifications import tell_queue
from shared import Pool, Queries

Row = dict[str, Any]


async def retry_task(pool: Pool, queries: Queries, id: int) -> None:
    """Go on with a FAILED durable task where it failed: what has completed is not run again.

    Keeps the log and queues the task again, and the child whose failure ended it, and so on down.
    Raises ValueError, with nothing changed, for a task that is unknown, not durable, not FAILED or
    abandoned, for the child of a parent that has not finished, and where the function went on from
    the failure: another result would contradict what it did then.
    """
    async with pool.connection() as conn, conn.transaction():
        task = await _lock_finished(conn, queries, id, {"FAILED"})
        row: Row | None = task
        ids = []
        while row is not None:
            ids.append(row["id"])
            row = await queries.lock_failed_child(conn, id=row["id"])
            if row is not None and row["was_handled"]:
                raise ValueError(
                    f"task {ids[-1]} went on after its child {row['id']} ({row['task_name']}) had "
                    "failed, so it cannot go on from there again; fork_task can go back to event "
                    f"{row['event_id']} of its log, where that child began"
                )
        await queries.reset_tasks(conn, ids=ids)
        wait = await queries.wait_again(conn, ids=ids)
        if wait is not None:  # its signal may have come while it was FAILED
            await queries.deliver_signal(conn, **wait)
    await tell_queue(pool, queries, task["queue"])


async def replay_task(pool: Pool, queries: Queries, id: int) -> None:
    """Run a COMPLETED or FAILED durable task anew, from the start. Raises what fork_task raises."""
    await fork_task(pool, queries, id, from_event=1)


async def fork_task(pool: Pool, queries: Queries, id: int, from_event: int) -> None:
    """Run a COMPLETED or FAILED durable task again from one event of its log on.

    What is before that event stays done. The rest is kept as an abandoned branch, with the outcome
    it led to; those of its children, and theirs, that have not begun, or wait, become FAILED.
    Raises ValueError, with nothing changed, for a task that is unknown, not durable, not finished
    or abandoned itself, for the child of a parent that has not finished, for an event beyond the
    next one of the log, and while anything that is to be abandoned still runs.
    """
    async with pool.connection() as conn, conn.transaction():
        task = await _lock_finished(conn, queries, id, {"COMPLETED", "FAILED"})
        events = [row["event_id"] async for row in queries.get_events(conn, task_id=id)]
        end = max(events, default=0) + 1
        if not 1 <= from_event <= end:
            raise ValueError(f"task {id} can be forked at events 1 to {end}, not at {from_event}")
        ids, first = [id], from_event
        while ids:
            children = [row async for row in queries.lock_children(conn, ids=ids, from_event=first)]
            for child in children:
                if child["status"] == "RUNNING":
                    raise ValueError(
                        f"task {id} cannot be forked there while task {child['id']} "
                        f"({child['task_name']}), which it has started, is RUNNING"
                    )
            ids, first = [child["id"] for child in children], 1
            await queries.abandon_tasks(conn, ids=ids)
        branch = task["branch_id"] + 1
        await queries.begin_branch(conn, id=id, branch_id=branch, from_event=from_event)
        await queries.reset_tasks(conn, ids=[id])
    await tell_queue(pool, queries, task["queue"])


async def _lock_finished(
    conn: AsyncConnection[Row], queries: Queries, id: int, states: set[str]
) -> Row:
    """Hold the task's row, and its parent's, until the end of the transaction; check both."""
    parent = await queries.lock_parent(conn, id=id)
    # The child of one that has not finished is refused. It may be ending, and wait for its parent.
    is_free = parent is None or parent["status"] in ("COMPLETED", "FAILED")
    look = queries.lock_finished_task if is_free else queries.get_task
    row: Row | None = await look(conn, id=id)
    if row is None:
        raise ValueError(f"there is no task {id}")
    if not row["is_durable"]:
        raise ValueError(f"task {id} ({row['task_name']}) is not durable")
    # Only now: while we waited for the parent's row somebody else may have forked it.
    if fork := await queries.get_fork(conn, id=id):
        raise ValueError(f"task {id} is abandoned: task {fork['task_id']} goes on without it")
    if row["status"] not in states:
        raise ValueError(f"task {id} is {row['status']}, not {' or '.join(sorted(states))}")
    if parent is not None and parent["status"] not in ("COMPLETED", "FAILED"):
        raise ValueError(
            f"task {id} is a child of task {parent['id']}, which is {parent['status']}: "
            "it knows the outcome already, or waits for it"
        )
    return row
