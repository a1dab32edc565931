"""What user code returned or raised, as HTTP. Runs in the replica, so that the ingress unpickles and encodes nothing.

An answer is a *head*, the JSON array ``[status, [[name, value], ...]]`` in Latin-1, and a body. `encode_result` gives
both at once (`Encoded`) or one part after the other (`Streamed`). Starlette is never imported here: a result can only
be one of its responses when somebody else imported it.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import dataclasses
import datetime
import decimal
import enum
import json
import os
import sys
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from ..errors import (
    DeadlineExceeded,
    EndpointNotFound,
    EngineClosed,
    MethodNotFound,
    NoReplica,
    Overloaded,
    ReplicaDied,
    ResultNotSerializable,
    RetryLater,
)

__all__ = ["Encoded", "Streamed", "decode_head", "encode_head", "encode_result", "failure_head", "to_json"]

Headers: TypeAlias = list[tuple[bytes, bytes]]
Background: TypeAlias = Callable[[], Awaitable[Any]]

_TEXT = "text/plain; charset=utf-8"
_BYTES = "application/octet-stream"
_JSON = "application/json"
_JSON_LINES = "application/x-ndjson"
_RETRY_AFTER_S = b"1"


# -- heads ---------------------------------------------------------------------------------------------------------

# Heads repeat: the same few statuses, content types and lengths come again and again. Only short ones are kept, and
# all are forgotten when they become too many, so that neither memory nor one client's cookies stay.
_MOST_HEADS = 512
_LONGEST_KEPT_HEAD = 160
_decoded: dict[bytes, tuple[int, Headers]] = {}
_templates: dict[str, str] = {}


def encode_head(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Write status and headers for the way through a channel."""
    pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    return json.dumps([status, pairs], separators=(",", ":")).encode("ascii")


def decode_head(data: bytes) -> tuple[int, Headers]:
    """Read what `encode_head` wrote. The list is the caller's own."""
    known = _decoded.get(data)
    if known is None:
        status, pairs = json.loads(data)
        known = (status, [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs])
        if len(data) <= _LONGEST_KEPT_HEAD and b"cookie" not in data:
            if len(_decoded) >= _MOST_HEADS:
                _decoded.clear()
            _decoded[data] = known
    return known[0], known[1].copy()


def _whole_head(content_type: str, length: int) -> bytes:
    template = _templates.get(content_type)
    if template is None:
        template = _templates[content_type] = f'[200,[["content-length","%d"],["content-type","{content_type}"]]]'
    return (template % length).encode("ascii")


_EMPTY_HEAD = b'[200,[["content-length","0"]]]'


# -- JSON ----------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> bytes:
    """Write compact JSON in UTF-8.

    Beside what JSON knows, it takes numpy arrays and scalars (and what else has ``dtype`` and ``tolist``), dataclasses,
    pydantic models, dates, times and time spans (in seconds), `Decimal` (as a string), `UUID`, `Path`, enumerations,
    sets and other collections, and bytes that are UTF-8.

    Raises:
        ResultNotSerializable: Some part of it has no form in JSON; the message says which.
        ValueError: A number is infinite or not a number, or the value contains itself.
    """
    try:
        text = _encode(value)
    except TypeError:
        # keys that are no strings, or a part that has no form: the slow way handles the one and names the other
        text = _encode(_plain(value, "the result", 0))
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate can be written as an escape only
        return _encode_ascii(_plain(value, "the result", 0)).encode("ascii")


def _default(value: Any) -> Any:
    plain = _simplify(value)
    if plain is _NO_FORM:
        raise TypeError(type(value).__qualname__)
    return plain


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_default).encode
_encode_ascii = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_default).encode

_NO_FORM = object()
_COLLECTIONS = (
    set,
    frozenset,
    range,
    collections.deque,
    collections.abc.KeysView,
    collections.abc.ValuesView,
    collections.abc.ItemsView,
)
_DEEPEST = 500


def _simplify(value: Any) -> Any:
    """Turn a value that JSON does not know into one that is nearer to it, or `_NO_FORM`."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, decimal.Decimal):
        return str(value)  # a number of JSON would lose digits on the way
    if isinstance(value, _COLLECTIONS):
        return list(value)
    if isinstance(value, collections.abc.Mapping):
        return dict(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            return _NO_FORM
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type):
        return _NO_FORM
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return _NO_FORM


def _plain(value: Any, path: str, depth: int) -> Any:
    """The whole value in JSON's own types, with an error that says where it cannot be."""
    if depth > _DEEPEST:
        raise ValueError(f"{path[:80]}... is nested too deeply for JSON, or contains itself")
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {_plain_key(key, path): _plain(item, f"{path}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{path}[{position}]", depth + 1) for position, item in enumerate(value)]
    simpler = _simplify(value)
    if simpler is _NO_FORM:
        raise ResultNotSerializable(
            f"{path} is a {type(value).__qualname__}, which has no form in JSON; "
            f"return a starlette Response, bytes, or something made of dicts, lists, strings and numbers"
        )
    return _plain(simpler, path, depth + 1)


def _plain_key(key: Any, path: str) -> str | int | float | bool | None:
    simpler = key
    for _ in range(3):  # an enumeration of numpy scalars, say
        if simpler is None or isinstance(simpler, (str, int, float)):
            return simpler
        simpler = _simplify(simpler)
    raise ResultNotSerializable(f"{path} has the key {key!r}, a {type(key).__qualname__}, which has no form in JSON")


# -- results -------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A whole answer.

    Attributes:
        head: See `encode_head`.
        body: The body.
        background: What the response wants to have run once the answer is out, or None.
    """

    head: bytes
    body: bytes
    background: Background | None = None


def encode_result(result: Any) -> Encoded | Streamed:
    """Turn what a backend returned into HTTP.

    Args:
        result: Any kind of starlette ``Response`` goes out as it is, streaming included; ``str`` as text/plain,
            bytes as application/octet-stream, None as an empty answer; generators and iterators are streamed;
            everything else becomes JSON (`to_json`).

    Raises:
        ResultNotSerializable: The result has no form in JSON.
        ValueError: A number is infinite or not a number.
    """
    kind = type(result)
    if kind is str:
        body = result.encode("utf-8")
        return Encoded(_whole_head(_TEXT, len(body)), body)
    if kind is bytes:
        return Encoded(_whole_head(_BYTES, len(result)), result)
    if result is None:
        return Encoded(_EMPTY_HEAD, b"")
    if kind is dict or kind is list:
        body = to_json(result)
        return Encoded(_whole_head(_JSON, len(body)), body)
    return _encode_other(result)


def _encode_other(result: Any) -> Encoded | Streamed:
    starlette = sys.modules.get("starlette.responses")
    if starlette is not None and isinstance(result, starlette.Response):
        plain = type(result).__call__ is starlette.Response.__call__ and hasattr(result, "body")
        return _encode_response(result) if plain else Streamed(result, response=True)
    if isinstance(result, (bytearray, memoryview)):
        body = bytes(result)
        return Encoded(_whole_head(_BYTES, len(body)), body)
    if isinstance(result, str) and not isinstance(result, enum.Enum):
        body = result.encode("utf-8")
        return Encoded(_whole_head(_TEXT, len(body)), body)
    if isinstance(result, (AsyncIterator, Iterator)):
        return Streamed(result)
    body = to_json(result)
    return Encoded(_whole_head(_JSON, len(body)), body)


def _encode_response(response: Any) -> Encoded:
    return Encoded(encode_head(response.status_code, response.raw_headers), bytes(response.body), response.background)


# -- streams -------------------------------------------------------------------------------------------------------

Part: TypeAlias = tuple[bytes, bytes]
"""A head, empty from the second part on, and a piece of the body."""


class Streamed:
    """An answer that comes in parts: an iterator of user code, or a Starlette response that is not a plain one.

    Each iteration gives ``(head, chunk)``, the head being empty from the second part on. No part is asked for before
    the one before it was taken. Closing the iteration closes the user's generator. An error before the first part is
    the call's error; one after it breaks the answer off. To be iterated once, either way.

    Attributes:
        background: What the response wants to have run once the answer is out. Known when the iteration has ended.
    """

    def __init__(self, source: Any, *, response: bool = False) -> None:
        self._source = source
        self._response = response
        self._blocking = not response and not isinstance(source, AsyncIterator)
        self.background: Background | None = None

    def _iterate(self) -> Generator[Part, None, None]:
        source: Iterator[Any] = self._source
        try:
            head = b""
            for item in source:
                chunk, content_type = _chunk(item)
                if not head:
                    head = _stream_head(content_type)
                    yield head, chunk
                else:
                    yield b"", chunk
            if not head:
                yield _EMPTY_HEAD, b""
        finally:
            _close(source)

    async def parts(self, scope: dict[str, Any], *, threaded: bool = False) -> AsyncGenerator[Part, None]:
        """Iterate on the running asyncio loop.

        Args:
            scope: The ASGI scope of the request; a Starlette response wants it.
            threaded: Ask an ordinary iterator for its items in a worker thread, where it cannot hold up the loop.
        """
        if self._response:
            parts = self._of_response(scope)
        elif self._blocking:
            parts = self._in_thread() if threaded else self._of_iterator()
        else:
            parts = self._of_async_iterator()
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()

    async def close(self) -> None:
        """Close the user's generator if nothing was or will be iterated (idempotent)."""
        source: Any = getattr(self._source, "body_iterator", None) if self._response else self._source
        if hasattr(source, "aclose"):
            await source.aclose()
        else:
            _close(source)

    async def _of_iterator(self) -> AsyncGenerator[Part, None]:
        parts = self._iterate()
        try:
            for part in parts:
                yield part
        finally:
            parts.close()

    async def _in_thread(self) -> AsyncGenerator[Part, None]:
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        parts = self._iterate()

        def advance() -> Part | None:
            return context.run(next, parts, None)

        step: asyncio.Future[Part | None] | None = None
        try:
            while True:
                step = loop.run_in_executor(None, advance)
                part = await asyncio.shield(step)
                if part is None:
                    break
                yield part
        finally:
            if step is not None and not step.done():  # cancelled: a generator that runs cannot be closed
                await asyncio.wait([step])
            parts.close()

    async def _of_async_iterator(self) -> AsyncGenerator[Part, None]:
        source: AsyncIterator[Any] = self._source
        try:
            head = b""
            async for item in source:
                chunk, content_type = _chunk(item)
                if not head:
                    head = _stream_head(content_type)
                    yield head, chunk
                else:
                    yield b"", chunk
            if not head:
                yield _EMPTY_HEAD, b""
        finally:
            if hasattr(source, "aclose"):
                await source.aclose()

    async def _of_response(self, scope: dict[str, Any]) -> AsyncGenerator[Part, None]:
        response = self._source
        handover = _Handover()
        task = asyncio.ensure_future(response(scope, handover.receive, handover.send))
        head = b""
        over = False
        try:
            while not over:
                message = await handover.next(task)
                if message is None:
                    raise RuntimeError(f"{type(response).__qualname__} returned before its answer was complete")
                if message["type"] == "http.response.start":
                    head = encode_head(message["status"], message.get("headers", ()))
                elif message["type"] == "http.response.body":
                    over = not message.get("more_body", False)
                    chunk = bytes(message.get("body", b""))
                    if chunk or head or over:
                        yield head, chunk
                        head = b""
                if not over:
                    handover.taken()
        finally:
            if over:
                # the rest of the call is the response's background task
                handover.taken()
                self.background = lambda: task
            else:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.exception()
                await self.close()


class _Handover:
    """Passes an ASGI application's messages to an iterator, one at a time: `send` returns once it was taken."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._message: dict[str, Any] | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._taken: asyncio.Future[None] | None = None

    async def receive(self) -> dict[str, Any]:
        # the iterator is closed when the client leaves, which cancels the application
        return await self._loop.create_future()  # type: ignore[no-any-return]

    async def send(self, message: dict[str, Any]) -> None:
        self._message = message
        self._taken = self._loop.create_future()
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
        await self._taken

    async def next(self, task: asyncio.Future[None]) -> dict[str, Any] | None:
        if self._message is None:
            self._arrived = self._loop.create_future()
            await asyncio.wait([task, self._arrived], return_when=asyncio.FIRST_COMPLETED)
            if self._message is None:
                self._arrived.cancel()
                await task  # raises what the application raised
                return None
        message, self._message = self._message, None
        return message

    def taken(self) -> None:
        if self._taken is not None and not self._taken.done():
            self._taken.set_result(None)


def _chunk(item: Any) -> tuple[bytes, str]:
    if isinstance(item, str):
        return item.encode("utf-8"), _TEXT
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item), _BYTES
    return to_json(item) + b"\n", _JSON_LINES


def _stream_head(content_type: str) -> bytes:
    return f'[200,[["content-type","{content_type}"]]]'.encode("ascii")


def _close(source: Any) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()


# -- failures ------------------------------------------------------------------------------------------------------

# The most special type first; the first that fits decides.
_FAILURES: tuple[tuple[type[BaseException], int, str], ...] = (
    (Overloaded, 503, "Too many requests are waiting; try again later."),
    (NoReplica, 503, "Nothing can serve this request at the moment; try again later."),
    (ReplicaDied, 502, "The process that served this request ended before it answered."),
    (DeadlineExceeded, 504, "This request was not answered in time."),
    (RetryLater, 503, "This request cannot be served at the moment; try again later."),
    (EngineClosed, 503, "The service is shutting down."),
    (MethodNotFound, 400, "What this route serves has no public method of that name."),
    (EndpointNotFound, 404, "Not Found"),
)


def failure_head(error: BaseException, *, debug: bool = False) -> tuple[bytes, bytes]:
    """Say to an HTTP client what went wrong, without telling it about the inside.

    Args:
        error: An `engine.errors.EngineError`, a starlette or FastAPI ``HTTPException``, or whatever user code raised.
        debug: Put the traceback into the body where it would be "Internal Server Error".

    Returns:
        Head and body.
    """
    if isinstance(error, Exception):
        if _is_http_exception(error, "starlette"):
            return _http_exception(error)
        for kind, status, sentence in _FAILURES:
            if isinstance(error, kind):
                later = ((b"retry-after", _RETRY_AFTER_S),) if status == 503 and kind is not EngineClosed else ()
                return _text(status, sentence, later)
        forms = sys.modules.get("starlette.formparsers")
        if forms is not None and isinstance(error, forms.MultiPartException):
            return _text(400, str(error.message))
    if debug:
        return _text(500, "".join(traceback.format_exception(type(error), error, error.__traceback__)))
    return _text(500, "Internal Server Error")


def _text(status: int, sentence: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> tuple[bytes, bytes]:
    body = sentence.encode("utf-8", "replace")
    return _whole(status, _TEXT, body, headers), body


def _whole(status: int, content_type: str, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    own = [(b"content-length", b"%d" % len(body)), (b"content-type", content_type.encode("ascii"))]
    return encode_head(status, [*own, *headers])


def _is_http_exception(error: Exception, library: str) -> bool:
    module = sys.modules.get(f"{library}.exceptions")
    return module is not None and isinstance(error, module.HTTPException)


def _http_exception(error: Any) -> tuple[bytes, bytes]:
    status = int(error.status_code)
    given = [
        (str(name).lower().encode("latin-1"), str(value).encode("latin-1"))
        for name, value in (error.headers or {}).items()
    ]
    if status < 200 or status in (204, 205, 304):
        return encode_head(status, given), b""
    # FastAPI answers in JSON, and Starlette's plain text can carry a string only
    in_json = _is_http_exception(error, "fastapi") or not isinstance(error.detail, str)
    body = to_json({"detail": error.detail}) if in_json else error.detail.encode("utf-8", "replace")
    content_type = next((value for name, value in given if name == b"content-type"), None)
    rest = [(name, value) for name, value in given if name not in (b"content-type", b"content-length")]
    chosen = content_type.decode("latin-1") if content_type is not None else (_JSON if in_json else _TEXT)
    return _whole(status, chosen, body, rest), body
