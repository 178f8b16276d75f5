"""Scenes of workers that die, freeze and stop: lessons 04, 07 and 09."""

from collections.abc import AsyncGenerator

from shared.lab.hand import Hand
from shared.lab.step import (
    Step,
    enqueue_order,
    events,
    finished,
    first_run,
    held_at,
    number,
    payments,
    ran_again,
    says_of,
    status,
    tasks,
)

Steps = AsyncGenerator[Step, str | None]

AGAIN = "Which functions will be called a second time?"
ALONE = "process_order alone"
WITH_CHARGE = "process_order and charge_payment"
WITH_ALL = "process_order and charge_payment and send_confirmation_email"
TAKEN_OVER = "For five seconds nothing happens. Then worker B takes over what A had."


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
        "then it sends an email. We will kill the worker between the two.",
        meanwhile="Worker A claims the order, and charges.",
    )
    worker, order = await held_at(lab, "process_order:between")
    yield Step(
        f"Worker {worker} has charged the customer. It has not sent the email, and the order is "
        f"RUNNING. Then {worker} is killed, and worker B is started.",
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


async def fenced_off(lab: Hand) -> Steps:
    """04 and later: a worker that was frozen comes back."""
    yield Step(
        "A worker need not be dead to be silent: a laptop's lid was closed. We freeze one in the "
        "last line of its function.",
        meanwhile="Worker A claims the order, and comes to the last line.",
    )
    worker, order = await held_at(lab, "process_order:end")
    await lab.freeze(worker)
    await lab.release()
    yield Step(
        f"Worker {worker} is frozen: look at the age of its heartbeat. Its process lives, and "
        "would only have to return. Let worker B take over.",
        button="Start worker B",
        meanwhile=TAKEN_OVER,
    )
    await lab.start_worker()
    await finished(lab, order)
    overwrites, refused = "It overwrites B's outcome", "It is refused"
    yield Step(
        f"B has finished the order in a second attempt. Now {worker} is thawed. It knows nothing "
        "of all this, and writes the outcome of attempt 1.",
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


async def before_the_event(lab: Hand) -> Steps:
    """07, moment 1: nothing has been written."""
    yield Step(
        "A step has three commits, and so there are gaps in which a worker can be killed. The "
        "first is before event and child are committed.",
        meanwhile="Worker A claims the order.",
    )
    worker, order = await held_at(lab, "process_order:start")
    yield Step(
        f"Worker {worker} has called process_order, and has not asked for a step yet. The log is "
        f"empty. Then {worker} is killed, and worker B is started.",
        question="How often will charge_payment be called in all?",
        choices=["Never", "Once", "Twice"],
        rows=await events(lab, order),
        meanwhile=TAKEN_OVER,
    )
    await kill_and_take_over(lab, worker, order)
    rows = await tasks(lab, order)
    calls = sum(row["attempt"] for row in rows.rows if row["task_name"] == "charge_payment")
    yield Step(
        "B's attempt found no event, so it wrote one, and created the child. The log did not show "
        "that there had been an attempt before.",
        rows=rows,
        right={0: "Never", 1: "Once", 2: "Twice"}.get(calls, f"{calls} times"),
        is_last=True,
    )


async def before_the_claim(lab: Hand) -> Steps:
    """07, moment 2: the child is in the queue."""
    yield Step(
        "The event is committed, and its child is in the queue, but nobody has claimed it. To make "
        "that moment last, worker A gets no slots for plain tasks.",
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
        f"Event 1 leads to a child that is QUEUED. Then {worker} is killed, and worker B is "
        "started.",
        question="What will B run first?",
        choices=["process_order", "charge_payment"],
        rows=await tasks(lab, order),
        meanwhile="Look closely at what B does in its first second.",
    )
    await lab.kill(worker)
    other = await lab.start_worker()
    first = await first_run(lab, other)
    await finished(lab, child["child_task_id"])
    yield Step(
        "A child is a task like any other. It was in the queue, so B claimed it at once, without "
        "asking whose child it is. The order itself is still RUNNING in the name of the dead "
        "worker. What will its second attempt find?",
        rows=await tasks(lab, order),
        right=first,
        meanwhile=TAKEN_OVER,
    )
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
        "order.",
        meanwhile="Worker A claims the order, and then its first step.",
    )
    worker, order = await held_at(lab, "charge_payment:start")
    yield Step(
        f"Two functions run on worker {worker}: process_order waits for charge_payment, which has "
        f"charged nobody yet. Then {worker} is killed, and worker B is started.",
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
        "The worst moment: the customer has been charged, and the outcome of the step is not "
        "written yet.",
        meanwhile="Worker A claims the order, and charges the customer.",
    )
    worker, order = await held_at(lab, "charge_payment:charged")
    yield Step(
        "The payment service has the payment. The child is still RUNNING, so the function will be "
        f"called again. Then {worker} is killed, and worker B is started.",
        question="How many payments will there be in the end?",
        choices=["None", "One", "Two"],
        rows=await payments(lab, order),
        meanwhile=TAKEN_OVER,
    )
    await kill_and_take_over(lab, worker, order)
    paid = await payments(lab, order)
    yield Step(
        "charge_payment was called twice, and asked for a payment twice, under the same key: the "
        "id of its task. That id was in the log. The payment service knew the key already.",
        rows=paid,
        right=number(len(paid.rows)),
        is_last=True,
    )


async def between_two_steps(lab: Hand) -> Steps:
    """07, moment 4: the outcome of the first step is written."""
    yield Step(
        "The first step is done, its outcome is written, and the order has not asked for the "
        "second one.",
        meanwhile="Worker A charges the customer, and writes that down.",
    )
    worker, order = await held_at(lab, "process_order:between")
    yield Step(
        f"The charge is COMPLETED. Worker {worker} is in the line between the two steps. Then "
        "it is killed, and worker B is started.",
        question=AGAIN,
        choices=["Nothing", ALONE, WITH_CHARGE],
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
        "The last gap: both steps are done. Only the order's own outcome is missing.",
        meanwhile="Worker A charges, and sends the email.",
    )
    worker, order = await held_at(lab, "process_order:end")
    yield Step(
        f"The function is about to return. Then {worker} is killed, and worker B is started.",
        question=AGAIN,
        choices=["Nothing", ALONE, WITH_ALL],
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


async def told_to_stop(lab: Hand) -> Steps:
    """09: SIGTERM is not a crash."""
    yield Step(
        "A stop is announced, so a worker can use the announcement. Worker A gets an order, which "
        "is durable, and a parcel, which is a plain task.",
        meanwhile="Worker A claims both.",
    )
    await lab.hold("pack_parcel:start")
    worker, order = await held_at(lab, "process_order:between")
    (parcel,) = await lab.enqueue("plain")
    await lab.reached("pack_parcel:start")
    await lab.start_worker()
    finishes, at_once, later = choices = [
        "A finishes it, and then ends",
        "B has it at once, while A still packs",
        "B has it when five seconds have passed",
    ]
    yield Step(
        "The order is between two steps, the parcel is being packed, and worker B stands by. "
        f"Then {worker} gets SIGTERM.",
        question="What becomes of the order?",
        choices=choices,
        meanwhile="Watch both workers.",
    )
    await lab.stop(worker)
    query = "SELECT attempt = 2 OR status = 'COMPLETED', attempt FROM tasks WHERE id = %(id)s"
    taken = await lab.until(query, {"id": order}, "somebody else has the order")
    is_packing = await status(lab, parcel) == "RUNNING"
    await lab.release()
    await finished(lab, order)
    await finished(lab, parcel)
    rows = await tasks(lab, order)
    rows.rows.extend((await tasks(lab, parcel)).rows)
    yield Step(
        "The order's progress is in its log, so it was put back at once. The parcel's was only in "
        "memory, so it got its grace, and A packed it to the end: attempt 1.",
        rows=rows,
        right=finishes if taken["attempt"] == 1 else at_once if is_packing else later,
        is_last=True,
    )
