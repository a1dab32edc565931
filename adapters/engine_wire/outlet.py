"""Output of a worker on its way to the engine: what the engine does not read in time is dropped, and counted.

User code prints and logs wherever it likes, also on the event loop of an async backend, and the engine's process may
be stopped, or busy for long with something that does not let go of Python's lock. Nobody who prints waits for it longer
than a moment now and then.
"""

from __future__ import annotations

import select
import time

__all__ = ["Outlet"]

_PATIENCE_S = 0.2
"""For a reader that is merely slow: longer than any turn of a controller that is well."""
_REGAINED = 0.05
"""What part of the time since goes to the next wait: a worker that prints without end runs at 95 % of its speed."""


class Outlet:
    """Whether a pipe or a socket takes what is written next. To be used by one thread at a time."""

    def __init__(self) -> None:
        self._left_s = _PATIENCE_S
        self._looked_at = 0.0

    def takes(self, descriptor: int) -> bool:
        """Whether it takes as much as a pipe takes whole (`select.PIPE_BUF`); of a socket far more than that."""
        if _is_writable(descriptor, 0.0):
            return True
        now = time.monotonic()
        patience_s = min(_PATIENCE_S, self._left_s + (now - self._looked_at) * _REGAINED)
        taken = patience_s > 0.001 and _is_writable(descriptor, patience_s)
        self._looked_at = time.monotonic()
        self._left_s = max(0.0, patience_s - (self._looked_at - now))
        return taken


def _is_writable(descriptor: int, timeout_s: float) -> bool:
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & select.POLLOUT for _, events in poll.poll(timeout_s * 1000))
