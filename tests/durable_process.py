"""worker_process.py with an order for a durable task, which stops where the test wants it to."""

from pathlib import Path
from typing import Any

import worker_process
from helpers import DEADLINE, wait_for
from shared import run
from worker_process import note


async def moment(input: Any, name: str) -> None:
    """Note that it has come to this point; if it is to stop here, wait for the file `gate`."""
    note(input["file"], name)
    if input["stop"] == name:
        await wait_for(Path(input["gate"]).exists, "the gate is open", seconds=10 * DEADLINE)


async def process_order(context: Any, input: Any) -> Any:
    try:
        await moment(input, "before-the-first-event")
        charge = await context.run_task("charge", input)
        await moment(input, "between-the-children")
        email = await context.run_task("send_email", input)
        await moment(input, "after-the-children")
        return [charge, email]
    finally:
        note(input["file"], "order-ends")


async def charge(input: Any) -> Any:
    from worker import current_task  # type: ignore[import-not-found, unused-ignore]

    key = current_task.get().id
    note(input["file"], f"charges-{key}")
    await moment(input, "charged")
    return key


async def send_email(input: Any) -> str:
    return "sent"


async def busy(input: Any) -> None:
    """Takes a slot until there is the file `gate`."""
    await moment(input, "busy")


if __name__ == "__main__":
    functions: list[Any] = [process_order, charge, send_email, busy]
    worker_process.FUNCTIONS[:] = functions
    run(worker_process.main())
