"""How attempts end, many in one statement."""

import asyncio

from batches import Batches
from models import Task


class Outcomes(Batches):
    """The outcomes of attempts, on their way to the database."""

    query = "write_outcomes"

    async def write(self, task: Task, status: str, output: object) -> bool:
        """Write how an attempt ended, however long that takes; return whether the task was ours.

        False, too, if it was written before and the answer got lost. Raises what is wrong with the
        output.
        """
        # Shielded: what has ended when the worker is stopped is written all the same.
        return await asyncio.shield(self.put(task, status=status, output=output)) is not None
