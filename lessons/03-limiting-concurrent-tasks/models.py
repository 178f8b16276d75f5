"""The rows of the database, as Python sees them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass
class Task:
    """A row of `tasks`; the fields stand in the order of the columns."""

    id: int
    inserted_at: datetime
    queue: str
    task_name: str
    input: Any
    output: Any
    status: str
    finished_at: datetime | None
