"""Accepts connections on an asyncio loop, and makes channels of them.

The controller hears its callers through one, and on a cluster its workers, too; an
`engine_wire.service_loops.AsyncServiceLoop` hears its callers through another. An acceptor listens on any number of
sockets and is used on its loop's thread alone. Given a secret, it shows a connection to nobody before the peer has
proved that it knows it too (`engine_wire.lobby`). Channels that break are dropped, after their listener heard of it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from engine.seam.channel import Channel, ChannelListener
from engine.seam.descriptors import REST_S, ShortageLog
from engine.seam.log import Log

from .addresses import accept_from, close_listening
from .channel import Driver, SocketChannel
from .drivers import LoopDriver
from .opening import Welcome

if TYPE_CHECKING:
    import asyncio

    from .lobby import Lobby, Watcher
    from .tls import TLS

__all__ = ["Acceptor", "channel_of", "channel_of_calls", "closed_on_error", "lobby_for", "note_shortage"]

_shortages = ShortageLog(Log("engine.wire"))


def note_shortage(error: OSError) -> None:
    """Tell the log that connections wait because there are no descriptors left to accept them."""
    _shortages.say(error, "callers wait until there are some")


@contextlib.contextmanager
def closed_on_error(listening: Sequence[socket.socket]) -> Iterator[None]:
    """Close sockets if an error leaves the block: whoever was to own them does not come to be."""
    try:
        yield
    except BaseException:
        for sock in listening:
            sock.close()
        raise


def lobby_for(
    secret: bytes | None, admit: Callable[[socket.socket], None], watcher: Watcher, tls: TLS | None
) -> Lobby | None:
    """Make the lobby of whoever accepts connections; None without a secret: nobody has to prove anything."""
    if secret is None:
        return None
    from .lobby import Lobby  # the local adapter has no use for the cost of its imports

    return Lobby(secret, admit, watcher, tls)


def channel_of(sock: socket.socket, listener: ChannelListener | None, driver: Driver, *, greet: bool) -> SocketChannel:
    """A channel over a connection that was accepted, plain or by TLS."""
    kind = SocketChannel
    if type(sock) is not socket.socket:
        from .secure import SecureChannel

        kind = SecureChannel
    return kind(sock, listener, driver, greet=greet)


def channel_of_calls(
    sock: socket.socket, listener: ChannelListener | None, driver: Driver, *, greet: bool
) -> SocketChannel:
    """A channel on which calls come; a caller of this machine is told which of them have begun.

    Args:
        sock: Accepted.
        listener: Who hears it.
        driver: What reads it.
        greet: Exchange greetings also with a caller of another machine.
    """
    if sock.family != socket.AF_UNIX:
        return channel_of(sock, listener, driver, greet=greet)
    return SocketChannel(sock, listener, driver, greet=False, opening=Welcome(sock))


class Acceptor:
    """Accepts connections on an asyncio loop until closed.

    Args:
        listening: Owned by the acceptor from now on.
        accept: Says who hears a new channel; with a secret, once its peer has proved who it is.
        loop: Runs it.
        secret: What peers must prove to know, and this side proves to them; at least 16 random bytes.
        calls: Whether calls come, of which this side says which have begun (`engine_wire.begun`).
        tls: With a secret: who this side is towards peers that come over TCP, who then have to use TLS.

    Raises:
        ValueError: The secret is too short.
        engine.errors.InvalidArgument: A certificate cannot be read.
    """

    def __init__(
        self,
        listening: Sequence[socket.socket],
        accept: Callable[[Channel], ChannelListener],
        loop: asyncio.AbstractEventLoop,
        *,
        secret: bytes | None = None,
        calls: bool = False,
        tls: TLS | None = None,
    ) -> None:
        self._listening = tuple(listening)
        self._accept = accept
        self._loop = loop
        self._calls = calls
        self._driver = LoopDriver(loop)
        self._channels: set[SocketChannel] = set()
        self._timer: asyncio.TimerHandle | None = None  # of the lobby
        self._resting: dict[socket.socket, asyncio.TimerHandle] = {}
        with closed_on_error(self._listening):
            self._lobby = lobby_for(secret, self._admit, self, tls)
        for sock in self._listening:
            sock.setblocking(False)
            self._listen(sock)

    def close(self) -> None:
        """Stop accepting and close every channel (idempotent)."""
        while self._resting:
            self._resting.popitem()[1].cancel()
        for sock in self._listening:
            if sock.fileno() >= 0:
                self._loop.remove_reader(sock.fileno())
                close_listening(sock)
        if self._timer is not None:
            self._timer.cancel()
        if self._lobby is not None:
            self._lobby.close()
        for channel in self._channels:
            channel.close()
        self._channels.clear()

    def open_channels(self) -> int:
        """How many of the accepted channels stand."""
        self._channels = {known for known in self._channels if not known.closed}
        return len(self._channels)

    def _listen(self, listening: socket.socket) -> None:
        self._resting.pop(listening, None)
        self._loop.add_reader(listening.fileno(), self._on_connection, listening)

    def _on_connection(self, listening: socket.socket) -> None:
        try:
            accepted = accept_from(listening, proves_itself=self._lobby is not None)
        except OSError as error:
            note_shortage(error)
            self._loop.remove_reader(listening.fileno())
            self._resting[listening] = self._loop.call_later(REST_S, self._listen, listening)
            return
        if accepted is None:
            return
        sock, peer = accepted
        if self._lobby is None:
            self._admit(sock)
            return
        self._lobby.enter(sock, peer)
        if self._timer is None:
            self._on_time()

    def _admit(self, sock: socket.socket) -> None:
        greet = self._lobby is None
        if self._calls:
            channel = channel_of_calls(sock, None, self._driver, greet=greet)
        else:
            channel = channel_of(sock, None, self._driver, greet=greet)
        channel.listener = self._accept(channel)
        self.open_channels()  # drops the closed ones
        self._channels.add(channel)
        channel.watch()

    def _on_time(self) -> None:
        assert self._lobby is not None
        self._lobby.expire()
        remaining_s = self._lobby.remaining_s()
        self._timer = None if remaining_s is None else self._loop.call_later(remaining_s, self._on_time)

    # -- the watcher of its lobby --------------------------------------------------------------------------------------

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """See `engine_wire.lobby.Watcher.watch`."""
        self._loop.add_reader(descriptor, callback)

    def unwatch(self, descriptor: int) -> None:
        """See `engine_wire.lobby.Watcher.unwatch`."""
        self._loop.remove_reader(descriptor)
