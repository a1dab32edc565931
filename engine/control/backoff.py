"""How long to wait between tries of what goes on until it succeeds."""

from __future__ import annotations

__all__ = ["backoff_s"]

_FIRST_S = 0.1
_LONGEST_S = 10.0


def backoff_s(failures: int) -> float:
    """Seconds to wait after this many failures in a row, from 1 on: twice as many each time, up to 10."""
    return min(_LONGEST_S, _FIRST_S * 2.0 ** min(failures - 1, 16))
