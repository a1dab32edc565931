"""What is watched of a replica: whether what runs gets on, and what the backend's own ``check_health`` says.

A thread looks when it is time (`engine.serving.watchdog`). What hangs, and how those are told whose calls it
holds, is for the two kinds of replica to say: `blocking_replica` and `loop_replica`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from ..config import BackendConfig
from ..seam.control_messages import Unhealthy
from ..seam.error_text import summary_of
from ..seam.log import Log
from ..seam.scribe import scribe
from .health import Health
from .watchdog import Watchdog

__all__ = ["Watched"]

_logger = Log("engine.backend")
_CHECK_MARGIN_S = 1.0
"""A loop that turns gives a check of health up itself. If it has not by then, it does not turn."""
_LAST_LINE_S = 1.0
"""How long it takes at most to log where a replica hangs, before it says so to be ended."""


class Watched:
    """That side of a replica.

    Args:
        tag: The backend's tag.
        replica_tag: Which of the backend's replicas it is, for the log.
        tell: Sends a control message to the controller.
        has_health_check: Whether the backend has a ``check_health``.
    """

    __slots__ = (
        "_config",
        "_drain_until",
        "_has_health_check",
        "_health",
        "_replica_tag",
        "_tag",
        "_tell",
        "_thread",
        "_watchdog",
    )

    on_loop: bool

    def __init__(self, tag: str, replica_tag: str, tell: Callable[[Any], None], *, has_health_check: bool) -> None:
        self._tag = tag
        self._replica_tag = replica_tag
        self._tell = tell
        self._has_health_check = has_health_check
        self._health = Health()
        self._watchdog = Watchdog(f"engine-watchdog-{replica_tag or tag}", self._look)
        self._thread: int | None = None  # the one that runs user code, from `_attached` on
        self._config: BackendConfig  # what is taken, by whoever is derived from this
        self._drain_until: float | None = None

    def _attached(self) -> None:
        """User code is run by this thread from now on."""
        self._thread = threading.get_ident()
        self._watch()

    def _watch(self) -> None:
        """Have somebody look after this replica, if there is something to look for."""
        if self._thread is not None and self._is_watched():
            self._watchdog.wake()

    def _is_watched(self) -> bool:
        return self._has_health_check or self._gets_on_or_not()

    def _gets_on_or_not(self) -> bool:
        """Whether there is a time after which calls, or the loop, are taken to hang."""
        raise NotImplementedError

    def _look(self, now: float, late_s: float) -> float | None:
        """See `engine.serving.watchdog.Watchdog`; on its thread."""
        again_s = self._look_at_work(now, late_s)
        if not self._has_health_check or self._drain_until is not None:
            return again_s
        look = self._health.look(now, late_s, self._config, margin_s=_CHECK_MARGIN_S if self.on_loop else 0.0)
        if look.check:
            self._ask_for_check()
        elif look.late:
            self._check_hangs()
        return min((wait for wait in (again_s, look.again_s) if wait is not None), default=None)

    def _look_at_work(self, now: float, late_s: float) -> float | None:
        """Act if what runs hangs; return in how many seconds it may."""
        raise NotImplementedError

    # -- the backend's own word on its health ----------------------------------------------------------------------

    def _ask_for_check(self) -> None:
        """Have ``check_health`` called where user code runs (the watchdog's thread)."""
        raise NotImplementedError

    def _check_hangs(self) -> None:
        """It does not return, and so nothing else runs (the watchdog's thread)."""
        raise NotImplementedError

    def _checked(self, error: BaseException | None) -> None:
        """It returned, or raised this."""
        failures = self._health.ended(well=error is None)
        if error is not None and self._drain_until is None:
            threshold = self._config.health_check_threshold
            count = f"({failures} in a row; health_check_threshold={threshold})"
            with contextlib.suppress(BaseException):  # of the error itself, asked for its text
                _logger.warning(
                    "check_health() of %s failed %s: %s",
                    self._who(),
                    count,
                    summary_of(error),
                    exc_info=error if failures == 1 else None,
                )
            if failures >= threshold:
                self._ask_to_be_replaced(f"is unhealthy: {summary_of(error)}", hung=False)
        self._watchdog.wake()  # which then knows when the next one is due

    # -- saying so -------------------------------------------------------------------------------------------------

    def _ask_to_be_replaced(self, reason: str, *, hung: bool) -> None:
        if hung:  # the process is killed, and what the watchdog logs is handled by another thread
            scribe().flush(_LAST_LINE_S)
        self._tell(Unhealthy(reason, hung))

    def _log_where(self, what: str, stack: str) -> None:
        _logger.warning("%s: %s. It is here:\n%s", self._who(), what, stack.rstrip())

    def _who(self) -> str:
        return f"{f'replica {self._replica_tag!r}' if self._replica_tag else 'a replica'} of backend {self._tag!r}"
