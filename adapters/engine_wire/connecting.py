"""The connecting side: opens channels to the addresses that workers announce.

Nobody waits here. What has to happen on a socket before messages may follow (a TCP connection that is not there yet, a
handshake) is an `Opening`, which the channel's driver, or the thread that drives the channel, moves on when the
socket is ready; messages sent meanwhile are kept. When the peer is gone, or is not who it should be, the channel is
lost.
"""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING

from engine.seam.channel import ChannelClosed, ChannelListener

from .addresses import open_socket, unanswered
from .channel import SocketChannel
from .drivers import LoopDriver, Poller, Undriven
from .protocol import GREETING

if TYPE_CHECKING:
    from .handshake import ClientHandshake

__all__ = ["Opening", "connect"]

_NOWAIT = socket.MSG_DONTWAIT
_UNPROVED = "the peer could not prove that it belongs to this engine"


def connect(
    address: str, listener: ChannelListener, *, on_loop: bool, poller: Poller | Undriven, secret: bytes | None = None
) -> SocketChannel:
    """Open a channel to ``unix:PATH``, ``unix:@NAME`` or ``tcp:HOST:PORT`` (see `engine_wire.addresses`).

    Args:
        address: As announced by a worker.
        listener: Who hears it.
        on_loop: Read on the asyncio loop running in this thread rather than by ``poller``.
        poller: Reads the channels that no loop owns; `Undriven` if one thread drives this one all its life.
        secret: What both ends know and prove to each other before the first message; at least 16 random bytes.

    Raises:
        engine.seam.channel.ChannelClosed: Nobody listens there, as far as is known at once; later, the channel is lost.
        ValueError: The secret is too short.
    """
    handshake: ClientHandshake | None = None
    if secret is not None:
        from .handshake import ClientHandshake  # the local adapter has no use for the cost of its imports

        handshake = ClientHandshake(secret)
    sock, connecting = open_socket(address)
    opening = Opening(sock, address, connecting, handshake) if connecting or handshake is not None else None
    try:
        driver: LoopDriver | Poller | Undriven = poller
        if on_loop:
            import asyncio

            driver = LoopDriver(asyncio.get_running_loop())
        channel = SocketChannel(sock, listener, driver, greet=handshake is None, opening=opening)
        if opening is not None:
            written = channel.on_writable()
            if opening.failure is not None and opening.connecting:
                raise ChannelClosed(opening.failure)
            channel.watch()  # what is kept must leave though nobody drives or watches
            if not written and not isinstance(driver, Undriven):
                driver.flush(channel)
        elif on_loop:
            channel.watch()
    except OSError as error:
        sock.close()
        raise ChannelClosed(unanswered(address, error.strerror)) from error
    except BaseException:
        sock.close()
        raise
    return channel


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
            except OSError as error:
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
