"""Middlewares around the ingress, and the guard around everything."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

from ..seam.ingress_server import ASGIApp, StreamBroken
from ..seam.log import Log
from .exchange import TEXT_TYPE, printable

__all__ = ["ErrorGuard", "wrap_middlewares"]

_logger = Log("engine.http")


class ErrorGuard:
    """The outermost application: whatever a middleware raises becomes a plain answer and one log record.

    Args:
        app: The application inside.
        debug: Tell clients the traceback.
    """

    def __init__(self, app: ASGIApp, *, debug: bool = False) -> None:
        self._app = app
        self._debug = debug

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noting_send(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except StreamBroken:
            raise
        except Exception as error:
            _logger.exception("%s %s failed in a middleware", scope["method"], printable(scope["path"]))
            if started:
                raise StreamBroken from error
            text = "".join(traceback.format_exception(error)) if self._debug else "Internal Server Error"
            body = text.encode("utf-8", "replace")
            headers = [(b"content-length", b"%d" % len(body)), TEXT_TYPE]
            await send({"type": "http.response.start", "status": 500, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})


def wrap_middlewares(app: ASGIApp, middlewares: Sequence[Any], debug: bool = False) -> ASGIApp:
    """Put middlewares around an application, and a guard around everything.

    Args:
        app: The application.
        middlewares: `starlette.middleware.Middleware` objects, or callables that take the application and return
            one; the first one is outermost.
        debug: Tell clients the traceback of what a middleware raises.

    Raises:
        Exception: Whatever a middleware's constructor raises.
    """
    for middleware in reversed(middlewares):
        if hasattr(middleware, "cls"):
            factory, args, kwargs = middleware
            app = factory(app, *args, **kwargs)
        else:
            app = middleware(app)
    return ErrorGuard(app, debug=debug)
