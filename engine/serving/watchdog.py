"""A thread that looks at a replica from time to time, from within its process.

What there is to see, and what is done about it, is the replica's affair (`Replica` and its subclasses): a look says
when the next one is due. So nothing is looked at before something can have become late, and no call costs more for
being watched. The thread ends with the replica. What it logs is handled by another one: the very handler that it would
wait for may be what hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..seam.log import Log
from ..seam.may_block import awaited_thread

__all__ = ["Watchdog"]

_logger = Log("engine.backend")
_STOOD_STILL_S = 1.0
"""A look that is later than this says that the process, or its machine, was stopped: nothing else ran either."""
_AFTER_FAILURE_S = 1.0


class Watchdog:
    """Looks when it is time.

    Args:
        name: Of the thread.
        look: Called with the time (`time.monotonic`) and with the seconds for which the process stood still since the
            last look, most often 0. Returns in how many seconds to look again; None means not before `wake`.
    """

    def __init__(self, name: str, look: Callable[[float, float], float | None]) -> None:
        self._name = name
        self._look = look
        self._bell = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def wake(self) -> None:
        """Have it look soon, for what there is to see has changed; the first time starts it. From any thread."""
        self._bell.set()
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                _logger.warning("%s cannot start (%s): calls that hang will not be noticed", self._name, error)
                return
            self._thread = thread

    def stop(self) -> None:
        """Look no more. Does not wait for a look that goes on."""
        self._stopped = True
        self._bell.set()

    def _run(self) -> None:
        with awaited_thread():
            self._watch()

    def _watch(self) -> None:
        wait_s: float | None = 0.0
        while not self._stopped:
            due = None if wait_s is None else time.monotonic() + wait_s
            rung = self._bell.wait(wait_s)
            self._bell.clear()
            if self._stopped:
                return
            now = time.monotonic()
            late_s = 0.0 if rung or due is None else now - due
            try:
                wait_s = self._look(now, late_s if late_s > _STOOD_STILL_S else 0.0)
            except Exception:
                _logger.exception("%s failed to look", self._name)
                wait_s = _AFTER_FAILURE_S
