"""The connecting side: opens channels to the addresses that workers announce.

Nobody waits here. What has to happen on a socket before messages may follow (a TCP connection that is not there yet, a
handshake) is an `engine_wire.opening.Opening`, which the channel's driver, or the thread that drives the channel, moves
on when the socket is ready; messages sent meanwhile are kept. When the peer is gone, or is not who it should be, the
channel is lost.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from engine.seam.channel import ChannelClosed, ChannelListener
from engine.seam.descriptors import is_shortage, shortage

from .addresses import is_foreign, open_socket, unanswered
from .begun import BegunPage
from .channel import SocketChannel
from .drivers import LoopDriver, Poller, Undriven
from .opening import Opening

if TYPE_CHECKING:
    from .handshake import ClientHandshake
    from .tls import TLS

__all__ = ["connect"]


def connect(
    address: str,
    listener: ChannelListener,
    *,
    on_loop: bool,
    poller: Poller | Undriven,
    secret: bytes | None = None,
    calls: bool = False,
    tls: TLS | None = None,
) -> SocketChannel:
    """Open a channel to ``unix:PATH``, ``unix:@NAME`` or ``tcp:HOST:PORT`` (see `engine_wire.addresses`).

    Args:
        address: As announced by a worker.
        listener: Who hears it.
        on_loop: Read on the asyncio loop running in this thread rather than by ``poller``.
        poller: Reads the channels that no loop owns; `Undriven` if one thread drives this one all its life.
        secret: What both ends know and prove to each other before the first message; at least 16 random bytes.
        calls: Whether a service is there, which says on a page which calls have begun (`engine_wire.begun`).
        tls: With a secret: who this side is over TCP, where it then uses TLS.

    Raises:
        engine.seam.channel.ChannelClosed: Nobody listens there, as far as is known at once; later, the channel is lost.
        engine.errors.ResourcesUnavailable: There are no descriptors left for it.
        ValueError: The secret is too short.
        engine.errors.InvalidArgument: A certificate cannot be read.
    """
    handshake: ClientHandshake | None = None
    if secret is not None:
        from .handshake import ClientHandshake  # the local adapter has no use for the cost of its imports

        handshake = ClientHandshake(secret)
    sock, connecting = open_socket(address)
    page: BegunPage | None = None
    try:
        driver: LoopDriver | Poller | Undriven = poller
        if on_loop:
            import asyncio

            driver = LoopDriver(asyncio.get_running_loop())
        elif isinstance(poller, Poller):
            poller.prepare()  # else it might lack descriptors only when a call is under way
        if calls:  # only now: it can be done without, if it was the last descriptor
            with contextlib.suppress(OSError):
                for page in BegunPage.made(sock):  # noqa: B007
                    break
        opening: Opening | None = None
        kind = SocketChannel
        if tls is not None and secret is not None and sock.family != socket.AF_UNIX:
            from .secure import SecureChannel, SecureOpening, SecureSocket

            kind = SecureChannel
            sock = secured = SecureSocket(sock, tls, server_side=False)
            opening = SecureOpening(secured, address, connecting, ClientHandshake(secret, secured.binding))
        elif connecting or handshake is not None:
            greets = calls and sock.family == socket.AF_UNIX
            opening = Opening(sock, address, connecting, handshake, greets=greets, page=page)
        channel = kind(sock, listener, driver, greet=handshake is None, opening=opening, page=page)
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
        _close(sock, page)
        if is_shortage(error):
            raise shortage(error) from error
        if is_foreign(error):
            raise
        raise ChannelClosed(unanswered(address, error.strerror)) from error
    except BaseException:
        _close(sock, page)
        raise
    return channel


def _close(sock: socket.socket, page: BegunPage | None) -> None:
    sock.close()
    if page is not None:
        page.close()
