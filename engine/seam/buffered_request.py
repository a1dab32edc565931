"""The Starlette request that a backend gets for an HTTP call: its body is already here.

The only module of the core that imports Starlette at its top, so it is imported where the first HTTP request is met.
"""

from __future__ import annotations

from typing import Any

import anyio
from starlette.requests import Request

__all__ = ["BufferedRequest"]

_ASGI = {"version": "3.0", "spec_version": "2.4"}


class BufferedRequest(Request):
    """A `starlette.requests.Request` whose whole body came with it.

    Everything works as on the original, as often as wanted and in any order, also from synchronous code that only
    reads attributes. `receive` gives the body once and then waits, as a server's does, so an ASGI application may be
    run on ``request.scope`` and ``request.receive``. It never tells that the client left: then the call is cancelled.

    Args:
        scope: The ASGI scope, as `engine.seam.http_request.trim_scope` leaves it; taken over, not copied.
        body: The body.
    """

    def __init__(self, scope: dict[str, Any], body: bytes) -> None:
        scope["asgi"] = _ASGI
        super().__init__(scope, receive=_Replay(body).receive)
        self._body = body

    @property
    def buffered_body(self) -> bytes:
        """The body, without awaiting."""
        return self._body

    @property
    def data(self) -> Any:
        """What only calls by handle have; a backend that asks for it over HTTP is told what to read instead."""
        raise AttributeError(
            "a request over HTTP has no .data, which exists for calls by handle only: read await request.json(), "
            "await request.body() or request.query_params, which both kinds of requests have"
        )

    def release(self) -> None:
        """Close the files of a form that was read. To be called, on any thread, when the call is over."""
        if self._form is not None:
            for _, value in self._form.multi_items():
                if not isinstance(value, str):
                    value.file.close()


class _Replay:
    """The ``receive`` of such a request, which does not know it: nothing is to keep it, and its body, in memory."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def receive(self) -> dict[str, Any]:
        if self._body is None:
            await anyio.sleep_forever()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
