"""What reads channels: an asyncio loop, or a thread that polls.

`LoopDriver` belongs to one loop and is used on its thread. `Poller` is one daemon thread for all the channels of a
process that threads (not loops) call through; it starts with the first channel that nobody drives and ends with
`Poller.close`. `Undriven` is for channels that a thread of their own drives for ever.
"""

from __future__ import annotations

import select
import selectors
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from .channel import SocketChannel

if TYPE_CHECKING:
    import asyncio

__all__ = ["LoopDriver", "Poller", "Undriven"]


class LoopDriver:
    """Reads channels on an asyncio (or uvloop) event loop."""

    drivable = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is_uvloop = type(loop).__module__.startswith("uvloop")

    def arm(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.arm`."""
        if not channel.armed:
            channel.armed = True
            self._loop.add_reader(channel.fd, _to_the_end(channel) if self._is_uvloop else channel.on_readable)

    def disarm(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.disarm`."""
        if channel.armed:
            channel.armed = False
            if not self._loop.is_closed():
                self._loop.remove_reader(channel.fd)

    def flush(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.flush`; callable from any thread."""
        self._loop.call_soon_threadsafe(self._start_writing, channel)

    def forget(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.forget`."""
        self.disarm(channel)
        if not self._loop.is_closed():
            self._loop.remove_writer(channel.fd)

    def _start_writing(self, channel: SocketChannel) -> None:
        if not channel.closed and not channel.on_writable():
            self._loop.add_writer(channel.fd, self._write_on, channel)

    def _write_on(self, channel: SocketChannel) -> None:
        if channel.on_writable():
            self._loop.remove_writer(channel.fd)


def _to_the_end(channel: SocketChannel) -> Callable[[], None]:
    """What reads a channel on uvloop, which calls a reader only once more when the socket has an error.

    The peer's last words come before the error, so one read would take them and nobody ever learn of the peer's death.
    """
    broken = select.poll()
    broken.register(channel.fd, 0)  # errors and hang-ups are reported in any case

    def read() -> None:
        channel.on_readable()
        while not channel.closed and broken.poll(0):
            channel.on_readable()

    return read


class Undriven:
    """For a channel that one thread drives all its life; whoever sends waits for the peer to take it."""

    drivable = True

    def arm(self, channel: SocketChannel) -> None:
        """Nothing to do."""

    def disarm(self, channel: SocketChannel) -> None:
        """Nothing to do."""

    def flush(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.flush`."""
        channel.flush_blocking()

    def forget(self, channel: SocketChannel) -> None:
        """Nothing to do."""


class Poller:
    """Reads channels on a thread of its own while no other thread drives them."""

    drivable = True

    def __init__(self, name: str = "engine-poller") -> None:
        self._name = name
        self._lock = threading.Lock()  # guards everything below
        self._selector: selectors.BaseSelector | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._interest: dict[int, tuple[SocketChannel, int]] = {}
        self._closed = False

    def arm(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.arm`."""
        with self._lock:
            if not channel.armed and not channel.closed and not self._closed:
                channel.armed = True
                self._change(channel, add=selectors.EVENT_READ)

    def disarm(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.disarm`."""
        with self._lock:
            if channel.armed:
                channel.armed = False
                self._change(channel, remove=selectors.EVENT_READ)

    def flush(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.flush`."""
        with self._lock:
            if not channel.closed and not self._closed:
                self._change(channel, add=selectors.EVENT_WRITE)

    def forget(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.forget`."""
        with self._lock:
            channel.armed = False
            self._change(channel, remove=selectors.EVENT_READ | selectors.EVENT_WRITE)

    def close(self) -> None:
        """End the thread and release the descriptors (idempotent)."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
            if self._wake is not None:
                self._wake[1].send(b"x")
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock:
            self._interest.clear()
            if self._selector is not None and self._wake is not None:
                self._selector.close()
                for end in self._wake:
                    end.close()
            self._selector = self._wake = None

    def _change(self, channel: SocketChannel, *, add: int = 0, remove: int = 0) -> None:
        known, before = self._interest.get(channel.fd, (channel, 0))
        if known is not channel:
            return  # a belated word on a channel that was closed: its descriptor has come back with another one
        after = (before | add) & ~remove
        if after == before:
            return
        selector = self._selector or self._start()
        if before and after:
            selector.modify(channel.fd, after, channel)
        elif after:
            selector.register(channel.fd, after, channel)
        else:
            selector.unregister(channel.fd)
        if after:
            self._interest[channel.fd] = (channel, after)
        else:
            del self._interest[channel.fd]

    def _start(self) -> selectors.BaseSelector:
        # epoll and kqueue take changes from other threads while one waits in select.
        self._selector = selectors.DefaultSelector()
        self._wake = socket.socketpair()
        self._selector.register(self._wake[0], selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, args=(self._selector,), name=self._name, daemon=True)
        self._thread.start()
        return self._selector

    def _run(self, selector: selectors.BaseSelector) -> None:
        while not self._closed:
            for key, events in selector.select():
                channel: SocketChannel | None = key.data
                if channel is None:
                    break
                if events & selectors.EVENT_WRITE and channel.on_writable():
                    with self._lock:
                        if not channel.has_unsent:  # a thread may have left some since
                            self._change(channel, remove=selectors.EVENT_WRITE)
                if events & selectors.EVENT_READ:
                    channel.on_readable()
