"""A pool whose every exchange with Postgres is a point at which a test may make something happen.

Nothing is mocked: pool, connections and server are real. psycopg sends everything through
`AsyncConnection.wait`, so that is where a run is watched and disturbed.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

from psycopg import AsyncConnection
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row

from shared import Connection, Pool, Queries
from shared.database import CancellablePool, use_strict_json

# The query that an asyncio task has called last, with its parameters.
last_query: ContextVar[tuple[str, dict[str, Any]]] = ContextVar("last_query", default=("", {}))


# psycopg's names for what is no statement of ours. Before a connection is given back, it commits.
GENERATORS = {
    "_enter_gen": "begin",
    "_exit_gen": "commit",
    "_commit_gen": "release",
    "_rollback_gen": "rollback",
}
OF_POOL = {"getconn", "putconn"}


class Point(NamedTuple):
    """One await of a run: the nth of its name, before or after it happens."""

    name: str
    n: int
    phase: str

    def __str__(self) -> str:
        return f"{self.phase} {self.name}#{self.n}"


class Watch:
    """Sees every point of a worker's run; what it calls then may raise, or wait."""

    def __init__(self, on_point: Callable[[Point, Connection | None], Awaitable[None]]) -> None:
        self.on_point = on_point
        self.points: dict[Point, bool] = {}  # was it within a transaction?
        self._counts: Counter[str] = Counter()

    @asynccontextmanager
    async def around(self, name: str, conn: Connection | None = None) -> AsyncIterator[None]:
        self._counts[name] += 1
        n = self._counts[name]
        await self.at(Point(name, n, "before"), conn)
        yield
        await self.at(Point(name, n, "after"), conn)

    async def at(self, point: Point, conn: Connection | None) -> None:
        status = conn.pgconn.transaction_status if conn else TransactionStatus.IDLE
        self.points[point] = status == TransactionStatus.INTRANS
        try:
            await self.on_point(point, conn)
        except asyncio.CancelledError:
            if point.phase == "after" or point.name in OF_POOL:
                raise
            # psycopg cannot be cancelled before it has sent something, so put that off until then.
            task = asyncio.current_task()
            assert task
            task.uncancel()
            task.cancel()


class WatchedQueries:
    """The queries of a lesson, which leave word of who was called."""

    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    def __getattr__(self, name: str) -> Any:
        query = getattr(self._queries, name)

        def call(conn: Connection, **parameters: Any) -> Any:
            last_query.set((name, parameters))
            return query(conn, **parameters)

        setattr(self, name, call)  # the worker compares queries by identity
        return call


class WatchedConnection(AsyncConnection[DictRow]):
    watch: Watch

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        name = last_query.get()[0] if gen.__name__ == "_execute_gen" else GENERATORS[gen.__name__]
        async with self.watch.around(name, self):
            return await super().wait(gen, *args, **kwargs)


class WatchedPool(CancellablePool):
    """A pool like another one, but watched; see `open_watched`."""

    watch: Watch

    async def getconn(self, timeout: float | None = None) -> Connection:
        async with self.watch.around("getconn"):
            return await super().getconn(timeout)

    async def putconn(self, conn: Connection) -> None:
        async with self.watch.around("putconn"):
            await super().putconn(conn)

    async def open_connection(self) -> Connection:
        """What shared.open_connection does, watched as well."""
        conninfo, kwargs = cast(str, self.conninfo), cast(dict[str, Any], self.kwargs)
        conn: Connection = await self.connection_class.connect(conninfo, **kwargs)
        await use_strict_json(conn)
        return conn


@asynccontextmanager
async def open_watched(pool: Pool, name: str, watch: Watch) -> AsyncIterator[Pool]:
    """A watched pool on the same database; its sessions go by this application_name."""
    connection_class = type("Connection", (WatchedConnection,), {"watch": watch})
    watched = WatchedPool(
        cast(str, pool.conninfo),
        connection_class=connection_class,
        kwargs={"autocommit": True, "row_factory": dict_row, "application_name": name},
        min_size=1,
        max_size=4,
        open=False,
        configure=use_strict_json,
    )
    watched.watch = watch
    async with watched:
        yield watched
