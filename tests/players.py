"""Two transactions that are played against each other, statement by statement, in every order."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from helpers import execute, wait_for
from shared import Pool

LOCK_WAITS = """
SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


async def wait_for_lock_wait(pool: Pool) -> None:
    """Return when some statement waits for a lock."""
    await wait_for(lambda: execute(pool, LOCK_WAITS), "somebody waits for a lock")


class Player:
    """One of two transactions, a statement at each turn."""

    def __init__(self, play: Callable[["Player"], Awaitable[Any]]) -> None:
        self.turns = asyncio.Semaphore(0)
        self.is_waiting = False
        self.deadlocks: list[BaseException] = []
        self.task = asyncio.ensure_future(play(self))

    async def turn(self) -> None:
        self.is_waiting = True
        await self.turns.acquire()
        self.is_waiting = False

    def go_on(self) -> None:
        self.is_waiting = False
        self.turns.release()

    def is_at_rest(self) -> bool:
        return self.is_waiting or self.task.done()


def orders(*turns: int) -> Iterator[list[int]]:
    """All ways in which the turns of two can follow each other, given how many each has."""
    for places in itertools.combinations(range(sum(turns)), turns[0]):
        yield [0 if place in places else 1 for place in range(sum(turns))]


async def play(pool: Pool, players: list[Player], order: list[int]) -> list[Any]:
    """Let them have their turns in this order, and end; return what they returned or raised."""
    for player in players:
        await wait_for(player.is_at_rest, "it waits for its turn")
    for number in order:
        await _let(pool, players, number)
    for player in players:
        for _ in range(9):
            player.turns.release()
    everybody = asyncio.gather(*(player.task for player in players), return_exceptions=True)
    return list(await asyncio.wait_for(everybody, 20))


async def _let(pool: Pool, players: list[Player], number: int) -> None:
    """Let one of them have its turn, until it is at the next one or waits for the other."""
    already = sum(not player.is_at_rest() for player in players)
    player = players[number]
    if not player.is_at_rest():
        return  # it waits for a lock still
    player.go_on()

    async def is_over() -> bool:
        return player.is_at_rest() or len(await execute(pool, LOCK_WAITS)) > already

    await wait_for(is_over, "its turn is over")
