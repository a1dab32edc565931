"""The HTTP/1.1 front against h11 and llhttp: the same bytes are the same requests, with the same ends, or refused.

That is what keeps requests from being smuggled in: a proxy in front and the engine must never differ in where one
request ends and the next begins. Longer runs, with new examples each time: `python -m bench.chaos fuzz`.
"""

from __future__ import annotations

import contextlib
import re

import h11
from fuzzing import fuzzed
from http_grammar import Stream, streams
from http_readers import Conversation, Front, Message, h11_reads, llhttp_reads

LENIENT = {
    # what llhttp calls it: what docs/security.md calls it
    "Unexpected whitespace after header value": "a folded line",
    "Expected CRLF after version": "a line that ends with LF alone",
    "Missing expected LF after header value": "a line that ends with LF alone",
    "Missing expected CR after header value": "a line that ends with LF alone",
    "Invalid header field char": "a line that ends with LF alone",
    "Invalid header value char": "control characters in a value",
    "Invalid character in chunk extensions": "control characters in a chunk extension",
    "Invalid character in chunk extensions name": "control characters in a chunk extension",
    "Invalid character in chunk extensions value": "control characters in a chunk extension",
    "Invalid character in chunk size": "white space after a chunk's size",
    "Content-Length can't be present with Transfer-Encoding": "both framings",
    "Transfer-Encoding can't be present with Content-Length": "both framings",
    "Content-Length can't be present with chunked encoding": "both framings",
    "Duplicate Content-Length": "a length given twice",
    "Invalid character in Content-Length": "a length given twice",
    "Invalid method encountered": "other methods",
    "Invalid HTTP version": "HTTP/1.2 and later",
}
"""Why llhttp may refuse a request that we take: all that h11 is more lenient in. Never may it read another request."""

_ABSOLUTE = re.compile(rb"(?i)https?://([^/?#]+)(.*)")
_TARGET = re.compile(rb"(?i)/|https?://[^/?#]")
_REFUSALS = (400, 431, 501, 505)


@fuzzed(stream=streams())
def test_the_same_bytes_are_the_same_requests(stream: Stream) -> None:
    with contextlib.closing(Front()) as front:
        ours = front.reads(stream.pieces, stream.answers)
    compare_with_h11(ours, h11_reads(stream.pieces), stream.answers)
    compare_with_llhttp(ours, llhttp_reads(stream.pieces))
    check_answers(ours, stream.answers)


def compare_with_h11(ours: Conversation, theirs: Conversation, answers: str) -> None:
    """What we take, h11 takes; what it refuses, we refuse; where we stop before it does, we have a reason."""
    assert len(ours.messages) <= len(theirs.messages)
    for mine, other in zip(ours.messages, theirs.messages, strict=False):
        compare(mine, other)
        assert not mine.complete or other.complete
    if ours.switched:
        return
    last = theirs.messages[len(ours.messages) - 1] if ours.messages else None
    ended = last is not None and (framed_twice(last) or answers == "before the body")
    if len(ours.messages) < len(theirs.messages):
        assert ours.closes, "requests were forgotten"
        assert ended or refused_by_us(theirs.messages[len(ours.messages)])
    elif theirs.closes:
        assert ours.closes
    elif ours.closes:
        assert ended
    elif last is not None:
        assert ours.messages[-1].complete == last.complete


def compare_with_llhttp(ours: Conversation, theirs: Conversation) -> None:
    """What we take is the same to llhttp, or it refuses it for a reason that is known."""
    for mine, other in zip(ours.messages, theirs.messages, strict=False):
        if not other.complete and (theirs.refused or not mine.complete):
            break
        compare(mine, other)
    understood = sum(message.complete for message in theirs.messages)
    taken = sum(message.complete for message in ours.messages)
    if understood < taken and not theirs.switched:
        assert theirs.refused is not None, "llhttp waits for more of a request that we take for complete"
        assert theirs.refused in LENIENT


def compare(mine: Message, other: Message) -> None:
    expected = as_we_serve(other)
    assert (mine.method, mine.target, mine.version) == (expected.method, expected.target, expected.version)
    assert mine.headers == expected.headers
    assert mine.body == other.body if mine.complete else other.body.startswith(mine.body)


def check_answers(ours: Conversation, answers: str) -> None:
    """A client finds one answer to each request in turn, and nothing else; after a refusal the connection ends."""
    rest = ours.written
    for message in ours.messages:
        if message.complete or (answers == "before the body" and rest.startswith(b"HTTP/1.1 200")):
            status, rest = one_answer(message.method, rest)
            assert status == 200
        else:
            assert message is ours.messages[-1]
    if rest and not ours.switched:
        status, rest = one_answer(b"GET", rest)
        assert status in _REFUSALS
        assert ours.closes
        assert rest == b""


def one_answer(method: bytes, data: bytes) -> tuple[int, bytes]:
    """The status of the first answer, and what follows it."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target=b"/", headers=[(b"host", b"x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    status = 0
    while True:
        event = client.next_event()
        if isinstance(event, h11.InformationalResponse):
            assert event.status_code == 100
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.EndOfMessage):
            return status, client.trailing_data[0]
        else:
            assert isinstance(event, h11.Data), event


def as_we_serve(message: Message) -> Message:
    """A request as others see it, in the form that applications get."""
    headers = []
    for name, value in message.headers:
        name = name.lower()
        value = value.strip(b" \t")
        headers.append((name, value.lower() if name == b"transfer-encoding" else value))
    if framed_twice(message):
        headers = [pair for pair in headers if pair[0] != b"content-length"]
    target = message.target
    absolute = _ABSOLUTE.match(target)
    if absolute is not None:
        authority, target = absolute.groups()
        target = target if target.startswith(b"/") else b"/" + target
        headers = [(b"host", authority)] + [pair for pair in headers if pair[0] != b"host"]
    path, _, query = target.partition(b"?")
    return Message(message.method, path + (b"?" + query if query else b""), headers, message.version)


def framed_twice(message: Message) -> bool:
    names = {name.lower() for name, _ in message.headers}
    return {b"content-length", b"transfer-encoding"} <= names


def refused_by_us(message: Message) -> bool:
    """Whether h11 takes it and we do not: the second table of docs/security.md."""
    size = len(message.target) + sum(len(name) + len(value) + 4 for name, value in message.headers)
    return (
        size > 16 * 1024
        or message.method in (b"CONNECT", b"PRI")
        or message.method != message.method.upper()
        or message.version[:2] != b"1."
        or _wrong_host(message)
        or (_TARGET.match(message.target) is None and (message.method, message.target) != (b"OPTIONS", b"*"))
    )


def _wrong_host(message: Message) -> bool:
    absolute = _ABSOLUTE.match(message.target)
    hosts = [value for name, value in message.headers if name.lower() == b"host"] + ([absolute[1]] if absolute else [])
    return any(re.search(rb"[^\w.~!$&'()*+,;=%\[\]:-]", host) for host in hosts)
