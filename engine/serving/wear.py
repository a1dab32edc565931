"""When a replica has done its share, so that another one is to take its place: by its calls, and by its memory."""

from __future__ import annotations

import os
import sys

from ..config import BackendConfig

__all__ = ["resident_mb", "worn_by_calls", "worn_by_memory"]


def worn_by_calls(config: BackendConfig, calls: int) -> str:
    """Why a replica that has begun so many calls is to be recycled, in words that follow its name; empty if not."""
    most = config.max_calls_per_replica
    return f"has begun {calls} calls (max_calls_per_replica={most})" if most is not None and calls >= most else ""


def worn_by_memory(config: BackendConfig) -> str:
    """As `worn_by_calls`, for the memory of this process."""
    most = config.max_rss_mb
    if most is None:
        return ""
    mb = resident_mb()
    return f"has {mb:.0f} MB in memory (max_rss_mb={most:g})" if mb is not None and mb > most else ""


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
