"""Serves an ASGI application with hypercorn's protocols until told to stop.

Hypercorn's own ``serve`` can wait for ever when it stops: on Python 3.12.1 and later it waits for every connection
before its timeout begins. So the life of sockets and connections is kept here, and hypercorn does the protocols.
Stopping closes idle connections at once and lets active ones finish; cancelling breaks them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence

from engine.config import HTTPOptions
from engine.seam.ingress_server import ASGIApp

__all__ = ["HypercornServer"]

_CLOSE_TIMEOUT_S = 1.0
"""How long broken connections may take to be gone, before serving ends without them."""
_IMPORT_AFTER_S = 1.0


def _import_full_lane_aside() -> None:
    # A thread of its own rather than the loop's executor, whose threads stay for ever.
    threading.Thread(
        target=importlib.import_module, args=("engine_http.full",), name="engine-import", daemon=True
    ).start()


class HypercornServer:
    """An `engine.seam.ingress_server.IngressServer`."""

    preload: tuple[str, ...] = (
        "engine_http.connections",
        "engine_http.plain",
        "engine_http.settings",
        "hypercorn.config",
    )

    def validate(self, options: HTTPOptions) -> None:
        """Check the settings that are hypercorn's.

        Raises:
            engine.errors.InvalidArgument: A setting is unknown, or has the wrong type or value.
        """
        if options.server_options:
            from .settings import check

            check(options)

    async def serve(
        self,
        app: ASGIApp,
        sockets: Sequence[socket.socket],
        options: HTTPOptions,
        *,
        started: Callable[[], None],
        stopping: Callable[[], Awaitable[object]],
    ) -> None:
        """Serve on bound sockets, in the running asyncio loop, until ``stopping()`` returns.

        Raises:
            engine.errors.InvalidArgument: A setting turned out to be wrong only now.
        """
        from .connections import Connections
        from .server_context import ServerContext
        from .settings import build_config, tls_context

        config = build_config(options)
        tls = tls_context(config)
        loop = asyncio.get_running_loop()
        connections = Connections(ServerContext(app, config, loop))
        servers: list[asyncio.Server] = []
        try:
            for sock in sockets:
                own = sock.dup()  # a server closes its socket
                own.setblocking(False)
                server = await loop.create_server(
                    connections.accept,
                    sock=own,
                    ssl=tls,
                    backlog=config.backlog,
                    ssl_handshake_timeout=config.ssl_handshake_timeout if tls is not None else None,
                )
                servers.append(server)
            started()
            # not needed for the first answers, and slow to import: done aside, before somebody needs it
            later = loop.call_later(_IMPORT_AFTER_S, _import_full_lane_aside)
            try:
                await stopping()
            finally:
                later.cancel()
            for server in servers:
                server.close()
            await connections.finish()
        finally:
            for server in servers:
                server.close()
            await connections.break_off(_CLOSE_TIMEOUT_S)
            for server in servers:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(server.wait_closed(), _CLOSE_TIMEOUT_S)
