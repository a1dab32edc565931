"""When a replica has done its share, so that another one is to take its place: by its calls, and by its memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..config import BackendConfig

__all__ = ["Memory", "resident_mb", "worn_by_calls"]


def worn_by_calls(config: BackendConfig, calls: int) -> str:
    """Why a replica that has begun so many calls is to be recycled, in words that follow its name; empty if not."""
    most = config.max_calls_per_replica
    return f"has begun {calls} calls (max_calls_per_replica={most})" if most is not None and calls >= most else ""


def resident_mb() -> float | None:
    """What this process has in memory, in 10^6 bytes; None if that cannot be found out just now.

    Elsewhere than on Linux that is the most it ever had.
    """
    try:
        if sys.platform == "linux":
            with open("/proc/self/statm", "rb") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
    except (OSError, ImportError):  # no file descriptor is left, say
        return None


class Memory:
    """What this process has in memory, as the replica that runs in it sees it from time to time.

    Args:
        resident_mb: Says how much that is.
    """

    def __init__(self, resident_mb: Callable[[], float | None] = resident_mb) -> None:
        self._resident_mb = resident_mb
        self._first_mb: float | None = None  # at the first look at which calls had begun

    def look(self, config: BackendConfig, calls: int) -> tuple[str, bool]:
        """As `worn_by_calls`; and whether it had too much from the start, as another replica in its place will have."""
        most = config.max_rss_mb
        first = self._first_mb is None
        if most is None and (not first or not calls):
            return "", False
        mb = self._resident_mb()
        if first and calls:
            self._first_mb = mb
        if most is None or mb is None or mb <= most:
            return "", False
        from_start = self._first_mb is None or self._first_mb > most
        return f"has {mb:.0f} MB in memory (max_rss_mb={most:g})", from_start
