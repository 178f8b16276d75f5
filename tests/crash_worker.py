"""worker_process.py with tasks whose runs can be told apart, and that give faults time to come."""

import asyncio
import os
from itertools import count
from pathlib import Path
from typing import Any

import worker_process
from helpers import wait_for
from shared import run
from worker_process import note

STEP = 0.3  # seconds
LONG = 20.0
PATIENCE = 60.0
runs = count(1)


def noted(input: Any, what: str) -> bool:
    """Whether a run of this task has noted that."""
    file = Path(input["file"])
    return file.exists() and f" {input['n']} {what} " in file.read_text()


async def step(input: Any) -> str:
    """Notes that it starts and ends, and returns the name of this run.

    If it is stubborn, its first run takes long, lest it ends before the test can disturb it, and
    does not obey its cancellation before another run has ended.
    """
    n, name = input["n"], f"{os.getpid()}-{next(runs)}"
    is_first = not noted(input, "starts")
    note(input["file"], f"{n} starts {name}")
    try:
        await asyncio.sleep(LONG if input["stubborn"] and is_first else STEP)
    except asyncio.CancelledError:
        if not (input["stubborn"] and is_first):
            raise
        await wait_for(lambda: noted(input, "ends"), "another run has ended", PATIENCE)
    note(input["file"], f"{n} ends {name}")
    return name


async def order(context: Any, input: Any) -> Any:
    """A durable task, from lesson 07 on: one step, then two at once."""
    first = await context.run_task("step", input)
    others = await asyncio.gather(*(context.run_task("step", input) for _ in range(2)))
    return [first, *others]


if __name__ == "__main__":
    functions: list[Any] = [step, order]
    worker_process.FUNCTIONS[:] = functions
    run(worker_process.main())
