"""Telling the database's absence from a statement's own fault, and waiting for its return."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import psycopg
from psycopg_pool import PoolClosed

T = TypeVar("T")

FIRST_DELAY = 0.1  # seconds
MAX_DELAY = 1.0
# InternalErrors to psycopg: for too long idle in a transaction, or in one at all, which is no more
# than a lost connection; and a server that is read-only, until its failover is over.
AWAY = {"25P03", "25P04", "25006"}

logger = logging.getLogger(__name__)
# How many keep_trying calls are failing just now: a hundred of them are one outage, not a hundred.
failing = 0


def is_away(error: BaseException) -> bool:
    """Whether an error means that the database cannot answer now but may do so later.

    True for a lost connection, a restart, a pool timeout, a deadlock, too many connections, a
    read-only server, a connection whose prepared statements are out of date. False for a closed
    pool, for a statement's own fault, and for SQLSTATE class 54 (a value too large or too complex),
    which psycopg calls an OperationalError too. False for an exception group, whatever is in it:
    ask for each of its members.
    """
    if isinstance(error, PoolClosed):
        return False
    if isinstance(error, psycopg.Error) and error.sqlstate in AWAY:
        return True
    if is_stale_plan(error):
        return True  # the pool closes its connection, and the next one has no plan yet
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return False
    return not (error.sqlstate or "").startswith("54")


def is_stale_plan(error: BaseException) -> bool:
    """Whether a statement was prepared on this connection before its table got another column."""
    return (
        isinstance(error, psycopg.errors.FeatureNotSupported)
        # Other than the message this is in no language. It is where Postgres raises the error.
        and error.diag.source_function == "RevalidateCachedQuery"
    )


async def keep_trying(operation: Callable[[], Awaitable[T]]) -> T:
    """Run a database operation, again and again while the database is away; return its result.

    `operation` must be safe to run again although an earlier try may have been committed. Whatever
    is not is_away() propagates at once. To stop trying, cancel it.
    """
    global failing
    delay = 0.0
    try:
        while True:
            try:
                result = await operation()
            except Exception as error:
                if not is_away(error):
                    raise
                if not delay:
                    failing += 1
                    if failing == 1:
                        logger.warning("database away, trying again: %s", one_line(error))
                delay = min(2 * delay or FIRST_DELAY, MAX_DELAY)
                await asyncio.sleep(delay * random.uniform(0.75, 1.0))
            else:
                if delay and failing == 1:
                    logger.info("database back")
                return result
    finally:
        if delay:
            failing -= 1


@contextmanager
def surviving_outage(what: str, *others: type[Exception]) -> Iterator[None]:
    """Log `what` and go on behind this block if the database is away; for loops that come again.

    It goes on after these other errors, too: for a block that loses nothing, however it fails.
    """
    try:
        yield
    except Exception as error:
        if not is_away(error) and not isinstance(error, others):
            raise
        logger.warning("%s: %s", what, one_line(error))


def one_line(error: BaseException) -> str:
    """An error's message with its line breaks removed."""
    return " ".join(str(error).split())
