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
    threading.Thread(target=_import_full_lane, name="engine-import", daemon=True).start()


def _import_full_lane() -> None:
    with contextlib.suppress(OSError):  # there are no descriptors left: then it is imported when it is needed
        importlib.import_module("engine_http.full")


class HypercornServer:
    """An `engine.seam.ingress_server.IngressServer`."""

    preload: tuple[str, ...] = (
        "engine_http.accepting",
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
        stopping: Callable[[], Awaitable[bool]],
    ) -> None:
        """Serve on bound sockets, in the running asyncio loop, until ``stopping()`` returns.

        See `engine.seam.ingress_server.IngressServer.serve`.

        Raises:
            engine.errors.InvalidArgument: A setting turned out to be wrong only now.
        """
        from .accepting import Accepting
        from .connections import Connections
        from .server_context import ServerContext
        from .settings import build_config, tls_context

        config = build_config(options)
        tls = tls_context(config)
        loop = asyncio.get_running_loop()
        connections = Connections(ServerContext(app, config, loop, options.stall_timeout_s), options.max_connections)
        accepting: list[Accepting] = []
        try:
            accepting.extend(
                Accepting(
                    sock,
                    config.backlog,
                    connections.accept,
                    connections,
                    loop,
                    tls=tls,
                    handshake_timeout_s=config.ssl_handshake_timeout,
                )
                for sock in sockets
            )
            started()
            # not needed for the first answers, and slow to import: done aside, before somebody needs it
            later = loop.call_later(_IMPORT_AFTER_S, _import_full_lane_aside)
            try:
                close_port = await stopping()
            finally:
                later.cancel()
            for one in accepting:
                one.finish(close_port=close_port)
            await connections.keep_none()
            for one in accepting:
                await one.begun()
            await connections.finish()
        finally:
            for one in accepting:
                one.stop()
                await one.stopped()
            await connections.break_off(_CLOSE_TIMEOUT_S)
