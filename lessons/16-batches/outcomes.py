"""How attempts end, many in one statement."""

import asyncio

from batches import Batches
from models import Task


class Outcomes(Batches):
    """The outcomes of attempts, on their way to the database."""

    query = "write_outcomes"

    async def write(self, task: Task, status: str, output: object) -> bool:
        """Write how an attempt ended, however long that takes; return whether a row has matched.

        None does if the task has been taken from us, or if we wrote it before and the answer got
        lost. Raises what is wrong with an output that is not JSON, or nothing that jsonb takes.
        """
        # Shielded: what has ended when the worker is stopped is written all the same.
        return await asyncio.shield(self.put(task, status=status, output=output)) is not None
