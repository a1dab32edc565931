"""Middlewares around the ingress, and the guard around everything."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ..seam.error_text import traceback_of
from ..seam.ingress_server import ASGIApp, StreamBroken
from ..seam.log import Log
from .exchange import TEXT_TYPE, printable, request_id_of

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
        started: Any = None  # the message that began the answer

        def noting_send(message: Any) -> Any:  # to be awaited: a coroutine of its own would cost each message another
            nonlocal started
            if started is None:
                started = message
            return send(message)

        try:
            await self._app(scope, receive, noting_send)
        except StreamBroken:
            raise
        except Exception as error:
            # of the answer that has begun, if one has: the ingress may have given the request its id
            request_id = request_id_of(_given_id(started) or _given_id(scope))
            _logger.exception(
                "%s %s failed in a middleware (request %s)", scope["method"], printable(scope["path"]), request_id
            )
            if started is not None:
                raise StreamBroken from error
            text = traceback_of(error) if self._debug else "Internal Server Error"
            body = text.encode("utf-8", "replace")
            headers = [(b"content-length", b"%d" % len(body)), TEXT_TYPE, (b"x-request-id", request_id.encode("ascii"))]
            await send({"type": "http.response.start", "status": 500, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})


def _given_id(message: Any) -> bytes | None:
    with contextlib.suppress(Exception):  # a middleware may have put anything into it, and have failed for that
        for name, value in message["headers"]:
            if name.lower() == b"x-request-id" and isinstance(value, bytes):
                return value
    return None


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
