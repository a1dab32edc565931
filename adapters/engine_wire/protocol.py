"""The wire format: messages to bytes and back, without any I/O.

A frame is a 13-byte header (length of the body, type, call id) and a body. Both ends open with a greeting that carries
the protocol's version. Deadlines travel as seconds remaining, because clocks of different machines do not agree. Those
seconds begin when the call is read, however long it was on its way; so the deadline itself goes along, for a peer that
has the same clock.

Frames from the peer are checked for type and length before anything of them is used; only the bodies of `Control`
are unpickled here, and those come from channels whose ends have proved who they are.
"""

from __future__ import annotations

import functools
import os
import pickle
import struct
import time

from engine.errors import InvalidArgument
from engine.seam.messages import (
    AS_CONFIGURED,
    LOW,
    NORMAL,
    Call,
    Cancel,
    Control,
    Credit,
    End,
    Failure,
    Item,
    Message,
    Reply,
)

__all__ = ["GREETING", "MAX_FRAME_BYTES", "PROTOCOL_VERSION", "Decoder", "ProtocolError", "check_greeting", "encode"]

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 30
"""Largest body. A gigabyte: what is larger belongs in a file or an object store, not in one message."""
_AT_FIRST = 1 << 22
_GROWTH = 4
"""Four megabytes of a frame have room at once, and then four times as many: what is copied then is little."""

_GREETING, _CALL, _REPLY, _FAILURE, _ITEM, _END, _CANCEL, _CREDIT, _CONTROL = range(9)
_NO_DEADLINE = -1.0
_LONGEST_NAME = 0xFFFF
_LOW_BIT = 0x80
"""Of the byte with a call's kind: it is of low priority."""
_INFORMED_BIT = 0x40
"""Of the same byte: see `Call.informed`."""

_new = tuple.__new__  # a named tuple's own constructor is several times slower
_header = struct.Struct("<IBQ")
_call_head = struct.Struct("<IBQBdHHI")
_call_fields = struct.Struct("<BdHHI")
assert _call_fields.size == 17
_moment = struct.Struct("<dI")
"""Behind the fields of a call that has a deadline: that, by the sender's clock, and `_time_namespace`."""
_MOMENT_BYTES = 12
assert _moment.size == _MOMENT_BYTES
_reply_head = struct.Struct("<IBQII")
_reply_fields = struct.Struct("<II")
_failure_head = struct.Struct("<IBQIBHI")
_failure_fields = struct.Struct("<IBHI")
_item_head = struct.Struct("<IBQI")
_end_head = struct.Struct("<IBQIB")
_end_fields = struct.Struct("<IB")
_amount = struct.Struct("<I")

_MAGIC = b"engine/wire\0"
GREETING = _header.pack(len(_MAGIC) + 2, _GREETING, 0) + _MAGIC + PROTOCOL_VERSION.to_bytes(2, "little")
"""The first bytes either end sends."""


class ProtocolError(Exception):
    """The peer sent something that is not this protocol."""


def encode(message: Message) -> bytes:
    """Turn a message into one frame.

    Raises:
        engine.errors.InvalidArgument: It is larger than `MAX_FRAME_BYTES`.
    """
    if type(message) is Reply:
        call_id, load, head, payload = message
        size = 8 + len(head) + len(payload)
        if size > MAX_FRAME_BYTES:
            raise _too_large(size)
        return _reply_head.pack(size, _REPLY, call_id, load, len(head)) + head + payload
    if type(message) is Call:
        call_id, kind, method, deadline, request_id, head, payload, _, priority, informed = message
        if priority:
            kind |= _LOW_BIT
        if informed:
            kind |= _INFORMED_BIT
        name, tag = method.encode(), request_id.encode()
        name_size, tag_size, head_size = len(name), len(tag), len(head)
        size = (17 if deadline is None else 17 + _MOMENT_BYTES) + name_size + tag_size + head_size + len(payload)
        if size > MAX_FRAME_BYTES:
            raise _too_large(size)
        if name_size > _LONGEST_NAME or tag_size > _LONGEST_NAME:
            raise InvalidArgument(f"the method's name or the request id has more than {_LONGEST_NAME} bytes")
        if deadline is None:
            prefix = _call_head.pack(size, _CALL, call_id, kind, _NO_DEADLINE, name_size, tag_size, head_size)
            return b"".join((prefix, name, tag, head, payload))
        left = max(0.0, deadline - time.monotonic())
        prefix = _call_head.pack(size, _CALL, call_id, kind, left, name_size, tag_size, head_size)
        return b"".join((prefix, _moment.pack(deadline, _time_namespace()), name, tag, head, payload))
    return _encode_other(message)


@functools.cache
def _time_namespace() -> int:
    """Tells processes of one machine apart whose clocks do not agree; 0 where there is no such thing."""
    try:
        return os.stat("/proc/self/ns/time").st_ino & 0xFFFFFFFF
    except OSError:
        return 0


def _encode_other(message: Message) -> bytes:
    if isinstance(message, Failure):
        cause = message.cause.encode("utf-8", "replace")[:_LONGEST_NAME]
        size = _failure_fields.size + len(cause) + len(message.head) + len(message.payload)
        _check_size(size)
        sizes = len(cause), len(message.head)
        prefix = _failure_head.pack(size, _FAILURE, message.id, message.load, message.kind, *sizes)
        frame = b"".join((prefix, cause, message.head, message.payload))
    elif isinstance(message, Item):
        size = _amount.size + len(message.head) + len(message.payload)
        _check_size(size)
        frame = b"".join((_item_head.pack(size, _ITEM, message.id, len(message.head)), message.head, message.payload))
    elif isinstance(message, End):
        frame = _end_head.pack(_end_fields.size, _END, message.id, message.load, message.failed)
    elif isinstance(message, Cancel):
        frame = _header.pack(0, _CANCEL, message.id)
    elif isinstance(message, Credit):
        frame = _header.pack(_amount.size, _CREDIT, message.id) + _amount.pack(message.amount)
    elif isinstance(message, Control):
        body = pickle.dumps(message.body, 5)
        _check_size(len(body))
        frame = _header.pack(len(body), _CONTROL, 0) + body
    else:
        raise TypeError(f"not a message: {message!r}")
    return frame


def _check_size(size: int) -> None:
    if size > MAX_FRAME_BYTES:
        raise _too_large(size)


def _too_large(size: int) -> InvalidArgument:
    return InvalidArgument(
        f"the message is {size} bytes, more than the {MAX_FRAME_BYTES} of one frame; pass a file name or split the data"
    )


class Decoder:
    """Cuts a stream of bytes into messages.

    Whoever reads puts what came into `arrived`, cuts it, and takes the messages from the front. An exception that a
    signal handler raises in between loses nothing: `cut` changes all or nothing, and can be called again.

    A frame that is larger than one read is collected in a buffer of its own (`large`): `spare` is the part of it still
    to fill, for reads straight into it. It grows with what comes, for a length alone must not cost memory.

    Args:
        greeting: Whether the peer greets first.
        same_machine: Whether the peer is on this machine, so that its clock is this one.

    Attributes:
        arrived: Bytes as they came, still to be cut; None if there are none.
        messages: Complete ones that nobody has taken yet.
        greeting_due: Whether the peer has not greeted yet, as it must.
        large: A frame to be read in place, while there is one.
        filled: How much of it is there, in bytes.
    """

    def __init__(self, *, greeting: bool, same_machine: bool = False) -> None:
        self.greeting_due = greeting
        self._same_machine = same_machine
        self._tail = b""
        self.arrived: bytes | None = None
        self.messages: list[Message] = []
        self.large: bytearray | None = None
        self.filled = 0
        self._large_bytes = 0  # of the whole frame that `large` grows into

    @property
    def spare(self) -> memoryview:
        """Where to read into while there is a `large` frame; otherwise let bytes have `arrived`."""
        assert self.large is not None
        return memoryview(self.large)[self.filled :]

    def cut(self) -> None:
        """Make messages of what has arrived and of a `large` frame that is filled.

        Raises:
            ProtocolError: They are not this protocol, or a frame is larger than `MAX_FRAME_BYTES`.
        """
        data = self.arrived
        if data is None:
            large = self.large
            if large is not None and self.filled == len(large):
                if self.filled == self._large_bytes:
                    self._cut(bytes(large))
                else:
                    larger = bytearray(min(self._large_bytes, _GROWTH * len(large)))
                    larger[: len(large)] = large
                    self.large = larger
            return
        if not (self._tail or self.messages or self.greeting_due) and len(data) >= 13:
            size, kind, call_id = _header.unpack_from(data)
            if size + 13 == len(data) and 0 < kind <= _CONTROL:  # one whole frame, as almost always
                message = _decode(kind, call_id, data, 13, len(data), self._same_machine)
                # No signal handler runs between these two: there is no call.
                self.messages, self.arrived = [message], None
                return
        self._cut(self._tail + data if self._tail else data)

    def _cut(self, data: bytes) -> None:
        messages: list[Message] = []
        greeting_due = self.greeting_due
        position, end = 0, len(data)
        while end - position >= 13:
            size, kind, call_id = _header.unpack_from(data, position)
            if greeting_due:
                check_greeting(data[position : position + len(GREETING)])
            if size > MAX_FRAME_BYTES or kind > _CONTROL:
                raise ProtocolError(f"a frame of type {kind} and {size} bytes")
            start = position + 13
            if start + size > end:
                break
            position = start + size
            if kind:
                messages.append(_decode(kind, call_id, data, start, position, self._same_machine))
            else:
                greeting_due = False
        tail, large, large_bytes = _rest(data, position)
        filled = 0 if large is None else end - position
        # No signal handler runs from here on: there is no call.
        self.messages += messages
        self.greeting_due, self._tail, self.arrived = greeting_due, tail, None
        self.large, self.filled, self._large_bytes = large, filled, large_bytes


def check_greeting(data: bytes) -> None:
    """See that these bytes begin a greeting, or are one.

    Raises:
        ProtocolError: They are something else, or greet in another version.
    """
    if data == GREETING[: len(data)]:
        return
    if data[13:25] == _MAGIC[: max(0, len(data) - 13)] and len(data) >= len(GREETING):
        version = int.from_bytes(data[-2:], "little")
        raise ProtocolError(f"the peer speaks version {version}, this side {PROTOCOL_VERSION}")
    raise ProtocolError("the peer did not greet")


def _rest(data: bytes, position: int) -> tuple[bytes, bytearray | None, int]:
    """What is kept of an incomplete frame: its bytes, or a buffer that begins with them; and how long that gets."""
    rest = len(data) - position
    if rest >= 13:
        total = 13 + int.from_bytes(data[position : position + 4], "little")
        if total > 1 << 18:
            large = bytearray(min(total, max(_AT_FIRST, rest)))
            large[:rest] = data[position:]
            return b"", large, total
    return data[position:] if rest else b"", None, 0


def _decode(kind: int, call_id: int, data: bytes, start: int, end: int, same_machine: bool) -> Message:
    try:
        if kind == _REPLY:
            load, head_size = _reply_fields.unpack_from(data, start)
            middle = start + 8 + head_size
            if middle > end:  # `_within`, without a call on the path of every answer
                raise ValueError("fields longer than the frame")
            return _new(Reply, (call_id, load, data[start + 8 : middle], data[middle:end]))
        if kind != _CALL:
            return _decode_other(kind, call_id, data, start, end)
        asks, remaining, method_size, request_id_size, head_size = _call_fields.unpack_from(data, start)
        priority, informed = NORMAL, False
        if asks >= _INFORMED_BIT:
            if asks & _LOW_BIT:
                priority = LOW
            informed = asks & _INFORMED_BIT != 0
            asks &= _INFORMED_BIT - 1
        method_at = start + 17
        deadline = None
        if remaining >= 0:
            deadline = _deadline(remaining, data, method_at, same_machine=same_machine)
            method_at += _MOMENT_BYTES
        request_id_at = method_at + method_size
        head_at = request_id_at + request_id_size
        payload_at = head_at + head_size
        if payload_at > end:
            raise ValueError("fields longer than the frame")
        return _new(
            Call,
            (
                call_id,
                asks,
                data[method_at:request_id_at].decode(),
                deadline,
                data[request_id_at:head_at].decode(),
                data[head_at:payload_at],
                data[payload_at:end],
                AS_CONFIGURED,
                priority,
                informed,
            ),
        )
    except Exception as error:  # the body of a control message may raise anything
        raise ProtocolError(f"a malformed frame of type {kind}: {error}") from error


def _deadline(remaining: float, data: bytes, moment_at: int, *, same_machine: bool) -> float:
    deadline = time.monotonic() + remaining
    if same_machine:
        moment, time_namespace = _moment.unpack_from(data, moment_at)
        if moment < deadline and time_namespace == _time_namespace():
            return float(moment)  # the call was on its way for so long
    return deadline


def _decode_other(kind: int, call_id: int, data: bytes, start: int, end: int) -> Message:
    if kind == _FAILURE:
        load, why, cause_size, head_size = _failure_fields.unpack_from(data, start)
        cause_at = start + _failure_fields.size
        head_at = cause_at + cause_size
        payload_at = _within(head_at + head_size, end)
        cause = data[cause_at:head_at].decode("utf-8", "replace")
        return Failure(call_id, load, why, data[head_at:payload_at], data[payload_at:end], cause)
    if kind == _ITEM:
        (head_size,) = _amount.unpack_from(data, start)
        payload_at = _within(start + 4 + head_size, end)
        return Item(call_id, data[start + 4 : payload_at], data[payload_at:end])
    if kind == _END:
        load, failed = _end_fields.unpack_from(data, start)
        _within(start + _end_fields.size, end)
        return End(call_id, load, bool(failed))
    if kind == _CANCEL:
        return Cancel(call_id)
    if kind == _CREDIT:
        _within(start + 4, end)
        return Credit(call_id, _amount.unpack_from(data, start)[0])
    return Control(pickle.loads(data[start:end]))


def _within(position: int, end: int) -> int:
    if position > end:
        raise ValueError("fields longer than the frame")
    return position
