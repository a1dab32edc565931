"""What an HTTP/2 client may send, and what it must not: Hypothesis strategies of frames, one behind the other."""

from __future__ import annotations

import struct

import hpack
from hypothesis import strategies as st

__all__ = ["PREFACE", "connections", "frame"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x4, 0x8, 0x20


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """One frame; ``length`` where its header says another one."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size & 0xFFFFFF)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


_STREAMS = st.sampled_from([1, 1, 1, 3, 3, 5, 7, 9, 11, 0, 2, 1 << 30])
_PSEUDO = {
    b":method": [b"GET", b"POST", b"HEAD", b"CONNECT", b"get", b"", b"\xff", b"A B"],
    b":path": [b"/", b"/a?b=c", b"*", b"", b"a", b"/\xff", b"/a b", b"/\r\n", b"/" + b"a" * 500],
    b":scheme": [b"http", b"https", b"", b"ftp", b"\xff"],
    b":authority": [b"x", b"", b"\xff", b"a b", b"y@z"],
}
_FIELDS = [
    (b"a", b"b"),
    (b"cookie", b"a=b"),
    (b"content-length", b"3"),
    (b"content-length", b"x"),
    (b"host", b"y"),
    (b"te", b"trailers"),
    (b"te", b"gzip"),
    (b"connection", b"close"),
    (b"transfer-encoding", b"chunked"),
    (b"A", b"b"),
    (b"a b", b"c"),
    (b"", b"c"),
    (b"a", b"b\r\nc: d"),
    (b"a", b"\x00"),
    (b"\xff", b"\xff"),
    (b":status", b"200"),
    (b":protocol", b"websocket"),
    (b":unknown", b"x"),
    (b"sec-websocket-version", b"13"),
    (b"expect", b"100-continue"),
    (b"big", b"x" * 5000),
]


@st.composite
def _heads(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    fields = []
    odd = draw(st.integers(0, 3)) == 0
    for name, values in _PSEUDO.items():
        oddity = draw(st.integers(0, 4)) if odd else 1
        if oddity != 4:
            fields.append((name, values[0] if oddity else draw(st.sampled_from(values))))
    extra = draw(st.lists(st.sampled_from(_FIELDS if odd else _FIELDS[:3]), max_size=2))
    return extra + fields if odd and draw(st.booleans()) else fields + extra


@st.composite
def _head_frames(draw: st.DrawFn, number: int) -> bytes:
    """Those of a request: mostly on the next stream of its connection."""
    stream = 2 * number + 1 if draw(st.integers(0, 7)) else draw(_STREAMS)
    block = hpack.Encoder().encode(draw(_heads()), huffman=draw(st.booleans()))
    flags = draw(st.sampled_from([END_STREAM, END_STREAM, 0]))
    parts = draw(st.sampled_from([1, 1, 1, 2, 3]))
    size = max(1, -(-len(block) // parts))
    pieces = [block[at : at + size] for at in range(0, len(block), size)] or [b""]
    if draw(st.integers(0, 9)) == 0:
        pieces += [b""] * draw(st.sampled_from([1, 70]))
    if draw(st.integers(0, 5)) == 0:
        flags |= WITH_PRIORITY
        pieces[0] = struct.pack(">IB", draw(_STREAMS), draw(st.integers(0, 255))) + pieces[0]
    data = frame(HEADERS, flags | (END_HEADERS if len(pieces) == 1 else 0), stream, pieces[0])
    for number, piece in enumerate(pieces[1:], 2):
        ends = number == len(pieces) and draw(st.integers(0, 9)) > 0
        data += frame(CONTINUATION, END_HEADERS if ends else 0, stream, piece)
    return data


_NUMBERS = st.one_of(st.integers(0, 20), st.sampled_from([65535, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]))
_OTHER_FRAMES = st.one_of(
    st.builds(
        lambda stream, flags, data: frame(DATA, flags, stream, data),
        _STREAMS,
        st.sampled_from([0, END_STREAM, PADDED]),
        st.sampled_from([b"abc", b"", b"x" * 20000, b"\xffabc"]),
    ),
    st.builds(lambda stream, code: frame(RST_STREAM, 0, stream, struct.pack(">I", code)), _STREAMS, _NUMBERS),
    st.builds(
        lambda stream, on, weight: frame(PRIORITY, 0, stream, struct.pack(">IB", on, weight)),
        st.one_of(_STREAMS, st.integers(1, 1 << 20)),
        _STREAMS,
        st.integers(0, 255),
    ),
    st.builds(
        lambda pairs: frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", code, value) for code, value in pairs)),
        st.lists(st.tuples(st.integers(0, 9), _NUMBERS), max_size=3),
    ),
    st.just(frame(SETTINGS, 1, 0)),
    st.builds(lambda data: frame(PING, 0, 0, data), st.binary(min_size=7, max_size=9)),
    st.builds(lambda stream, by: frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", by)), _STREAMS, _NUMBERS),
    st.builds(lambda last: frame(GOAWAY, 0, 0, struct.pack(">II", last, 0)), _NUMBERS),
    st.builds(frame, st.integers(0, 20), st.integers(0, 255), _STREAMS, st.binary(max_size=30)),
    st.builds(lambda length: frame(DATA, 0, 1, b"abc", length), st.sampled_from([2, 4, 1 << 14, (1 << 24) - 1])),
)


@st.composite
def connections(draw: st.DrawFn) -> tuple[bytes, ...]:
    """What a client sends on one connection, preface first, in up to seven pieces."""
    data = bytearray(PREFACE + frame(SETTINGS, 0, 0))
    for number in range(draw(st.integers(0, 8))):
        if draw(st.integers(0, 3)):
            data += draw(_head_frames(number))
        data += draw(st.sampled_from([0, 0, 1, 1, 1, 40])) * draw(_OTHER_FRAMES)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    pieces = (bytes(data[begin:end]) for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True))
    return tuple(filter(None, pieces))
