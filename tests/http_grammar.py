"""Streams of HTTP/1.1 requests, valid and nearly so, and the places where they are cut: Hypothesis strategies."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

__all__ = ["Stream", "streams"]


@dataclass(frozen=True)
class Stream:
    """What one client sends.

    Attributes:
        pieces: The bytes as they arrive.
        answers: When the application answers each request: after its body, before, or once all pieces have arrived.
    """

    pieces: tuple[bytes, ...]
    answers: str


def _mostly(usual: list[bytes], unusual: list[bytes]) -> st.SearchStrategy[bytes]:
    """Usual ones four times out of five: a request with many oddities is refused for the first of them."""
    return st.integers(0, 4).flatmap(lambda number: st.sampled_from(usual if number else unusual))


_METHODS = _mostly(
    [b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS"],
    [b"get", b"PoST", b"G=T", b"GE T", b"", b"CONNECT", b"TRACE", b"PATCH", b"PRI", b"FOO", b"X" * 30, b"M-SEARCH"],
)
_TARGETS = _mostly(
    [b"/", b"/a", b"/a?b=c", b"/%20%2f", b"/a?", b"//x"],
    [
        b"*",
        b"http://y/a",
        b"HTTP://y?q",
        b"https://y@z:1/a",
        b"ftp://y/a",
        b"y:80",
        b"a",
        b"",
        b"/a b",
        b"/\xe4",
        b"/\x00",
        b"/\x7f",
        b"/a#b",
        b"/a\tb",
        b"/" + b"a" * 20000,
    ],
)
_VERSIONS = _mostly(
    [b"HTTP/1.1"],
    [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.10", b"http/1.1", b"HTTP/1", b"HTTP/1.1 ", b""],
)
_LINE_ENDS = _mostly([b"\r\n"] * 4, [b"\n", b"\r", b"\r\r\n", b"\n\r", b" \r\n", b"\x0b\r\n"])
_SEPARATORS = _mostly([b" "], [b"  ", b"\t", b"\x0b", b"\r ", b""])
_HOSTS: st.SearchStrategy[list[bytes]] = st.integers(0, 5).flatmap(
    lambda number: (
        st.just([b"host: x"])
        if number
        else st.sampled_from(
            [
                [],
                [b"host: x", b"host: x"],
                [b"host: x", b"Host: y"],
                [b"host:"],
                [b"host : x"],
                [b"host: a b"],
                [b"host: x/y?"],
            ]
        )
    )
)
_FIELDS = _mostly(
    [
        b"a: b",
        b"A:b",
        b"a:",
        b"a: \t b \t",
        b"cookie: a=b",
        b"cookie: c=d",
        b"connection: keep-alive",
        b"connection: close",
        b"x-high: \xe4\xff",
    ],
    [
        b"connection: Close, foo",
        b"connection: foo",
        b"connection: upgrade",
        b"connection: Upgrade, HTTP2-Settings",
        b"upgrade: h2c",
        b"upgrade: websocket",
        b"upgrade: foo",
        b"http2-settings: AAMAAABkAAQAAP__",
        b"http2-settings: !",
        b"sec-websocket-version: 13",
        b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
        b"expect: 100-continue",
        b"expect: 100-Continue",
        b"expect: something",
        b"proxy-connection: keep-alive",
        b"te: trailers",
        b"a : b",
        b" a: b",
        b"\ta: b",
        b"a: b\r\n c",
        b"a: b\r\n\tcontent-length: 5",
        b"a: b\n c",
        b"a",
        b": b",
        b"a: \x00",
        b"a: \x01\x1f",
        b"a: \x7f",
        b"a: b\rc: d",
        b"a: b\nc: d",
        b"a: b\x0bc",
        b"a(b: c",
        b"\xe4: b",
        b"a\x00: b",
        b"keep-alive: timeout=5",
        b"big: " + b"x" * 17000,
    ],
)
_BODY = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
"""A body that is a request for whoever takes its end for somewhere else."""
_CHUNKS = st.lists(
    st.builds(
        lambda size, extension, end, data, after: b"%b%b%b%b%b" % (size % len(data), extension, end, data, after),
        _mostly([b"%x", b"%X", b"00%x"], [b"+%x", b" %x", b"0x%x", b"-%x", b"%xg", b"f%x", b"7fffffffffffffff%x"]),
        _mostly(
            [b"", b";a", b";a=b"], [b";", b" ;a", b';a="b;c"', b";a\n", b";a\r", b";\x00", b" ", b"\t", b";" * 3000]
        ),
        _LINE_ENDS,
        st.sampled_from([b"abc", b"d", _BODY]),
        _LINE_ENDS,
    ),
    max_size=3,
)
_LAST_CHUNKS = _mostly(
    [b"0\r\n\r\n"] * 3 + [b"000\r\n\r\n", b"0;a\r\n\r\n", b"0\r\nt: v\r\n\r\n"],
    [
        b"0\n\n",
        b"0\r\r\n",
        b"0\r\n",
        b"0 \r\n\r\n",
        b"0\r\nt : v\r\n\r\n",
        b"0\r\ncontent-length: 3\r\n\r\n",
        b"",
        b"0\r\nt",
    ],
)
_CHUNKED = st.builds(lambda chunks, last: b"".join(chunks) + last, _CHUNKS, _LAST_CHUNKS)
_LENGTHS = _mostly(
    [b"content-length: %d"],
    [
        b"content-length: +%d",
        b"content-length: -%d",
        b"content-length: 0%d",
        b"content-length: %d, %d",
        b"content-length: %d,9",
        b"content-length: 0x%d",
        b"content-length: %d ",
        b"content-length:\t%d",
        b"content-length: %d\x0b",
        b"content-length: %d\r\ncontent-length: %d",
        b"content-length: %d\r\nContent-Length: 9",
        b"content-length: \r\n %d",
        b"content-length : %d",
        b"content-length: 9%d",
        b"content-length: 99999999999999999999%d",
        b"content_length: %d",
        b"content-length:",
    ],
)
_ENCODINGS = _mostly(
    [b"transfer-encoding: chunked"] * 3 + [b"Transfer-Encoding: Chunked"],
    [
        b"transfer-encoding: gzip, chunked",
        b"transfer-encoding: chunked, gzip",
        b"transfer-encoding: chunked, chunked",
        b"transfer-encoding: chunked,",
        b"transfer-encoding: ,chunked",
        b"transfer-encoding: chunked\r\ntransfer-encoding: chunked",
        b"transfer-encoding: identity\r\ntransfer-encoding: chunked",
        b"transfer-encoding: identity",
        b"transfer-encoding: xchunked",
        b"transfer-encoding: chunked;q=1",
        b"transfer-encoding:\x0bchunked",
        b"transfer-encoding:\r\n chunked",
        b"transfer-encoding: \r\n\tchunked",
        b"transfer-encoding: chu\r\n nked",
        b"transfer-encoding : chunked",
        b"transfer_encoding: chunked",
        b"transfer-encoding:",
        b'transfer-encoding: "chunked"',
        b"transfer-encoding: chunked\x00",
    ],
)


def _with_length(template: bytes, body: bytes) -> tuple[list[bytes], bytes]:
    return [template.replace(b"%d", b"%d" % len(body))], body


_PLAIN_BODIES = st.sampled_from([b"", b"a", b"abc", _BODY, b"\x00\r\n\n\xff" * 30])
_FRAMINGS: st.SearchStrategy[tuple[list[bytes], bytes]] = st.one_of(
    st.just(([], b"")),
    st.builds(_with_length, _LENGTHS, _PLAIN_BODIES),
    st.builds(lambda encoding, body: ([encoding], body), _ENCODINGS, _CHUNKED),
    st.builds(
        lambda length, encoding, body: (_with_length(length, body)[0] + [encoding], body),
        _LENGTHS,
        _ENCODINGS,
        _CHUNKED,
    ),
)


@st.composite
def _requests(draw: st.DrawFn) -> bytes:
    framing, body = draw(_FRAMINGS)
    fields = draw(_HOSTS) + draw(st.lists(_FIELDS, max_size=3)) + framing
    if draw(st.booleans()):
        fields = draw(st.permutations(fields))
    separator = draw(_SEPARATORS)
    line = separator.join([draw(_METHODS), draw(_TARGETS), draw(_VERSIONS)])
    before = draw(_mostly([b""], [b"\r\n", b"\n", b" ", b"\r\n\r\n", b"\x00", b"\x16\x03\x01"]))
    lines = [line, *fields]
    ends = b"\r\n" if draw(st.integers(0, 3)) else None
    head = b"".join(one + (ends or draw(_LINE_ENDS)) for one in lines)
    return before + head + (ends or draw(_LINE_ENDS)) + body


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """One to four requests on a connection, with up to three bytes changed, in up to seven pieces."""
    data = bytearray(b"".join(draw(st.lists(_requests(), min_size=1, max_size=4))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2, 3]))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["insert", "remove", "replace"]))
        given = b"" if kind == "remove" else draw(st.sampled_from(_BYTES))
        data[at : at + (kind != "insert")] = given
    if draw(st.integers(0, 3)):  # something to be taken for a request by who is at another place
        data += b"GET /last HTTP/1.1\r\nhost: x\r\n\r\n"
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    pieces = (bytes(data[begin:end]) for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True))
    answers = draw(st.sampled_from(["after the body", "after the body", "before the body", "at the end"]))
    return Stream(tuple(filter(None, pieces)), answers)


_BYTES = [b"\r", b"\n", b"\r\n", b"\x00", b" ", b"\t", b":", b",", b"0", b"1", b"\xff", b"\x0b", b"\x7f", b"H", b";"]
