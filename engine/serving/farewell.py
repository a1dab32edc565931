"""The end of a user's object: its ``close()`` hook, then the object itself. Runs on the replica's thread.

Nothing here raises: a replica that leaves goes on leaving, whatever user code does. What outlasts the time the replica
has is cut off: a coroutine here, everything else by the controller, which kills a worker that stays.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any

from ..seam.error_text import type_name_of
from ..seam.log import Log
from .user_callable import UserCallable

__all__ = ["begin_close", "finish_close"]

_logger = Log("engine.backend")


def begin_close(user: UserCallable) -> Awaitable[Any] | None:
    """Call ``close()``, if there is one; returns what is to be awaited."""
    try:
        outcome = user.close()
    except BaseException as error:
        _log(user, error)
        return None
    return outcome if hasattr(outcome, "__await__") else None


async def finish_close(user: UserCallable, closing: Awaitable[Any], within_s: float) -> None:
    """Await what ``close()`` returned, for so many seconds at most."""
    task = asyncio.ensure_future(_guarded(user, closing))
    if not (await asyncio.wait([task], timeout=within_s))[0]:
        _logger.warning("close() of backend %r is not done within its graceful_shutdown_timeout_s", user.tag)
        task.cancel()
        await asyncio.wait([task], timeout=0.1)  # for its `finally`; whoever ignores that is cut off by a kill


async def _guarded(user: UserCallable, closing: Awaitable[Any]) -> None:
    try:
        await closing
    except asyncio.CancelledError:
        pass  # by the above, which says so
    except BaseException as error:  # SystemExit would end the loop
        _log(user, error)


def _log(user: UserCallable, error: BaseException) -> None:
    logged = False
    with contextlib.suppress(BaseException):  # of the error itself, asked for its text in the main thread
        logged = _logger.error("close() of backend %r failed", user.tag, exc_info=error)
    if not logged:
        with contextlib.suppress(BaseException):
            _logger.error("close() of backend %r failed with %s", user.tag, type_name_of(error))
