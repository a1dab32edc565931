"""All connections of one server: how they are made, kept and ended.

Everything here runs on the server's loop, and only its thread touches it. A connection is kept from when it opens until
it is closed and the application calls made for it have ended, whoever closed it.
"""

from __future__ import annotations

import asyncio

from engine.seam.log import Log

from .connection import Connection
from .lane import Lane, LaneWithTask
from .server_context import ServerContext

__all__ = ["Connections"]

log = Log("engine.http")


class Connections:
    """The connections of one server, as their `engine_http.connection.Owner`.

    Args:
        context: What they share.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._open: set[Connection] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()

    def __repr__(self) -> str:
        return f"<Connections {len(self._open)} open>"

    def accept(self) -> Connection:
        """Make the protocol of a new connection."""
        return Connection(self._context, self)

    async def finish(self) -> None:
        """Close idle connections, let active ones finish their request, return when none is left."""
        await self._context.stop()
        for connection in list(self._open):
            if connection.idle:
                connection.close()
        await self._none_left.wait()

    async def break_off(self, timeout_s: float) -> None:
        """Break what is left."""
        await self._context.stop()
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
