"""How long a task of an event loop may be in user code in one go: one call, one batch, one step of a stream.

It is cancelled when that time is over, and told on if it does not end. What waits for a client does not count.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .replica import Job

__all__ = ["CallLimit"]

_GRACE_S = 2.0
"""For a task that was cancelled to end: to close what it has open, say."""


class CallLimit:
    """The limit of one task.

    Args:
        task: What runs.
        jobs: The calls that it runs.
        overran: Called when the time is over, right before the task is cancelled.
        outlived: Called when it has not ended some time after that.

    Attributes:
        streaming: The call of which a part of a stream was sent.
        limit_s: How long it may be in user code in one go, as of the last time that it began.
        over: Its time is over.
    """

    def __init__(
        self,
        task: asyncio.Task[Any],
        jobs: list[Job],
        overran: Callable[[CallLimit], None],
        outlived: Callable[[CallLimit], None],
    ) -> None:
        self.task = task
        self.jobs = jobs
        self.streaming: Job | None = None
        self.limit_s = math.inf
        self.over = False
        self._overran = overran
        self._outlived = outlived
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, limit_s: float | None) -> None:
        """User code begins, and has so many seconds from now on; None leaves it any time.

        What goes on although its time was over, to close a stream, say, is given no more than time to end.
        """
        self.pause()
        if self.over:
            self._timer = self.task.get_loop().call_later(_GRACE_S, self._outlived, self)
        elif limit_s is not None:
            self.limit_s = limit_s
            self._timer = self.task.get_loop().call_later(limit_s, self._end)

    def pause(self) -> None:
        """User code has returned for now, or for good."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        if self.task.done():
            return
        self.over = True
        self._timer = self.task.get_loop().call_later(_GRACE_S, self._outlived, self)
        self._overran(self)
        self.task.cancel()
