"""How long a client is waited for.

A client that owes a part of its request holds the memory of what came. What waits for it is ended by cancelling the
waiting task, because a server's `receive` takes no timeout.
"""

from __future__ import annotations

import asyncio
import time

from ..errors import DeadlineExceeded

__all__ = ["ClientStalled", "Patience"]


class ClientStalled(Exception):
    """The client was waited for in vain."""


class Patience:
    """Ends a wait of the current task for its client. For one wait at a time, in ``with patience:``.

    Args:
        stall_s: Seconds that one wait may take; None for any.
        deadline: When all waits must be over, in seconds of ``time.monotonic``; None for never.

    Raises:
        ClientStalled: One wait took longer.
        DeadlineExceeded: The deadline has passed while it waited.
    """

    def __init__(self, stall_s: float | None, deadline: float | None = None) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._stall_s = stall_s
        self._deadline = None if deadline is None else loop.time() + deadline - time.monotonic()
        self._task = asyncio.current_task()
        self._since: float | None = None  # of the wait that goes on
        self._timer: asyncio.TimerHandle | None = None
        self._over: Exception | None = None
        self._cancelled = self._cancellations()  # by others, before

    def __enter__(self) -> None:
        self._since = now = self._loop.time()
        if self._timer is None:
            self._look_at(now)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._since = None
        over, self._over = self._over, None
        if over is not None and kind is not None and issubclass(kind, asyncio.CancelledError):
            uncancel = getattr(self._task, "uncancel", None)  # from Python 3.11 on
            if uncancel is not None:
                uncancel()
            if self._cancellations() <= self._cancelled:  # else others want the task to end, too
                raise over from None

    def _cancellations(self) -> int:
        count = getattr(self._task, "cancelling", None)  # from Python 3.11 on
        return count() if count is not None else 0

    def stop(self) -> None:
        """It is over (idempotent)."""
        timer, self._timer = self._timer, None  # it knows this object: neither keeps the request in memory
        self._task = None
        if timer is not None:
            timer.cancel()

    def _look_at(self, now: float) -> None:
        ends = [] if self._deadline is None else [self._deadline]
        if self._stall_s is not None:
            ends.append(now + self._stall_s)
        if ends:
            self._timer = self._loop.call_at(min(ends), self._look)

    def _look(self) -> None:
        now = self._loop.time()
        since = self._since
        if since is None:
            self._timer = None  # nothing is waited for; the next wait begins anew
        elif self._deadline is not None and now >= self._deadline:
            self._end(DeadlineExceeded("the time of the request was over before its body was there"))
        elif self._stall_s is not None and now >= since + self._stall_s:
            self._end(ClientStalled(f"the client was waited for in vain, for {self._stall_s:g} s"))
        else:
            self._look_at(since)

    def _end(self, error: Exception) -> None:
        self._timer = None
        if self._task is not None:
            self._over = error
            self._task.cancel()
