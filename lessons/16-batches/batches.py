"""Say more at once: what comes while one statement is in flight is the next statement's."""

import asyncio
from itertools import accumulate
from typing import Any

from models import Task
from shared import Pool, Queries, keep_trying
from shared.jsonb import dumps

MAX_ROWS = 100  # of one statement
MAX_CHARACTERS = 1_000_000  # of one statement, unless its first row has more
Row = dict[str, Any]
Answer = asyncio.Future[Row | None]


class Batches:
    """Rows that go to the database together, as one JSON document."""

    query: str  # the name of the statement; `ordinality` in its rows says which row is answered

    def __init__(self, pool: Pool, queries: Queries) -> None:
        self.pool = pool
        self.queries = queries
        self._waiting: list[tuple[str, Answer]] = []
        self._news = asyncio.Event()
        self._in_flight = asyncio.Lock()

    def put(self, task: Task, **columns: Any) -> Answer:
        """Let the next statement carry a row about this attempt; await its answer.

        The answer is None if the statement skips the row, and an error if the row is at fault. If
        the answer is cancelled before the row is sent, the row is left out. Raises ValueError or
        TypeError for a value that is not JSON.
        """
        owner = f'"id": {task.id}, "worker_id": "{task.worker_id}", "attempt": {task.attempt}'
        row = ", ".join(f'"{name}": {dumps(value)}' for name, value in columns.items())
        answer: Answer = asyncio.get_running_loop().create_future()
        self._waiting.append((f"{{{owner}, {row}}}", answer))
        self._news.set()
        return answer

    async def keep_sending(self) -> None:
        """Send what waits, then what has come meanwhile. There is no timer. Never returns."""
        while True:
            await self._news.wait()
            self._news.clear()
            await self.send_all()

    async def send_all(self) -> None:
        """Send what waits. What has no answer yet when this is cancelled goes on waiting."""
        async with self._in_flight:
            while self._waiting:
                await self._send(self._waiting[:MAX_ROWS])
                self._waiting = [each for each in self._waiting if not each[1].done()]

    async def _send(self, batch: list[tuple[str, Answer]]) -> None:
        """Send these; one by one if Postgres refuses them, since one alone may be the reason."""
        try:
            await keep_trying(lambda: self._send_once(batch))
        except Exception as error:
            if len(batch) > 1:
                for each in batch:
                    await self._send([each])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)

    async def _send_once(self, batch: list[tuple[str, Answer]]) -> None:
        async with self.pool.connection() as conn:
            # Only now, since we may have waited. What does not fit in goes on waiting.
            batch = [each for each in batch if not each[1].done()]
            sizes = accumulate(len(row) for row, _ in batch)
            batch = batch[: max(1, sum(size <= MAX_CHARACTERS for size in sizes))]
            rows = f"[{','.join(row for row, _ in batch)}]"
            found = getattr(self.queries, self.query)(conn, rows=rows)
            answers = {row["ordinality"]: row async for row in found}
        for number, (_, answer) in enumerate(batch, 1):
            if not answer.done():
                answer.set_result(answers.get(number))
