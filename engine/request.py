"""The one argument of a backend: a Starlette request over HTTP, a `ServeRequest` from a handle.

Starlette is imported when a request is first asked for something that only Starlette has, never before.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from .errors import InvalidArgument

if TYPE_CHECKING:
    from types import TracebackType

    from starlette.datastructures import URL, FormData, Headers, State
    from starlette.requests import Request


__all__ = ["QueryParameters", "ServeRequest"]


class QueryParameters(Mapping[str, Any]):
    """The keyword arguments of a call by handle, read like Starlette's ``query_params``, but with the objects passed.

    Over HTTP all values are strings; here they are what the caller passed. A list or tuple stands for a name that is
    given several times: `getlist` and `multi_items` give its items one by one, and ``params[name]`` all of it.
    ``str(params)`` is the query as a URL would have it.
    """

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"QueryParameters({self._values!r})"

    def __str__(self) -> str:
        return urlencode([(name, str(value)) for name, value in self.multi_items()])

    def getlist(self, name: str) -> list[Any]:
        """All values of a name: the items of a list or tuple, otherwise the one value; none without such a name."""
        return _several(self._values[name]) if name in self._values else []

    def multi_items(self) -> list[tuple[str, Any]]:
        """Pairs of name and value, one for each item of a list or tuple."""
        return [(name, one) for name, value in self._values.items() for one in _several(value)]


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


class ServeRequest:
    """What a backend gets when it is called through a handle: reads like `starlette.requests.Request`.

    It is not an instance of it, so that a backend can tell its callers apart where it wants to.

    ===================== ================================== ===========================================
    HTTP client           handle                             backend reads
    ===================== ================================== ===========================================
    ``headers={...}``     ``.options(http_headers={...})``   ``request.headers`` (case-insensitive)
    method POST           ``.options(http_method="POST")``   ``request.method``
    ``json={...}``        ``.remote({...})``                 ``await request.json()``
    ``form={...}``        ``.remote({...})``                 ``await request.form()``
    ``params={"a": "b"}`` ``.remote(a="b")``                 ``request.query_params`` (here any objects)
    ``data="long str"``   ``.remote("long str")``            ``await request.body()`` (bytes in both)
    (nothing)             ``.remote(python_object)``         ``request.data`` (the very object)
    ===================== ================================== ===========================================

    Args:
        data: What the caller passed to ``remote()``.
        kwargs: The query parameters.
        method: The HTTP verb to report.
        headers: Pairs of name and value.
    """

    __slots__ = ("_headers", "_kwargs", "_params", "_request", "data", "method")

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
        self._params: QueryParameters | None = None
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
    def query_params(self) -> QueryParameters:
        """The keyword arguments of the call, the very objects; over HTTP they are strings."""
        if self._params is None:
            self._params = QueryParameters(self._kwargs)
        return self._params

    @property
    def cookies(self) -> dict[str, str]:
        """What a ``cookie`` header says."""
        return self._mirror.cookies

    @property
    def url(self) -> URL:
        """The path ``/`` and the query, all of it as text: a call by handle has no address."""
        return self._mirror_with_query.url

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
        return self._mirror_with_query.scope  # type: ignore[return-value]

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
        from .seam.jsonable import to_json

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
            from .seam.buffered_request import BufferedRequest

            scope: dict[str, Any] = {
                "type": "http",
                "http_version": "1.1",
                "method": self.method,
                "scheme": "http",
                "path": "/",
                "raw_path": b"/",
                "root_path": "",
                "query_string": b"",
                "headers": [(str(name).lower().encode("latin-1"), _latin(value)) for name, value in self._headers],
                "client": None,
                "server": None,
                "path_params": {},
            }
            self._request = BufferedRequest(scope, b"")
        return self._request

    @property
    def _mirror_with_query(self) -> Request:
        """Apart, as the text of what was passed may be long, and is of use to few."""
        mirror = self._mirror
        if self._kwargs and not mirror.scope["query_string"]:
            mirror.scope["query_string"] = str(self.query_params).encode("ascii")
        return mirror


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

        from .seam.error_text import a_kind_of

        data = self._data
        if isinstance(data, FormData):
            return data
        if not isinstance(data, Mapping):
            raise InvalidArgument(
                f"form() needs the caller to pass a dict of fields, as in handle.remote({{'name': 'value'}}); "
                f"it passed {a_kind_of(data)}"
            )
        fields: list[tuple[str, str | UploadFile]] = []
        for name, value in data.items():
            for one in _several(value):
                if isinstance(one, bytes):
                    one = one.decode("utf-8")
                fields.append((str(name), one if isinstance(one, (str, UploadFile)) else str(one)))
        return FormData(fields)
