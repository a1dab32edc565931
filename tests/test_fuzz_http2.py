"""The HTTP/2 front: whatever frames a client sends, its own connection ends at most, and its work is bounded."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator

import h2.config
import h2.connection
import h2.errors
import h2.events
import hpack
import pytest
from fuzzing import fuzzed, log_of
from http2_frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    connections,
    frame,
)
from http_readers import Conversation, Front

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_CALM = struct.pack(">I", h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)


@fuzzed(pieces=connections())
def test_any_frames_end_their_own_connection_at_most(pieces: tuple[bytes, ...]) -> None:
    with log_of("engine.http") as lines, contextlib.closing(Front()) as front:
        told = front.reads(pieces)
    assert lines == []
    for message in told.streams:
        assert _TOKEN.fullmatch(message.method.lower()) and message.method == message.method.upper()
        assert message.target.startswith(b"/") or message.target == b"*"
        for name, value in message.headers:
            assert _TOKEN.fullmatch(name) and _VALUE.fullmatch(value)
    if told.switched:
        answers(told)


def answers(told: Conversation) -> dict[int, int]:
    """The statuses by stream, as a client understands them: it hears HTTP/2 and nothing else."""
    statuses: dict[int, int] = {}
    decoder = hpack.Decoder()
    rest = told.written
    while rest:
        size, kind, flags, stream = (
            int.from_bytes(rest[:3], "big"),
            rest[3],
            rest[4],
            int.from_bytes(rest[5:9], "big"),
        )
        assert kind <= CONTINUATION and len(rest) >= 9 + size
        if kind == HEADERS:
            assert flags & END_HEADERS and stream not in statuses, "a second answer"
            (status,) = [value for name, value in decoder.decode(rest[9 : 9 + size], raw=True) if name == b":status"]
            statuses[stream] = int(status)
        rest = rest[9 + size :]
    return statuses


# -- what was found ----------------------------------------------------------------------------------------------------


@pytest.fixture
def front() -> Iterator[Front]:
    with contextlib.closing(Front()) as front:
        yield front


def head(stream: int, *, flags: int = END_STREAM, **pseudo: bytes | None) -> bytes:
    named = {"method": b"GET", "path": b"/", "scheme": b"http", "authority": b"x", **pseudo}
    fields = [(b":" + name.encode(), value) for name, value in named.items() if value is not None]
    return frame(HEADERS, END_HEADERS | flags, stream, hpack.Encoder().encode(fields))


BEGIN = PREFACE + frame(SETTINGS, 0, 0)


@pytest.mark.parametrize(
    ("pseudo", "status"),
    [
        ({"path": b"/\xff"}, 400),
        ({"path": b"/a b"}, 400),
        ({"path": b"a"}, 400),
        ({"path": b"*"}, 400),
        ({"authority": b"x/admin?"}, 400),
        ({"method": b"get"}, 501),
        ({"method": b"\xff"}, 501),
        ({"method": b"CONNECT", "path": None, "scheme": None}, 501),
        ({"method": b"OPTIONS", "path": b"*"}, 200),
    ],
)
def test_a_request_that_cannot_be_served_leaves_others_alone(
    front: Front, pseudo: dict[str, bytes | None], status: int
) -> None:
    told = front.reads((BEGIN + head(1) + head(3, **pseudo) + head(5) + head(7, flags=0, **pseudo),))
    assert not told.closes
    # the body of the last one is not waited for, if it is refused
    last = {7: status} if status != 200 else {}
    assert answers(told) == {1: 200, 3: status, 5: 200, **last}


def test_a_request_that_is_refused_and_reset_at_once_leaves_others_alone(front: Front) -> None:
    for ends in (frame(RST_STREAM, 0, 3, bytes(4)), frame(DATA, 0, 3, b"abc")):
        told = front.reads((BEGIN + head(1) + head(3, path=b"*") + ends + head(5),))
        assert {1: 200, 5: 200} == {stream: status for stream, status in answers(told).items() if stream != 3}
        assert not told.closes


def test_priorities_are_not_heard(front: Front) -> None:
    many = b"".join(frame(PRIORITY, 0, 2 * n + 1, struct.pack(">IB", 0, 1)) for n in range(5, 3000))
    told = front.reads((BEGIN + many + head(1) + frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 255)) + head(3),))
    assert answers(told) == {1: 200, 3: 200}
    assert not told.closes


def test_who_has_many_streams_reset_is_sent_away(front: Front) -> None:
    def reset(count: int) -> bytes:
        return b"".join(head(n) + frame(RST_STREAM, 0, n, bytes(4)) for n in range(1, 2 * count, 2))

    assert not front.reads((BEGIN + reset(400),)).closes
    told = front.reads((BEGIN + reset(2000),))
    assert told.closes and told.written.endswith(_CALM)
    assert len(told.streams) < 600


@pytest.mark.parametrize(
    "flood",
    [
        frame(CONTINUATION, 0, 1, b"") * 1000,
        frame(CONTINUATION, 0, 1, b"\x00\x01a\x7f\x80" + b"x" * 255) * 1000,
    ],
    ids=["empty", "large"],
)
def test_a_head_without_end_ends_the_connection(front: Front, flood: bytes) -> None:
    told = front.reads((BEGIN + frame(HEADERS, END_STREAM, 1, b"\x82") + flood,))
    assert told.closes and told.streams == []


def test_a_small_head_that_unpacks_to_much_ends_the_connection(front: Front) -> None:
    encoder = hpack.Encoder()
    first = encoder.encode([(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"), (b"a", b"x" * 3000)])
    bomb = first + encoder.encode([(b"a", b"x" * 3000)]) * 1000
    told = front.reads((BEGIN + frame(HEADERS, END_STREAM | END_HEADERS, 1, bomb),))
    assert told.closes and told.streams == []


@pytest.mark.parametrize(
    "one",
    [
        frame(PING, 0, 0, bytes(8)),
        frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 70000)),
        frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
        frame(DATA, 0, 3, b""),
    ],
    ids=["ping", "settings", "window", "empty data"],
)
def test_a_flood_of_frames_is_answered_and_kept_nowhere(front: Front, one: bytes) -> None:
    told = front.reads((BEGIN + head(1) + head(3, flags=0), *[one * 1000] * 5))
    assert answers(told)[1] == 200
    assert len(told.streams) == 2
