"""The task functions of the lab: an order with a charge and an email, and a parcel.

Each can be held at gates, named FUNCTION:PLACE, until the lab lets it go: so a scene makes a moment
certain without changing the lesson.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import timedelta
from types import ModuleType
from typing import Any

from psycopg import sql

from shared import Pool, keep_trying
from shared.lab.lesson import OpenLesson

TaskFunction = Callable[..., Coroutine[Any, Any, Any]]
Say = Callable[..., None]

log = logging.getLogger("shop")


class Gates:
    """Where functions are held. `closed` comes from the lab, and changes while they wait."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.closed: set[str] = set()
        self._changed = asyncio.Event()

    def set(self, closed: list[str]) -> None:
        self.closed = set(closed)
        self._changed.set()
        self._changed = asyncio.Event()

    async def hold(self, gate: str, task: int, attempt: int | None) -> None:
        """Tell the lab that a function is held here, and wait until the gate is open."""
        fact = {"gate": gate, "task": task, "attempt": attempt}
        self.say(held=fact)
        try:
            while gate in self.closed:
                await self._changed.wait()
        finally:
            self.say(left=fact)


class Functions:
    """The functions of one worker. `modules` are the lesson's, by name; `pool` is for the shop."""

    def __init__(
        self,
        lesson: OpenLesson,
        modules: dict[str, ModuleType],
        queries: Any,
        pool: Pool,
        queue: str,
        gates: Gates,
    ) -> None:
        self.lesson = lesson
        self.modules = modules
        self.queries = queries
        self.pool = pool
        self.queue = queue
        self.gates = gates

    def by_name(self) -> dict[str, TaskFunction]:
        """The functions that this lesson's worker gets."""
        steps: dict[str, TaskFunction] = {"pack_parcel": self.pack_parcel}
        if "durable" in self.lesson.abilities:
            steps["process_order"] = self.durable_order
            steps["charge_payment"] = self.charge_payment
            steps["send_confirmation_email"] = self.send_confirmation_email
        elif "events" in self.lesson.abilities:
            steps["process_order"] = self.logged_order
        else:
            steps["process_order"] = self.plain_order
        return steps

    async def durable_order(self, context: Any, input: Any) -> Any:
        """From lesson 07 on: each step is a child task."""

        async def gate(place: str) -> None:
            name = f"process_order:{place}"
            if name in self.gates.closed:
                await self.gates.hold(name, context.task_id, context.attempt)

        await gate("start")
        charge = await context.run_task("charge_payment", input)
        await gate("between")
        approval = None
        if "sleep" in input:
            await context.sleep(timedelta(seconds=input["sleep"]))
        if "approval" in input:
            approval = await context.wait_for_signal("approval")
        try:
            email = await context.run_task("send_confirmation_email", input)
        except self.modules["errors"].TaskNotOwnedError:
            text = "its next step raises TaskNotOwnedError"
            log.info("task %d, attempt %d: %s", context.task_id, context.attempt, text)
            raise
        await gate("end")
        result = {"charge": charge, "email": email}
        return result if approval is None else {**result, "approval": approval}

    async def logged_order(self, input: Any) -> Any:
        """Lessons 05 and 06: each step is an event, and one that has begun is not begun again."""
        task = self.modules["models"].Task(**await self.own_row(input))
        await self.gate("process_order:start", input)
        if not await self.has_begun(task, 1, "charge_payment"):
            await self.charge_payment(input)
        await self.gate("process_order:between", input)
        if not await self.has_begun(task, 2, "send_confirmation_email"):
            await self.send_confirmation_email(input)
        await self.gate("process_order:end", input)
        return "done"

    async def has_begun(self, task: Any, event_id: int, name: str) -> bool:
        """Append the event of a step; whether an earlier attempt has appended it."""
        about = [name, task.input] if self.lesson.has("durable_events", "key") else []
        event_log = self.modules["event_log"].EventLog(self.queries)
        async with self.pool.connection() as conn, conn.transaction():
            _, is_recorded = await event_log.append(conn, task, event_id, "TASK_STARTED", *about)
        return bool(is_recorded)

    async def plain_order(self, input: Any) -> Any:
        """Up to lesson 04: all steps are one function."""
        await self.gate("process_order:start", input)
        await self.charge_payment(input)
        await self.gate("process_order:between", input)
        await self.send_confirmation_email(input)
        await self.gate("process_order:end", input)
        return "done"

    async def charge_payment(self, input: Any) -> Any:
        await self.gate("charge_payment:start", input)
        outcome: Any = "charged"
        if "payments" in self.lesson.abilities:
            outcome = await keep_trying(lambda: self.pay(input))
        await self.gate("charge_payment:charged", input)
        await asyncio.sleep(input["seconds"])
        return outcome

    async def pay(self, input: Any) -> Any:
        """What a payment service does: where there is a key, it charges once for each."""
        task_id, attempt = await self.own_task(input)
        values = {"order_id": input["order_id"], "amount": input["amount"]}
        if self.lesson.has("payments", "idempotency_key"):
            values["idempotency_key"] = task_id
        statement = sql.SQL("INSERT INTO payments ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
            sql.SQL(", ").join(map(sql.Identifier, values)),
            sql.SQL(", ").join(map(sql.Placeholder, values)),
        )
        async with self.pool.connection() as conn:
            cursor = await conn.execute(statement, values)
        what = "charged" if cursor.rowcount else "has been charged before"
        log.info("task %d, attempt %d: %s %s", task_id, attempt, input["order_id"], what)
        return {"payment": task_id} if "idempotency_key" in values else "charged"

    async def send_confirmation_email(self, input: Any) -> Any:
        await self.gate("send_confirmation_email:start", input)
        await asyncio.sleep(input["seconds"])
        if input.get("fails") and (await self.own_task(input))[1] == 1:
            raise ConnectionError("the mail server is down")
        await self.gate("send_confirmation_email:sent", input)
        return "sent"

    async def pack_parcel(self, input: Any) -> Any:
        await self.gate("pack_parcel:start", input)
        await asyncio.sleep(input["seconds"])
        return "packed"

    async def gate(self, name: str, input: Any) -> None:
        """Be held here if the lab wants it."""
        if name in self.gates.closed:
            await self.gates.hold(name, *await self.own_task(input))

    async def own_task(self, input: Any) -> tuple[int, int]:
        """Id and attempt of the task that runs; 1 where the lesson counts no attempts."""
        current = getattr(self.modules["worker"], "current_task", None)
        if current is not None:
            task = current.get()
            return task.id, task.attempt
        row = await self.own_row(input)
        return row["id"], row.get("attempt", 1)

    async def own_row(self, input: Any) -> dict[str, Any]:
        """The row of the task that runs, where its function is not told which that is."""
        async with self.pool.connection() as conn:
            cursor = await conn.execute(
                "SELECT * FROM tasks WHERE queue = %s AND input ->> 'order_id' = %s",
                [self.queue, input["order_id"]],
            )
            row = await cursor.fetchone()
        assert row is not None
        return row
