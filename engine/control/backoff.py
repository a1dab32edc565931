"""How long to wait between tries of what goes on until it succeeds."""

from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["backoff_s"]

_FIRST_S = 0.1
_LONGEST_S = 10.0


def backoff_s(failures: int, jitter: Callable[[], float] = random.random) -> float:
    """Seconds to wait after this many failures in a row, from 1 on: twice as many each time, up to 10.

    Of these, half to all, at random: what has failed at the same moment must not be tried at the same moment for ever.

    Args:
        failures: So many.
        jitter: Returns a random number from 0 to 1.
    """
    longest_s = min(_LONGEST_S, _FIRST_S * 2.0 ** min(failures - 1, 16))
    return longest_s * (1 + jitter()) / 2
