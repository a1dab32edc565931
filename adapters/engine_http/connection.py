"""One connection: its socket, its life, and which lane its requests take.

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
import contextlib
import math
import os
import socket
import struct
import sys
from collections.abc import Coroutine
from typing import Any, NamedTuple, Protocol, cast

from engine.seam.log import Log

from .lane import NO_LANE, Lane, LaneWithTask
from .server_context import ServerContext

__all__ = ["Connection", "Owner"]

log = Log("engine.http")

_LOOK_AFTER_S = 1.0
"""A connection that is closed and empty by then only waits for its client to say goodbye in TLS."""
_STALLED_LOOKS = 120
"""Looks at a closed connection without its client having taken anything. A slow one takes a buffer at a time."""
_TCP_INFO = struct.Struct("=24xI92xQ16xI")
"""What is asked of Linux's ``tcp_info``: packets sent and not acknowledged, bytes acknowledged, bytes not sent yet."""


class _Left(NamedTuple):
    """What a client has yet to take, and how much it has taken; the kernel tells of the latter on Linux."""

    here: int
    in_kernel: bool = False
    taken: int = 0


class Owner(Protocol):
    """What keeps the connections of a server and makes their lanes: `engine_http.connections.Connections`."""

    def add(self, connection: Connection) -> None:
        """Take note of a connection that opened."""

    def discard(self, connection: Connection) -> None:
        """Forget a connection that is closed and whose application calls have ended."""

    def plain_lane(self, connection: Connection) -> Lane:
        """Make the lane that a connection begins in."""

    def full_lane(self, connection: Connection, *, http2: bool) -> LaneWithTask:
        """Make the lane for what is not ordinary. ``http2`` says that the client chose HTTP/2 already."""


class Connection(asyncio.Protocol):
    """One client's connection. Made by `engine_http.connections.Connections.accept`.

    Args:
        context: What it shares with the server's other connections.
        owner: What keeps it and makes its lanes.

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
    _timer: asyncio.TimerHandle  # of an idle connection, then of one that is to be gone

    def __init__(self, context: ServerContext, owner: Owner) -> None:
        self.context = context
        self.loop = context.loop
        self._owner = owner
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
        self._owner.add(self)
        family = transport.get_extra_info("socket").family
        self.client = _address(family, transport.get_extra_info("peername"))
        self.server = _address(family, transport.get_extra_info("sockname"))
        self.tls = transport.get_extra_info("ssl_object")
        self._idle_since = self.loop.time()
        self._timer = self.loop.call_later(self.context.config.keep_alive_timeout, self._check_idle)
        if self.tls is not None and self.tls.selected_alpn_protocol() == "h2":
            self.take_full_lane(b"", http2=True)
        else:
            self._lane = self._owner.plain_lane(self)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        if not self.closing:
            self._lane.data(data)

    def eof_received(self) -> None:
        """Treat a client that stops sending as one that left, as HTTP servers do."""
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the client is gone."""
        self.lost = True
        self._timer.cancel()
        self._end()
        if not self._tasks:
            self._leave()

    def pause_writing(self) -> None:
        """Make writers wait: the client takes less than it is given."""
        if self._writable is None:
            self._writable = self.loop.create_future()
            self._check_taken(self._writable, None)

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

    @property
    def idle_since(self) -> float:
        """Since when it is idle, by the loop's clock; infinite if it is not."""
        return math.inf if self._idle_since is None else self._idle_since

    def set_idle(self, idle: bool) -> None:
        """Say whether a request is being received or answered."""
        self._idle_since = self.loop.time() if idle else None

    def take_full_lane(self, data: bytes, *, http2: bool = False) -> None:
        """Let hypercorn serve the connection from here on.

        Args:
            data: What the client sent and nobody served yet.
            http2: It chose HTTP/2 already.
        """
        self._lane = lane = self._owner.full_lane(self, http2=http2)
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
        """Close once everything written is sent (idempotent). From now on nobody waits to write."""
        if not self.closing:
            self._lane.farewell()
            self._end()
            self._timer.cancel()
            self._transport.close()
            self._timer = self.loop.call_later(_LOOK_AFTER_S, self._check_gone, None, 0)

    def break_off(self) -> None:
        """End at once, whatever is going on."""
        self._end()
        self._transport.abort()
        for task in self._tasks:
            task.cancel()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        if not self.closing:
            self.closing = True
            self.resume_writing()
            self._lane.ended()

    def _check_gone(self, state: _Left | None, looks: int) -> None:
        # A client that takes nothing more would keep its connection, and what is buffered for it, for good.
        left = self._left()
        looks = looks + 1 if left == state else 1
        if not left.here and not left.in_kernel:
            self._transport.abort()
        elif looks > _STALLED_LOOKS:
            self._reset()
        else:
            self._timer = self.loop.call_later(_LOOK_AFTER_S, self._check_gone, left, looks)

    def _left(self) -> _Left:
        here = self._transport.get_write_buffer_size()
        if sys.platform == "linux":
            with contextlib.suppress(OSError, ValueError):  # it is gone already, or no TCP
                sock = socket.socket(fileno=self._transport.get_extra_info("socket").fileno())
                try:
                    told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
                finally:
                    sock.detach()
                if len(told) == _TCP_INFO.size:  # else the kernel is too old to tell
                    unacknowledged, taken, unsent = _TCP_INFO.unpack(told)
                    return _Left(here, bool(unacknowledged or unsent), taken)
        return _Left(here)

    def _reset(self) -> None:
        # Else the kernel would keep what the client does not take, and ask for a quarter of an hour whether it does.
        with contextlib.suppress(OSError):  # it is gone already
            sock = self._transport.get_extra_info("socket")
            with socket.socket(fileno=os.dup(sock.fileno())) as same:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _check_taken(self, writable: asyncio.Future[None], state: _Left | None) -> None:
        # A slow client takes a buffer at a time, and the kernel much of it before it asks for more: it is only let go
        # if it takes nothing at all.
        timeout_s = self.context.stall_timeout_s
        if timeout_s is None or self._writable is not writable or self.closing:
            return
        left = self._left()
        if left == state:
            log.debug("%r took nothing for %g s", self, timeout_s)
            self._end()
            self._reset()
        else:
            self.loop.call_later(timeout_s, self._check_taken, writable, left)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.debug("a connection failed", exc_info=task.exception())
            self.close()
        if self.lost and not self._tasks:
            self._leave()

    def _leave(self) -> None:
        self._owner.discard(self)
        self._lane = NO_LANE  # which knew this connection, too: they would have kept each other in memory

    def _check_idle(self) -> None:
        # One timer per connection that looks back, rather than one per request that is cancelled.
        timeout_s = self.context.config.keep_alive_timeout
        left_s = timeout_s
        if self._idle_since is not None:
            left_s = self._idle_since + timeout_s - self.loop.time()
            if left_s <= 0:
                self.close()
                return
        self._timer = self.loop.call_later(left_s, self._check_idle)


def _address(family: int, name: Any) -> tuple[str, int] | None:
    return (name[0], name[1]) if family in (socket.AF_INET, socket.AF_INET6) and name else None
