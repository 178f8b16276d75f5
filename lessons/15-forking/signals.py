"""Signals: something outside tells a durable task something, whether or not it waits already."""

from typing import Any

from psycopg.types.json import Jsonb

from shared import Connection, Queries


async def send_signal(
    conn: Connection,
    queries: Queries,
    task_id: int,
    name: str,
    payload: Any,
    idempotency_key: str | None = None,
) -> None:
    """Send a signal to a durable task that has not finished. It is received once, by one wait.

    A signal that nobody waits for yet is kept. If the caller has a transaction, all this belongs to
    it: when that is rolled back nothing has happened. A repeated idempotency key changes nothing.
    Raises ValueError for a task that is unknown, not durable or finished; a payload that is not
    JSON raises the same errors as an input of create_task. Nothing is stored then.
    """
    async with conn.transaction():
        task = await queries.lock_receiver(conn, id=task_id)
        if task is None:
            raise ValueError(f"there is no task {task_id}")
        signal = await queries.create_signal(
            conn,
            task_id=task_id,
            name=name,
            payload=Jsonb(payload),
            idempotency_key=idempotency_key,
        )
        if signal is None:
            return  # sent before, and perhaps received: the task may have finished since
        if not task["is_durable"]:
            raise ValueError(f"task {task_id} ({task['task_name']}) is not durable")
        if task["status"] in ("COMPLETED", "FAILED"):
            raise ValueError(f"task {task_id} ({task['task_name']}) is {task['status']} already")
        wait = await queries.deliver_signal(conn, task_id=task_id, name=name)
        if wait is not None:
            await queries.notify(conn, queues=[], ids=[wait["id"]], worker_id=None)
