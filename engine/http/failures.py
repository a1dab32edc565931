"""What user code or the engine raised, as HTTP. Runs in the replica, and in the ingress for what never came there.

What says that a call was wrong is about the client's request only if the engine found that out for this very request.
Raised by user code, it is about a call that the backend made, say: the backend's failure, like all else it raises.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..errors import (
    DeadlineExceeded,
    EndpointNotFound,
    EngineClosed,
    MethodNotFound,
    NoReplica,
    Overloaded,
    ReplicaDied,
    RetryLater,
)
from ..seam.error_text import message_of, shortened, summary_of, traceback_of
from ..seam.jsonable import to_json
from .heads import JSON, TEXT, encode_head

__all__ = ["Told", "failure_head", "tell_failure"]

_RETRY_AFTER_S = b"1"
_LONGEST_CAUSE = 500

_Row = tuple[type[BaseException], int, str]
# The most special type first; the first that fits decides.
_PASSED_ON: tuple[_Row, ...] = (
    (Overloaded, 503, "Too many requests are waiting; try again later."),
    (NoReplica, 503, "Nothing can serve this request at the moment; try again later."),
    (ReplicaDied, 502, "The process that served this request ended before it answered."),
    (DeadlineExceeded, 504, "This request was not answered in time."),
    (RetryLater, 503, "This request cannot be served at the moment; try again later."),
    (EngineClosed, 503, "The service is shutting down."),
)
_OF_THE_REQUEST: tuple[_Row, ...] = (
    (MethodNotFound, 400, "What this route serves has no public method of that name."),
    (EndpointNotFound, 404, "Not Found"),
)


class Told(NamedTuple):
    """What an HTTP client is told of a failure.

    Attributes:
        head: See `engine.http.heads`.
        body: The body.
        untold: What went wrong with the backend and the client is not told, so that the log must say it; or None.
        cause: For the line that the ingress logs of it: type and message of what the client is told in general words
            only; empty if there is nothing to add.
    """

    head: bytes
    body: bytes
    untold: BaseException | None
    cause: str


def tell_failure(error: BaseException, *, of_the_request: bool, debug: bool = False) -> Told:
    """Say to an HTTP client what went wrong, without telling it about the inside. Never raises, whatever the error is.

    Args:
        error: An `engine.errors.EngineError`, a starlette or FastAPI ``HTTPException``, or whatever user code raised.
        of_the_request: The engine itself found fault with the request, so that user code has no part in it.
        debug: Put the traceback into the body where it would be "Internal Server Error", and what the engine says of a
            failure of its own below the sentence that clients are told.
    """
    try:
        if _is_http_exception(error):
            return Told(*_http_exception(error), None, "")
        for kind, status, sentence in (*_PASSED_ON, *_OF_THE_REQUEST) if of_the_request else _PASSED_ON:
            if isinstance(error, kind):
                later = ((b"retry-after", _RETRY_AFTER_S),) if status == 503 and kind is not EngineClosed else ()
                sentence += f"\n\n{message_of(error)}" if debug else ""
                return Told(*_text(status, sentence, later), None, _cause(error) if status >= 500 else "")
        return Told(*_other(error, debug=debug), error, _cause(error))
    except BaseException as worse:  # a detail that has no form in JSON, a header that HTTP cannot carry, or anything
        return Told(*_text(500, traceback_of(worse) if debug else "Internal Server Error"), worse, _cause(worse))


def failure_head(error: BaseException, *, debug: bool = False) -> tuple[bytes, bytes]:
    """Head and body of `tell_failure`, for what the engine itself raised over the request."""
    return tell_failure(error, of_the_request=True, debug=debug)[:2]


def _cause(error: BaseException) -> str:
    """In one line, which nobody who had a hand in the message can break."""
    line = shortened(summary_of(error).partition("\n")[0], _LONGEST_CAUSE)
    return line if line.isprintable() else repr(line)


def _other(error: BaseException, *, debug: bool) -> tuple[bytes, bytes]:
    forms = sys.modules.get("starlette.formparsers")
    if forms is not None and isinstance(error, forms.MultiPartException):
        return _text(400, str(error.message))
    return _text(500, traceback_of(error) if debug else "Internal Server Error")


def _text(status: int, sentence: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> tuple[bytes, bytes]:
    body = sentence.encode("utf-8", "replace")
    return _whole(status, TEXT, body, headers), body


def _whole(status: int, content_type: str, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    own = [(b"content-length", b"%d" % len(body)), (b"content-type", content_type.encode("ascii"))]
    return encode_head(status, [*own, *headers])


def _is_http_exception(error: BaseException, library: str = "starlette") -> bool:
    """Whether this is an ``HTTPException`` of Starlette (FastAPI's are, too), without importing it."""
    module = sys.modules.get(f"{library}.exceptions")
    return module is not None and isinstance(error, module.HTTPException)


def _http_exception(error: Any) -> tuple[bytes, bytes]:
    status = error.status_code
    given = [(_latin(name).lower(), _latin(value)) for name, value in (error.headers or {}).items()]
    if status in (204, 205, 304):
        return encode_head(status, given, 0 if status == 205 else None), b""
    # FastAPI answers in JSON, and Starlette's plain text can carry a string only
    in_json = _is_http_exception(error, "fastapi") or not isinstance(error.detail, str)
    body = to_json({"detail": error.detail}) if in_json else error.detail.encode("utf-8", "replace")
    content_type = next((value for name, value in given if name == b"content-type"), None)
    rest = [(name, value) for name, value in given if name not in (b"content-type", b"content-length")]
    chosen = content_type.decode("latin-1") if content_type is not None else (JSON if in_json else TEXT)
    return _whole(status, chosen, body, rest), body


def _latin(given: object) -> bytes:
    text = str(given)
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"the headers of an HTTPException hold {text!r}, which no HTTP header can carry") from None
