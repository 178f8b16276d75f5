"""Scenes of orders that wait: lessons 12 to 15."""

import asyncio

from shared.lab.crashes import Steps
from shared.lab.hand import Hand
from shared.lab.step import Rows, Step, enqueue_order, finished, payments, status, tasks

ASLEEP = 8  # seconds; longer than it takes to notice that a worker is dead
APART = 1.0  # seconds between two things, for the picture to show which was first


async def slept_through(lab: Hand) -> Steps:
    """12: a sleep outlives its worker."""
    yield Step(
        f"An order charges, sleeps for {ASLEEP} seconds, and sends its email. Its worker will be "
        "killed while it sleeps.",
        meanwhile="Worker A charges the customer. Then the order falls asleep.",
    )
    worker = await lab.start_worker()
    order = await enqueue_order(lab, sleep=ASLEEP)
    asleep = "SELECT count(*) > 0 FROM tasks WHERE queue = %(queue)s AND status = 'SLEEPING'"
    await lab.until(asleep, {}, "the order sleeps")
    await lab.kill(worker)
    await lab.start_worker()  # before the question: it may take long to answer
    choices = [f"{ASLEEP} seconds", f"{2 * ASLEEP} seconds", "For ever"]
    yield Step(
        f"The sleep is a child task with a time in the column wake_at. Worker {worker} was killed "
        "as it began. Worker B has been started.",
        question="How long will the sleep take in all?",
        choices=choices,
        rows=await tasks(lab, order),
        meanwhile="The order is lost, and taken over. The sleep is not even noticed.",
    )
    await finished(lab, order)
    (slept,) = await lab.rows(
        "SELECT extract(epoch FROM finished_at - inserted_at)::float AS seconds FROM tasks "
        "WHERE id IN (SELECT child_task_id FROM durable_events WHERE task_id = %(id)s) "
        "AND task_name = 'sleep'",
        {"id": order},
    )
    is_once = ASLEEP <= slept["seconds"] < 1.5 * ASLEEP
    yield Step(
        "No worker runs a sleep, so none can take it along when it dies. The next attempt found "
        "the same child by its event, and waited for the rest.",
        rows=await tasks(lab, order),
        right=choices[0] if is_once else f"{slept['seconds']:.0f} seconds",
        is_last=True,
    )


async def nobodys(lab: Hand) -> Steps:
    """13: who waits has left already."""
    yield Step(
        f"An order charges, and sleeps for {ASLEEP} seconds. Watch its status, and the worker's "
        "durable slots.",
        meanwhile="The order waits for a second, and leaves.",
    )
    worker = await lab.start_worker()
    order = await enqueue_order(lab, sleep=ASLEEP)
    slept = {"id": order}
    asleep = "SELECT count(*) > 0 FROM tasks WHERE queue = %(queue)s AND status = 'SLEEPING'"
    await lab.until(asleep, {}, "the order sleeps")
    suspended = "SELECT status = 'SUSPENDED' FROM tasks WHERE id = %(id)s"
    await lab.until(suspended, slept, "the order is suspended")
    await asyncio.sleep(APART)
    await lab.kill(worker)
    choices = ["Yes, after five seconds", "No, it was nobody's when A died"]
    yield Step(
        f"The order is SUSPENDED: no slot, no memory, no worker. {worker} has been killed. When "
        "you answer, we start worker B.",
        question="Will anybody notice that the order has lost its worker?",
        choices=choices,
        rows=await tasks(lab, order),
        meanwhile="The sleep ends when it ends.",
    )
    overdue = (
        "SELECT count(*) > 0 AS is_so FROM tasks WHERE queue = %(queue)s "
        "AND status = 'SLEEPING' AND wake_at < clock_timestamp()"
    )
    (is_overdue,) = await lab.rows(overdue)
    await lab.start_worker()
    await finished(lab, order)
    (row,) = await lab.rows("SELECT lost_count FROM tasks WHERE id = %(id)s", slept)
    end = "The end of the sleep queued the order"
    if is_overdue["is_so"]:
        end = (
            "The sleep's time had come while no worker ran, so it ended when B had started. That "
            "queued the order"
        )
    yield Step(
        "A suspension is a crash on purpose, and so a real one has nothing left to break. "
        f"{end}, and its second attempt went on behind the sleep.",
        rows=await tasks(lab, order),
        right=choices[0] if row["lost_count"] else choices[1],
        is_last=True,
    )


async def signal_to_nobody(lab: Hand) -> Steps:
    """14: a signal needs no worker."""
    yield Step(
        "An order charges, and waits for an approval. It may wait for days, and all workers may be "
        "stopped meanwhile.",
        meanwhile="Worker A charges. The order waits, and leaves.",
    )
    worker = await lab.start_worker()
    order = await enqueue_order(lab, "approval")
    suspended = "SELECT status = 'SUSPENDED' FROM tasks WHERE id = %(id)s"
    await asked(lab, order)
    await lab.until(suspended, {"id": order}, "the order is suspended")
    yield Step(
        f"The order is SUSPENDED: no slot of {worker}, no memory, no worker. Its wait is a child "
        "task, that no worker runs either.",
        rows=await tasks(lab, order),
        button=f"Kill worker {worker}",
        meanwhile="Nothing is taken from the order.",
    )
    await lab.kill(worker)
    yield Step(
        f"Worker {worker} was killed, and no worker runs. When you answer, we send the approval.",
        question="What will be the status of the order then?",
        choices=["SUSPENDED", "QUEUED", "COMPLETED"],
        rows=await tasks(lab, order),
    )
    await lab.send_signal(order, "approval", {"by": "you"})
    yield Step(
        "The signal ended the wait, which is a child task, and a trigger queued its parent. All of "
        "that is one transaction, by whoever sends the signal. Now there is something for a worker "
        "to do.",
        rows=await tasks(lab, order),
        right=await status(lab, order),
        button="Start worker B",
        meanwhile="Worker B goes on behind the wait.",
    )
    await lab.start_worker()
    await finished(lab, order)
    yield Step(
        "The second attempt found the charge and the approval in the log, and sent the email.",
        rows=await signals(lab, order),
        is_last=True,
    )


async def early_signal(lab: Hand) -> Steps:
    """14: a signal that comes before its wait."""
    yield Step(
        "Somebody approves an order before it has asked. No worker runs yet, and the order is "
        "still in the queue.",
        meanwhile="The order is enqueued, and the approval sent.",
    )
    order = await enqueue_order(lab, "approval")
    await lab.send_signal(order, "approval", {"by": "you"})
    choices = ["It is received", "It is lost, and the order waits for another"]
    yield Step(
        "The signal is a row, and nobody has received it. When you answer, we start worker A.",
        question="What becomes of the signal when the order asks for it?",
        choices=choices,
        rows=await signals(lab, order),
        meanwhile="Worker A runs the order.",
    )
    await lab.start_worker()
    await asked(lab, order)
    rows = await signals(lab, order)
    if rows.rows[0]["received_by"] is not None:
        await finished(lab, order)
    yield Step(
        "A signal is kept until a wait for its name comes along, and is received by that wait, in "
        "the transaction in which the wait begins.",
        rows=rows,
        right=choices[rows.rows[0]["received_by"] is None],
        is_last=True,
    )


async def asked(lab: Hand, order: int) -> None:
    """Wait until an order has asked for its approval."""
    query = (
        "SELECT count(*) > 0 FROM durable_events WHERE kind = 'SIGNAL_AWAITED' AND task_id = %(id)s"
    )
    await lab.until(query, {"id": order}, "the order asks for its approval")


async def signals(lab: Hand, order: int) -> Rows:
    """The signals that were sent to an order."""
    query = "SELECT id, name, payload, received_by FROM signals WHERE task_id = %(id)s ORDER BY id"
    return Rows("its signals", await lab.rows(query, {"id": order}))


async def forked(lab: Hand) -> Steps:
    """15: the log has branches."""
    yield Step(
        "An order is completed, and its email was wrong. The email shall go out again, and the "
        "customer shall not be charged again.",
        meanwhile="Worker A runs the order to its end.",
    )
    await lab.start_worker()
    order = await enqueue_order(lab)
    await finished(lab, order)
    before = {row["id"] for row in (await tasks(lab, order)).rows}
    yield Step(
        "The order is COMPLETED. Event 1 is the charge, event 2 the email. When you answer, we "
        "fork at event 2.",
        question="Which steps will run again, as new child tasks?",
        choices=[
            "charge_payment and send_confirmation_email",
            "send_confirmation_email",
            "Neither",
        ],
        rows=await tasks(lab, order),
        meanwhile="The order is queued again, on branch 2.",
    )
    await lab.fork(order, 2)
    await finished(lab, order)
    after = await tasks(lab, order)
    new = [row["task_name"] for row in after.rows if row["id"] not in before]
    yield Step(
        "Branch 2 begins with what was kept of branch 1: the charge. The first email stays in the "
        "log as well, on the branch that was left.",
        rows=after,
        right=" and ".join(new) if len(new) > 1 else new[0] if new else "Neither",
    )
    yield Step("There is one payment.", rows=await payments(lab, order), is_last=True)
