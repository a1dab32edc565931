"""How requests travel: an HTTP request as its pickled scope and its body, a Starlette request in an envelope of both.

Starlette is imported when the first request is built, never before.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from starlette.requests import Request

    from .buffered_request import BufferedRequest

__all__ = [
    "RequestEnvelope",
    "build_http_request",
    "envelope_of",
    "envelope_of_async",
    "is_starlette_request",
    "trim_scope",
]

_ABSENT = object()
_PLAIN_KEYS = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "client",
    "server",
    "path_params",
)


_EXTRAS = "engine.extras"


def trim_scope(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Keep those parts of an ASGI scope that another process can use; what middlewares left as `scope_extras`."""
    trimmed = {}
    for key in _PLAIN_KEYS:
        value = scope.get(key, _ABSENT)
        if value is not _ABSENT:
            trimmed[key] = value
    # a server may give any iterable of pairs, and pairs that are lists
    trimmed["headers"] = [(name, value) for name, value in scope.get("headers", ())]
    from_server = len(trimmed) + ("asgi" in scope) + ("extensions" in scope) + ("state" in scope)
    if len(scope) != from_server or scope.get("state"):
        from .scope_extras import pack_extras

        extras = pack_extras(scope, trimmed)
        if extras:
            trimmed[_EXTRAS] = extras
    return trimmed


_buffered_request: type[BufferedRequest] | None = None


def build_http_request(head: bytes, body: bytes) -> BufferedRequest:
    """Make the request that a backend gets for an HTTP call.

    Args:
        head: The pickled scope, as `trim_scope` left it.
        body: The whole body.
    """
    global _buffered_request
    if _buffered_request is None:
        from .buffered_request import BufferedRequest

        _buffered_request = BufferedRequest
    scope = pickle.loads(head)
    extras = scope.pop(_EXTRAS, None)
    if extras:
        from .scope_extras import restore_extras

        restore_extras(scope, extras)
    return _buffered_request(scope, body)


# -- Starlette requests passed to a handle -------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestEnvelope:
    """A Starlette request on its way through a handle.

    Attributes:
        head: The pickled scope, as `trim_scope` leaves it.
        body: The whole body.
    """

    head: bytes
    body: bytes


def is_starlette_request(value: object) -> TypeGuard[Request]:
    """Whether a value is a `starlette.requests.Request`, without importing Starlette."""
    module = sys.modules.get("starlette.requests")
    return module is not None and isinstance(value, module.Request)


def envelope_of(request: Request) -> RequestEnvelope:
    """Pack a Starlette request whose body is already in memory.

    Raises:
        InvalidArgument: Its body was not read yet, or was read in a way that kept nothing of it.
    """
    body = getattr(request, "_body", None)
    if body is None:
        if not _has_no_body(request):
            _check_unconsumed(request)
            raise InvalidArgument(
                "a sync handle cannot read the body of a request from the network: `await request.body()` first, "
                "or use a handle of get_handle(name, sync=False)"
            )
        body = b""
    return _pack(request, body)


async def envelope_of_async(request: Request) -> RequestEnvelope:
    """Pack a Starlette request, reading its body where that was not done yet.

    Raises:
        InvalidArgument: Its body was read in a way that kept nothing of it.
        starlette.requests.ClientDisconnect: The client left before its body was complete.
    """
    if getattr(request, "_body", None) is None:
        _check_unconsumed(request)
    return _pack(request, await request.body())


def _check_unconsumed(request: Request) -> None:
    if getattr(request, "_stream_consumed", False):
        raise InvalidArgument(
            "the body of this request was consumed by stream() or form() and cannot be passed on: "
            "`await request.body()` before those"
        )


def _has_no_body(request: Request) -> bool:
    if not str(request.scope.get("http_version", "")).startswith("1"):
        return False
    return "content-length" not in request.headers and "transfer-encoding" not in request.headers


def _pack(request: Request, body: bytes) -> RequestEnvelope:
    try:
        head = pickle.dumps(trim_scope(request.scope), 5)
    except Exception as error:
        raise InvalidArgument(f"this request cannot be passed on: its scope cannot be pickled ({error})") from error
    return RequestEnvelope(head, bytes(body))
