"""Waking threads that wait for a change.

Not by a condition or an event: those are made in Python, and when a signal handler of the application raises in one,
its lock can stay locked, so that whoever has the news would wait for ever. A `SimpleQueue` is made in C.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

__all__ = ["Bell"]


class Bell:
    """Any number of threads wait for it, any thread may ring it."""

    def __init__(self) -> None:
        self._waiting: list[SimpleQueue[None]] = []

    def ring(self) -> None:
        """Let all who wait look again."""
        for waiting in list(self._waiting):
            waiting.put(None)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until a condition holds, which is looked at again whenever it rings; False if it takes too long."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waiting: SimpleQueue[None] = SimpleQueue()
        self._waiting.append(waiting)
        try:
            while not condition():
                try:
                    waiting.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
                except Empty:
                    return condition()
            return True
        finally:
            self._waiting.remove(waiting)
