"""What reads channels: an asyncio loop, or a thread that polls.

`LoopDriver` belongs to one loop and is used on its thread. `Poller` is one daemon thread for all the channels of a
process that threads (not loops) call through; it starts with the first channel that nobody drives and ends with
`Poller.close`. `Undriven` is for channels that a thread of their own drives for ever.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.seam.may_block import awaited_thread

from .channel import SocketChannel
from .kernel import READABLE, WRITABLE, make_kernel

if TYPE_CHECKING:
    import asyncio

__all__ = ["LoopDriver", "Poller", "Undriven"]

_MOST_READY = 64
"""Channels that are served before the kernel is asked again; the others come next."""


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
        self._waiting: _Waiting | None = None
        self._spare: _Waiting | None = None  # for the time when it is needed
        self._thread: threading.Thread | None = None
        self._interest: dict[int, tuple[SocketChannel, int]] = {}
        self._closed = False

    def arm(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.arm`."""
        with self._lock:
            if not channel.armed and not channel.closed and not self._closed:
                self._change(channel, add=READABLE)
                channel.armed = True  # not sooner: whoever finds it armed relies on that

    def disarm(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.disarm`."""
        with self._lock:
            if channel.armed:
                channel.armed = False
                self._change(channel, remove=READABLE)

    def flush(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.flush`."""
        with self._lock:
            if not channel.closed and not self._closed:
                self._change(channel, add=WRITABLE)

    def forget(self, channel: SocketChannel) -> None:
        """See `engine_wire.channel.Driver.forget`."""
        with self._lock:
            channel.armed = False
            self._change(channel, remove=READABLE | WRITABLE)

    def prepare(self) -> None:
        """Take the descriptors that reading channels will need (idempotent).

        Raises:
            OSError: There are none left.
        """
        if self._waiting is None and self._spare is None:
            with self._lock:
                if self._waiting is None and self._spare is None and not self._closed:
                    self._spare = _Waiting()

    def close(self) -> None:
        """End the thread and release the descriptors (idempotent)."""
        with self._lock:
            self._closed = True
            if self._spare is not None:
                self._spare.close()
                self._spare = None
            thread = self._thread
            if self._waiting is not None:
                self._waiting.end()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock:
            self._thread = None
            self._interest.clear()
            if self._waiting is not None:
                self._waiting.close()
            self._waiting = None

    def _change(self, channel: SocketChannel, *, add: int = 0, remove: int = 0) -> None:
        known, before = self._interest.get(channel.fd, (channel, 0))
        if known is not channel:
            return  # a belated word on a channel that was closed: its descriptor has come back with another one
        after = (before | add) & ~remove
        if after == before:
            return
        kernel = (self._waiting or self._start()).kernel
        if after:
            self._interest[channel.fd] = (channel, after)
        else:
            del self._interest[channel.fd]
        try:
            kernel.watch(channel.fd, after)
        except BaseException:
            kernel.watch(channel.fd, after)
            raise

    def _start(self) -> _Waiting:
        waiting = self._spare or _Waiting()
        self._spare = None
        thread = threading.Thread(target=self._run, args=(waiting,), name=self._name, daemon=True)
        try:
            thread.start()
        except BaseException:  # it may have started all the same
            waiting.abandon()
            raise
        self._thread, self._waiting = thread, waiting
        return waiting

    def _run(self, waiting: _Waiting) -> None:
        with awaited_thread():
            while not (self._closed or waiting.abandoned):
                for descriptor, ready in waiting.kernel.wait(None, _MOST_READY):
                    channel, interest = self._interest.get(descriptor, (None, 0))
                    if channel is not None and not self._closed:
                        self._serve(channel, interest, ready)
        if waiting.abandoned:
            waiting.close()

    def _serve(self, channel: SocketChannel, interest: int, ready: int) -> None:
        writes = interest & WRITABLE and ready & ~READABLE
        try:
            if writes and channel.on_writable():
                with self._lock:
                    if not channel.has_unsent:  # a thread may have left some since
                        self._change(channel, remove=WRITABLE)
            if interest & READABLE and ready & ~WRITABLE:
                channel.on_readable()
        except BaseException:  # of whoever hears this channel: the others go on
            from engine.seam.log import Log

            Log("engine.wire").exception("%r could not be served", channel)
            if writes:  # for reading, the channel itself knows whether it can go on
                channel.lose("it could not be served")


class _Waiting:
    """What a poller's thread waits for. Other threads may change that meanwhile, and say everything twice.

    Attributes:
        kernel: Watches the descriptors.
        abandoned: See `abandon`.
    """

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        try:
            self.kernel = make_kernel()
        except BaseException:
            self._near.close()
            self._far.close()
            raise
        self.abandoned = False
        self.kernel.watch(self._near.fileno(), READABLE)

    def end(self) -> None:
        """End all waits, for good."""
        self._far.send(b"x")

    def abandon(self) -> None:
        """Nobody knows whether a thread waits here; if so, it is to close this and end."""
        self.abandoned = True
        self.end()

    def close(self) -> None:
        """Release the descriptors (idempotent)."""
        self.kernel.close()
        self._near.close()
        self._far.close()
