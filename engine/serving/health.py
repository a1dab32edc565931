"""When a backend's ``check_health`` is to be called, and what became of it. Decisions only: times are passed in.

The watchdog asks (`Health.look`), and the thread or loop that runs user code answers (`Health.begun`, `Health.ended`).
What they share is written by one of them at a time: by the watchdog between checks, by the other until one ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from ..config import BackendConfig

__all__ = ["Health", "Look"]


class Look(NamedTuple):
    """What is to be done now.

    Attributes:
        check: Have `check_health` called.
        late: The call of it that runs has outlasted its time.
        again_s: Seconds until the next look, unless a check ends before.
    """

    check: bool
    late: bool
    again_s: float | None


class Health:
    """The checks of one replica.

    Args:
        jitter: Returns a random number from 0 to 1: replicas that were started together are not to be checked together.

    Attributes:
        began_at: When the check that runs began; None while none does.
        failures: In a row.
    """

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._due: float | None = None
        self._asked = False
        self.began_at: float | None = None
        self.failures = 0

    def look(self, now: float, late_s: float, config: BackendConfig, *, margin_s: float = 0.0) -> Look:
        """What is to be done now.

        Args:
            now: The time.
            late_s: For how long the process has stood still since the last look.
            config: Period and timeout.
            margin_s: Of a check that runs, this is what it may outlast its time by.
        """
        patience_s = config.health_check_timeout_s + margin_s
        if self._asked:
            began_at = self.began_at
            if began_at is None:  # what runs takes long, which is no fault of the check
                return Look(False, False, patience_s)
            if late_s:
                self.began_at = began_at = began_at + late_s
            remaining_s = began_at + patience_s - now
            return Look(False, remaining_s <= 0, remaining_s if remaining_s > 0 else patience_s)
        period_s = config.health_check_period_s
        if period_s is None:
            return Look(False, False, None)
        if self._due is None:
            self._due = now + period_s * (0.9 + 0.2 * self._jitter())
        remaining_s = min(self._due - now, 1.1 * period_s)  # it may have been longer when that was decided
        if remaining_s > 0:
            return Look(False, False, remaining_s)
        self._asked = True
        return Look(True, False, patience_s)

    def begun(self, now: float) -> None:
        """User code is about to be called."""
        self.began_at = now

    def ended(self, *, well: bool) -> int:
        """It has returned, or was given up; returns how many in a row have failed."""
        self.failures = 0 if well else self.failures + 1
        self.began_at = self._due = None
        self._asked = False
        return self.failures
