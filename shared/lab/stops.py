"""Scenes of workers that freeze and come back, or are told to stop: lessons 04, 07 and 09."""

from shared.lab.crashes import TAKEN_OVER, Steps
from shared.lab.hand import Hand
from shared.lab.step import (
    Rows,
    Step,
    finished,
    held_at,
    ids_of,
    number,
    says_of,
    tasks,
)


async def fenced_off(lab: Hand) -> Steps:
    """04 and later: a worker that was frozen comes back."""
    yield Step(
        "A worker need not be dead to be silent: a laptop's lid was closed. We will freeze worker "
        "A in the last line of its function.",
        meanwhile="Worker A claims the order, and comes to the last line.",
    )
    worker, order = await held_at(lab, "process_order:end")
    await lab.freeze(worker)
    await lab.release()
    yield Step(
        "Worker A is frozen: look at the age of its heartbeat. Its process lives, and would only "
        "have to return. Let worker B take over.",
        button="Start worker B",
        meanwhile=TAKEN_OVER,
    )
    await lab.start_worker()
    await finished(lab, order)
    overwrites, refused = "It overwrites B's outcome", "It is refused"
    yield Step(
        "B has finished the order in a second attempt. When you answer, we thaw A. It knows "
        "nothing of all this, and will write the outcome of attempt 1.",
        question="What becomes of its write?",
        choices=[overwrites, refused, "The order runs again"],
        rows=await tasks(lab, order),
        meanwhile="The worker wakes up, in the middle of its function.",
    )
    line = lab.record.last_number
    await lab.thaw(worker)
    says = await says_of(lab, worker, order, line)
    yield Step(
        "Its write says: only if the attempt is still 1. The attempt is 2, so no row matches. The "
        "worker says so in its log, drops the outcome, and is a worker like any other again.",
        rows=await tasks(lab, order),
        right=refused if says.startswith("is not ours") else overwrites,
        is_last=True,
    )


async def refused_a_step(lab: Hand) -> Steps:
    """07, moment 5: a worker that was frozen comes back, and goes on to its next step."""
    yield Step(
        "A worker need not be dead to be silent: a laptop's lid was closed. We will freeze worker "
        "A when it has charged the customer, and has not written that down.",
        meanwhile="Worker A claims the order, and charges the customer.",
    )
    worker, order = await held_at(lab, "charge_payment:charged")
    await lab.freeze(worker)
    await lab.release()
    yield Step(
        "Worker A is frozen: look at the age of its heartbeat. Both functions are in its memory, "
        "in the middle of a line. Let worker B take over.",
        button="Start worker B",
        rows=await tasks(lab, order),
        meanwhile=TAKEN_OVER,
    )
    await lab.start_worker()
    await finished(lab, order)
    yield Step(
        "B has called both functions again, sent the email, and finished the order. When you "
        "answer, we thaw A. It knows nothing of all this: charge_payment will return, and "
        "process_order will go on to its next step, the email.",
        question="How many emails will the customer get in all?",
        choices=["None", "One", "Two"],
        rows=await tasks(lab, order),
        meanwhile="Worker A wakes up, in the middle of its functions.",
    )
    line = lab.record.last_number
    await lab.thaw(worker)
    says = await says_of(lab, worker, order, line)
    emails = [row for row in (await tasks(lab, order)).rows if "email" in row["task_name"]]
    yield Step(
        f"“Task {order}, attempt 1: {says}.” The attempt is 2, so A's can append nothing to the "
        "log, and create no child. What its charge_payment returned matches no row either, and is "
        "dropped. And as the key was the same, the customer was charged once.",
        rows=await tasks(lab, order),
        right=number(sum(row["attempt"] for row in emails)),
        is_last=True,
    )


async def told_to_stop(lab: Hand) -> Steps:
    """09: SIGTERM is not a crash."""
    yield Step(
        "A stop is announced, so a worker can use the announcement. Worker A will get an order, "
        "which is durable, and a parcel, which is a plain task.",
        meanwhile="Worker A claims both.",
    )
    await lab.hold("pack_parcel:start")
    worker, order = await held_at(lab, "process_order:between")
    (parcel,) = await lab.enqueue("plain")
    await lab.reached("pack_parcel:start", lambda: ids_of(lab, parcel))
    await lab.start_worker()
    finishes, at_once, later = choices = [
        "A finishes it, and then ends",
        "B has it at once, while A still packs",
        "B has it when five seconds have passed",
    ]
    yield Step(
        "The order is between two steps, the parcel is being packed, and worker B stands by. "
        "When you answer, A gets SIGTERM.",
        question="What becomes of the order?",
        choices=choices,
        meanwhile="Watch both workers.",
    )
    await lab.stop(worker)
    query = "SELECT attempt = 2 OR status = 'COMPLETED', attempt FROM tasks WHERE id = %(id)s"
    taken = await lab.until(query, {"id": order}, "somebody else has the order")
    both = [*(await tasks(lab, order)).rows, *(await tasks(lab, parcel)).rows]
    then = Rows("the order, its steps and the parcel, after the SIGTERM", both)
    is_packing = both[-1]["status"] == "RUNNING"
    await lab.release()
    await finished(lab, order)
    await finished(lab, parcel)
    yield Step(
        "The order's progress is in its log, so it was put back at once. The parcel's was only in "
        "memory, so it got its grace, and A packed it to the end: attempt 1.",
        rows=then,
        right=finishes if taken["attempt"] == 1 else at_once if is_packing else later,
        is_last=True,
    )
