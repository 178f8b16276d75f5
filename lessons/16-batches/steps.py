"""New steps of durable tasks, many in one statement."""

from batches import Batches, Row
from models import Task


class Steps(Batches):
    """The new steps of durable tasks, on their way to the database."""

    query = "start_steps"

    async def start(self, task: Task, event_id: int, key: str, child: Row) -> Row | None:
        """Create an event that the log does not have, and its child; return the child's row.

        None means that this try has created nothing: the task has been taken from us, Postgres
        refuses the child, or an earlier try has created it and its answer got lost. Look.
        """
        try:
            child["task_name"].encode()  # JSON would escape half of a surrogate pair
            seconds = child["timeout"] and child["timeout"].total_seconds()
            columns = child | {"input": child["input"].obj, "timeout": seconds}
            return await self.put(task, event_id=event_id, key=key, **columns)
        except Exception:
            # Whatever it is: `_start_child` comes next, and finds the child or the right error.
            return None
