"""How long a call would wait in a queue, judged by how fast the queue has been emptied. Pure: times are passed in."""

from __future__ import annotations

import math

__all__ = ["Pace"]

_WEIGHT = 1 / 16
"""Of the last interval against all before it: the mean forgets what was longer ago than some 16 calls."""
_PAUSE_S = 0.5
"""After so long without a call that waited, what was measured before says nothing about those to come."""


class Pace:
    """The mean time that calls spend at the head of a queue.

    By Little's law (J. D. C. Little, "A Proof for the Queuing Formula L = λW", 1961) a call behind `n` others waits
    `n` such times; and is answered after as many as there are calls before it, those with replicas included.

    Attributes:
        interval_s: That mean in seconds; 0 as long as nothing is known.
    """

    __slots__ = ("_left_at", "interval_s")

    def __init__(self) -> None:
        self.interval_s = 0.0
        self._left_at = -math.inf  # when the last call left

    def come(self, now: float) -> None:
        """A call has come to the queue, which was empty."""
        if now - self._left_at > _PAUSE_S:
            self.interval_s = 0.0

    def leave(self, since: float, now: float) -> None:
        """A call has left the queue, to which it had come at ``since``."""
        interval_s = now - max(self._left_at, since)
        if self.interval_s:
            self.interval_s += (interval_s - self.interval_s) * _WEIGHT
        else:
            self.interval_s = interval_s
        self._left_at = now
