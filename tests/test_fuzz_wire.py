"""The wire between processes: whatever a peer sends ends its own connection at most, and costs little memory."""

from __future__ import annotations

import array
import contextlib
import fcntl
import itertools
import os
import pickle
import socket
import struct
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

from fakes import decoded
from fuzzing import fuzzed, log_of
from hypothesis import strategies as st

from engine.seam.control_messages import Applied, LogLine, Pong, Ready, Subscribe
from engine.seam.messages import (
    AS_CONFIGURED,
    HTTP,
    LOW,
    NORMAL,
    PYTHON,
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
from engine.testing.fakes import FakeListener
from engine_wire import SocketChannel, Undriven, protocol
from engine_wire.acceptor import channel_of_calls
from engine_wire.begun import BegunPage, adopted
from engine_wire.handshake import ClientHandshake, HandshakeError, ServerHandshake
from engine_wire.protocol import GREETING, Decoder, ProtocolError, encode

_ids = st.integers(0, (1 << 64) - 1)
_loads = st.integers(0, (1 << 32) - 1)
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_bytes = st.one_of(st.binary(max_size=40), st.sampled_from([1 << 16, (1 << 18) + 5]).map(bytes))
_bodies = st.one_of(
    st.none(),
    st.builds(Ready, _texts),
    st.builds(LogLine, st.integers(0, 50), _texts, _texts),
    st.builds(Pong, st.integers(), st.integers()),
    st.builds(Subscribe, st.booleans(), _texts),
    st.builds(Applied, st.integers()),
)
_MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        lambda *fields: Call(*fields[:7], AS_CONFIGURED, *fields[7:]),
        _ids,
        st.sampled_from([PYTHON, HTTP]),
        _texts,
        st.none(),
        _texts,
        _bytes,
        _bytes,
        st.sampled_from([NORMAL, LOW]),
        st.booleans(),
    ),
    st.builds(Reply, _ids, _loads, _bytes, _bytes),
    st.builds(Failure, _ids, _loads, st.integers(0, 255), _bytes, _bytes),
    st.builds(Item, _ids, _bytes, _bytes),
    st.builds(End, _ids, _loads, st.booleans()),
    st.builds(Cancel, _ids),
    st.builds(Credit, _ids, _loads),
    st.builds(Control, _bodies),
)
_frames = st.one_of(
    _MESSAGES.map(encode),
    # headers of any length, type and number, some with a little behind them
    st.builds(
        lambda size, kind, number, rest: struct.pack("<IBQ", size, kind, number) + rest,
        st.one_of(
            st.integers(0, 40), st.integers(0, (1 << 32) - 1), st.sampled_from([1 << 18, 1 << 30, (1 << 30) + 1])
        ),
        st.integers(0, 12),
        _ids,
        st.binary(max_size=40),
    ),
    st.binary(max_size=40),
)


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    """Frames one behind the other, with bits turned, and cut off somewhere."""
    data = bytearray(b"".join(draw(st.lists(_frames, max_size=4))))
    for _ in range(draw(st.sampled_from([0, 0, 1, 3])) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


_cuts = st.lists(st.integers(0, 1 << 12), max_size=6)


def _pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


@contextlib.contextmanager
def _nothing_is_unpickled() -> Iterator[None]:
    """Pickles of strangers are none of the decoder's business: those come from proven peers alone."""
    with mock.patch.object(protocol, "pickle", SimpleNamespace(loads=bytes, dumps=pickle.dumps)):
        yield


@fuzzed(messages=st.lists(_MESSAGES, max_size=4), cuts=_cuts, greeting=st.booleans())
def test_messages_come_back_as_they_were(messages: list[Message], cuts: list[int], greeting: bool) -> None:
    decoder = Decoder(greeting=greeting)
    stream = (GREETING if greeting else b"") + b"".join(map(encode, messages))
    got = [message for piece in _pieces(stream, cuts) for message in decoded(decoder, piece)]
    assert got == messages
    assert list(map(type, got)) == list(map(type, messages))


@fuzzed(deadline=st.floats(allow_nan=False), same_machine=st.booleans())
def test_deadlines_get_no_later_on_one_machine(deadline: float, same_machine: bool) -> None:
    call = Call(1, 0, "m", deadline, "", b"", b"")
    (copy,) = decoded(Decoder(greeting=False, same_machine=same_machine), encode(call))
    assert isinstance(copy, Call) and copy.deadline is not None
    assert copy[:3] + copy[4:] == call[:3] + call[4:]
    if same_machine and protocol.time.monotonic() < deadline:
        assert copy.deadline <= deadline


@fuzzed(data=_streams(), cuts=_cuts, greeting=st.booleans())
def test_any_bytes_are_messages_or_an_error_wherever_they_are_cut(data: bytes, cuts: list[int], greeting: bool) -> None:
    def read(pieces: list[bytes]) -> tuple[list[Message], str | None]:
        decoder, got = Decoder(greeting=greeting), []
        try:
            for piece in pieces:
                got += decoded(decoder, piece)
                held = len(decoder._tail) + len(decoder.large or b"")
                assert held <= max(4 * len(data), 1 << 22), "a length alone takes memory"
        except ProtocolError as error:
            assert str(error)
            return [*got, *decoder.messages], "broken"
        return got, None

    with _nothing_is_unpickled():
        whole, broken = read([data])
        parts, broken_too = read(_pieces(data, cuts))
    assert broken == broken_too
    # of what came in one piece with an error nothing is passed on
    assert repr(parts[: len(whole)]) == repr(whole)
    assert broken or len(parts) == len(whole)


@fuzzed(data=_streams(), cuts=_cuts, descriptors=st.lists(st.sampled_from(["page", "small", "open", "file", "pipe"])))
def test_a_peer_ends_its_own_connection_at_most(data: bytes, cuts: list[int], descriptors: list[str]) -> None:
    before = _open_descriptors()
    near, far = socket.socketpair()
    listener = FakeListener()
    with contextlib.ExitStack() as stack, _nothing_is_unpickled():
        stack.enter_context(far)
        records = stack.enter_context(log_of("engine.wire"))
        channel = channel_of_calls(near, listener, Undriven(), greet=True)
        stack.callback(channel.close)
        pieces = _pieces(GREETING + data, cuts)
        rights = [stack.enter_context(_descriptor(kind)) for kind in descriptors]
        for number, piece in enumerate(pieces):
            if not channel.closed:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    _say(far, piece, rights if number == 0 else [], channel)
                channel.read_rest()
        far.close()
        channel.read_rest()
        assert channel.drive(lambda: listener.losses > 0, 5.0)
        assert listener.losses == 1
        assert channel.sock.fileno() == -1
        broke = "broke the protocol" in str(listener.reason)
        assert len(records) == broke, records
    assert _open_descriptors() <= before  # another test's may go meanwhile


@fuzzed(words=st.binary(max_size=40), number=_ids, cut=st.integers(0, 5000))
def test_a_page_says_something_or_nothing(words: bytes, number: int, cut: int) -> None:
    if not hasattr(os, "memfd_create"):
        return  # there is no memory to share
    page = BegunPage()
    try:
        os.pwrite(page.fd, words, 0)
        begun = page.read()
        assert begun is None or begun.may_have(number) in (True, False)
    finally:
        page.close()
    with tempfile.TemporaryFile() as file:
        file.write(bytes(cut))
        file.flush()
        given = [os.dup(file.fileno())]
        assert adopted(given) is None
        assert given == []


@fuzzed(data=st.binary(max_size=200), cuts=_cuts, honest=st.booleans(), server=st.booleans())
def test_nobody_gets_through_a_handshake_without_the_secret(
    data: bytes, cuts: list[int], honest: bool, server: bool
) -> None:
    """Neither who sends anything, nor who begins as he should and knows another secret."""
    secret, other = bytes(range(32)), bytes(32)
    side = ServerHandshake(secret) if server else ClientHandshake(secret)
    peer = ClientHandshake(other) if server else ServerHandshake(other)
    if honest and isinstance(peer, ClientHandshake):
        data = peer.hello + data
    elif honest and isinstance(side, ClientHandshake):
        data = peer.feed(side.hello) + data
    for piece in _pieces(data, cuts):
        while piece and side.wanted:
            assert side.wanted <= 128, "it holds more of a stranger's than that"
            now, piece = piece[: side.wanted], piece[side.wanted :]
            try:
                side.feed(now)
            except HandshakeError as error:
                assert str(error) and side.wanted == 0
    assert not side.complete


# -- helpers -----------------------------------------------------------------------------------------------------------


def _open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


@contextlib.contextmanager
def _descriptor(kind: str) -> Iterator[int]:
    """Something that a peer may pass: what it should, one that can shrink, one of another size, or anything."""
    if kind == "page" and hasattr(os, "memfd_create"):
        page = BegunPage()
        yield page.fd
        page.close()
    elif kind == "pipe" or not hasattr(os, "memfd_create"):
        read, write = os.pipe()
        yield read
        os.close(read)
        os.close(write)
    elif kind == "file":
        with tempfile.TemporaryFile() as file:
            yield file.fileno()
    else:
        fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 4096 if kind == "open" else 100)
        if kind == "small":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        yield fd
        os.close(fd)


def _say(sock: socket.socket, data: bytes, descriptors: list[int], channel: SocketChannel) -> None:
    if descriptors:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        data = data[sock.sendmsg([data], rights, socket.MSG_DONTWAIT) :]
    while data and not channel.closed:
        with contextlib.suppress(BlockingIOError):
            data = data[sock.send(data, socket.MSG_DONTWAIT) :]
        channel.read_rest()
