"""Channels inside one process: the caller's end and the worker's end of a pair.

The worker's end delivers through the worker's mailbox; the caller's end through the caller's loop, or straight in the
worker's thread for callers that are threads. Messages are the same immutable tuples that a socket would carry.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any

from engine.seam.channel import Channel, ChannelClosed, ChannelListener
from engine.seam.log import Log
from engine.seam.messages import Call, End, Failure, Message, Reply

__all__ = ["InlineChannel", "Mailbox"]

_TERMINAL = (Reply, Failure, End)


class Mailbox:
    """What comes in for one worker: functions to run on its thread, in order. Any thread may post.

    While the worker's thread runs user code it has stepped out: whoever posts then runs the function itself, holding
    the worker's turn. The main thread has another one do so, for a signal handler of the application may raise there,
    in the middle of anything.
    """

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: contextvars.Context | None = None
        self._turn = threading.RLock()  # held by whoever delivers to the worker
        self._out = False
        self._posts: queue.SimpleQueue[bool] = queue.SimpleQueue()  # of the main thread, while user code runs
        self._courier: threading.Thread | None = None  # delivers those
        self.meanwhile: Callable[[], object] = lambda: None
        """Called after something came in while user code runs, by whoever posted it, with the turn."""

    def step_out(self) -> None:
        """The worker's thread is about to run user code."""
        if self._courier is None:
            self._start_courier()
        self._out = True
        self._turn.release()
        self._deliver_meanwhile()

    def step_in(self) -> None:
        """The worker's thread is back."""
        self._turn.acquire()
        self._out = False

    def take_turn(self) -> None:
        """The worker's thread begins."""
        self._turn.acquire()

    def close(self) -> None:
        """The worker's thread is about to end."""
        self._posts.put(False)

    def _start_courier(self) -> None:
        courier = threading.Thread(target=self._deliver_posts, name="engine-inline-courier", daemon=True)
        try:
            courier.start()
        except RuntimeError:  # there are no threads left: then the main thread delivers itself
            return
        self._courier = courier

    def _deliver_posts(self) -> None:
        while self._posts.get():
            try:
                self._deliver_meanwhile()
            except Exception:
                Log("engine.inline").exception("a message could not be delivered")

    def _deliver_meanwhile(self) -> None:
        while self._out and not self._items.empty() and self._turn.acquire(False):
            try:
                if self._out:
                    self.run_pending(0)
                    self.meanwhile()
            finally:
                self._turn.release()

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver on this loop from now on, starting with what came before. Called on the loop's thread."""
        self._loop = loop
        # Whoever posts has a context of its own, which is not the worker's.
        self._context = contextvars.copy_context()
        while not self._items.empty():
            item = self._items.get()
            if item is not None:
                loop.call_soon(item)

    def post(self, item: Callable[[], object] | None) -> None:
        """Run a function on the worker's thread; None only wakes it."""
        loop = self._loop
        if loop is None:
            self._items.put(item)
            if self._courier is None or threading.current_thread() is not threading.main_thread():
                self._deliver_meanwhile()
            elif self._out:
                self._posts.put(True)
        elif item is not None:
            try:
                loop.call_soon_threadsafe(item, context=self._context)
            except RuntimeError:
                pass  # the worker has ended

    def run_pending(self, timeout_s: float | None) -> None:
        """Run what is there, waiting at most this long for the first of it."""
        try:
            item = self._items.get(timeout_s is None or timeout_s > 0, timeout_s)
        except queue.Empty:
            return
        while True:
            if item is not None:
                item()
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                return


class InlineChannel:
    """One end of a pair. ``deliver`` runs a function where this end's listener wants to be called."""

    opened = True

    def __init__(self, listener: ChannelListener, deliver: Callable[[Callable[[], object]], None]) -> None:
        self.peer: InlineChannel
        self.closed = False
        self._listener = listener
        self._deliver = deliver
        self._unanswered: dict[int, None] = {}  # numbers of calls
        self._begun: set[int] = set()  # numbers of those that have begun at the peer

    def send(self, message: Message) -> None:
        """See `engine.seam.channel.Channel.send`."""
        peer = self.peer
        if self.closed or peer.closed:
            raise ChannelClosed("the peer is gone")
        delivery = _Delivery(peer, message)
        if type(message) is Call:
            self._unanswered[message.id] = None
        try:
            peer._deliver(delivery)
        except BaseException:  # raised by a signal handler: nobody knows whether it was on its way
            peer._deliver(delivery)
            raise
        if isinstance(message, _TERMINAL):
            # If a signal handler raises as the first one begins, its loop has done with that, and a caller waits on.
            peer._deliver(delivery)

    def _take(self, message: Message) -> None:
        if not self.closed:
            self._listener.received(self, message)
            if isinstance(message, _TERMINAL):
                self._unanswered.pop(message.id, None)
                self._begun.discard(message.id)

    def awaits(self, call_id: int) -> bool:
        """See `engine.seam.channel.Channel.awaits`."""
        return call_id in self._unanswered and not self.closed

    def begin(self, call_id: int) -> bool:
        """See `engine.seam.channel.Channel.begin`."""
        # In this order: whoever cuts the channel first closes it and then looks, so one of the two sees the other.
        peer = self.peer
        peer._begun.add(call_id)
        return not (self.closed or peer.closed)

    def may_have_begun(self, call_id: int) -> bool:
        """See `engine.seam.channel.Channel.may_have_begun`."""
        return call_id in self._begun

    def watch(self) -> None:
        """See `engine.seam.channel.Channel.watch`; nothing to do."""

    def drive(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        """See `engine.seam.channel.Channel.drive`; messages deliver themselves."""
        return False

    def close(self) -> None:
        """See `engine.seam.channel.Channel.close`."""
        if not self.closed:
            self.closed = True
            peer = self.peer
            peer._deliver(lambda: peer.lose("the peer closed the channel"))

    def cut(self, reason: str) -> None:
        """Close both ends, and tell both listeners."""
        if not self.closed:
            self.closed = True
            self._deliver(lambda: self._listener.lost(self, reason))
            peer = self.peer
            peer._deliver(lambda: peer.lose(reason))

    def lose(self, reason: str) -> None:
        """Close this end because the other one is gone."""
        if not self.closed:
            self.closed = True
            self._listener.lost(self, reason)


class _Delivery:
    """A message on its way, which is taken once however often it arrives."""

    __slots__ = ("_channel", "_message", "_taken")

    def __init__(self, channel: InlineChannel, message: Message) -> None:
        self._channel = channel
        self._message = message
        self._taken = False

    def __call__(self) -> None:
        if not self._taken:
            self._taken = True
            try:
                self._channel._take(self._message)
            except BaseException:
                self._take_again()
                raise

    def _take_again(self) -> None:
        """Nobody knows whether its listener has it. An answer can be taken twice; of all else nothing is certain."""
        try:
            if isinstance(self._message, _TERMINAL):
                self._channel._take(self._message)
                return
        except BaseException:  # it was the listener's own
            pass
        self._channel.cut("taking a message from it was interrupted")


def connect(
    caller: ChannelListener, deliver: Callable[[Callable[[], object]], None], service: ChannelListener, mailbox: Any
) -> tuple[Channel, InlineChannel]:
    """Make a pair: the caller's end and the worker's end."""
    near = InlineChannel(caller, deliver)
    far = InlineChannel(service, mailbox.post)
    near.peer, far.peer = far, near
    return near, far
