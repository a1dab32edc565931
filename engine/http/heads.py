"""Heads of answers: the JSON array ``[status, [[name, value], ...]]`` in Latin-1."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable
from typing import TypeAlias

__all__ = [
    "BYTES",
    "EMPTY_HEAD",
    "JSON",
    "JSON_LINES",
    "TEXT",
    "WITHOUT_BODY",
    "Headers",
    "announced_length",
    "decode_head",
    "encode_head",
    "stream_head",
    "whole_head",
    "wrong_length",
]

Headers: TypeAlias = list[tuple[bytes, bytes]]

TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"
JSON = "application/json"
JSON_LINES = "application/x-ndjson"

WITHOUT_BODY = (204, 304)
"""Answers with these statuses have no body, whatever their headers say."""

# Heads repeat: the same few statuses, content types and lengths come again and again. Only short ones are kept, and
# all are forgotten when they become too many, so that neither memory nor one client's cookies stay.
_MOST_HEADS = 512
_LONGEST_KEPT_HEAD = 160
_decoded: dict[bytes, tuple[int, Headers]] = {}
_templates: dict[str, str] = {}


_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


def encode_head(status: int, headers: Iterable[tuple[bytes, bytes]], length: int | None = None) -> bytes:
    """Write status and headers for the way through a channel.

    Args:
        status: The status.
        headers: The headers.
        length: How long the body is; None where that is not known yet, or the client gets no body.

    Raises:
        ValueError: HTTP cannot carry them; the message says which, and why.
    """
    pairs: list[tuple[str, str]] = []
    for name, value in headers:
        if not (
            isinstance(name, bytes) and isinstance(value, bytes) and _NAME.fullmatch(name) and _VALUE.fullmatch(value)
        ):
            raise ValueError(
                f"HTTP cannot carry the header {name!r} with the value {value!r}: both must be bytes, the name made of "
                "letters, digits and hyphens, the value of one line"
            )
        if name.lower() == b"content-length":
            announced = _length(value)
            if length is not None and announced != length:
                raise ValueError(wrong_length(announced, length))
        pairs.append((name.decode("latin-1"), value.decode("latin-1")))
    return json.dumps([_checked_status(status), pairs], separators=(",", ":")).encode("ascii")


def announced_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The length that the body has according to headers that `encode_head` has accepted, or None.

    Raises:
        ValueError: They contradict each other.
    """
    lengths = {_length(value) for name, value in headers if name.lower() == b"content-length"}
    if len(lengths) > 1:
        raise ValueError(f"the answer has more than one content-length: {sorted(lengths)}")
    return lengths.pop() if lengths else None


def wrong_length(announced: int, length: int | str) -> str:
    """Say that a body is not as long as its header promises: a server could not send it."""
    return f"the content-length of the answer is {announced}, but its body has {length} bytes; leave the header out"


def _length(value: bytes) -> int:
    if not value.isdigit():
        raise ValueError(f"the content-length of an answer must be a number, not {value!r}")
    return int(value)


def _checked_status(status: int) -> int:
    try:
        number = operator.index(status)
    except TypeError:
        number = 0
    # a status below 200 announces an answer rather than being one: the client would wait for it for ever
    if not 200 <= number <= 999:
        raise ValueError(f"the status of an answer must be a number from 200 to 999, not {status!r}")
    return number


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


def whole_head(content_type: str, length: int) -> bytes:
    """The head of a whole answer."""
    template = _templates.get(content_type)
    if template is None:
        template = _templates[content_type] = f'[200,[["content-length","%d"],["content-type","{content_type}"]]]'
    return (template % length).encode("ascii")


EMPTY_HEAD = b'[200,[["content-length","0"]]]'


def stream_head(content_type: str) -> bytes:
    """The head of a stream."""
    return f'[200,[["content-type","{content_type}"]]]'.encode("ascii")
