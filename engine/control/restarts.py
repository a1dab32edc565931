"""When the replicas of one backend are started again, and when callers better stop waiting for one. Decisions only.

A replica that was ready and dies says nothing against the next one: that starts at once, and as many side by side as
died. So it is, whatever its age, with one that has answered a call. Of those that have not, which may be a backend that
leaves as soon as it is ready, so many in a short time are replaced at once; from then on each waits a little.

A *start* that fails lets its place wait before it is tried again, longer and longer, and no other place with it.
Starts that failed side by side are one failure: they say no more than one of them. After a few in a row, with none
that succeeded in between, nobody is left waiting for a replica; the tries go on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from .backoff import backoff_s

__all__ = ["Restarts"]

_HOPELESS_AFTER = 3
"""Failures in a row after which callers are told that there is no replica, rather than left waiting for one."""
_WINDOW_S = 10.0
_LEAST_BURST = 10
_BURST_PER_REPLICA = 3
"""Within the window, so many replicas that had answered nothing are replaced at once: who kills idle ones for a test, a
node that takes all of them along, or a call that kills each it comes to, must not find the backend waiting."""


class Restarts:
    """Keeps count for one backend. Times are seconds of any one clock.

    Args:
        jitter: Returns a random number from 0 to 1.

    Attributes:
        failures: Tries to start a replica that failed, in a row.
        not_before: When a place whose start failed is tried again.
    """

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._level = 0.0  # of the leaky bucket of deaths without an answer
        self._level_at = 0.0  # when it was that
        self._first_failed_at = math.inf  # the first of `failures`
        self.failures = 0
        self.not_before = -math.inf

    def died(self, now: float, *, answered: bool, replicas: int) -> float:
        """A replica died that had been ready.

        Args:
            now: The time.
            answered: It had answered a call.
            replicas: How many the backend should have.

        Returns:
            Seconds to wait before the next one starts in its place.
        """
        if answered:
            return 0.0
        burst = max(_LEAST_BURST, _BURST_PER_REPLICA * replicas)
        per_s = burst / _WINDOW_S
        self._level = max(0.0, self._level - (now - self._level_at) * per_s) + 1
        self._level_at = now
        return max(0.0, self._level - burst) / per_s * (1 + self._jitter() / 2)

    def failed(self, began: float, now: float) -> bool:
        """A start that began then has failed: its place is to wait until `not_before`; returns whether that counts."""
        if began < self.not_before:  # it was tried side by side with one that was counted
            return False
        self.failures += 1
        self._first_failed_at = min(self._first_failed_at, now)
        self.not_before = now + backoff_s(self.failures, self._jitter)
        return True

    def reset(self) -> None:
        """A replica became ready, or what is started is another thing now: places that wait may be tried at once."""
        self.failures = 0
        self._first_failed_at = math.inf
        self.not_before = -math.inf

    def hopeless(self, oldest_start: float) -> bool:
        """Whether the last tries all failed. One that has gone on since before the first of them may yet succeed.

        Args:
            oldest_start: When the oldest of the starts began that go on; infinity if none does.
        """
        return self.failures >= _HOPELESS_AFTER and oldest_start > self._first_failed_at
