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

    __slots__ = ("_came_at", "_left_at", "_stood_still", "interval_s")

    def __init__(self) -> None:
        self.interval_s = 0.0
        self._came_at = -math.inf  # when the queue was empty last, and a call came
        self._left_at = -math.inf  # when the last call left
        self._stood_still = False

    def come(self, now: float) -> None:
        """A call has come to the queue, which was empty."""
        if now - self._left_at > _PAUSE_S:
            self.interval_s = 0.0
        self._came_at = now

    def stand_still(self) -> None:
        """There was nobody to take calls until now: the interval that runs is not counted."""
        self._stood_still = True

    def leave(self, now: float) -> None:
        """A call has left the queue."""
        interval_s = now - max(self._left_at, self._came_at)
        if self._stood_still:
            self._stood_still = False
        elif self.interval_s:
            self.interval_s += (interval_s - self.interval_s) * _WEIGHT
        else:
            self.interval_s = interval_s
        self._left_at = now
