"""What scenes are written with: a step, and how they look into the lesson's tables."""

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from shared.lab.hand import Hand


@dataclass(frozen=True)
class Rows:
    """Rows of the lesson's own tables, to be shown, and when they were as they are here."""

    title: str
    rows: list[dict[str, Any]]
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Step:
    """What the page shows until the reader goes on.

    With `choices` it is a question, and the reader's choice comes back from the `yield`. The step
    after it has the right answer in `right`, as the tables have shown it: if the lesson is broken,
    that is what it says. `meanwhile`: what to watch while the scene is on its way to the next step.
    """

    sentence: str
    question: str | None = None
    choices: list[str] = field(default_factory=list)
    rows: Rows | None = None
    right: str | None = None
    is_last: bool = False
    button: str = "Next"
    meanwhile: str = "Watch the timeline."


# Yields steps, gets the reader's choice (None where there was nothing to choose).
Play = Callable[[Hand], AsyncGenerator[Step, str | None]]

NUMBERS = ["None", "One", "Two", "Three"]


def number(count: int) -> str:
    """A small number in words."""
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


async def held_at(lab: Hand, gate: str, **input: Any) -> tuple[str, int]:
    """Worker A has an order and stands at this gate. Returns the worker's key, the order's id."""
    await lab.hold(gate)
    worker = await lab.start_worker()
    order = await enqueue_order(lab, **input)
    # Not another one, that the reader has enqueued meanwhile.
    await lab.reached(gate, lambda: ids_of(lab, order))
    return worker, order


async def ids_of(lab: Hand, order: int) -> set[int]:
    """The ids of an order and its child tasks."""
    return {row["id"] for row in (await tasks(lab, order)).rows}


async def enqueue_order(lab: Hand, kind: str = "order", **input: Any) -> int:
    """Enqueue an order, which is then the chosen task."""
    (order,) = await lab.enqueue(kind, **input)
    lab.choose(order)
    return order


async def finished(lab: Hand, id: int) -> None:
    """Wait until a task has finished."""
    await lab.until(
        "SELECT status IN ('COMPLETED', 'FAILED') FROM tasks WHERE id = %(id)s",
        {"id": id},
        f"task {id} has finished",
    )


async def status(lab: Hand, id: int) -> str:
    """The status of a task."""
    (row,) = await lab.rows("SELECT status FROM tasks WHERE id = %(id)s", {"id": id})
    return str(row["status"])


async def tasks(lab: Hand, order: int) -> Rows:
    """An order and its child tasks."""
    columns = "id, task_name, status, attempt"
    if ("durable_events", "child_task_id") not in lab.lesson.columns:
        query = f"SELECT {columns} FROM tasks WHERE id = %(id)s"
        return Rows("the order", await lab.rows(query, {"id": order}))
    query = (
        f"SELECT {columns} FROM tasks WHERE id = %(id)s OR id IN "
        "(SELECT child_task_id FROM durable_events WHERE task_id = %(id)s) ORDER BY id"
    )
    return Rows("the order and its steps", await lab.rows(query, {"id": order}))


async def payments(lab: Hand, order: int) -> Rows:
    """The payments of an order, from the demo's payment service."""
    query = (
        "SELECT to_jsonb(payments) - 'inserted_at' AS payment FROM payments "
        "JOIN tasks ON order_id = input ->> 'order_id' WHERE id = %(id)s "
        "ORDER BY payments.inserted_at"
    )
    rows = await lab.rows(query, {"id": order})
    return Rows("the payments", [row["payment"] for row in rows])


async def first_run(lab: Hand, worker: str, since: int) -> str:
    """The name of the first task that a worker runs, by its lines of the log after this number.

    Each scene has a worker B: without the number it would be the one of an earlier scene.
    """

    def find() -> str | None:
        lines = [line["text"] for line in lab.record.newer_than(since) if line["worker"] == worker]
        return next((text.split()[-1] for text in lines if ": RUNNING " in text), None)

    return str(await lab.wait_for(find, f"worker {worker} runs a task"))


async def says_of(lab: Hand, worker: str, task: int, since: int) -> str:
    """What a worker says first of a task, in a line of the log after this number."""

    def find() -> str | None:
        lines = [line for line in lab.record.newer_than(since) if line["worker"] == worker]
        return next((line["what"] for line in lines if line.get("task") == task), None)

    return str(await lab.wait_for(find, f"worker {worker} says something of task {task}"))


def line_with(lab: Hand, text: str, since: int) -> str | None:
    """What a worker has said with this text in it, in a line of the log after this number."""
    lines = lab.record.newer_than(since)
    return next((line["text"] for line in lines if text in line["text"]), None)


async def ran_again(lab: Hand, order: int) -> str:
    """The functions that were called more than once, in words."""
    rows = (await tasks(lab, order)).rows
    names = [row["task_name"] for row in rows if row["attempt"] > 1]
    if not names:
        return "None"
    return f"{names[0]} alone" if len(names) == 1 else " and ".join(names)
