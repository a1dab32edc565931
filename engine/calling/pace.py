"""How long a call would wait in a queue, and how many may, judged by how fast it was emptied. Times are passed in."""

from __future__ import annotations

import math

__all__ = ["Pace"]

_LONG_AGO = 16
"""The mean time forgets what was longer ago than some so many calls."""
_LOAD_WEIGHT = 1 / 32
"""Of what came during the last interval, against all before it."""
_MOST_AT_ONCE = 32
"""Of what came during one interval: a crowd that came while replicas had stopped for a moment is no load that lasts."""
_IDLENESS = 1 / 20
"""About the share of time that replicas may be without a call under overload, because none waits just then."""
_PAUSE_S = 0.5
"""After so long without a call that waited, what was measured before says nothing about those to come."""


class Pace:
    """The mean time that calls spend at the head of a queue, and how many come in such a time.

    By Little's law (J. D. C. Little, "A Proof for the Queuing Formula L = λW", 1961) a call behind `n` others waits
    `n` such times; and is answered after as many as there are calls before it, those with replicas included.

    Where more calls come than can be served, and the rest is refused, a long queue serves no more of them than a short
    one: it only lets each wait longer. What it is good for is that replicas find a call whenever they are free. If
    `load` calls come for each that is served, and the queue takes `n`, it is empty for a share of about ``load ** -n``
    of the time (the queue M/M/1/n; D. G. Kendall, 1953). So the greater the load, the shorter the queue may be.

    Attributes:
        interval_s: That mean in seconds; 0 as long as nothing is known.
        load: How many calls come for each that leaves.
        crowded_since: Since when that has been more than one; infinite if it is not.
    """

    __slots__ = (
        "_came",
        "_came_at",
        "_counted",
        "_first_s",
        "_left_at",
        "_stood_still",
        "crowded_since",
        "interval_s",
        "load",
    )

    def __init__(self) -> None:
        self.interval_s = 0.0
        self.load = 1.0
        self.crowded_since = math.inf
        self._counted = 0  # of the intervals in the mean, if they are not very many
        self._first_s: float | None = None  # of a queue that was empty: how long the first to leave waited
        self._came = 0  # since the last one left
        self._came_at = -math.inf  # when the queue was empty last, and a call came
        self._left_at = -math.inf  # when the last call left
        self._stood_still = False

    def come(self, now: float) -> None:
        """A call has come to the queue, which was empty."""
        if now - self._left_at > _PAUSE_S:
            self.interval_s = 0.0
            self.load = 1.0
            self.crowded_since = math.inf
            self._counted = 0
        self._came = 1
        self._first_s = None
        self._came_at = now

    def stand_still(self) -> None:
        """There was nobody to take calls until now: the interval that runs is not counted."""
        self._stood_still = True

    def leave(self, now: float) -> None:
        """A call has left the queue."""
        came_at, left_at = self._came_at, self._left_at
        came, self._came = self._came, 0
        self._left_at = now
        if self._stood_still:
            self._stood_still = False
            return
        self.load = max(1.0, self.load + (min(came, _MOST_AT_ONCE) - self.load) * _LOAD_WEIGHT)
        if self.load <= 1.0:
            self.crowded_since = math.inf
        elif self.crowded_since == math.inf:
            self.crowded_since = now
        if left_at >= came_at:
            if self._first_s is not None:
                self._count(self._first_s)
                self._first_s = None
            self._count(now - left_at)
        else:
            # It came when replicas had been at work for a while, so that this is less than the whole time. That evens
            # out with what follows: replicas that began together let several leave together. If nothing follows, it
            # is not counted, or few calls that hardly waited would make a queue look quicker than it is.
            self._first_s = now - came_at
            if not self._counted:
                self.interval_s = max(self.interval_s, self._first_s)

    def _count(self, interval_s: float) -> None:
        if self._counted < _LONG_AGO:
            self._counted += 1
        self.interval_s += (interval_s - self.interval_s) / self._counted

    def expect(self, now: float, waiting: int, in_flight: int) -> float:
        """Another call has come to the queue, to wait or to be refused.

        Args:
            now: The time.
            waiting: How many wait already, at least one.
            in_flight: How many the replicas hold. If none, time passes without saying how fast they are.

        Returns:
            How many seconds it would wait; 0 if that is not known.
        """
        self._came += 1
        interval_s = self.interval_s
        since_s = now - max(self._left_at, self._came_at)
        if not in_flight or self._stood_still or since_s <= interval_s:
            return waiting * interval_s
        if not self._counted:
            return waiting * since_s  # the first that waits has done so for as long already
        return since_s + (waiting - 1) * interval_s

    def most_waiting(self, in_flight: int) -> float:
        """How many calls are enough to keep replicas busy, where others are refused.

        Args:
            in_flight: How many the replicas hold, several of which may be answered at once.
        """
        if self.load <= 1.0:
            return math.inf
        return max(1.0, in_flight / 2, math.log(_IDLENESS) / -math.log(self.load))
