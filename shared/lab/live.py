"""Keeps all open pages up to date. One reader of the database serves them all."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import psycopg

from shared.database import Connection, without_password
from shared.errors import error_text
from shared.lab.hand import Hand
from shared.lab.lesson import OpenLesson
from shared.lab.stage import Stage
from shared.outages import is_away, one_line

INTERVAL = 0.2  # seconds between two states, while something happens
IDLE_INTERVAL = 1.0  # and while nothing does: heartbeats and other programs
LIVELY = 2.0  # seconds after the last news for which something may happen
KEEP_ALIVE = 15.0  # seconds

State = dict[str, Any]


class Tab:
    """One open page: the task that it looks at, and what it has not been sent yet."""

    def __init__(self, chosen: int | None, seen: int) -> None:
        self.chosen = chosen
        self.seen = seen  # the number of the last log entry that it has
        self.news = asyncio.Event()
        self.state: str | None = None
        self._compared: str | None = None

    def offer(self, state: State) -> None:
        """Keep a state for sending if it says something new; one that was not sent is dropped."""
        # A clock that has gone on is no news.
        compared = json.dumps(state | {"now": None})
        if compared != self._compared:
            self._compared = compared
            self.state = json.dumps(with_ages(state))
            self.news.set()


def with_ages(state: State) -> State:
    """The state with the age of each heartbeat, which only grows as time goes by."""
    workers = [
        worker | {"heartbeat_age": max(0.0, state["now"] - worker["heartbeat_at"])}
        if "heartbeat_at" in worker and "now" in state
        else worker
        for worker in state["workers"]
    ]
    return state | {"workers": workers}


class Live:
    """Reads the state while somebody looks, and sends it to the tabs."""

    def __init__(self, lesson: OpenLesson) -> None:
        self.lesson = lesson
        self.tabs: list[Tab] = []
        self.extras: Callable[[], State] = dict  # what else the state has: scenes
        self.error: str | None = None  # of the lesson's files
        self.away: str | None = None  # why the database does not answer
        self.closed = False
        self._prepared_for = -1  # so many workers have started since
        self._news = asyncio.Event()
        self._last_news = 0.0
        self._times: dict[str, float] = {}  # of the engine, as the last worker has told them
        self._conn: Connection | None = None
        self._last: tuple[State, dict[int, State | None]] = ({}, {})

    def begin(self, hand: Hand) -> None:
        """Say whose run this is."""
        self.hand = hand
        self.stage = Stage(self.lesson, hand.queue, hand.record, hand.processes)

    def touch(self) -> None:
        """Something has happened: look soon, and often for a while."""
        self._last_news = time.monotonic()
        self._news.set()

    async def keep_reading(self) -> None:
        """Read and send, as long as there are tabs. Returns never."""
        while True:
            if self.tabs:
                await self._send(await self.read())
            await asyncio.sleep(INTERVAL)
            if not self.tabs:
                await self._wait(KEEP_ALIVE)
            elif time.monotonic() > self._last_news + LIVELY:
                await self._wait(IDLE_INTERVAL - INTERVAL)

    async def _wait(self, seconds: float) -> None:
        """Until there is news, but not longer than that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()

    async def read(self) -> tuple[State, dict[int, State | None]]:
        """The state, and the tasks that the tabs look at; as they were, if they are away."""
        try:
            conn = await self._connection()
            ids = {tab.chosen for tab in self.tabs if tab.chosen is not None}
            base = await self.stage.read(conn, ids)
            chosen = {id: await self.stage.read_chosen(conn, id) for id in ids}
            self.away = None
            self._last = base, chosen
            return self._last
        except SystemExit as error:
            self.error = str(error)
        except psycopg.Error as error:
            if is_away(error):
                self.away = without_password(one_line(error))
            else:
                self.error = f"The tables are not as they were: {one_line(error)}"
            self._prepared_for = -1
            await self.close()
        except Exception as error:  # of whatever a reader has made of the lesson
            self.error = error_text(error)
        base, chosen = self._last
        workers = [worker.view() for worker in self.hand.processes.shown()]
        return base | {"workers": workers}, chosen

    async def _connection(self) -> Connection:
        """The connection for reading, when the lesson is in order."""
        if self._conn is None or self._conn.closed:
            self._conn = await self.lesson.connect()
        # A reader may have changed the files, and then starts a worker.
        started = self.hand.processes.started
        if started != self._prepared_for or self.error:
            await self.lesson.prepare(self._conn)
            await self.stage.begin(self._conn)
            self.error, self._prepared_for = self.lesson.syntax_error(), started
        return self._conn

    async def close(self) -> None:
        """Close the connection; the next reading opens another."""
        if self._conn is not None:
            await self._conn.close()
            self._conn = None

    async def _send(self, read: tuple[State, dict[int, State | None]]) -> None:
        base, chosen = read
        state = self._surroundings() | base | self.extras()
        for tab in self.tabs:
            # A tab that was opened while we were reading waits for the next time.
            if tab.chosen is None or tab.chosen in chosen or self.away or self.error:
                tab.offer(state | {"chosen": chosen.get(tab.chosen) if tab.chosen else None})
            if tab.seen < self.hand.record.last_number:
                tab.news.set()

    def _surroundings(self) -> State:
        """What the state says that is in no table."""
        workers = self.hand.processes.workers
        for worker in workers:
            times = ("inactive_after", "heartbeat_interval")
            self._times |= {name: worker.facts[name] for name in times if name in worker.facts}
        stillborn = workers[-1].error if workers and not workers[-1].is_alive else None
        lesson = self.lesson.summary() | self._times
        known = "restarting" if self.hand.is_restarting else "away" if self.away else "up"
        database: State = {"state": known, "embedded": self.hand.embedded}
        if self.away:
            database["error"] = self.away
        return {
            "lesson": lesson | {"error": self.error or stillborn},
            "database": database,
            "gates": sorted(self.hand.processes.closed_gates),
            "choose": self.hand.chosen,
        }

    async def stream(self, chosen: int | None, seen: int) -> AsyncIterator[str]:
        """The events for one tab, until it is closed."""
        tab = Tab(chosen, seen)
        self.tabs.append(tab)
        self.touch()
        try:
            yield "retry: 1000\n\n"
            while not self.closed:
                if tab.state is not None:
                    state, tab.state = tab.state, None
                    yield f"event: state\ndata: {state}\n\n"
                if entries := self.hand.record.newer_than(tab.seen):
                    tab.seen = entries[-1]["n"]
                    yield f"id: {tab.seen}\nevent: log\ndata: {json.dumps(entries)}\n\n"
                with suppress(TimeoutError):
                    async with asyncio.timeout(KEEP_ALIVE):
                        await tab.news.wait()
                if not tab.news.is_set():
                    yield ": still here\n\n"
                tab.news.clear()
        finally:
            self.tabs.remove(tab)

    def end(self) -> None:
        """Let all streams end."""
        self.closed = True
        for tab in self.tabs:
            tab.news.set()
