"""How old replicas may become: one timer for all of them.

Runs on the controller's loop. A controller that takes over from another one counts from then on.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .workers import Worker

__all__ = ["Age", "Ages", "lifetime_s"]

_SPREAD = 0.1


class Age(NamedTuple):
    """A replica that is to be replaced once it is ``max_age_s`` seconds old, or a little earlier."""

    worker: Worker
    max_age_s: float


class Ages:
    """Tells of replicas that have become too old, also again as long as they are there.

    Args:
        all_there_are: Gives the replicas that may become too old.
        too_old: Called with such a replica, and why in words that follow its name.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        all_there_are: Callable[[], Iterable[Age]],
        too_old: Callable[[Worker, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._all_there_are = all_there_are
        self._too_old = too_old
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    def look(self) -> None:
        """Tell of those that are too old, and look again when the next one will be: to be called when some changed."""
        self.close()
        now = self._clock()
        ends = [
            (one.worker.ready_at + lifetime_s(one.worker.spec.worker_id, one.max_age_s), one)
            for one in self._all_there_are()
        ]
        for end, age in ends:
            if end <= now:
                self._too_old(age.worker, f"is {now - age.worker.ready_at:.1f} s old (max_age_s={age.max_age_s:g})")
        nexts = [end - now for end, _ in ends if end > now]
        if nexts:
            self._timer = asyncio.get_running_loop().call_later(min(nexts), self.look)

    def close(self) -> None:
        """Look no more, until `look` is called (idempotent)."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def lifetime_s(worker_id: str, max_age_s: float) -> float:
    """How old this replica may become: up to a tenth less than others, so that not all are replaced at once."""
    return max_age_s * (1.0 - _SPREAD * zlib.crc32(worker_id.encode()) / 2**32)
