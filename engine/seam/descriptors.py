"""What is done when the system has no file descriptors left, or no memory for sockets.

Whoever accepts connections rests for `REST_S` then: the listening socket stays readable, so that trying again at once
would take the whole processor. Whoever needs a descriptor for a caller says so by `shortage`. Everybody notices it by
`is_shortage`, and tells the log through a `ShortageLog`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from typing import TypeGuard

from ..errors import ResourcesUnavailable
from .log import Log

__all__ = ["REST_S", "ShortageLog", "is_shortage", "shortage", "telling_shortages"]

REST_S = 0.1
"""Seconds until accepting is tried again. Who connects meanwhile waits in the kernel."""
_SAY_AGAIN_AFTER_S = 60.0
_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


def is_shortage(error: BaseException) -> TypeGuard[OSError]:
    """Whether this is an `OSError` for lack of file descriptors, or of memory for sockets."""
    return isinstance(error, OSError) and error.errno in _SHORTAGES


def shortage(error: OSError, what: str = "") -> ResourcesUnavailable:
    """What a caller is told that cannot be served for lack of descriptors; to be raised ``from error``.

    Args:
        error: Of which `is_shortage` is true.
        what: What could not be done.
    """
    return ResourcesUnavailable(f"{what}{': ' if what else ''}{_what_is_short(error)}; close some, or raise the limit")


@contextlib.contextmanager
def telling_shortages() -> Iterator[None]:
    """Raise `shortage` in the place of an `OSError` that is one."""
    try:
        yield
    except OSError as error:
        if is_shortage(error):
            raise shortage(error) from error
        raise


class ShortageLog:
    """Says in a log that descriptors ran out: once, and not again for a minute.

    Args:
        log: Where.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._silent_until = 0.0

    def say(self, error: OSError, consequence: str) -> None:
        """Say it, and what it means for others."""
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + _SAY_AGAIN_AFTER_S
            self._log.warning("%s: %s", _what_is_short(error), consequence)


def _what_is_short(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        # not by the module resource: to import it takes a descriptor
        return f"no file descriptors left (RLIMIT_NOFILE={os.sysconf('SC_OPEN_MAX')})"
    if error.errno == errno.ENFILE:
        return "no file descriptors left on this machine"
    return f"no memory left for sockets ({error.strerror})"
