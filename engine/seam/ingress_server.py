"""The inward seam: what serves the ingress on sockets.

A server is found by its name in the entry-point group ``engine.ingress_servers``. The core knows no server by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..config import HTTPOptions
from .plugins import load_plugin

if TYPE_CHECKING:
    import socket

__all__ = ["ASGIApp", "IngressServer", "StreamBroken", "load_server"]

ENTRY_POINTS = "engine.ingress_servers"

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
"""An ASGI 3 application."""


class StreamBroken(Exception):
    """An answer broke off after its first part: the server must break the connection, so that the client notices.

    Whoever raised it has logged why; a server need not.
    """


class IngressServer(Protocol):
    """Serves an ASGI application on sockets until told to stop."""

    preload: tuple[str, ...]
    """Modules worth importing before a worker exists."""

    def validate(self, options: HTTPOptions) -> None:
        """Check the server's own settings, where the engine was created, before any worker starts.

        Raises:
            engine.errors.InvalidArgument: A setting is unknown, or has the wrong type or value.
        """

    async def serve(
        self,
        app: ASGIApp,
        sockets: Sequence[socket.socket],
        options: HTTPOptions,
        *,
        started: Callable[[], None],
        stopping: Callable[[], Awaitable[bool]],
    ) -> None:
        """Serve on bound sockets, in the running asyncio loop.

        Calls ``started`` once connections are accepted. When ``stopping()`` returns, it accepts who has connected
        already, and then no more. If ``stopping()`` returned True, it shuts the sockets down (``SHUT_RDWR``), so that
        whoever connects then is refused, though other processes have the sockets, too. It closes idle connections, lets
        active ones finish their request and returns when none is left. When it is cancelled it breaks what is left and
        returns soon. The sockets stay the caller's and open.

        Raises:
            engine.errors.InvalidArgument: A setting turned out to be wrong only now.
        """


def load_server(name: str) -> IngressServer:
    """Find a server by its name.

    Raises:
        InvalidArgument: No installed package provides it.
    """
    server: IngressServer = load_plugin(ENTRY_POINTS, name, "ingress server")()
    return server
