"""Processes that work on a lesson's tables, and what they do and use."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import QUEUE, SLOTS
from benchmarks.stage import Stage

TESTS = Path(__file__).parents[1]


@dataclass
class Run:
    """A rate, and what it has cost per task (or order)."""

    per_s: float
    costs: dict[str, float]


@asynccontextmanager
async def contestant(stage: Stage, kind: str = "worker") -> AsyncIterator[Process]:
    """A process of contestant.py that is ready; killed at the end if it has not ended."""
    concurrency = SLOTS if stage.number >= 3 else 0  # lesson 02 has no slots
    arguments = ["-m", "benchmarks.contestant", kind, str(stage.path), str(concurrency)]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, stdin=PIPE, stdout=PIPE
    )
    try:
        await line(process)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def check(processes: list[Process]) -> None:
    """End the program if one of them has ended."""
    if any(process.returncode is not None for process in processes):
        raise SystemExit("a process that was measured has ended before its time, see above")


async def line(process: Process) -> str:
    """The next line that a contestant writes."""
    assert process.stdout is not None
    text = (await process.stdout.readline()).decode()
    if not text:
        await process.wait()
        check([process])
    return text


async def ask(process: Process) -> float:
    """What a contestant answers to a line.

    The first lets it begin, and the answer is when it did so, by the clock of Postgres. The answer
    to all others is the number of statements that it has sent so far.
    """
    assert process.stdin is not None
    process.stdin.write(b"\n")
    return float(await line(process))


async def end(process: Process) -> dict[str, float]:
    """Let a contestant end; return what it has used."""
    process.terminate()
    used: dict[str, float] = json.loads(await line(process))
    await process.wait()
    return used


async def race(stage: Stage, count: int, kind: str = "worker", processes: int = 1) -> Run:
    """Let some processes do what is queued; figures are per one of `count`."""
    before = await stage.used()
    async with AsyncExitStack() as stack:
        racing = [
            await stack.enter_async_context(contestant(stage, kind)) for _ in range(processes)
        ]
        starts = await asyncio.gather(*map(ask, racing))
        await stage.wait_until_done(lambda: check(racing))
        ends = [await end(process) for process in racing]
    await stage.wait_until_closed([process.pid for process in racing])
    after = await stage.used()
    costs = {
        "tx": after["transactions"] - before["transactions"],
        "statements": sum(used["statements"] for used in ends),
        "wal_bytes": after["wal_bytes"] - before["wal_bytes"],
        "cpu_us": sum(used["cpu_us"] for used in ends),
    }
    return Run(
        per_s=count / (await finished_at(stage) - min(starts)),
        costs={name: cost / count for name, cost in costs.items()},
    )


async def finished_at(stage: Stage) -> float:
    """When the last task was completed. Ends the program if one has failed."""
    (row,) = await stage.rows(
        """
        SELECT extract(epoch FROM max(finished_at))::FLOAT AS at,
            min(output::TEXT) FILTER (WHERE status = 'FAILED') AS error
        FROM tasks
        WHERE queue = %s
        """,
        QUEUE,
    )
    if row["error"]:
        raise SystemExit(f"{stage.path.name}: a task that was measured has failed: {row['error']}")
    return float(row["at"])
