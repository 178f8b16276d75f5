"""The rows of the database, as Python sees them."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID


class Record:
    """Takes its fields from a row, and leaves columns that it does not know: a later release may
    add them while this one is running."""

    def __init__(self, **row: Any) -> None:
        for name in type(self).__annotations__:
            setattr(self, name, row[name])


@dataclass(init=False)
class Task(Record):
    """A row of `tasks`; the fields stand in the order of the columns."""

    id: int
    inserted_at: datetime
    queue: str
    task_name: str
    input: Any
    output: Any
    status: str
    finished_at: datetime | None
    retry_count: int
    max_retries: int
    timeout: timedelta | None
    schedule_timeout_at: datetime | None
    priority: int
    worker_id: UUID | None
    attempt: int
    is_durable: bool


@dataclass(init=False)
class DurableEvent(Record):
    """A row of `durable_events`; the fields stand in the order of the columns."""

    task_id: int
    event_id: int
    kind: str
    inserted_at: datetime
    key: str
    child_task_id: int
