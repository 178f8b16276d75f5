"""The slots of a worker: how many tasks it may run at once, and when to ask for more."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from models import Task


class Slots:
    """`limit` places for running tasks. With 0 nothing is ever claimed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running: dict[asyncio.Task[None], Task] = {}
        self.parked: Counter[object] = Counter()  # those that need no slot: for how many each waits
        self.more_waiting = False  # may there be more than the last claim took?
        self._wake = asyncio.Event()  # set when there is a reason to claim at once

    @property
    def free(self) -> int:
        return max(0, self.limit - len(self.running) + len(self.parked))

    def fill(self, run: asyncio.Task[None], task: Task) -> None:
        """Let a task have a slot for as long as its `run` takes."""
        self.running[run] = task
        run.add_done_callback(self._release)

    def _release(self, run: asyncio.Task[None]) -> None:
        del self.running[run]
        if self.more_waiting:
            self._wake.set()

    @contextmanager
    def given_back(self, owner: object) -> Iterator[None]:
        """Within this block a running task needs no slot. Afterwards there may be too few."""
        self.parked[owner] += 1
        if self.more_waiting:
            self._wake.set()
        try:
            yield
        finally:
            self.parked[owner] -= 1
            if not self.parked[owner]:
                del self.parked[owner]

    def news(self) -> None:
        """There may be more tasks: claim at once, or as soon as a slot is free."""
        self.more_waiting = True
        self._wake.set()

    async def wait(self, seconds: float) -> None:
        """Sleep for that long, or until there is a reason to claim at once."""
        if self.more_waiting and self.free:
            return
        self._wake.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
