"""One channel over a connected socket.

The socket stays in blocking mode, whoever uses it; all I/O here passes ``MSG_DONTWAIT``.

Who reads: exactly one party at a time, the holder of the reader role (`_reading`). It is either the driver (a loop, or
a polling thread) or a thread inside `SocketChannel.drive`, which waits for its own answer and delivers everybody else's
on the way. Who writes: any thread, under `_write_lock`; what the kernel does not take at once is kept and written by
the driver, or by the driving thread.

A channel may begin with an opening (`engine_wire.opening.Opening`), which whoever reads or writes moves on, under
`_write_lock`. Until it is done messages are kept, and nothing that the peer sends is taken for one.

When the peer dies, the reader delivers what was complete and then calls ``listener.lost`` once.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from engine.seam.channel import ChannelClosed, ChannelListener
from engine.seam.messages import Call, End, Failure, Message, Reply

from .protocol import GREETING, Decoder, ProtocolError, encode

if TYPE_CHECKING:
    from .opening import Opening

__all__ = ["Driver", "SocketChannel"]

_READ_SIZE = 1 << 16
_NOWAIT = socket.MSG_DONTWAIT
_LONGEST_POLL_S = 86400.0  # poll takes no more than 2**31 ms; whoever waits longer looks again
_TERMINAL = frozenset((Reply, Failure, End))


class Driver(Protocol):
    """What reads a channel when no thread drives it."""

    drivable: bool
    """Whether threads may take the reader role for themselves."""

    def arm(self, channel: SocketChannel) -> None:
        """Call `SocketChannel.on_readable` whenever there is something to read (idempotent)."""

    def disarm(self, channel: SocketChannel) -> None:
        """Stop doing so (idempotent)."""

    def flush(self, channel: SocketChannel) -> None:
        """Call `SocketChannel.on_writable` once the socket takes more bytes."""

    def forget(self, channel: SocketChannel) -> None:
        """The channel's socket is about to be closed."""


class SocketChannel:
    """A `engine.seam.channel.Channel` over a socket.

    Args:
        sock: Connected; owned by the channel from now on.
        listener: Who hears it; may be set later, but before the channel is watched or driven.
        driver: What reads it.
        greet: Exchange greetings first. Off where the socket itself is proof of the peer, as in a socketpair, and
            where a handshake is.
        opening: What must be done first on a socket that is not connected or whose peer is to prove who it is. It
            says what to send before the first message, be it the greeting.
    """

    def __init__(
        self,
        sock: socket.socket,
        listener: ChannelListener | None,
        driver: Driver,
        *,
        greet: bool = True,
        opening: Opening | None = None,
    ) -> None:
        sock.setblocking(True)
        self.sock = sock
        self.fd = sock.fileno()
        self.listener = listener
        self._driver = driver
        self._decoder = Decoder(greeting=greet)
        self._reading = threading.Lock()  # the reader role
        self._write_lock = threading.Lock()  # guards changes of _opening, _unsent and _closed, and the order of frames
        self._opening = opening
        self._unsent: deque[memoryview] = deque()
        if opening is not None:
            self._unsent.append(memoryview(b""))  # the place of what goes first; and so `send` keeps what follows
        self._closed = False
        self._told = False
        self.armed = False  # whether the driver reads; only the driver's arm and disarm touch it
        self._poll_input: select.poll | None = None
        # Somebody must read while there are calls without an answer. Two counts, since each has one writer at a time:
        self._calls_sent = 0  # whoever holds the write lock
        self._calls_answered = 0  # whoever holds the reader role
        if greet and opening is None:
            try:
                sock.send(GREETING, _NOWAIT)
            except OSError:
                pass  # the peer is gone already, as whoever reads will find

    def __repr__(self) -> str:
        state = "closed" if self._closed else "driven" if self._reading.locked() else "armed" if self.armed else "idle"
        if self._opening is not None and not self._closed:
            state += " opening"
        open_calls = self._calls_sent - self._calls_answered
        return f"<SocketChannel fd={self.fd} {state} open_calls={open_calls} unsent={len(self._unsent)}>"

    @property
    def closed(self) -> bool:
        """Whether it takes no more messages."""
        return self._closed

    @property
    def opened(self) -> bool:
        """See `engine.seam.channel.Channel.opened`."""
        return self._opening is None

    @property
    def has_unsent(self) -> bool:
        """Whether it keeps bytes that the kernel has not taken yet, and that it waits for nothing else to write."""
        opening = self._opening
        return bool(self._unsent) and (opening is None or opening.wants_write)

    # -- writing ---------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """See `engine.seam.channel.Channel.send`."""
        data = encode(message)
        with self._write_lock:
            if self._closed:
                raise ChannelClosed("the channel is closed")
            if type(message) is Call:
                self._calls_sent += 1
            if self._unsent:
                self._unsent.append(memoryview(data))
                return
            try:
                sent = self.sock.send(data, _NOWAIT)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise ChannelClosed(f"the peer is gone ({error.strerror})") from error
            if sent == len(data):
                return
            self._unsent.append(memoryview(data)[sent:])
        self._driver.flush(self)

    def on_writable(self) -> bool:
        """Write what is kept; returns whether everything is out. A broken socket is left for the reader to find."""
        with self._write_lock:
            if self._opening is not None and not self._open(self._opening):
                return not self.has_unsent
            while self._unsent and not self._closed:
                try:
                    sent = self.sock.send(self._unsent[0], _NOWAIT)
                except BlockingIOError:
                    return False
                except OSError:
                    self._unsent.clear()
                    return True
                if sent == len(self._unsent[0]):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = self._unsent[0][sent:]
            return True

    def _open(self, opening: Opening) -> bool:
        first = None if self._closed else opening.advance()
        if first is None:
            return False
        self._unsent[0] = memoryview(first)
        self._opening = None
        return True

    def flush_blocking(self) -> None:
        """Write what is kept, waiting for the peer to take it. For channels that no loop and no poller drives."""
        while not self.on_writable():
            self._poll(select.POLLOUT, None)

    # -- reading ---------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """See `engine.seam.channel.Channel.watch`."""
        if self.armed or not self._reading.acquire(False):
            return  # whoever holds the role arms the driver when it leaves calls behind
        self._reading.release()
        if not self._closed:
            self._driver.arm(self)

    def drive(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        """See `engine.seam.channel.Channel.drive`."""
        if not self._driver.drivable or not self._reading.acquire(False):
            return False
        reading = False
        try:
            if self.armed:
                self._driver.disarm(self)
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            while not self._closed and not done():
                # An interrupt while it waits does no harm, one in the middle of a read may lose part of a frame: so
                # waiting and reading are two steps.
                if not self._await_input(deadline):
                    break
                reading = True
                self._read(_NOWAIT)
                reading = False
        except BaseException:
            if reading:
                self._lose("reading it was interrupted")
            raise
        finally:
            self._leave_role()
        return True

    def _await_input(self, deadline: float | None) -> bool:
        while True:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return False
            events = self._poll(select.POLLIN | (select.POLLOUT if self._unsent and self.has_unsent else 0), remaining)
            if events & select.POLLOUT:
                self.on_writable()
            if events & ~select.POLLOUT:
                return True

    def _poll(self, events: int, timeout_s: float | None) -> int:
        if events == select.POLLIN:  # as almost always, and only by the holder of the reader role
            poll = self._poll_input
            if poll is None:
                poll = self._poll_input = select.poll()
                poll.register(self.fd, events)
        else:
            poll = select.poll()
            poll.register(self.fd, events)
        ready = poll.poll(None if timeout_s is None else min(max(0.0, timeout_s), _LONGEST_POLL_S) * 1000)
        return ready[0][1] if ready else 0

    def on_readable(self) -> None:
        """Read once, without blocking, and deliver what came. Called by the driver."""
        if self._reading.acquire(False):
            try:
                self._read(_NOWAIT)
            finally:
                self._leave_role()

    def read_rest(self) -> None:
        """Deliver all that has arrived, and the peer's end if that has, too; waits for nothing.

        On the thread of the loop that drives it, before `close`, which drops what the peer said last.
        """
        arrived = select.poll()
        arrived.register(self.fd, select.POLLIN)
        while not self._closed and arrived.poll(0):
            self.on_readable()

    def _read(self, flags: int) -> None:
        if self._opening is not None:
            self._read_opening()
            return
        try:
            if self._decoder.large is not None:
                spare = self._decoder.spare
                count = self.sock.recv_into(spare, 0, flags)
                messages = self._decoder.filled(count) if count else None
            else:
                data = self.sock.recv(_READ_SIZE, flags)
                messages = self._decoder.feed(data) if data else None
        except BlockingIOError:
            return
        except ProtocolError as error:
            self._lose(f"the peer broke the protocol: {error}")
            return
        except OSError as error:
            self._lose(f"the connection broke ({error.strerror})")
            return
        if messages is None:
            self._lose("the peer closed the connection")
            return
        listener = self.listener
        assert listener is not None
        for message in messages:
            if type(message) in _TERMINAL:
                self._calls_answered += 1
            listener.received(self, message)

    def _read_opening(self) -> None:
        written = self.on_writable()
        opening = self._opening
        if opening is not None and opening.failure is not None:
            self._lose(opening.failure)
        elif not written:
            self._driver.flush(self)

    # -- closing ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See `engine.seam.channel.Channel.close`."""
        self._told = True
        self._shut()

    def _lose(self, reason: str) -> None:
        self._shut()
        if not self._told:
            self._told = True
            assert self.listener is not None
            self.listener.lost(self, reason)

    def _shut(self) -> None:
        with self._write_lock:
            if self._closed:
                return
            self._closed = True
            self._unsent.clear()
        self._driver.forget(self)
        try:
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that drives the channel
        except OSError:
            pass  # the peer was faster
        if self._reading.acquire(False):
            self._leave_role()

    def _leave_role(self) -> None:
        # Only who holds the role closes the socket: its descriptor must not be reused under a thread blocked in recv.
        if self._closed:
            self.sock.close()
        self._reading.release()
        # Only now: whoever sends a call and finds the role taken counts on its holder, who may have looked before.
        if not (self.armed or self._closed) and (self._calls_sent != self._calls_answered or self._opening is not None):
            self._driver.arm(self)
