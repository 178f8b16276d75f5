"""Scenes of workers that are killed: lessons 04 and 07."""

from collections.abc import AsyncGenerator

from shared.lab.hand import Hand
from shared.lab.step import (
    Rows,
    Step,
    enqueue_order,
    finished,
    first_run,
    held_at,
    ids_of,
    line_with,
    number,
    payments,
    ran_again,
    tasks,
)

Steps = AsyncGenerator[Step, str | None]

AGAIN = "Which functions will be called a second time?"
ALONE = "process_order alone"
WITH_CHARGE = "process_order and charge_payment"
WITH_EMAIL = "process_order and send_confirmation_email"
WITH_ALL = "process_order and charge_payment and send_confirmation_email"
# True however long the reader has thought: a worker that is frozen meanwhile has not beaten.
TAKEN_OVER = (
    "As soon as B sees a last heartbeat of A that is older than five seconds, it takes over."
)
WE_KILL = "When you answer, we kill A and start worker B."


async def kill_and_take_over(lab: Hand, worker: str, order: int) -> None:
    """Kill a worker that stands at a gate; another one finishes the order."""
    await lab.kill(worker)
    await lab.release()
    await lab.start_worker()
    await finished(lab, order)


async def charged_twice(lab: Hand) -> Steps:
    """04: the whole order is one function."""
    yield Step(
        "An order is one task here, and its function does everything: it charges the customer, and "
        "then it sends an email. We will hold worker A between the two.",
        meanwhile="Worker A claims the order, and charges.",
    )
    worker, order = await held_at(lab, "process_order:between")
    yield Step(
        "Worker A has charged the customer. It has not sent the email, and the order is RUNNING. "
        f"{WE_KILL}",
        question="How many payments will there be in the end?",
        choices=["None", "One", "Two"],
        rows=await payments(lab, order),
        meanwhile=TAKEN_OVER,
    )
    await kill_and_take_over(lab, worker, order)
    paid = await payments(lab, order)
    yield Step(
        "After five seconds without a heartbeat the order went back into the queue. B called its "
        "function from the first line, since nothing says how far A had got. Lessons 05 to 07 are "
        "about that.",
        rows=paid,
        right=number(len(paid.rows)),
        is_last=True,
    )


async def before_the_event(lab: Hand) -> Steps:
    """07, moment 1: nothing has been committed."""
    yield Step(
        "A step has three commits, and so there are gaps in which a worker can be killed. The "
        "first is in the middle of a transaction: the child is created, its event is not. To hold "
        "worker A there, the lab locks the table durable_events.",
        meanwhile="Worker A claims the order, and asks for the first step.",
    )
    worker = await lab.start_worker()
    async with lab.locked("durable_events"):
        order = await enqueue_order(lab)
        waiting = await waits_for_lock(lab, worker)
        yield Step(
            "A's transaction is open. It has created the child, and its INSERT of the event waits "
            f"for our lock. In tasks all others see {await seen_by_others(lab, order)}. {WE_KILL}",
            question="How often will charge_payment be called in all?",
            choices=["Never", "Once", "Twice"],
            rows=waiting,
            meanwhile="Postgres ends A's transaction. " + TAKEN_OVER,
        )
        await lab.kill(worker)
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = %(pid)s"
    await lab.until(gone, {"pid": waiting.rows[0]["pid"]}, "Postgres has ended A's transaction")
    await lab.start_worker()
    await finished(lab, order)
    rows = await tasks(lab, order)
    calls = sum(row["attempt"] for row in rows.rows if row["task_name"] == "charge_payment")
    ids = [row["id"] for row in rows.rows]
    rolled_back = f" It was task {ids[0] + 1}." if ids[1] == ids[0] + 2 else ""
    yield Step(
        f"Postgres rolled A's transaction back, and A's child with it.{rolled_back} B's attempt "
        "found no event, so it wrote one, and created another child.",
        rows=rows,
        right={0: "Never", 1: "Once", 2: "Twice"}.get(calls, f"{calls} times"),
        is_last=True,
    )


async def waits_for_lock(lab: Hand, worker: str) -> Rows:
    """What Postgres says of a worker's transaction, when it waits for a lock on a table."""
    row = await lab.until(
        "SELECT pid, state, wait_event_type, left(query, 26) || ' ...' AS query "
        "FROM pg_stat_activity WHERE application_name = %(name)s AND wait_event = 'relation'",
        {"name": lab.processes.application_name(worker)},
        "the worker waits for the lock",
    )
    return Rows("A's transaction in pg_stat_activity", [row])


async def seen_by_others(lab: Hand, order: int) -> str:
    """How many tasks the lab sees, in words: with a transaction the order and no child."""
    (row,) = await lab.rows(
        "SELECT count(*) AS number FROM tasks WHERE queue = %(queue)s AND id >= %(id)s",
        {"id": order},
    )
    return "the order alone" if row["number"] == 1 else f"{row['number']} rows"


async def before_the_claim(lab: Hand) -> Steps:
    """07, moment 2: the child is in the queue."""
    yield Step(
        "The next gap: event and child are committed, and nobody has claimed the child. To make "
        "that moment last, worker A will get no slots for plain tasks.",
        meanwhile="Worker A claims the order, and asks for the first step.",
    )
    worker = await lab.start_worker(concurrency=0)
    order = await enqueue_order(lab)
    child = await lab.until(
        "SELECT child_task_id IS NOT NULL, child_task_id FROM durable_events "
        "WHERE task_id = %(id)s",
        {"id": order},
        "the first event is written",
    )
    yield Step(
        f"Event 1 leads to a child that is QUEUED. {WE_KILL}",
        question="What will B run first?",
        choices=["process_order", "charge_payment"],
        rows=await tasks(lab, order),
        meanwhile="Look closely at what B does in its first second.",
    )
    line = lab.record.last_number
    await lab.kill(worker)
    await lab.hold(start := "process_order:start")  # so that the table below stays true
    other = await lab.start_worker()
    first = await first_run(lab, other, line)
    await finished(lab, child["child_task_id"])
    await lab.reached(start, lambda: ids_of(lab, order))
    yield Step(
        "A child is a task like any other. It was in the queue, so B claimed it at once, without "
        "asking whose child it is. The order had to wait until A's last heartbeat was five seconds "
        "old. Now B has it, and we hold B in the first line. What will this attempt find?",
        rows=await tasks(lab, order),
        right=first,
        meanwhile="Attempt 2 asks for the first step.",
    )
    await lab.release()
    await finished(lab, order)
    yield Step(
        "It found the event, and by it the child, which was COMPLETED. So it took the output and "
        "went on to the email. Nothing but process_order was called twice.",
        rows=await tasks(lab, order),
        is_last=True,
    )


async def while_the_child_runs(lab: Hand) -> Steps:
    """07, moment 3: the child is RUNNING on the same worker."""
    yield Step(
        "Another gap: the child has been claimed, and its function runs, on the same worker as the "
        "order. We will hold worker A in the first line of that function.",
        meanwhile="Worker A claims the order, and then its first step.",
    )
    worker, order = await held_at(lab, "charge_payment:start")
    yield Step(
        "Two functions run on worker A: process_order waits for charge_payment, which has charged "
        f"nobody yet. {WE_KILL}",
        question=AGAIN,
        choices=[ALONE, "charge_payment alone", WITH_CHARGE],
        rows=await tasks(lab, order),
        meanwhile=TAKEN_OVER,
    )
    await kill_and_take_over(lab, worker, order)
    yield Step(
        "Both rows were RUNNING in the name of a dead worker, so both were queued again, and both "
        "have an attempt 2. The log led the order to the same child.",
        rows=await tasks(lab, order),
        right=await ran_again(lab, order),
        is_last=True,
    )


async def after_the_charge(lab: Hand) -> Steps:
    """07, moment 3 again, and now the worst of it: the world has changed, and the table has not."""
    yield Step(
        "The child runs, and now the worst of it: the customer has been charged, and the outcome "
        "of the step is not written yet. We will hold worker A there.",
        meanwhile="Worker A claims the order, and charges the customer.",
    )
    worker, order = await held_at(lab, "charge_payment:charged")
    yield Step(
        f"The payment is made; the child is still RUNNING. {WE_KILL} The function will then be "
        "called again.",
        question="How many payments will there be in the end?",
        choices=["None", "One", "Two"],
        rows=await payments(lab, order),
        meanwhile=TAKEN_OVER,
    )
    line = lab.record.last_number
    await kill_and_take_over(lab, worker, order)
    paid = await payments(lab, order)
    said = line_with(lab, "has been charged before", line)
    yield Step(
        "charge_payment was called twice, and asked for a payment twice, under the same key: the "
        "id of its task. Both attempts were of the same row, and the log led the order to it."
        + (f" The payment service knew the key already: “{said}”." if said else ""),
        rows=paid,
        right=number(len(paid.rows)),
        is_last=True,
    )


async def between_two_steps(lab: Hand) -> Steps:
    """07, moment 4: the outcome of the first step is written."""
    yield Step(
        "The last gap comes when the outcome of a step is written. We will hold worker A in the "
        "line between the two steps.",
        meanwhile="Worker A charges the customer, and writes that down.",
    )
    worker, order = await held_at(lab, "process_order:between")
    yield Step(
        "The charge is COMPLETED, and the order has not asked for the email. " + WE_KILL,
        question=AGAIN,
        choices=["None", ALONE, WITH_CHARGE],
        rows=await tasks(lab, order),
        meanwhile=TAKEN_OVER,
    )
    await kill_and_take_over(lab, worker, order)
    yield Step(
        "The function ran again from its first line. Its first step did not: the event led to a "
        "child that is COMPLETED, and its output came from the table.",
        rows=await tasks(lab, order),
        right=await ran_again(lab, order),
        is_last=True,
    )


async def after_the_last_step(lab: Hand) -> Steps:
    """07, moment 4 once more: everything is done but the order's own outcome."""
    yield Step(
        "The same gap, after the last step: both steps are done, and only the order's own outcome "
        "is missing. We will hold worker A there.",
        meanwhile="Worker A charges, and sends the email.",
    )
    worker, order = await held_at(lab, "process_order:end")
    yield Step(
        "Both steps are COMPLETED, and the function is about to return. " + WE_KILL,
        question=AGAIN,
        choices=["None", ALONE, WITH_EMAIL, WITH_ALL],
        rows=await tasks(lab, order),
        meanwhile=TAKEN_OVER,
    )
    await kill_and_take_over(lab, worker, order)
    yield Step(
        "Attempt 2 went through the whole function without running a step, and returned the same "
        "value. The customer got one email.",
        rows=await tasks(lab, order),
        right=await ran_again(lab, order),
        is_last=True,
    )
