"""Waiting for the signal that asks a program to end, in its main thread: where Python runs handlers of signals.

A handler may strike anywhere in that thread, so what it and the thread share is a queue that can bear this
(`queue.SimpleQueue`; a `threading.Event` would lock itself out). As process 1 of a container a program gets no signal
that it has no handler for; it has these.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType
from typing import Any

from ..errors import EngineError, WouldBlock
from ..seam.may_block import running_asyncio_loop

__all__ = ["Vigil"]

_ENDING = (signal.SIGTERM, signal.SIGINT)


class Vigil:
    """Handles the signals while it is entered, and leaves the former handlers in place.

    SIGINT stays ignored if it was, as in a program that a shell has put into the background.

    Args:
        hurry: Called in the handler of the second signal, and of each later one. Must not block.

    Raises:
        errors.EngineError: This is not the main thread.
        errors.WouldBlock: An event loop runs in it.
    """

    def __init__(self, hurry: Callable[[], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise EngineError(
                "serve_forever() handles signals, which Python allows in the main thread alone: call it there, or wait "
                "here for something of your own and then call shutdown()"
            )
        if running_asyncio_loop() is not None:
            raise WouldBlock(
                "serve_forever() would block the event loop that runs in this thread: have loop.add_signal_handler set "
                "an asyncio.Event, await that, and leave `async with Engine(...)`"
            )
        self._hurry = hurry
        self._news: SimpleQueue[int | None] = SimpleQueue()
        self._before: dict[int, Any] = {}
        self._signalled = False

    def __enter__(self) -> Vigil:
        try:
            for number in _ENDING:
                before = signal.getsignal(number)
                if number != signal.SIGINT or before is not signal.SIG_IGN:
                    self._before[number] = before  # first: an exception may strike as soon as ours is there
                    signal.signal(number, self._handle)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            # What was installed by other means than Python's is not known to it, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def wait(self) -> int | None:
        """Wait for a signal; returns its number, or None if `end` was faster."""
        return self._news.get()

    def end(self) -> None:
        """There is nothing to wait for any more; from any thread."""
        self._news.put(None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            self._hurry()
        self._signalled = True
        self._news.put(number)
