"""The rows of the database, as Python sees them."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID


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
    retry_count: int
    max_retries: int
    timeout: timedelta | None
    schedule_timeout_at: datetime | None
    priority: int
    worker_id: UUID | None
    attempt: int


@dataclass
class DurableEvent:
    """A row of `durable_events`; the fields stand in the order of the columns."""

    task_id: int
    event_id: int
    kind: str
    inserted_at: datetime
    key: str
