"""The ways in which an answer is waited for, and what is made of it when it has come.

==============  =======================================  ==============================================
who waits       place                                    delivered by
==============  =======================================  ==============================================
a thread        `ThreadSlot`: it drives the channel      itself, or whoever drives the channel
a task          `TaskSlot`, `answer_to`                  its own loop
a stream        `StreamSlot`: one message after another  its own loop
anybody, later  `engine.calling.ref.Ref`, `settled`      whoever learns of it
nobody          `CopySlot`                               whoever reads the channel
==============  =======================================  ==============================================
"""

from __future__ import annotations

import collections
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BackendError, EngineError
from ..seam.error_text import summary_of
from ..seam.may_block import running_asyncio_loop
from ..seam.messages import Call, End, Failure, Item, Reply
from ..seam.serialization import loads, loads_leniently, unpack_exception, was_struck
from .budget import deadline_error
from .slot import Slot, Submitter

if TYPE_CHECKING:
    import asyncio

__all__ = ["CopySlot", "StreamSlot", "TaskSlot", "ThreadSlot", "answer_to", "open_answer", "settled"]


def open_answer(message: Reply | Failure | Item | End) -> Any:
    """Turn the answer to a Python call into its result.

    Raises:
        BaseException: What user code raised, or an `EngineError`.
    """
    if type(message) is Reply:
        try:
            return loads(message.payload)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, say, of what it is made of
            if was_struck(lambda: loads(message.payload)):
                raise
            return _open_leniently(message.payload, error)
    if isinstance(message, Failure):
        raise unpack_exception(message.payload)
    raise BackendError("the backend answered with a stream; call it over HTTP, or return the whole result")


def _open_leniently(payload: bytes, failure: BaseException) -> Any:
    try:
        return loads_leniently(payload)
    except KeyboardInterrupt:
        raise
    except BaseException:
        raise BackendError(
            f"the result cannot be rebuilt in this process ({summary_of(failure)}); its type must be importable here"
        ) from failure


# -- threads -----------------------------------------------------------------------------------------------------------


class ThreadSlot(Slot):
    """The waiting place of a thread that does nothing else meanwhile."""

    __slots__ = ("answer", "arrived", "error")

    drives = True

    def __init__(self, endpoint: str, call: Call, shard_key: str | None) -> None:
        Slot.__init__(self, endpoint, call, shard_key)  # which takes half as long as by `super`
        self.answer: Any = None
        self.error: BaseException | None = None
        self.arrived = threading.Lock()
        self.arrived.acquire()

    def deliver(self, message: Reply | Failure | Item | End) -> None:
        """See `Slot.deliver`."""
        if self.arrived.locked():  # else it is told a second time
            self.answer = message
            try:
                self.arrived.release()
            except RuntimeError:
                pass  # somebody has told it just now

    def fail(self, error: EngineError) -> None:
        """See `Slot.fail`."""
        if self.arrived.locked():
            self.error = error
            try:
                self.arrived.release()
            except RuntimeError:
                pass  # somebody has told it just now

    def wait(self, caller: Submitter, timeout_s: float | None, deadline: float | None) -> None:
        """Drive the call's channel, or wait for whoever drives it, until the answer is there.

        Whoever calls this gives the call up if that raises.

        Args:
            caller: Has the call.
            timeout_s: How long the call may take, for those who are told that it took longer.
            deadline: When that is over, or None.

        Raises:
            errors.DeadlineExceeded: It was not there in time.
        """
        channel = self.channel
        if channel is not None and self.arrived.locked():
            remaining_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            driven = channel.drive(lambda: not self.arrived.locked() or self.channel is not channel, remaining_s)
            if not driven or self.arrived.locked():  # it was refused: the replica says when it has a place
                channel.watch()
        remaining = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self.arrived.acquire(timeout=remaining):
            caller.cancel(self)
            if self.arrived.locked():
                assert timeout_s is not None
                raise deadline_error(self.endpoint, timeout_s)

    def open(self) -> Any:
        """The call's result, once it is there."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # it knows this frame, and the call: they would keep each other in memory
        return open_answer(self.answer)


# -- tasks -------------------------------------------------------------------------------------------------------------


class TaskSlot(Slot):
    """The waiting place of a task; everything happens on its loop."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[Any], endpoint: str, call: Call, shard_key: str | None) -> None:
        Slot.__init__(self, endpoint, call, shard_key)
        self.future = future

    def deliver(self, message: Reply | Failure | Item | End) -> None:
        """See `Slot.deliver`."""
        if not self.future.done():
            self.future.set_result(message)

    def fail(self, error: EngineError) -> None:
        """See `Slot.fail`."""
        if not self.future.done() and not self.future.get_loop().is_closed():
            self.future.set_exception(error)

    def expire(self, timeout_s: float) -> None:
        """Fail because the answer takes too long."""
        self.fail(deadline_error(self.endpoint, timeout_s))


async def answer_to(
    caller: Submitter,
    endpoint: str,
    call: Call,
    timeout_s: float | None,
    *,
    shard_key: str | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
) -> Any:
    """Make a call on the running asyncio loop and await its answer, unopened. Cancelling the await gives the call up.

    Args:
        caller: Of this loop.
        endpoint: Its name.
        call: The call, with its deadline.
        timeout_s: How long it may take, for those who are told that it took longer; None without a deadline.
        shard_key: Calls with equal keys go to the same backend.
        loop: The running one, if it is known already.

    Raises:
        errors.EngineError: No answer will come.
    """
    if loop is None:
        import asyncio

        loop = asyncio.get_running_loop()
    slot = TaskSlot(loop.create_future(), endpoint, call, shard_key)
    deadline = call.deadline
    timer = None
    try:
        caller.submit(slot)
        if deadline is not None and timeout_s is not None:
            timer = loop.call_later(max(0.0, deadline - time.monotonic()), slot.expire, timeout_s)
        return await slot.future
    except BaseException:
        caller.cancel(slot)
        raise
    finally:
        if timer is not None:
            timer.cancel()
        del slot  # what its future raises knows this frame: they would keep each other in memory


class StreamSlot(Slot):
    """The waiting place of a task that takes one message after the other, on its loop."""

    __slots__ = ("_arrived", "_waiter", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: str, call: Call, shard_key: str | None) -> None:
        super().__init__(endpoint, call, shard_key)
        self.loop = loop
        self._arrived: collections.deque[Any] | None = None
        self._waiter: asyncio.Future[Any] | None = None

    def deliver(self, message: Any) -> None:
        """Take a message, an error, or what else the waiting task is to hear."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            self._waiter = None
            waiter.set_result(message)
        elif self._arrived is None:
            self._arrived = collections.deque((message,))
        else:
            self._arrived.append(message)

    def fail(self, error: EngineError) -> None:
        """See `Slot.fail`: the error comes as a message."""
        if not self.loop.is_closed():
            self.deliver(error)

    async def next(self) -> Any:
        """Wait for the next message."""
        if self._arrived:
            return self._arrived.popleft()
        self._waiter = self.loop.create_future()
        return await self._waiter


# -- whoever comes later -----------------------------------------------------------------------------------------------


class Settling(Protocol):
    """What can be waited for: a ref."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call back, in any thread, once it is done."""

    def drop_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Forget a callback (idempotent)."""


async def settled(ref: Settling) -> None:
    """Return once a ref is done, on asyncio (any loop) or trio. Cancelling the wait leaves the call alone."""
    loop = running_asyncio_loop()
    if loop is None:
        await _settled_on_trio(ref)
        return
    future: asyncio.Future[None] = loop.create_future()

    def finish() -> None:
        if not future.done():
            future.set_result(None)

    def wake(_: Any) -> None:
        if running_asyncio_loop() is loop:
            finish()
            return
        try:
            loop.call_soon_threadsafe(finish)
        except RuntimeError:
            pass  # the loop was closed: nobody waits any more

    ref.add_done_callback(wake)
    try:
        await future
    except BaseException:
        ref.drop_done_callback(wake)
        raise


async def _settled_on_trio(ref: Settling) -> None:
    trio: Any = sys.modules.get("trio")
    if trio is None:
        raise RuntimeError("a ref can be awaited on asyncio and on trio")
    token = trio.lowlevel.current_trio_token()
    event = trio.Event()

    def wake(_: Any) -> None:
        try:
            token.run_sync_soon(event.set)
        except trio.RunFinishedError:
            pass  # nobody waits any more

    ref.add_done_callback(wake)
    try:
        await event.wait()
    except BaseException:
        ref.drop_done_callback(wake)
        raise


# -- nobody ------------------------------------------------------------------------------------------------------------


class CopySlot(Slot):
    """The place of a copied call, whose answer is dropped."""

    __slots__ = ()

    def deliver(self, message: Reply | Failure | Item | End) -> None:
        """Nobody waits for it."""

    def fail(self, error: EngineError) -> None:
        """Nobody waits for it."""
