"""Whether blocking here would stop an event loop: that of an async backend, or any that runs in this thread."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from ..errors import WouldBlock

if TYPE_CHECKING:
    import asyncio

__all__ = ["check_may_block", "mark_loop_thread", "running_asyncio_loop", "unmark_loop_thread"]

_loop_threads: set[int] = set()  # threads that run the event loop of an async backend


def mark_loop_thread() -> None:
    """Declare that this thread runs the event loop of an async backend."""
    _loop_threads.add(threading.get_ident())


def unmark_loop_thread() -> None:
    """Take `mark_loop_thread` back."""
    _loop_threads.discard(threading.get_ident())


def check_may_block(what: str) -> None:
    """Refuse to block the event loop that an async backend runs on.

    Raises:
        errors.WouldBlock: This thread runs such a loop.
    """
    if _loop_threads and threading.get_ident() in _loop_threads:
        raise WouldBlock(
            f"{what} would block the event loop of this async backend: get the handle with "
            "get_handle(name, sync=False) and await it, or await the ref"
        )


def running_asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The asyncio loop that runs in this thread, if any."""
    if "asyncio" not in sys.modules:
        return None
    import asyncio

    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
