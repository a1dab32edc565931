"""What user code returned, as HTTP. Runs in the replica, so that the ingress unpickles and encodes nothing.

An answer is a head (`engine.http.heads`) and a body. `encode_result` gives both at once (`Encoded`) or one part after
the other (`engine.http.streams.Streamed`). Starlette is never imported here: a result can only be one of its responses
when somebody else imported it.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

from ..seam.jsonable import to_json
from .heads import BYTES, EMPTY_HEAD, JSON, TEXT, WITHOUT_BODY, encode_head, whole_head
from .streams import Background, Streamed

__all__ = ["Encoded", "encode_result"]


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


def encode_result(result: Any, request: Any = None) -> Encoded | Streamed:
    """Turn what a backend returned into HTTP.

    Args:
        result: Any kind of starlette ``Response`` goes out as it is, streaming included; ``str`` as text/plain,
            bytes as application/octet-stream, None as an empty answer; generators and iterators are streamed;
            everything else becomes JSON (`to_json`).
        request: The request that is answered: the answer to HEAD has no body, whatever its headers say.

    Raises:
        ResultNotSerializable: The result has no form in JSON.
        ValueError: A number is infinite or not a number; or HTTP cannot carry a response's head, or not with its body.
    """
    kind = type(result)
    if kind is str:
        body = result.encode("utf-8")
        return Encoded(whole_head(TEXT, len(body)), body)
    if kind is bytes:
        return Encoded(whole_head(BYTES, len(result)), result)
    if result is None:
        return Encoded(EMPTY_HEAD, b"")
    if kind is dict or kind is list:
        body = to_json(result)
        return Encoded(whole_head(JSON, len(body)), body)
    return _encode_other(result, request)


def _encode_other(result: Any, request: Any) -> Encoded | Streamed:
    starlette = sys.modules.get("starlette.responses")
    if starlette is not None and isinstance(result, starlette.Response):
        plain = type(result).__call__ is starlette.Response.__call__ and hasattr(result, "body")
        return _encode_response(result, request) if plain else Streamed(result, response=True)
    if isinstance(result, (bytearray, memoryview)):
        body = bytes(result)
        return Encoded(whole_head(BYTES, len(body)), body)
    if isinstance(result, str) and not isinstance(result, enum.Enum):
        body = result.encode("utf-8")
        return Encoded(whole_head(TEXT, len(body)), body)
    if isinstance(result, (AsyncIterator, Iterator)):
        return Streamed(result)
    body = to_json(result)
    return Encoded(whole_head(JSON, len(body)), body)


def _encode_response(response: Any, request: Any) -> Encoded:
    body = bytes(response.body)
    status = response.status_code
    bodiless = status in WITHOUT_BODY or (request is not None and request.method == "HEAD")
    head = encode_head(status, response.raw_headers, None if bodiless else len(body))
    return Encoded(head, body, response.background)
