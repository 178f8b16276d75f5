"""Running a finished durable task again: retry_task goes on, replay_task begins anew."""

from typing import Any

from psycopg import AsyncConnection

from notifications import tell_queue
from shared import Pool, Queries

Row = dict[str, Any]


async def retry_task(pool: Pool, queries: Queries, id: int) -> None:
    """Go on with a FAILED durable task where it failed: what has completed is not run again.

    Keeps the log and queues the task again, and the child whose failure ended it, and so on down.
    Raises ValueError, with nothing changed, for a task that is unknown, not durable or not FAILED,
    for the child of a parent that has not finished, and where the function went on from the
    failure: another result would contradict what it did then.
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
                    "failed, so it cannot go on from there again; replay_task runs it anew"
                )
        await queries.reset_tasks(conn, ids=ids)
        wait = await queries.wait_again(conn, ids=ids)
        if wait is not None:  # its signal may have come while it was FAILED
            await queries.deliver_signal(conn, **wait)
    await tell_queue(pool, queries, task["queue"])


async def replay_task(pool: Pool, queries: Queries, id: int) -> None:
    """Run a COMPLETED or FAILED durable task anew, from the start: its log is deleted.

    The children of the run before stay in `tasks`; those that nobody has claimed yet become FAILED.
    Raises ValueError, with nothing changed, for a task that is unknown, not durable or not
    finished, for the child of a parent that has not finished, and while a child still runs.
    """
    async with pool.connection() as conn, conn.transaction():
        task = await _lock_finished(conn, queries, id, {"COMPLETED", "FAILED"})
        ids = [id]
        while ids:
            children = [row async for row in queries.lock_children(conn, ids=ids)]
            for child in children:
                if child["status"] == "RUNNING":
                    raise ValueError(
                        f"task {id} cannot be replayed while task {child['id']} "
                        f"({child['task_name']}), which it has started, is RUNNING"
                    )
            ids = [child["id"] for child in children]
            await queries.abandon_tasks(conn, ids=ids)
        await queries.delete_events(conn, task_id=id)
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
    if row["status"] not in states:
        raise ValueError(f"task {id} is {row['status']}, not {' or '.join(sorted(states))}")
    if parent is not None and parent["status"] not in ("COMPLETED", "FAILED"):
        raise ValueError(
            f"task {id} is a child of task {parent['id']}, which is {parent['status']}: "
            "it knows the outcome already, or waits for it"
        )
    return row
