"""The event log of a task: the steps it has begun, for the next attempt to find.

It does not check yet that the next attempt begins the same steps (lesson 06).
"""

from errors import TaskNotOwnedError
from models import DurableEvent, Task
from shared import Connection, Queries


class EventLog:
    """Appends events to the logs of tasks, each event once, by the owner of the task only."""

    def __init__(self, queries: Queries) -> None:
        self.queries = queries

    async def append(
        self, conn: Connection, task: Task, event_id: int, kind: str
    ) -> tuple[DurableEvent, bool]:
        """Append an event, or find the one that an earlier attempt has appended.

        The caller holds the transaction. Returns the event, and whether it was recorded already.
        Raises TaskNotOwnedError if `task.attempt` is not the running attempt of its task.
        """
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
            return DurableEvent(**row), True

        row = await self.queries.append_event(conn, task_id=task.id, event_id=event_id, kind=kind)
        return DurableEvent(**row), False
