"""Accepts the connections of one listening socket on the server's loop.

asyncio's own servers try again without a pause when there are no descriptors left, with a log record each time, and
uvloop's hang up on whoever comes then. Here the server rests for a moment, and clients wait in the kernel. Only the
loop's thread touches it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

from engine.seam.descriptors import REST_S, ShortageLog, is_shortage
from engine.seam.log import Log

__all__ = ["Accepting"]

log = Log("engine.http")

_AT_ONCE = 64
"""So many connections are accepted before those that stand get a turn."""
_shortages = ShortageLog(log)


class Accepting:
    """Accepts from now on, until `stop`.

    Args:
        sock: Bound and listening, or to listen; stays the caller's.
        backlog: How many connections may wait in the kernel.
        make: Makes the protocol of a connection.
        loop: The running loop.
        tls: What to serve TLS with, or None.
        handshake_timeout_s: How long a client may take to begin with TLS.
    """

    def __init__(
        self,
        sock: socket.socket,
        backlog: int,
        make: Callable[[], asyncio.Protocol],
        loop: asyncio.AbstractEventLoop,
        *,
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
    ) -> None:
        self._sock = sock
        self._make = make
        self._loop = loop
        self._tls = tls
        self._handshake_timeout_s = None if tls is None else handshake_timeout_s
        self._beginning: set[asyncio.Task[None]] = set()
        self._rest: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        sock.listen(backlog)
        self._go_on()

    def stop(self) -> None:
        """Accept no more, and hang up on who has not begun (idempotent)."""
        self._loop.remove_reader(self._sock.fileno())
        if self._rest is not None:
            self._rest.cancel()
        for task in self._beginning:
            task.cancel()

    async def stopped(self) -> None:
        """Wait until those are gone."""
        if self._beginning:
            await asyncio.wait(self._beginning)

    def _go_on(self) -> None:
        self._rest = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if is_shortage(error):
                    _shortages.say(error, "clients wait until there are some")
                    self._loop.remove_reader(self._sock.fileno())
                    self._rest = self._loop.call_later(REST_S, self._go_on)
                return  # or another ingress was faster, or the client went away again
            sock.setblocking(False)
            task = self._loop.create_task(self._begin(sock))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

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
