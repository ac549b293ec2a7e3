"""Waiting for what cannot be cancelled: a thread goes on, whatever becomes of whoever waits for it.

It writes to descriptors, and reads from them, that are closed when the wait is over: their numbers would be those of
other files by then. So however often we are cancelled (a second Ctrl-C, a loop that closes), the wait goes on; what the
cancellation was for happens once the thread has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Collection
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T], *, stop: Callable[[], object] = lambda: None) -> T:
    """What ``work`` returns or raises. When we are cancelled, ``stop`` asks it to end sooner.

    Not asyncio.to_thread, whose future is a Task: a loop that closes cancels all of them, and calls them done.
    """
    context = contextvars.copy_context()
    future = asyncio.get_running_loop().run_in_executor(None, lambda: context.run(work))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop()
        await ended([future])
        if not future.cancelled():
            future.exception()  # whatever it was, we are cancelled
        raise


async def ended(futures: Collection[asyncio.Future[Any]]) -> None:
    """Return once all of them have ended, and not before. Raises CancelledError then if we were cancelled meanwhile."""
    cancelled = False
    while any(not future.done() for future in futures):
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
