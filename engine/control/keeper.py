"""When the controller's state is written: at each change, and again until the store takes it.

Runs on the controller's loop, and blocks it for as long as the store takes: a round trip on the network.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress

from ..seam.log import Log
from .backoff import backoff_s
from .checkpoint import Checkpoint, Picture

__all__ = ["Keeper"]

_logger = Log("engine.controller")


class Keeper:
    """Writes the picture of now.

    Args:
        checkpoint: Where to.
        picture: Gives it.
    """

    def __init__(self, checkpoint: Checkpoint, picture: Callable[[], Picture]) -> None:
        self._checkpoint = checkpoint
        self._picture = picture
        self._trying: asyncio.Task[None] | None = None  # while what is kept is not the picture of now, as far as known
        self._closed = False

    def keep(self) -> None:
        """Write the picture of now; nothing once closed.

        If the store does not take it, or cannot say whether it did, then the picture of each later moment is tried in
        the background until one was kept: so the store also follows whoever takes a change back.

        Raises:
            BaseException: Why it was not kept.
        """
        if self._closed:
            return
        try:
            self._checkpoint.keep(self._picture())
        except BaseException as error:
            self._fall_behind(error)
            raise
        self._catch_up()

    def keep_or_log(self) -> None:
        """As `keep`, where nobody waits who could be told that the store is away: it is logged.

        Does nothing while the picture of each moment is tried anyway: a store that is slow to fail blocks the loop.
        """
        if self._trying is None:
            with suppress(Exception):
                self.keep()

    def close(self) -> None:
        """Write nothing more: what is about to end is the adapter's to clear."""
        self._closed = True
        if self._trying is not None:
            self._trying.cancel()

    def _fall_behind(self, error: BaseException) -> None:
        if self._trying is None:
            _logger.error(
                "the engine's state could not be kept: %r. It is tried again until it can; should the controller die "
                "before that, the next one may find an older state",
                error,
            )
            self._trying = asyncio.get_running_loop().create_task(self._try_again())

    def _catch_up(self) -> None:
        if self._trying is not None:
            _logger.warning("the engine's state is kept again")
            self._trying.cancel()  # it may be this very task, which is about to end then
            self._trying = None

    async def _try_again(self) -> None:
        for failures in itertools.count(1):
            await asyncio.sleep(backoff_s(failures))
            with suppress(Exception):
                return self.keep()
