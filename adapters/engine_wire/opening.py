"""What has to happen on a socket before messages may follow.

On a connecting side's (`Opening`) that is a TCP connection which is not there yet, a handshake, or both. Nobody waits
for it: whoever reads or writes the channel moves its opening on when the socket is ready. When the peer is gone, or is
not who it should be, the opening says why and shuts the socket down, so that the channel's reader finds the news.

The side that accepts calls over a Unix socket takes the caller's greeting first (`Welcome`): with it comes the page on
which it notes the calls that begin (`engine_wire.begun`).
"""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import TYPE_CHECKING, Any

from engine.seam.log import Log

from .addresses import is_foreign, unanswered
from .begun import BegunPage, adopted, close_all, descriptors_in, greet_with
from .protocol import GREETING, ProtocolError, check_greeting

if TYPE_CHECKING:
    from .handshake import ClientHandshake

__all__ = ["UNPROVED", "Opening", "Welcome"]

_log = Log("engine.wire")
_NOWAIT = socket.MSG_DONTWAIT
_UNINHERITED = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
UNPROVED = "the peer could not prove that it belongs to this engine"


class Opening:
    """What happens on a connecting side's socket before messages may be written. Used under its channel's write lock.

    Args:
        sock: Of the channel.
        address: That it leads to.
        connecting: Whether the connection is not there yet.
        handshake: To go through; None if a greeting is all.
        greets: Whether the peer is a `Welcome`, which takes a greeting after the handshake, too, and returns it.
        page: What goes with that greeting; owned by the channel.

    Attributes:
        greeted: Whether the peer greets when it has read all that this side sends to open the connection.
        connecting: Whether the connection is not there yet.
        failure: Why it never will be open, once that is known. The socket is then shut down, so that its reader finds
            the news.
    """

    words: memoryview | None = None
    """Where the channel notes which calls begin here, once it is open: callers run none."""

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        connecting: bool,
        handshake: ClientHandshake | None,
        *,
        greets: bool = False,
        page: BegunPage | None = None,
    ) -> None:
        self._sock = sock
        self.greeted = greets
        self._page = page
        self._address = address
        self.connecting = connecting
        self._handshake = handshake
        self._outgoing = b"" if handshake is None else handshake.hello
        self.failure: str | None = None

    @property
    def wants_write(self) -> bool:
        """Whether it waits until the socket takes bytes, rather than until some come."""
        return self.failure is None and (self.connecting or bool(self._outgoing))

    def advance(self) -> bytes | None:
        """Do what can be done without waiting; once all is done, returns what goes before the first message."""
        if self.failure is None:
            try:
                return self._advance()
            except BlockingIOError:
                pass
            except BaseException as error:
                if not isinstance(error, OSError) or is_foreign(error):
                    self._fail("opening it was interrupted")  # nobody knows any more what was sent and received
                    raise
                self._fail(f"the connection broke ({error.strerror})")
        return None

    def _advance(self) -> bytes | None:
        if self.connecting and not self._is_connected():
            return None
        while self._outgoing:
            self._outgoing = self._outgoing[self._sock.send(self._outgoing, _NOWAIT) :]
        handshake = self._handshake
        return GREETING if handshake is None else self._listen(handshake)

    def _is_connected(self) -> bool:
        waiting = select.poll()
        waiting.register(self._sock, select.POLLOUT)
        if not waiting.poll(0):
            return False
        error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._fail(unanswered(self._address, os.strerror(error)))
            return False
        if self._sock.getsockname() == self._sock.getpeername():
            # Nobody listens, and the kernel happened to give this socket the very port that it looks for.
            self._fail(unanswered(self._address, "connected to itself"))
            return False
        self.connecting = False
        return True

    def _listen(self, handshake: ClientHandshake) -> bytes | None:
        from .handshake import HandshakeError

        while True:
            data = self._sock.recv(handshake.wanted, _NOWAIT)
            if not data:
                self._fail("the peer closed the connection before it proved that it belongs to this engine")
                return None
            try:
                answer = handshake.feed(data)
            except HandshakeError as error:
                self._fail(f"{UNPROVED} ({error})")
                return None
            if handshake.complete:
                return self._introduced(answer) if self.greeted else answer

    def _introduced(self, proof: bytes) -> bytes:
        # Nothing else was written since the hello was read, so both fit in.
        if self._sock.send(proof, _NOWAIT) < len(proof):
            raise ConnectionError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        greet_with(self._sock, GREETING, self._page)
        return b""

    def _fail(self, reason: str) -> None:
        self.failure = reason
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it never was connected, which wakes the reader as well


class Welcome:
    """What happens first on a Unix socket of the side that takes calls. Used under its channel's write lock.

    This side greets in return: so whoever has seen no greeting knows that it has read no calls either.

    Args:
        sock: Of the channel.

    Attributes:
        greeted: False: it is the greeting that this waits for.
        connecting: False: whoever accepts is connected.
        wants_write: False: it waits for the caller.
        failure: As that of an `Opening`.
        words: Where the channel notes which calls begin, once it is open; None if the caller does not ask for it.
    """

    greeted = False
    connecting = False
    wants_write = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._got = b""
        self._received: list[tuple[bytes, list[tuple[int, int, bytes]], int, Any]] = []  # and not looked at yet
        self._descriptors: list[int] = []  # that came
        self._over = False
        self.failure: str | None = None
        self.words: memoryview | None = None

    def advance(self) -> bytes | None:
        """Take what has come of the greeting; once all is there, returns what goes before the first message."""
        while self.failure is None:
            if self._over:
                return GREETING
            try:
                self._receive()
                if len(self._got) == len(GREETING):
                    self.words = adopted(self._descriptors)
                    self._over = True
            except BlockingIOError:
                break
            except ProtocolError as error:
                _log.warning("a peer broke the protocol: %s; the connection is closed", error)
                self._fail(f"the peer broke the protocol: {error}")
            except BaseException as error:
                if not isinstance(error, OSError) or is_foreign(error):
                    self._fail("opening it was interrupted")  # nobody knows any more what came
                    raise
                self._fail(f"the connection broke ({error.strerror})")
        return None

    def _receive(self) -> None:
        missing = len(GREETING) - len(self._got)
        # In one go: no signal handler runs between a descriptor's coming and its being noted.
        self._received += map(self._sock.recvmsg, (missing,), (socket.CMSG_SPACE(4),), (_NOWAIT | _UNINHERITED,))
        self._look()
        check_greeting(self._got)

    def _look(self) -> None:
        data = self._got + b"".join(received[0] for received in self._received)
        descriptors = self._descriptors + descriptors_in(item for received in self._received for item in received[1])
        ended = any(not received[0] for received in self._received)
        self._received, self._got, self._descriptors = [], data, descriptors
        if ended:
            self._fail("the peer closed the connection")

    def _fail(self, reason: str) -> None:
        self.failure = reason
        if self._received:
            self._look()
        close_all(self._descriptors)
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster
