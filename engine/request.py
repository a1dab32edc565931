"""The one argument of a backend: a Starlette request over HTTP, a `ServeRequest` from a handle.

Owns both ways a request travels: an HTTP request as its pickled scope and its body, a Starlette request passed to a
handle as a `RequestEnvelope` of the same two. Starlette is imported when a request is first asked for something that
only Starlette has, never before.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import urlencode

from .errors import InvalidArgument

if TYPE_CHECKING:
    from types import TracebackType

    from starlette.datastructures import URL, FormData, Headers, QueryParams, State
    from starlette.requests import Request

    from .buffered import BufferedRequest

__all__ = [
    "RequestEnvelope",
    "ServeRequest",
    "build_http_request",
    "envelope_of",
    "envelope_of_async",
    "is_starlette_request",
    "trim_scope",
]


class ServeRequest:
    """What a backend gets when it is called through a handle: reads like `starlette.requests.Request`.

    It is not an instance of it, so that a backend can tell its callers apart where it wants to.

    ===================== ================================== =========================================
    HTTP client           handle                             backend reads
    ===================== ================================== =========================================
    ``headers={...}``     ``.options(http_headers={...})``   ``request.headers`` (case-insensitive)
    method POST           ``.options(http_method="POST")``   ``request.method``
    ``json={...}``        ``.remote({...})``                 ``await request.json()``
    ``form={...}``        ``.remote({...})``                 ``await request.form()``
    ``params={"a": "b"}`` ``.remote(a="b")``                 ``request.query_params``
    ``data="long str"``   ``.remote("long str")``            ``await request.body()`` (bytes in both)
    (nothing)             ``.remote(python_object)``         ``request.data`` (the very object)
    ===================== ================================== =========================================

    Args:
        data: What the caller passed to ``remote()``.
        kwargs: The query parameters; their values are turned into strings, lists and tuples into repeated ones.
        method: The HTTP verb to report.
        headers: Pairs of name and value.
    """

    __slots__ = ("_headers", "_kwargs", "_request", "data", "method")

    data: Any
    """The very object that the caller passed."""
    method: str
    """The HTTP verb: "GET" unless the caller chose another by ``options(http_method=...)``."""

    def __init__(
        self, data: Any, *, kwargs: dict[str, Any], method: str = "GET", headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.data = data
        self.method = method
        self._kwargs = kwargs
        self._headers = headers
        self._request: Request | None = None

    def __repr__(self) -> str:
        return f"<ServeRequest {self.method} data={type(self.data).__name__} params={sorted(self._kwargs)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.data, self._kwargs, self.method, tuple(self._headers))

    @property
    def headers(self) -> Headers:
        """The headers of ``options(http_headers=...)``, case-insensitive."""
        return self._mirror.headers

    @property
    def query_params(self) -> QueryParams:
        """The keyword arguments of the call, as strings."""
        return self._mirror.query_params

    @property
    def cookies(self) -> dict[str, str]:
        """What a ``cookie`` header says."""
        return self._mirror.cookies

    @property
    def url(self) -> URL:
        """The path ``/`` and the query: a call by handle has no address."""
        return self._mirror.url

    @property
    def base_url(self) -> URL:
        """The path ``/``."""
        return self._mirror.base_url

    @property
    def path_params(self) -> dict[str, Any]:
        """Always empty: a call by handle has no path."""
        return self._mirror.path_params

    @property
    def client(self) -> None:
        """Always None: a call by handle has no network address."""
        return None

    @property
    def state(self) -> State:
        """A place for the backend's own notes about this request."""
        return self._mirror.state

    @property
    def scope(self) -> dict[str, Any]:
        """The call as an ASGI scope."""
        return self._mirror.scope  # type: ignore[return-value]

    async def body(self) -> bytes:
        """The data as bytes: a string in UTF-8, bytes as they are, None as no bytes, everything else as JSON.

        Raises:
            TypeError: The data has no form in JSON.
        """
        data = self.data
        if isinstance(data, bytes):
            return data
        if isinstance(data, str):
            return data.encode("utf-8")
        if data is None:
            return b""
        if isinstance(data, (bytearray, memoryview)):
            return bytes(data)
        from .http.responses import to_json

        return to_json(data)

    async def json(self) -> Any:
        """The data itself; a string or bytes are parsed as JSON.

        Raises:
            json.JSONDecodeError: A string or bytes are not JSON.
        """
        if isinstance(self.data, (str, bytes, bytearray)):
            return json.loads(self.data)
        return self.data

    def form(self, **_limits: Any) -> _Form:
        """The data as a form: ``await request.form()`` or ``async with request.form() as form``.

        Args:
            _limits: What Starlette takes here; there is nothing to limit.

        Returns:
            Something to await or to enter, giving a `starlette.datastructures.FormData`. Awaiting it raises
            `errors.InvalidArgument` when the caller did not pass a mapping.
        """
        return _Form(self.data)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The body in one piece, then an empty one, as Starlette ends a stream."""
        yield await self.body()
        yield b""

    async def is_disconnected(self) -> bool:
        """Always False: there is no connection that could break."""
        return False

    async def close(self) -> None:
        """Do nothing: there are no files to close."""

    @property
    def _mirror(self) -> Request:
        if self._request is None:
            from .buffered import BufferedRequest

            pairs: list[tuple[str, str]] = []
            for name, value in self._kwargs.items():
                values = value if isinstance(value, (list, tuple)) else (value,)
                pairs.extend((name, str(one)) for one in values)
            scope: dict[str, Any] = {
                "type": "http",
                "http_version": "1.1",
                "method": self.method,
                "scheme": "http",
                "path": "/",
                "raw_path": b"/",
                "root_path": "",
                "query_string": urlencode(pairs).encode("ascii"),
                "headers": [(str(name).lower().encode("latin-1"), _latin(value)) for name, value in self._headers],
                "client": None,
                "server": None,
                "path_params": {},
            }
            self._request = BufferedRequest(scope, b"")
        return self._request


def _rebuild(data: Any, kwargs: dict[str, Any], method: str, headers: Sequence[tuple[str, str]]) -> ServeRequest:
    return ServeRequest(data, kwargs=kwargs, method=method, headers=headers)


def _latin(value: Any) -> bytes:
    text = str(value)
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise InvalidArgument(f"http_headers: {text!r} has characters that no HTTP header can carry") from None


class _Form:
    """A form to await or to enter, as Starlette's `Request.form` gives one."""

    __slots__ = ("_data",)

    def __init__(self, data: Any) -> None:
        self._data = data

    def __await__(self) -> Generator[Any, None, FormData]:
        return self._build().__await__()

    async def __aenter__(self) -> FormData:
        return await self._build()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    async def _build(self) -> FormData:
        from starlette.datastructures import FormData, UploadFile

        data = self._data
        if isinstance(data, FormData):
            return data
        if not isinstance(data, Mapping):
            raise InvalidArgument(
                f"form() needs the caller to pass a dict of fields, as in handle.remote({{'name': 'value'}}); "
                f"it passed a {type(data).__name__}"
            )
        fields: list[tuple[str, str | UploadFile]] = []
        for name, value in data.items():
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(one, bytes):
                    one = one.decode("utf-8")
                fields.append((str(name), one if isinstance(one, (str, UploadFile)) else str(one)))
        return FormData(fields)


# -- HTTP requests -------------------------------------------------------------------------------------------------

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


def trim_scope(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Keep those parts of an ASGI scope that another process can use."""
    trimmed = {}
    for key in _PLAIN_KEYS:
        value = scope.get(key, _ABSENT)
        if value is not _ABSENT:
            trimmed[key] = value
    # a server may give any iterable of pairs, and pairs that are lists
    trimmed["headers"] = [(name, value) for name, value in scope.get("headers", ())]
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
        from .buffered import BufferedRequest

        _buffered_request = BufferedRequest
    return _buffered_request(pickle.loads(head), body)


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

    def request(self) -> BufferedRequest:
        """The request that the backend gets."""
        return build_http_request(self.head, self.body)


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
