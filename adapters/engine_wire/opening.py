"""What has to happen on a connecting side's socket before messages may follow.

That is a TCP connection which is not there yet, a handshake, or both. Nobody waits for it: whoever reads or writes the
channel moves its opening on when the socket is ready. When the peer is gone, or is not who it should be, the opening
says why and shuts the socket down, so that the channel's reader finds the news.
"""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING

from .addresses import is_foreign, unanswered
from .protocol import GREETING

if TYPE_CHECKING:
    from .handshake import ClientHandshake

__all__ = ["Opening"]

_NOWAIT = socket.MSG_DONTWAIT
_UNPROVED = "the peer could not prove that it belongs to this engine"


class Opening:
    """What happens on a connecting side's socket before messages may be written. Used under its channel's write lock.

    Args:
        sock: Of the channel.
        address: That it leads to.
        connecting: Whether the connection is not there yet.
        handshake: To go through; None if a greeting is all.

    Attributes:
        connecting: Whether the connection is not there yet.
        failure: Why it never will be open, once that is known. The socket is then shut down, so that its reader finds
            the news.
    """

    def __init__(self, sock: socket.socket, address: str, connecting: bool, handshake: ClientHandshake | None) -> None:
        self._sock = sock
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
                self._fail(f"{_UNPROVED} ({error})")
                return None
            if handshake.complete:
                return answer

    def _fail(self, reason: str) -> None:
        self.failure = reason
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it never was connected, which wakes the reader as well
