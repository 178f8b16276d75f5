"""Calling a task's function with a limit: nobody waits beyond it, and errors stay in the task."""

import asyncio
import logging
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

from durable_context import DurableContext

log = logging.getLogger("worker")

Result = tuple[Any, BaseException | None]  # the output; and the error, or None


async def call(
    coroutine: Coroutine[Any, Any, Any],
    context: DurableContext,
    timeout: timedelta | None,
    grace: float,
) -> Result:
    """Run this coroutine in an asyncio task of its own; return how it ended.

    After `timeout`, when its task is suspended, or when this call is cancelled, the coroutine is
    cancelled, and if it does not end within `grace` seconds it is left behind. The branches that
    `context` knows are cancelled and awaited, too.
    """
    running = asyncio.create_task(_result(coroutine))
    try:
        seconds = None if timeout is None else timeout.total_seconds()
        ends: set[asyncio.Future[Any]] = {running, context.left}
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        in_time = running.done()
        # First the context: what is cancelled must not start further steps.
        ours = {running, *context.end()}
        unfinished = {each for each in ours if not each.done()}
        for each in unfinished:
            each.cancel()
        if unfinished:
            _, ignoring = await asyncio.wait(unfinished, timeout=grace)
            if ignoring:
                log.warning("task %d ignores its cancellation, and is left behind", context.task_id)
    if context.left.done():
        return None, None  # nobody asks: the task is not ours any more
    if not in_time:
        return None, TimeoutError(f"timed out after {timeout}")
    if running.cancelled():  # it cancelled itself, and returned before its next await
        return None, asyncio.CancelledError("the function cancelled itself")
    return running.result()


async def _result(coroutine: Coroutine[Any, Any, Any]) -> Result:
    """An error is returned, not raised: a SystemExit would stop the event loop."""
    try:
        return await coroutine, None
    except BaseException as error:
        return None, error
