"""Connections: their sockets, their lives, and which lane their requests take.

A `Connection` begins in the plain lane (`engine_http.plain`), which serves ordinary HTTP/1.1 requests at little cost.
The first thing it meets that is not ordinary moves it for good to the other lane (`engine_http.full`), where hypercorn
serves all there is: HTTP/2, upgrades, chunked and announced bodies, HTTP/1.0, and the refusal of what is malformed.
A connection that chose HTTP/2 in its TLS handshake begins there. Both lanes run the same application.

    socket ──► Connection ──► PlainLane ──────────────────────► application
                   │              └── (not ordinary: from its first byte on)
                   └────────► FullLane ──► hypercorn h11, h2 ─► application

Everything here runs on one asyncio loop, and only its thread touches it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol, cast

from engine.seam.ingress_server import ASGIApp

if TYPE_CHECKING:
    from hypercorn.asyncio.worker_context import WorkerContext
    from hypercorn.config import Config

__all__ = ["Connection", "Connections", "Lane"]

log = logging.getLogger("engine.http")

READ_AHEAD = 64 * 1024
"""Bytes taken from a client before the application took those before."""


class Lane(Protocol):
    """What serves the requests of one connection."""

    def data(self, data: bytes) -> None:
        """Take what the client sent."""

    def lost(self) -> None:
        """The client is gone."""

    def flush(self) -> None:
        """Write what was held back."""


class Connections:
    """All connections of one server.

    Args:
        app: The application.
        config: Hypercorn's configuration.
        loop: The loop that everything here runs on.
    """

    def __init__(self, app: ASGIApp, config: Config, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self.config = config
        self.loop = loop
        self.logs_access = config.log.access_logger is not None
        self.stopping = False  # whether each connection is to be closed after its request
        self._open: set[Connection] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._common_second = 0
        self._common = b""

    def __repr__(self) -> str:
        return f"<Connections {len(self._open)} open>"

    @functools.cached_property
    def context(self) -> WorkerContext:
        """What hypercorn's protocols know of their server; only the full lane needs it, and it is slow to import."""
        from hypercorn.asyncio.worker_context import WorkerContext

        return WorkerContext(None)

    def common_headers(self) -> bytes:
        """The header lines that every HTTP/1.1 answer gets, the date among them."""
        second = int(time.time())
        if second != self._common_second:
            self._common_second = second
            self._common = b"".join(b"%b: %b\r\n" % pair for pair in self.config.response_headers("h11"))
        return self._common

    def accept(self) -> Connection:
        """Make the protocol of a new connection."""
        return Connection(self)

    def add(self, connection: Connection) -> None:
        """Take note of a connection that opened."""
        self._open.add(connection)
        self._none_left.clear()

    def discard(self, connection: Connection) -> None:
        """Forget a connection that is closed and whose application calls have ended."""
        self._open.discard(connection)
        if not self._open:
            self._none_left.set()

    async def finish(self) -> None:
        """Close idle connections, let active ones finish their request, return when none is left."""
        await self._stop()
        for connection in list(self._open):
            if connection.idle:
                connection.close()
        await self._none_left.wait()

    async def break_off(self, timeout_s: float) -> None:
        """Break what is left."""
        await self._stop()
        for connection in list(self._open):
            connection.break_off()
        try:
            await asyncio.wait_for(self._none_left.wait(), timeout_s)
        except asyncio.TimeoutError:
            log.warning("%d connections did not end with their server", len(self._open))

    async def _stop(self) -> None:
        self.stopping = True
        if "context" in self.__dict__:
            await self.context.terminated.set()


class Connection(asyncio.Protocol):
    """One client's connection. Made by `Connections.accept`.

    Attributes:
        tls: The TLS object, or None.
        client: Address and port of the client, or None.
        server: Address and port it connected to, or None.
        requests: How many requests it has begun.
        closing: Whether nothing more is to be read from or written to it.
    """

    tls: Any
    client: tuple[str, int] | None
    server: tuple[str, int] | None
    _transport: asyncio.Transport
    _lane: Lane
    _idle_timer: asyncio.TimerHandle

    def __init__(self, owner: Connections) -> None:
        self.owner = owner
        self.loop = owner.loop
        self.requests = 0
        self.closing = False
        self.lost = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reading = True
        self._writable: asyncio.Future[None] | None = None
        self._idle_since: float | None = None

    def __repr__(self) -> str:
        state = "lost" if self.lost else "closing" if self.closing else "idle" if self.idle else "active"
        return f"<Connection {state}, {self.requests} requests>"

    # -- asyncio.Protocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to serve the client."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not an instance of it
        self.owner.add(self)
        family = transport.get_extra_info("socket").family
        self.client = _address(family, transport.get_extra_info("peername"))
        self.server = _address(family, transport.get_extra_info("sockname"))
        self.tls = transport.get_extra_info("ssl_object")
        self._idle_since = self.loop.time()
        self._idle_timer = self.loop.call_later(self.owner.config.keep_alive_timeout, self._check_idle)
        if self.tls is not None and self.tls.selected_alpn_protocol() == "h2":
            self.take_full_lane(b"", http2=True)
        else:
            from .plain import PlainLane

            self._lane = PlainLane(self)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        if not self.closing:
            self._lane.data(data)

    def eof_received(self) -> None:
        """Treat a client that stops sending as one that left, as HTTP servers do; the transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the client is gone."""
        self.lost = self.closing = True
        self._idle_timer.cancel()
        self.resume_writing()
        self._lane.lost()
        if not self._tasks:
            self.owner.discard(self)

    def pause_writing(self) -> None:
        """Make writers wait: the client takes less than it is given."""
        if self._writable is None:
            self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        """Let writers go on."""
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    # -- for the lanes ---------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no request is being received or answered."""
        return self._idle_since is not None

    def set_idle(self, idle: bool) -> None:
        """Say whether a request is being received or answered."""
        self._idle_since = self.loop.time() if idle else None

    def take_full_lane(self, data: bytes, *, http2: bool = False) -> None:
        """Let hypercorn serve the connection from here on.

        Args:
            data: What the client sent and nobody served yet.
            http2: It chose HTTP/2 already.
        """
        from .full import FullLane

        self._lane = lane = FullLane(self, http2=http2)
        if data:
            lane.data(data)
        self.spawn(lane.serve())

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as part of this connection."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def pause_reading(self) -> None:
        """Let the client wait (idempotent)."""
        if self._reading and not self.closing:
            self._reading = False
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Let the client go on (idempotent)."""
        if not self._reading and not self.closing:
            self._reading = True
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Send something; nothing happens where the client is gone."""
        if not self.closing:
            self._transport.write(data)

    @property
    def congested(self) -> bool:
        """Whether the client has yet to take what was written; `drain` waits until it did."""
        return self._writable is not None

    async def drain(self) -> None:
        """Wait until the client has taken most of what was written."""
        while self._writable is not None:
            await asyncio.shield(self._writable)

    def close(self) -> None:
        """Close once everything written is sent (idempotent)."""
        if not self.closing:
            self._lane.flush()
            self.closing = True
            self._transport.close()

    def break_off(self) -> None:
        """End at once, whatever is going on."""
        self.closing = True
        self._transport.abort()
        for task in self._tasks:
            task.cancel()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.debug("a connection failed", exc_info=task.exception())
            self.close()
        if self.lost and not self._tasks:
            self.owner.discard(self)

    def _check_idle(self) -> None:
        # One timer per connection that looks back, rather than one per request that is cancelled.
        timeout_s = self.owner.config.keep_alive_timeout
        left_s = timeout_s
        if self._idle_since is not None:
            left_s = self._idle_since + timeout_s - self.loop.time()
            if left_s <= 0:
                self.close()
                return
        self._idle_timer = self.loop.call_later(left_s, self._check_idle)


def _address(family: int, name: Any) -> tuple[str, int] | None:
    return (name[0], name[1]) if family in (socket.AF_INET, socket.AF_INET6) and name else None
