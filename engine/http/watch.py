"""What may end a request before its answer has come."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ..calling.answers import StreamSlot
from ..calling.slot import Submitter
from ..errors import DeadlineExceeded

__all__ = ["Lookout", "Watch"]

_WATCH_AFTER_S = 0.05
"""Most requests end sooner, and are spared the task that waits for the client to leave."""


class Lookout:
    """Starts watches when their requests take longer than most: one timer does for all requests of a loop.

    It runs while there are any, and looks twice in `_WATCH_AFTER_S` which are still there that were there before.

    Args:
        loop: Runs it, and the requests.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._new: dict[Watch, None] = {}  # since the last look
        self._seen: dict[Watch, None] = {}  # not started at the last look
        self._runs = False

    def enter(self, watch: Watch) -> None:
        """Start it in a while, in time for its deadline, unless it leaves before."""
        if watch.soon_s is not None:
            watch.alarm_at(watch.soon_s)
            return
        self._new[watch] = None
        if not self._runs:
            self._run()

    def leave(self, watch: Watch) -> None:
        """Its request is over (idempotent)."""
        if watch in self._new:
            del self._new[watch]
        else:
            self._seen.pop(watch, None)

    def _run(self) -> None:
        self.loop.call_later(_WATCH_AFTER_S / 2, self._look)
        self._runs = True

    def _look(self) -> None:
        self._runs = False  # first: if this is interrupted, the next request goes on with it
        while self._seen:
            self._seen.popitem()[0].start()
        self._seen, self._new = self._new, {}
        if self._seen:
            self._run()


class Watch:
    """Looks out for the client leaving and for the deadline passing, once a request takes longer than most.

    A call whose client left is given up at once, also while the request waits in a server that lets nobody go.
    """

    __slots__ = ("_alarm", "_caller", "_deadline", "_receive", "_slot", "_task", "soon_s")

    def __init__(self, slot: StreamSlot, caller: Submitter, receive: Any, deadline: float | None) -> None:
        self._slot = slot
        self._caller = caller
        self._receive = receive
        self._deadline = deadline
        self._task: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self.soon_s: float | None = None  # its deadline is so near
        if deadline is not None and (remaining_s := deadline - time.monotonic()) < _WATCH_AFTER_S:
            self.soon_s = max(0.0, remaining_s)

    def alarm_at(self, delay_s: float) -> None:
        """Begin to watch after so many seconds."""
        self._alarm = self._slot.loop.call_later(delay_s, self.start)

    def start(self) -> None:
        """Begin to watch (idempotent)."""
        if self._task is None:
            if self._alarm is not None:
                self._alarm.cancel()
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
