"""worker_process.py with durable tasks that wait: for a time, or for a child."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import worker_process
from helpers import DEADLINE, wait_for
from shared import run
from worker_process import note


async def sleepy(context: Any, input: Any) -> int:
    """Sleeps for that many seconds, and returns in which attempt it got up."""
    note(input["file"], "begins")
    await context.sleep(timedelta(seconds=input["seconds"]))
    note(input["file"], "wakes")
    return int(context.attempt)


async def order(context: Any, input: Any) -> Any:
    """Waits for an approval."""
    note(input["file"], "begins")
    try:
        return await context.run_task("approval", input)
    finally:
        note(input["file"], "ends")


async def approval(input: Any) -> str:
    """Comes when there is the file `gate`."""
    note(input["file"], "asks")
    await wait_for(Path(input["gate"]).exists, "the gate is open", seconds=10 * DEADLINE)
    return "approved"


if __name__ == "__main__":
    functions: list[Any] = [sleepy, order, approval]
    worker_process.FUNCTIONS[:] = functions
    run(worker_process.main())
