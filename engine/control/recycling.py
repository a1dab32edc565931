"""Whether it helps to recycle replicas for their memory. Decisions only.

Where each replica soon needs more than ``max_rss_mb``, another one in its place will, too: for ever one after the other
would start, and none have the time to do its work. So that is tried less and less often; meanwhile they serve.
"""

from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["Recycling"]

_FIRST_PAUSE_S = 10.0
_LONGEST_PAUSE_S = 600.0


class Recycling:
    """Keeps count for one backend. Times are seconds of any one clock.

    Args:
        jitter: Returns a random number from 0 to 1.

    Attributes:
        in_vain: Replicas in a row that were recycled for what the next one needed as well.
    """

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._not_before = 0.0
        self.in_vain = 0

    def reset(self) -> None:
        """Something else is asked for now."""
        self.in_vain = 0

    def allows(self, now: float) -> bool:
        """Whether to recycle now a replica that needs too much since its first calls; if so, that counts as done."""
        if self.in_vain and now < self._not_before:
            return False
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self.in_vain, 16))
        self._not_before = now + pause_s * (1 + self._jitter()) / 2
        self.in_vain += 1
        return True
