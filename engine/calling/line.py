"""Calls that wait for the same, and which of them is next. Pure but for its own lists.

There are two priorities. Calls of the normal one go first, but every tenth that goes is one of low priority if any
waits: background work gets on, however much else there is. Among equals, who came first goes first.

Not thread-safe: whoever owns a line holds a lock around its methods. A signal handler of the application may raise
wherever a function is called; what must not be torn apart here calls none, and the rest `mend` makes anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from operator import attrgetter
from typing import Final

from ..seam.messages import Call
from .slot import Slot

__all__ = ["MOST_PASSED", "Line", "bytes_of", "share_of_low"]

MOST_PASSED: Final = 9
"""So many calls of normal priority go in a row while one of low priority waits."""

_since = attrgetter("since")


def bytes_of(call: Call) -> int:
    """How much memory a call takes, as far as it depends on what is passed."""
    return len(call.head) + len(call.payload)


def share_of_low(bound: int) -> int:
    """What of a bound there is for calls of low priority: half of it, so that they are refused first."""
    return (bound + 1) // 2


class Line:
    """The calls of one caller that wait for one backend.

    Args:
        ranked: Whether priorities matter; otherwise all calls are taken for normal ones.

    Attributes:
        normal: Those of normal priority, the next one first.
        low: Those of low priority.
        bytes: What all of them take together.
        passed: How many went in a row while one of low priority waited.
    """

    __slots__ = ("_ranked", "bytes", "low", "normal", "passed")

    def __init__(self, *, ranked: bool = True) -> None:
        self._ranked = ranked
        self.normal: deque[Slot] = deque()
        self.low: deque[Slot] = deque()
        self.bytes = 0
        self.passed = 0

    def __len__(self) -> int:
        return len(self.normal) + len(self.low)

    def __iter__(self) -> Iterator[Slot]:
        yield from self.normal
        yield from self.low

    def head(self) -> deque[Slot]:
        """The one of its lists whose first call is next."""
        if self.low and (not self.normal or self.passed >= MOST_PASSED):
            return self.low
        return self.normal

    def before(self, *, low: bool) -> int:
        """How many of those that wait go before one that comes now."""
        normal, others = len(self.normal), len(self.low)
        return normal + (others if low else min(others, normal // MOST_PASSED))

    def add(self, slot: Slot) -> None:
        """Let a call wait, behind those that came before it."""
        call = slot.call
        queue = self.low if call.priority and self._ranked else self.normal
        slot.waited = True
        slot.bytes = bytes_of(call)
        if queue and queue[-1].since > slot.since:
            queue.insert(bisect_right(queue, slot.since, key=_since), slot)
        else:
            queue.append(slot)
        self.bytes += slot.bytes
        slot.wait_in(self)

    def discard(self, slot: Slot) -> None:
        """Take a call out that is given up (idempotent)."""
        for queue in (self.normal, self.low):
            try:
                place = queue.index(slot)
            except ValueError:
                continue
            # No signal handler runs between these: there is no call.
            del queue[place]
            self.bytes -= slot.bytes
            slot.queue = None
            return

    def clear(self) -> list[Slot]:
        """Take all calls out; returns them."""
        slots = list(self)
        for slot in slots:
            slot.leave_queue()
        self.normal.clear()
        self.low.clear()
        self.bytes = self.passed = 0
        return slots

    def mend(self) -> None:
        """After an exception that struck: make anew what it may have torn."""
        for slot in self:
            slot.wait_in(self)
        self.bytes = sum(slot.bytes for slot in self)
