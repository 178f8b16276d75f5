"""The event log of a task: the steps it has begun, for the next attempt to find.

It only checks that the next attempt begins the same steps. Lesson 07 also starts them.
"""

import hashlib
import json
from typing import Any

from errors import NonDeterminismError, TaskNotOwnedError
from models import DurableEvent, Task
from shared import Connection, Queries
from shared.jsonb import dumps


def event_key(kind: str, task_name: str, input: Any) -> str:
    """What an event is about, as SHA-256 over canonical JSON: equal events have equal keys.

    Raises TypeError or ValueError for an input that is not JSON.
    """
    # To JSON and back first: the names in a dict become strings, and are sorted as strings.
    value = json.loads(dumps([kind, task_name, input]))
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class EventLog:
    """Appends events to the logs of tasks, each event once, by the owner of the task only."""

    def __init__(self, queries: Queries) -> None:
        self.queries = queries

    async def append(
        self, conn: Connection, task: Task, event_id: int, kind: str, task_name: str, input: Any
    ) -> tuple[DurableEvent, bool]:
        """Append an event, or find the one that an earlier attempt has appended.

        The caller holds the transaction. Returns the event, and whether it was recorded already.
        Raises TaskNotOwnedError if `task.attempt` is not the running attempt of its task,
        NonDeterminismError if another event is recorded under this id.
        """
        key = event_key(kind, task_name, input)
        owned = await self.queries.lock_task(
            conn, id=task.id, worker_id=task.worker_id, attempt=task.attempt
        )
        if owned is None:
            raise TaskNotOwnedError(
                f"task {task.id} is not owned by attempt {task.attempt} any more"
            )

        # Not joined to the lock: a statement that has to wait for a lock still sees the log as it
        # was before the wait.
        row = await self.queries.get_event(conn, task_id=task.id, event_id=event_id)
        if row is not None:
            event = DurableEvent(**row)
            if event.key != key:
                raise NonDeterminismError(
                    f"task {task.id}, event {event_id}: "
                    f"recorded is {event.kind} with key {event.key[:16]}, "
                    f"asked for is {kind} {task_name!r} with key {key[:16]}"
                )
            return event, True

        row = await self.queries.append_event(
            conn, task_id=task.id, event_id=event_id, kind=kind, key=key
        )
        return DurableEvent(**row), False
