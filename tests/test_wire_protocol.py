"""The wire format, without any I/O: what goes in comes out, however the bytes were cut, and nothing else does."""

from __future__ import annotations

import math
import random
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import decoded

from engine.errors import InvalidArgument
from engine.seam.control_messages import Ping, Publish
from engine.seam.messages import (
    HTTP,
    LOW,
    PYTHON,
    Call,
    Cancel,
    Control,
    Credit,
    End,
    Failure,
    FailureKind,
    Item,
    Message,
    Reply,
)
from engine.seam.snapshot import RoutingSnapshot
from engine_wire import protocol
from engine_wire.protocol import GREETING, MAX_FRAME_BYTES, Decoder, ProtocolError, encode

HEADER = struct.Struct("<IBQ")
SIZES = [0, 1, 12, 13, 255, 256, 65535, 65536, (1 << 18) - 40, 1 << 18, (1 << 18) + 1, 1 << 20]
"""Sizes around which the decoder does something else."""
BIG_ID = (1 << 64) - 1
TYPES = {
    name: number for number, name in enumerate("greeting call reply failure item end cancel credit control".split())
}


def payload(size: int) -> bytes:
    return random.Random(size).randbytes(size)


MESSAGES: list[Message] = [
    Call(1, PYTHON, "__call__", None, "", b"", b"argument"),
    Call(2, HTTP, "größe", None, "request-✓", b"scope", b""),
    Call(BIG_ID, HTTP, "", None, "", b"", b""),
    Call(3, PYTHON, "m", None, "", b"", b"background", priority=LOW),
    Call(3, HTTP, "m", None, "r", b"scope", b"background", priority=LOW),
    Call(3, PYTHON, "m", None, "", b"", b"again", informed=True),
    Call(3, HTTP, "m", None, "r", b"scope", b"again", priority=LOW, informed=True),
    Reply(1, 0, b"", b"result"),
    Reply(BIG_ID, (1 << 32) - 1, b"[200, []]", b""),
    Reply(0, 0, b"", b""),
    Failure(3, 7, FailureKind.USER, b"", b"packed"),
    Failure(3, 7, FailureKind.ENGINE, b"[502, []]", b"body", "ReplicaDied: größer"),
    Failure(3, 0, FailureKind.DRAINING, b"[503, []]", b""),
    Item(4, b"head", b"chunk"),
    Item(4, b"", b""),
    End(5, 9, True),
    End(5, 0, False),
    Cancel(6),
    Credit(7, 16),
    Control(Ping(3)),
    Control(Publish(RoutingSnapshot(3))),
    Control(None),
]


def kinds_of(messages: list[Message]) -> list[type[Any]]:
    return [type(message) for message in messages]


def frame(kind: str, body: bytes, call_id: int = 1, *, size: int | None = None) -> bytes:
    return HEADER.pack(len(body) if size is None else size, TYPES[kind], call_id) + body


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    decoder = Decoder(greeting=False)
    (copy,) = decoded(decoder, encode(message))
    assert copy == message
    assert type(copy) is type(message)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_arrives_whole(size: int) -> None:
    data = payload(size)
    sized: list[Message] = [
        Call(1, PYTHON, "m", None, "r", data, b""),
        Call(1, PYTHON, "m", None, "r", b"h", data),
        Reply(1, 2, data, b""),
        Reply(1, 2, b"h", data),
        Failure(1, 2, FailureKind.ENGINE, b"h", data),
        Item(1, b"h", data),
        Control(data),
    ]
    for message in sized:
        # A small message before and one after: the border between frames may lie anywhere.
        stream = encode(Cancel(8)) + encode(message) + encode(Credit(9, 1))
        assert decoded(Decoder(greeting=False), stream) == [Cancel(8), message, Credit(9, 1)]


@pytest.mark.parametrize("length", [1, 255, 256, 65535])
def test_names_of_any_length(length: int) -> None:
    message = Call(1, PYTHON, "n" * length, None, "r" * length, b"", b"x")
    assert decoded(Decoder(greeting=False), encode(message)) == [message]


def test_deadlines_travel_as_time_remaining(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 100.0}
    monkeypatch.setattr(protocol.time, "monotonic", lambda: clock["now"])
    data = encode(Call(1, PYTHON, "m", 130.0, "", b"", b""))
    late = encode(Call(1, PYTHON, "m", 90.0, "", b"", b""))
    clock["now"] = 5000.0  # another machine, another clock
    (call,) = decoded(Decoder(greeting=False), data)
    assert isinstance(call, Call)
    assert call.deadline == 5030.0
    (call,) = decoded(Decoder(greeting=False), late)
    assert isinstance(call, Call)
    assert call.deadline == 5000.0  # passed, but still a deadline


def test_the_time_on_the_way_counts_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 100.0}
    monkeypatch.setattr(protocol.time, "monotonic", lambda: clock["now"])
    call = Call(1, PYTHON, "name", 130.0, "id", b"head", b"payload")
    data = encode(call)
    clock["now"] = 200.0
    (arrived,) = decoded(Decoder(greeting=False, same_machine=True), data)
    assert arrived == call
    (arrived,) = decoded(Decoder(greeting=False), data)
    assert arrived == call._replace(deadline=230.0)
    monkeypatch.setattr(protocol, "_time_namespace", lambda: 7)  # of another container, with a clock of its own
    (arrived,) = decoded(Decoder(greeting=False, same_machine=True), data)
    assert arrived == call._replace(deadline=230.0)
    clock["now"] = 50.0
    monkeypatch.undo()
    monkeypatch.setattr(protocol.time, "monotonic", lambda: clock["now"])
    (arrived,) = decoded(Decoder(greeting=False, same_machine=True), data)
    assert arrived == call._replace(deadline=80.0), "it is never longer than what was left"


def test_a_deadline_far_away() -> None:
    (call,) = decoded(Decoder(greeting=False), encode(Call(1, PYTHON, "m", math.inf, "", b"", b"")))
    assert isinstance(call, Call)
    assert call.deadline == math.inf


def test_what_is_no_message_is_not_encoded() -> None:
    with pytest.raises(TypeError, match="not a message: 'text'"):
        encode("text")  # type: ignore[arg-type]


# -- however the bytes were cut --------------------------------------------------------------------------------------


def whole_stream() -> bytes:
    return GREETING + b"".join(map(encode, MESSAGES))


def test_byte_by_byte() -> None:
    decoder = Decoder(greeting=True)
    messages = [message for byte in whole_stream() for message in decoded(decoder, bytes([byte]))]
    assert messages == MESSAGES
    assert kinds_of(messages) == kinds_of(MESSAGES)


def test_all_in_one_read() -> None:
    assert decoded(Decoder(greeting=True), whole_stream()) == MESSAGES


def test_cut_in_two_anywhere() -> None:
    stream = GREETING + b"".join(map(encode, MESSAGES[:6]))
    for cut in range(len(stream) + 1):
        decoder = Decoder(greeting=True)
        messages = [message for part in (stream[:cut], stream[cut:]) if part for message in decoded(decoder, part)]
        assert messages == MESSAGES[:6]


def test_a_large_frame_is_collected_in_place() -> None:
    message = Reply(1, 0, b"h", payload(1 << 20))
    data = encode(message)
    decoder = Decoder(greeting=False)
    assert decoded(decoder, data[:100]) == []
    assert decoder.large is not None
    assert len(decoder.large) == len(data)
    assert len(decoder.spare) == len(data) - 100
    assert decoded(decoder, data[100:]) == [message]
    assert decoder.large is None
    assert decoded(decoder, encode(Cancel(1))) == [Cancel(1)]


def test_a_large_frame_begins_with_a_header_cut_in_two() -> None:
    message = Reply(1, 0, b"h", payload(1 << 20))
    data = encode(Cancel(1)) + encode(message) + encode(Cancel(2))
    decoder = Decoder(greeting=False)
    assert decoded(decoder, data[:20]) == [Cancel(1)]
    assert decoder.large is None
    assert decoded(decoder, data[20:]) == [message, Cancel(2)]


def pieces(stream: bytes, chance: random.Random) -> Iterator[bytes]:
    position = 0
    while position < len(stream):
        size = chance.choice([1, 2, 12, 13, 14, 100, 5000, 65536])
        yield stream[position : position + size]
        position += size


@pytest.mark.parametrize("seed", range(5))
def test_random_messages_cut_at_random(seed: int) -> None:
    chance = random.Random(seed)
    messages: list[Message] = [
        chance.choice(
            [
                Call(
                    number,
                    chance.randrange(2),
                    "m" * chance.randrange(50),
                    None,
                    "",
                    b"h",
                    payload(chance.choice(SIZES)),
                ),
                Reply(number, chance.randrange(1 << 32), b"", payload(chance.randrange(400_000))),
                Item(number, b"", payload(chance.randrange(100))),
                Cancel(number),
            ]
        )
        for number in range(40)
    ]
    decoder = Decoder(greeting=True)
    stream = GREETING + b"".join(map(encode, messages))
    assert [message for piece in pieces(stream, chance) for message in decoded(decoder, piece)] == messages


# -- what is not this protocol ---------------------------------------------------------------------------------------


def broken(data: bytes, *, greeting: bool = False) -> str:
    with pytest.raises(ProtocolError) as caught:
        decoded(Decoder(greeting=greeting), data)
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"\0" * 40,
        b"\xff" * 13,
        encode(Cancel(1)),
        encode(MESSAGES[0]),
        GREETING[:13] + b"something else",
    ],
)
def test_the_greeting_is_missing(data: bytes) -> None:
    assert broken(data, greeting=True) == "the peer did not greet"


def test_another_version() -> None:
    data = GREETING[:-2] + (258).to_bytes(2, "little")
    assert broken(data, greeting=True) == f"the peer speaks version 258, this side {protocol.PROTOCOL_VERSION}"


def test_a_greeting_may_come_in_parts() -> None:
    decoder = Decoder(greeting=True)
    for cut in (5, 15, 20):
        assert decoded(decoder, GREETING[:cut]) == []
        assert decoded(decoder, GREETING[cut:] + encode(Cancel(1))) == [Cancel(1)]
        decoder = Decoder(greeting=True)


def test_a_type_that_does_not_exist() -> None:
    assert broken(HEADER.pack(0, 9, 1)) == "a frame of type 9 and 0 bytes"
    assert broken(HEADER.pack(5, 255, 1)) == "a frame of type 255 and 5 bytes"


def test_a_frame_that_is_too_long_is_refused_at_its_header() -> None:
    decoder = Decoder(greeting=False)
    with pytest.raises(ProtocolError, match=f"a frame of type 2 and {MAX_FRAME_BYTES + 1} bytes"):
        decoded(decoder, HEADER.pack(MAX_FRAME_BYTES + 1, TYPES["reply"], 1))
    assert decoder.large is None


@pytest.mark.parametrize(
    "message",
    [
        Call(1, PYTHON, "m", None, "", b"", b"x" * 60),
        Reply(1, 0, b"", b"x" * 60),
        Failure(1, 0, 0, b"", b"x" * 60),
        Item(1, b"", b"x" * 60),
        Control("x" * 60),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_that_is_too_large_is_not_sent(message: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 50)
    with pytest.raises(InvalidArgument, match=r"^the message is \d+ bytes, more than the 50 of one frame; pass a file"):
        encode(message)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frame("reply", b"\0" * 7), id="a reply without its fields"),
        pytest.param(frame("reply", struct.pack("<II", 0, 5) + b"1234"), id="a reply with too long a head"),
        pytest.param(frame("call", b"\0" * 16), id="a call without its fields"),
        pytest.param(frame("call", struct.pack("<BdHHI", 0, -1, 3, 0, 0) + b"ab"), id="too long a method"),
        pytest.param(frame("call", struct.pack("<BdHHI", 0, -1, 0, 0, 3) + b"ab"), id="too long a head"),
        pytest.param(frame("call", struct.pack("<BdHHI", 0, -1, 1, 0, 0) + b"\xff"), id="a method that is no text"),
        pytest.param(frame("failure", b"\0" * 8), id="a failure without its fields"),
        pytest.param(frame("failure", struct.pack("<IBI", 0, 0, 3) + b"ab"), id="a failure with too long a head"),
        pytest.param(frame("item", b"\0" * 3), id="an item without its fields"),
        pytest.param(frame("item", struct.pack("<I", 3) + b"ab"), id="an item with too long a head"),
        pytest.param(frame("end", b"\0" * 4), id="an end without its fields"),
        pytest.param(frame("credit", b"\0" * 3), id="credit without an amount"),
        pytest.param(frame("control", b""), id="an empty control message"),
        pytest.param(frame("control", b"garbage"), id="a control message that is no pickle"),
        pytest.param(frame("control", b"cengine.nowhere\nNothing\n."), id="a control message of an unknown type"),
    ],
)
@pytest.mark.parametrize("followed", [False, True])
def test_malformed_frames(data: bytes, followed: bool) -> None:
    # What follows must not be taken for the rest of the frame.
    text = broken(data + encode(Reply(1, 0, b"", b"x" * 100)) if followed else data)
    assert text.startswith("a malformed frame of type ")


def test_noise_is_refused_or_waited_for_but_nothing_else_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 1 << 20)  # more would only cost time
    chance = random.Random(11)
    outcomes = set()
    for _ in range(3000):
        decoder = Decoder(greeting=chance.random() < 0.2)
        kind = chance.randrange(8)  # all but control, whose bodies are trusted
        noise = HEADER.pack(chance.choice([0, 1, 4, 5, 9, 17, 30]), kind, chance.getrandbits(64))
        noise += chance.randbytes(chance.randrange(40))
        try:
            messages = decoded(decoder, noise)
        except ProtocolError:
            outcomes.add("refused")
        else:
            outcomes.add("taken" if messages else "waiting")
    assert outcomes == {"refused", "taken", "waiting"}


@pytest.mark.parametrize("seed", range(3))
def test_one_flipped_byte_never_does_more_than_break_the_channel(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 1 << 20)  # more would only cost time
    chance = random.Random(seed)
    plain = [message for message in MESSAGES if not isinstance(message, Control)]
    stream = b"".join(map(encode, plain))
    for _ in range(500):
        broken_stream = bytearray(stream)
        position = chance.randrange(len(stream))
        broken_stream[position] ^= 1 << chance.randrange(8)
        try:
            decoded(Decoder(greeting=False), bytes(broken_stream))
        except ProtocolError:
            pass


def test_deadlines_by_the_real_clock() -> None:
    before = time.monotonic()
    (call,) = decoded(Decoder(greeting=False), encode(Call(1, PYTHON, "m", before + 60, "", b"", b"")))
    assert isinstance(call, Call)
    assert call.deadline is not None
    assert before + 59 < call.deadline < time.monotonic() + 61


def test_a_length_alone_costs_no_memory() -> None:
    decoder = Decoder(greeting=False)
    head = HEADER.pack(MAX_FRAME_BYTES, TYPES["reply"], 1)
    assert decoded(decoder, head) == []
    assert decoder.large is not None and len(decoder.large) <= 1 << 22
    assert decoded(decoder, bytes(5 << 20)) == []
    assert len(decoder.large) <= 1 << 24


def test_a_frame_for_which_the_buffer_grows_arrives_whole() -> None:
    message = Reply(1, 2, b"h", payload(10 << 20))
    assert decoded(Decoder(greeting=False), encode(Cancel(8)) + encode(message) + encode(Credit(9, 1))) == [
        Cancel(8),
        message,
        Credit(9, 1),
    ]
