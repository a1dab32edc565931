"""Accepts the connections of one listening socket on the server's loop.

asyncio's own servers try again without a pause when there are no descriptors left, with a log record each time, and
uvloop's hang up on whoever comes then. Here the server rests for a moment, and clients wait in the kernel. Only the
loop's thread touches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

from engine.seam.descriptors import REST_S, ShortageLog, is_shortage
from engine.seam.log import Log

__all__ = ["Accepting"]

log = Log("engine.http")

_BEGINS_WITHIN_S = 1.0
"""So long may a client that has connected at the last moment take to begin with TLS."""
_AT_ONCE = 64
"""So many connections are accepted before those that stand get a turn."""
_shortages = ShortageLog(log)


class Room(Protocol):
    """Who says how many connections there may be: `engine_http.connections.Connections`."""

    def has_room(self, beginning: int) -> bool:
        """Whether there may be another one, beside those that stand and so many that begin."""

    def wait_for_room(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` once, when one has ended."""


class Accepting:
    """Accepts from now on, until `stop`.

    Args:
        sock: Bound and listening, or to listen; stays the caller's.
        backlog: How many connections may wait in the kernel.
        make: Makes the protocol of a connection.
        room: Says whether there may be another one. Who connects when there may not waits in the kernel.
        loop: The running loop.
        tls: What to serve TLS with, or None.
        handshake_timeout_s: How long a client may take to begin with TLS.
    """

    def __init__(
        self,
        sock: socket.socket,
        backlog: int,
        make: Callable[[], asyncio.Protocol],
        room: Room,
        loop: asyncio.AbstractEventLoop,
        *,
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
    ) -> None:
        self._sock = sock
        self._make = make
        self._room = room
        self._loop = loop
        self._tls = tls
        self._handshake_timeout_s = None if tls is None else handshake_timeout_s
        self._beginning: set[asyncio.Task[None]] = set()
        self._rest: asyncio.TimerHandle | None = None
        self._waits = False  # for room
        self._stopped = False
        sock.setblocking(False)
        sock.listen(backlog)
        self._go_on()

    def finish(self, *, close_port: bool) -> None:
        """Accept who has connected already, whether or not there is room, and then no more.

        Args:
            close_port: Whoever connects from now on is to be refused, though other processes have the socket, too. Only
                Linux can do that; elsewhere the port is closed with the last of them.
        """
        self._accept_no_more()
        self._accept_waiting()
        if close_port:
            with contextlib.suppress(OSError):  # somebody else has done so, or the system cannot
                self._sock.shutdown(socket.SHUT_RDWR)

    def _accept_waiting(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except ConnectionError:  # this one went away again
                continue
            except OSError:  # that was all, or there are no descriptors left
                return
            self._take(sock)

    async def begun(self) -> None:
        """Wait until who was accepted has begun, or takes too long."""
        if self._beginning:
            await asyncio.wait(self._beginning, timeout=_BEGINS_WITHIN_S)

    def stop(self) -> None:
        """Accept no more, and hang up on who has not begun (idempotent)."""
        self._accept_no_more()
        for task in self._beginning:
            task.cancel()

    async def stopped(self) -> None:
        """Wait until those are gone."""
        if self._beginning:
            await asyncio.wait(self._beginning)

    def _accept_no_more(self) -> None:
        self._stopped = True
        self._loop.remove_reader(self._sock.fileno())
        if self._rest is not None:
            self._rest.cancel()

    def _go_on(self) -> None:
        self._rest = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._room.has_room(len(self._beginning)):
                self._waits = True
                self._loop.remove_reader(self._sock.fileno())
                self._room.wait_for_room(self._found_room)
                return
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if is_shortage(error):
                    _shortages.say(error, "clients wait until there are some")
                    self._loop.remove_reader(self._sock.fileno())
                    self._rest = self._loop.call_later(REST_S, self._go_on)
                elif error.errno == errno.EINVAL:  # the port is closed, for all who share it; it would stay readable
                    self._loop.remove_reader(self._sock.fileno())
                return  # or another ingress was faster, or the client went away again
            self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        task = self._loop.create_task(self._begin(sock))
        self._beginning.add(task)
        task.add_done_callback(self._begun)

    def _found_room(self) -> None:
        if self._waits and not self._stopped:
            self._waits = False
            self._go_on()

    def _begun(self, task: asyncio.Task[None]) -> None:
        self._beginning.discard(task)
        if self._waits:
            self._found_room()  # it may have failed: nobody else would tell

    async def _begin(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._make, sock, ssl=self._tls, ssl_handshake_timeout=self._handshake_timeout_s
            )
        except asyncio.CancelledError:
            sock.close()
            raise
        except Exception as error:
            sock.close()
            # a port scan, a client that distrusts the certificate, or one that left again
            if isinstance(error, OSError):
                log.debug("a client's connection failed: %s", error)
            else:
                log.exception("a client's connection failed")
