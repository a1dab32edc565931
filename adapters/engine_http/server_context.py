"""What all connections of one server share.

It belongs to the server's loop, and only the loop's thread touches it.
"""

from __future__ import annotations

import asyncio
import functools
import time
from typing import TYPE_CHECKING

from engine.seam.ingress_server import ASGIApp

if TYPE_CHECKING:
    from hypercorn.asyncio.worker_context import WorkerContext
    from hypercorn.config import Config

__all__ = ["ServerContext"]


class ServerContext:
    """What a connection and its lane know of their server.

    Args:
        app: The application.
        config: Hypercorn's configuration.
        loop: The loop that every connection is served on.
        stall_timeout_s: Seconds for which a client may take nothing of an answer, or None.

    Attributes:
        logs_access: Whether each answer is to be written to the access log.
        stopping: Whether each connection is to be closed after its request.
    """

    def __init__(
        self, app: ASGIApp, config: Config, loop: asyncio.AbstractEventLoop, stall_timeout_s: float | None = None
    ) -> None:
        self.app = app
        self.config = config
        self.loop = loop
        self.stall_timeout_s = stall_timeout_s
        self.logs_access = config.log.access_logger is not None
        self.stopping = False
        self._common_second = 0
        self._common = b""

    @functools.cached_property
    def hypercorn(self) -> WorkerContext:
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

    async def stop(self) -> None:
        """Let each connection end with its request, in hypercorn's protocols as well (idempotent)."""
        self.stopping = True
        if "hypercorn" in self.__dict__:
            await self.hypercorn.terminated.set()
