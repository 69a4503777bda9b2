"""SIGTERM while asyncio runs: turned into a cancellation, so that everything open is closed on the way out.

Raised inside a callback of the loop, an exception would be logged by the loop and lost.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from omr.errors import Terminated

T = TypeVar("T")


def run_async(work: Callable[[], Awaitable[T]]) -> T:
    """The result of `work()` in an event loop of its own. Raises Terminated when SIGTERM has cancelled it."""
    return asyncio.run(_stoppable(work))


async def _stoppable(work: Callable[[], Awaitable[T]]) -> T:
    loop, me = asyncio.get_running_loop(), asyncio.current_task()
    assert me is not None
    if threading.current_thread() is not threading.main_thread():
        return await work()
    terminated = threading.Event()

    def stop() -> None:
        terminated.set()
        me.cancel()

    before = signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        return await work()
    except asyncio.CancelledError:
        if terminated.is_set():
            raise Terminated from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
