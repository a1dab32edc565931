"""All connections of one server: how they are made, kept and ended.

Everything here runs on the server's loop, and only its thread touches it. A connection is kept from when it opens until
it is closed and the application calls made for it have ended, whoever closed it.

There are no more of them than is allowed. Who comes then waits in the kernel, and the connections that nobody has used
for longest are closed for it.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

from engine.seam.log import Log

from .connection import Connection
from .lane import Lane, LaneWithTask
from .server_context import ServerContext

__all__ = ["Connections"]

log = Log("engine.http")

_IDLE_S = 1.0
"""So long must a connection have been idle to be closed for another one: its first request may be on its way."""
_CLOSED_AT_ONCE = 1000
_SAY_AGAIN_AFTER_S = 60.0


class Connections:
    """The connections of one server, as their `engine_http.connection.Owner` and `engine_http.accepting.Room`.

    Args:
        context: What they share.
        most: So many may be open at a time; None for any number.
    """

    def __init__(self, context: ServerContext, most: int | None = None) -> None:
        self._context = context
        self._most = most
        self._open: set[Connection] = set()
        self._waiting: dict[Callable[[], None], None] = {}  # to be told that there may be room
        self._look: asyncio.TimerHandle | None = None  # for idle ones, while somebody waits: not for each that comes
        self._silent_until = 0.0
        self._none_left = asyncio.Event()
        self._none_left.set()

    def __repr__(self) -> str:
        return f"<Connections {len(self._open)} open>"

    def accept(self) -> Connection:
        """Make the protocol of a new connection."""
        return Connection(self._context, self)

    # -- room for more ---------------------------------------------------------------------------------------------

    def has_room(self, beginning: int) -> bool:
        """See `engine_http.accepting.Room.has_room`."""
        return self._most is None or len(self._open) + beginning < self._most

    def wait_for_room(self, tell: Callable[[], None]) -> None:
        """See `engine_http.accepting.Room.wait_for_room`."""
        now = self._context.loop.time()
        if now >= self._silent_until:
            self._silent_until = now + _SAY_AGAIN_AFTER_S
            log.warning("%d clients are connected (max_connections): others wait until one leaves", self._most)
        self._waiting[tell] = None
        if self._look is None:
            self._make_room()

    def _make_room(self) -> None:
        """Close those that have been idle for longest; look again soon if somebody waits then."""
        if not self._waiting:
            self._look = None
            return
        loop = self._context.loop
        self._look = loop.call_later(_IDLE_S, self._make_room)
        since = loop.time() - _IDLE_S
        idle = (connection for connection in self._open if connection.idle_since <= since and not connection.closing)
        for connection in heapq.nsmallest(_CLOSED_AT_ONCE, idle, key=_idle_since):
            connection.close()

    def _tell_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for tell in waiting:
            tell()

    # -- their end -------------------------------------------------------------------------------------------------

    async def keep_none(self) -> None:
        """Let each connection end with its request from now on (idempotent)."""
        await self._context.stop()

    async def finish(self) -> None:
        """Close idle connections, let active ones finish their request, return when none is left.

        Who has only just connected may have his first request on its way, and gets a moment for it.
        """
        await self.keep_none()
        self._waiting.clear()
        loop = self._context.loop
        since = loop.time() - _IDLE_S
        for connection in list(self._open):
            if connection.idle_since <= since or (connection.idle and connection.requests):
                connection.close()
        later = loop.call_later(_IDLE_S, self._close_idle)
        try:
            await self._none_left.wait()
        finally:
            later.cancel()

    def _close_idle(self) -> None:
        for connection in list(self._open):
            if connection.idle:
                connection.close()

    async def break_off(self, timeout_s: float) -> None:
        """Break what is left."""
        await self.keep_none()
        for connection in list(self._open):
            connection.break_off()
        try:
            await asyncio.wait_for(self._none_left.wait(), timeout_s)
        except asyncio.TimeoutError:
            log.warning("%d connections did not end with their server", len(self._open))

    # -- the owner of each connection ------------------------------------------------------------------------------

    def add(self, connection: Connection) -> None:
        """See `engine_http.connection.Owner.add`."""
        self._open.add(connection)
        self._none_left.clear()

    def discard(self, connection: Connection) -> None:
        """See `engine_http.connection.Owner.discard`."""
        self._open.discard(connection)
        if self._waiting:
            self._tell_waiting()
        if not self._open:
            self._none_left.set()

    def plain_lane(self, connection: Connection) -> Lane:
        """See `engine_http.connection.Owner.plain_lane`."""
        from .plain import PlainLane

        return PlainLane(connection)

    def full_lane(self, connection: Connection, *, http2: bool) -> LaneWithTask:
        """See `engine_http.connection.Owner.full_lane`."""
        from .full import FullLane  # slow to import

        return FullLane(connection, http2=http2)


def _idle_since(connection: Connection) -> float:
    return connection.idle_since
