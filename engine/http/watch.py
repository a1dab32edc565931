"""What may end a request before its answer has come."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ..calling.answers import StreamSlot
from ..calling.slot import Submitter
from ..errors import DeadlineExceeded

__all__ = ["Watch"]

_WATCH_AFTER_S = 0.05
"""Most requests end sooner, and are spared the task that waits for the client to leave."""


class Watch:
    """Looks out for the client leaving and for the deadline passing, once a request takes longer than most.

    A call whose client left is given up at once, also while the request waits in a server that lets nobody go.
    """

    __slots__ = ("_alarm", "_caller", "_deadline", "_receive", "_slot", "_task", "after_s")

    def __init__(self, slot: StreamSlot, caller: Submitter, receive: Any, deadline: float | None) -> None:
        self._slot = slot
        self._caller = caller
        self._receive = receive
        self._deadline = deadline
        self._task: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self.after_s = _WATCH_AFTER_S
        if deadline is not None:
            self.after_s = max(0.0, min(_WATCH_AFTER_S, deadline - time.monotonic()))

    def start(self) -> None:
        """Begin to watch (idempotent)."""
        if self._task is None:
            self._task = self._slot.loop.create_task(self._pump())
            if self._deadline is not None:
                remaining_s = max(0.0, self._deadline - time.monotonic())
                self._alarm = self._slot.loop.call_later(remaining_s, self._expired)

    def deadline_met(self) -> None:
        """The answer began in time."""
        self._deadline = None
        if self._alarm is not None:
            self._alarm.cancel()

    def stop(self) -> None:
        """Watch no longer (idempotent)."""
        self.deadline_met()
        task, self._task = self._task, None  # it knows this watch, too: neither keeps the request in memory
        if task is not None:
            task.cancel()

    async def _pump(self) -> None:
        # a server may hand the client's leaving through the same queue as the body: it must be emptied
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._caller.cancel(self._slot)
                self._slot.deliver(None)
                return

    def _expired(self) -> None:
        self._slot.fail(DeadlineExceeded("no answer came in time"))
