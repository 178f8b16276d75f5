"""How cost grows: with rows, with processes, with payloads. Measured on one lesson."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

from psycopg.errors import InsufficientPrivilege

from benchmarks import QUEUE, TASKS, scaled
from benchmarks.measure import Book, measure_noop, measure_rates, times
from benchmarks.race import ask, check, contestant
from benchmarks.stage import Stage

MANY = 1_000_000
SUSPENDED = 10_000
PROCESSES = [1, 2, 4]
PAYLOADS = {"100_B": (100, 5000), "10_kB": (10_000, 1000), "1_MB": (1_000_000, 10)}

INSERT_FINISHED = """
INSERT INTO tasks (queue, task_name, input, output, status, inserted_at, finished_at)
SELECT %s, 'noop', jsonb_build_object('n', n), 'null', 'COMPLETED', past, past
FROM generate_series(1, %s) AS n, (SELECT now() - INTERVAL '1 hour' AS past)
"""
INSERT_SLEEPERS = """
INSERT INTO tasks (queue, task_name, input, output, status, wake_at)
SELECT %s, 'sleep', '{"seconds": 86400}', 'null', 'SLEEPING', now() + INTERVAL '1 day'
FROM generate_series(1, %s)
"""
COUNT_SUSPENDED = "SELECT count(*) AS suspended FROM tasks WHERE status = 'SUSPENDED'"


async def finished(stage: Stage) -> None:
    await stage.rows(INSERT_FINISHED, QUEUE, scaled(MANY))


async def sleepers(stage: Stage) -> None:
    await stage.rows(INSERT_SLEEPERS, QUEUE, scaled(MANY))


async def suspended(stage: Stage) -> None:
    """Durable tasks that sleep for a day, put to sleep by the lesson's own worker."""
    await stage.fill(scaled(SUSPENDED), "nap")
    async with contestant(stage) as process:
        await ask(process)
        while (await stage.rows(COUNT_SUSPENDED))[0]["suspended"] < scaled(SUSPENDED):
            check([process])
            await asyncio.sleep(0.2)


# What piles up, by the first lesson that has it.
PILES: dict[str, tuple[int, Callable[[Stage], Awaitable[None]]]] = {
    f"{MANY}_finished": (2, finished),
    f"{MANY}_sleepers": (12, sleepers),
    f"{SUSPENDED}_suspended": (13, suspended),
}


async def pile_up(stage: Stage, pile: Callable[[Stage], Awaitable[None]]) -> None:
    """Put the rows there, and do what else is done long before where they come one by one."""
    await pile(stage)
    await stage.rows("VACUUM (ANALYZE) tasks")
    with suppress(InsufficientPrivilege):
        await stage.rows("CHECKPOINT")


async def measure_piles(book: Book, without: Stage, piles: dict[str, Stage]) -> None:
    """All rates without such rows, and then beside each kind of them. Once."""
    await without.clear()
    await measure_rates(book, "growth.without", without)
    for name, stage in piles.items():
        await measure_rates(book, f"growth.{name}", stage)


async def measure_growth(book: Book, stage: Stage) -> None:
    """The rate with several processes, and with larger inputs and outputs. Once."""
    for number in PROCESSES:
        await stage.clear()
        prefix = f"growth.{number}_processes"
        await measure_noop(book, prefix, stage, 2 * times(stage) * TASKS, processes=number)
    for name, (size, count) in PAYLOADS.items():
        await stage.clear()
        # Digits of chance, since Postgres would compress anything else.
        text = os.urandom(size // 2).hex()
        tasks = scaled(times(stage) * count)
        await measure_noop(book, f"growth.payload_{name}", stage, tasks, text)
