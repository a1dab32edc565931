"""What a worker's allocator keeps for later is given back once a flood is over.

Freed memory stays with the process where something small that still lives lies above it: after two hundred streams that
held a megabyte each, a server kept most of that for good. glibc gives whole pages back when asked to, which takes it
milliseconds, and keeps other threads from allocating meanwhile. So it is asked only where there may be much, when
the process's memory does not change just then, and less and less often where it did not help. Other C libraries have no
such question, and mostly need none.

Looked after on the control thread of a worker, at each question of the controller whether it is there.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable

__all__ = ["SpareMemory"]

_MUCH_BYTES = 16 << 20
_LITTLE_BYTES = 4 << 20
_PAUSE_S = 3.0
_LONGEST_PAUSE_S = 600.0


class SpareMemory:
    """Decides when the allocator is asked, and asks it.

    Args:
        resident: Says how many bytes of memory the process has; 0 if that is not known.
        trim: Asks the allocator.
        clock: Seconds.
    """

    def __init__(
        self,
        resident: Callable[[], int] | None = None,
        trim: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resident = resident or _resident
        self._trim = trim or _trim
        self._clock = clock
        self._least = 0  # that it ever had
        self._before = 0  # when it was looked at last
        self._needed = 0  # the most it ever had when it was asked in vain
        self._asked_at = -math.inf
        self._pause_s = _PAUSE_S

    def look(self) -> None:
        """Give back what is not needed, if there may be much of it."""
        has, before = self._resident(), self._before
        self._before = has
        self._least = min(self._least or has, has)
        if has - self._least < _MUCH_BYTES or abs(has - before) >= _LITTLE_BYTES:
            return
        if has - self._needed >= _MUCH_BYTES:
            self._pause_s = _PAUSE_S
        if self._clock() - self._asked_at < self._pause_s:
            return
        self._trim()
        self._before = left = self._resident()
        self._asked_at = self._clock()
        if has - left >= _LITTLE_BYTES:
            self._pause_s = _PAUSE_S
        else:
            self._needed = max(self._needed, left)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _resident() -> int:
    if sys.platform != "linux":
        return 0
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no descriptor is left, say
        return 0


def _trim() -> None:
    import ctypes  # takes a megabyte

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
