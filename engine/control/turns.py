"""Who changes one backend, one after the other, and what gives way to whoever comes.

An exchange of replicas may take long: others start, and those that leave finish what they hold. One that goes on in the
background gives way to whoever wants to change something, and goes on afterwards. One that was asked for gives way to
what makes it pointless. Runs on the controller's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, closing
from typing import Any, TypeVar, cast

__all__ = ["GaveWay", "Turns"]

_Result = TypeVar("_Result")


class GaveWay(Exception):
    """An exchange was broken off, because somebody came to whom it gives way."""


class Turns:
    """Hands out turns, in the order in which they were asked for.

    Attributes:
        interrupted: The exchange that goes on is to end. It is cancelled, too; but what it waits for may swallow that.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._waiting = 0
        self._waiting_instead = 0  # of those, who make pointless what others asked for
        self._exchange: asyncio.Task[Any] | None = None
        self._background = False  # is what that is
        self.interrupted = False

    @asynccontextmanager
    async def turn(self, *, instead: bool = False) -> AsyncIterator[None]:
        """Have one's turn in the block.

        Args:
            instead: What goes on need not be finished, whoever asked for it.
        """
        self._waiting += 1
        self._waiting_instead += instead
        try:
            self._interrupt()
            await self._lock.acquire()
        finally:
            self._waiting -= 1
            self._waiting_instead -= instead
        try:
            yield
        finally:
            self._lock.release()

    @asynccontextmanager
    async def background(self) -> AsyncIterator[None]:
        """As `turn`, for what holds up nobody."""
        async with self._lock:
            yield

    async def exchange(self, work: Coroutine[Any, Any, _Result], *, background: bool = False) -> _Result:
        """Exchange replicas in one's turn.

        Args:
            work: Does it.
            background: Nobody has asked for it.

        Raises:
            GaveWay: Somebody came to whom it gives way. What was done of it until then stays.
            BaseException: What the work raised.
        """
        with closing(work):  # it may never begin
            task = self._exchange = asyncio.get_running_loop().create_task(_outcome(work))
            self._background = background
            self._interrupt()
            try:
                await asyncio.wait({task})
            except BaseException:
                self._break_off(task)
                await asyncio.wait({task})
                raise
            finally:
                interrupted, self.interrupted, self._exchange = self.interrupted, False, None
        if task.cancelled():
            if interrupted:
                raise GaveWay
            raise asyncio.CancelledError
        result, error = task.result()
        if error is not None:
            raise error
        return cast(_Result, result)

    def _interrupt(self) -> None:
        gives_way = self._waiting if self._background else self._waiting_instead
        if self._exchange is not None and gives_way:
            self._break_off(self._exchange)

    def _break_off(self, task: asyncio.Task[Any]) -> None:
        """Once, however many come: the second time would strike it while it ends what it has started."""
        if not self.interrupted:
            self.interrupted = True
            task.cancel()


async def _outcome(work: Coroutine[Any, Any, _Result]) -> tuple[_Result | None, BaseException | None]:
    """What came of it. Raised in a task, a `SystemExit` would end the loop."""
    try:
        return await work, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error
