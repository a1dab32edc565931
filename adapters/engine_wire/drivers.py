"""What reads channels: an asyncio loop, or a thread that polls.

`LoopDriver` belongs to one loop and is used on its thread. `Poller` is one daemon thread for all the channels of a
process that threads (not loops) call through; it starts with the first channel that nobody drives and ends with
`Poller.close`. `Undriven` is for channels that a thread of their own drives for ever.
"""

from __future__ import annotations

import abc
import contextlib
import select
import selectors
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.seam.may_block import awaited_thread

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
    """Reads channels on a thread of its own while no other thread drives them.

    What it does for other threads can be done again, should a signal handler raise in its midst.
    """

    drivable = True

    def __init__(self, name: str = "engine-poller") -> None:
        self._name = name
        self._lock = threading.Lock()  # guards everything below
        self._kernel: _Kernel | None = None
        self._spare: _Kernel | None = None  # for the time when it is needed
        self._thread: threading.Thread | None = None
        self._interest: dict[int, tuple[SocketChannel, int]] = {}
        self._closed = False

    def arm(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.arm`."""
        with self._lock:
            if not channel.armed and not channel.closed and not self._closed:
                self._change(channel, add=selectors.EVENT_READ)
                channel.armed = True  # not sooner: whoever finds it armed relies on that

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

    def prepare(self) -> None:
        """Take the descriptors that reading channels will need (idempotent).

        Raises:
            OSError: There are none left.
        """
        if self._kernel is None and self._spare is None:
            with self._lock:
                if self._kernel is None and self._spare is None and not self._closed:
                    self._spare = _kernel()

    def close(self) -> None:
        """End the thread and release the descriptors (idempotent)."""
        with self._lock:
            self._closed = True
            if self._spare is not None:
                self._spare.close()
                self._spare = None
            thread = self._thread
            if self._kernel is not None:
                self._kernel.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock:
            self._thread = None
            self._interest.clear()
            if self._kernel is not None:
                self._kernel.close()
            self._kernel = None

    def _change(self, channel: SocketChannel, *, add: int = 0, remove: int = 0) -> None:
        known, before = self._interest.get(channel.fd, (channel, 0))
        if known is not channel:
            return  # a belated word on a channel that was closed: its descriptor has come back with another one
        after = (before | add) & ~remove
        if after == before:
            return
        kernel = self._kernel or self._start()
        if after:
            self._interest[channel.fd] = (channel, after)
        else:
            del self._interest[channel.fd]
        try:
            kernel.watch(channel.fd, after)
        except BaseException:
            kernel.watch(channel.fd, after)
            raise

    def _start(self) -> _Kernel:
        kernel = self._spare or _kernel()
        self._spare = None
        thread = threading.Thread(target=self._run, args=(kernel,), name=self._name, daemon=True)
        try:
            thread.start()
        except BaseException:  # it may have started all the same
            kernel.abandon()
            raise
        self._thread, self._kernel = thread, kernel
        return kernel

    def _run(self, kernel: _Kernel) -> None:
        with awaited_thread():
            while not (self._closed or kernel.abandoned):
                for descriptor, events in kernel.wait():
                    channel, interest = self._interest.get(descriptor, (None, 0))
                    if channel is not None and not self._closed:
                        self._serve(channel, events & interest)
        if kernel.abandoned:
            kernel.close()

    def _serve(self, channel: SocketChannel, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE and channel.on_writable():
                with self._lock:
                    if not channel.has_unsent:  # a thread may have left some since
                        self._change(channel, remove=selectors.EVENT_WRITE)
            if events & selectors.EVENT_READ:
                channel.on_readable()
        except BaseException:  # of whoever hears this channel: the others go on
            from engine.seam.log import Log

            Log("engine.wire").exception("%r could not be served", channel)
            if events & selectors.EVENT_WRITE:  # for reading, the channel itself knows whether it can go on
                channel.lose("it could not be served")


class _Kernel(abc.ABC):
    """What the kernel watches for a poller. Other threads may change that while one waits, and say everything twice."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self.abandoned = False
        self.watch(self._near.fileno(), selectors.EVENT_READ)

    @abc.abstractmethod
    def watch(self, descriptor: int, events: int) -> None:
        """Watch for these events, or for none."""

    @abc.abstractmethod
    def wait(self) -> list[tuple[int, int]]:
        """Wait until something is ready: descriptors and events."""

    def wake(self) -> None:
        """End all waits, for good."""
        self._far.send(b"x")

    def abandon(self) -> None:
        """Nobody knows whether a thread waits here; if so, it is to close this and end."""
        self.abandoned = True
        self.wake()

    def close(self) -> None:
        """Release the descriptors (idempotent)."""
        self._near.close()
        self._far.close()


class _Epoll(_Kernel):
    """That of Linux, with nothing between us and it: the books of a selector could disagree with it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        super().__init__()

    def watch(self, descriptor: int, events: int) -> None:
        mask = (events & selectors.EVENT_READ and select.EPOLLIN) | (events & selectors.EVENT_WRITE and select.EPOLLOUT)
        try:
            if mask:
                self._epoll.register(descriptor, mask)
            else:
                self._epoll.unregister(descriptor)
        except FileExistsError:
            self._epoll.modify(descriptor, mask)
        except FileNotFoundError:
            pass

    def wait(self) -> list[tuple[int, int]]:
        return [
            (
                descriptor,
                (mask & ~select.EPOLLIN and selectors.EVENT_WRITE) | (mask & ~select.EPOLLOUT and selectors.EVENT_READ),
            )
            for descriptor, mask in self._epoll.poll()
        ]

    def close(self) -> None:
        self._epoll.close()
        super().close()


class _Selector(_Kernel):
    """That of other systems."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        super().__init__()

    def watch(self, descriptor: int, events: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)
        if events:
            self._selector.register(descriptor, events)

    def wait(self) -> list[tuple[int, int]]:
        return [(key.fd, events) for key, events in self._selector.select()]

    def close(self) -> None:
        self._selector.close()
        super().close()


def _kernel() -> _Kernel:
    return _Epoll() if hasattr(select, "epoll") else _Selector()
