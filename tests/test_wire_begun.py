"""What a caller learns, of a peer that is gone, about the calls that had begun there."""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
import tempfile
from collections.abc import Iterator

import pytest

from engine.seam.channel import ChannelClosed
from engine.seam.messages import PYTHON, Call, Reply
from engine.testing.fakes import FakeListener
from engine.testing.instruments import PATIENCE_S
from engine.testing.strikes import struck
from engine_wire import SocketChannel, Undriven, mapping
from engine_wire.acceptor import channel_of_calls
from engine_wire.begun import FIRST_PLACE, BegunPage, adopted, close_all, greet_with
from engine_wire.handshake import ClientHandshake, ServerHandshake
from engine_wire.opening import Opening
from engine_wire.protocol import GREETING, encode

pytestmark = [
    pytest.mark.usefixtures("leaves_nothing"),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there is no memory to share"),
]
ANY = 1 << 60
SECRET = bytes(range(32))


def call(number: int) -> Call:
    return Call(number, PYTHON, "m", None, "", b"", b"")


class Pair:
    """A caller's end and a replica's end, each driven by the test."""

    def __init__(self, page: BegunPage | None) -> None:
        near, far = socket.socketpair()
        self.caller, self.service = FakeListener(), FakeListener()
        self.near = SocketChannel(near, self.caller, Undriven(), page=page)
        self.far = channel_of_calls(far, self.service, Undriven(), greet=True)

    def call(self, *numbers: int) -> None:
        """Send calls, and let the replica's end hear them."""
        for number in numbers:
            self.near.send(call(number))
        assert self.far.drive(lambda: len(self.service.heard) >= len(numbers), PATIENCE_S)

    def hear(self) -> None:
        """Let the caller's end hear all there is."""
        assert self.near.drive(lambda: self.caller.losses > 0, PATIENCE_S)

    def begun(self, *numbers: int) -> list[int]:
        return [number for number in numbers if self.near.may_have_begun(number)]


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(BegunPage())
    yield pair
    pair.near.close()
    pair.far.close()


def test_which_calls_have_begun_is_known_in_whatever_order_they_came(pair: Pair) -> None:
    pair.call(3, 5, 4, 9)
    assert [pair.far.begin(number) for number in (3, 5)] == [True] * 2
    assert pair.begun(3, 4, 5, 9) == [3, 4, 5, 9]  # it lives: more may begin at any time
    pair.far.close()
    pair.hear()
    assert pair.caller.losses == 1
    assert pair.begun(3, 4, 5, 9) == [3, 5]
    assert not pair.far.begin(9)


def test_of_calls_that_began_long_ago_the_highest_is_known(pair: Pair) -> None:
    pair.call(1)
    late, last = 7, 2000
    for number in (*range(10, last), late):
        pair.far.begin(number)
    pair.far.close()
    pair.hear()
    assert all(map(pair.near.may_have_begun, range(1, last)))
    assert pair.begun(last, last + 1) == []
    assert pair.near._begun_there is not None
    assert late in pair.near._begun_there.numbers
    assert last - 2 * 256 < pair.near._begun_there.forgotten < last - 200


def test_a_peer_that_closed_before_anything_began(pair: Pair) -> None:
    pair.call(1)
    pair.far.close()
    pair.hear()
    assert pair.begun(1) == []


def test_a_peer_that_died_with_calls_unread(pair: Pair) -> None:
    """Its socket breaks then, instead of ending."""
    pair.call(1)
    pair.far.begin(1)
    pair.near.send(call(2))
    pair.far.close()
    pair.hear()
    assert "broke" in str(pair.caller.reason)
    assert pair.begun(1, 2) == [1]


def test_whoever_writes_finds_the_peer_gone_first(pair: Pair) -> None:
    pair.call(1, 2)
    pair.far.begin(1)
    pair.far.close()
    with pytest.raises(ChannelClosed):
        pair.near.send(call(3))
    pair.hear()
    assert pair.begun(1, 2) == [1]


def test_its_last_words_come_first(pair: Pair) -> None:
    pair.call(1, 2)
    pair.far.begin(1)
    pair.far.send(Reply(1, 0, b"", b""))
    pair.far.close()
    pair.hear()
    assert pair.caller.heard == [Reply(1, 0, b"", b"")]
    assert pair.begun(2) == []


def test_a_peer_that_only_stops_talking_may_still_begin_more(pair: Pair) -> None:
    pair.call(1)
    pair.far.sock.shutdown(socket.SHUT_WR)
    pair.hear()
    assert pair.caller.losses == 1
    assert pair.begun(1) == [1]


def test_whoever_closes_it_knows_nothing_of_the_peer(pair: Pair) -> None:
    pair.call(1)
    pair.near.close()
    assert pair.begun(1) == [1]


def test_a_peer_that_broke_the_protocol(pair: Pair) -> None:
    pair.call(1)
    pair.far.sock.send(b"\xff" * 100)
    pair.hear()
    assert "protocol" in str(pair.caller.reason)
    assert pair.begun(1) == [1]


def test_a_caller_without_a_page() -> None:
    pair = Pair(None)
    pair.call(1)
    assert pair.far.begin(1)
    pair.far.close()
    pair.hear()
    assert pair.begun(1, 2) == [1, 2]


def test_the_greeting_goes_alone_if_too_many_pages_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the calls behind it would be taken for a greeting, and the channel be given up again and again."""

    class Crowded(socket.socket):
        def sendmsg(self, *_: object) -> int:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    two = socket.socketpair()
    monkeypatch.setattr(socket, "socketpair", lambda: (Crowded(fileno=two[0].detach()), two[1]))
    pair = Pair(BegunPage())
    pair.call(1)
    assert not pair.service.losses
    pair.far.close()
    pair.hear()
    assert pair.begun(1) == [1]


def test_a_peer_that_keeps_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, because it had no descriptor left to take it."""
    monkeypatch.setattr("engine_wire.opening.adopted", lambda descriptors: adopted([*descriptors]) and None)
    monkeypatch.setattr("engine_wire.begun._mapped", lambda descriptor: None)
    pair = Pair(BegunPage())
    pair.call(1)
    pair.far.begin(1)
    pair.far.close()
    pair.hear()
    assert pair.begun(1, 2) == [1, 2]


@pytest.mark.parametrize("garbage", [struct.pack("=QQ", ANY, 1), b"\xff" * 16, struct.pack("=QQ", 0, 7)])
def test_garbage_on_the_page_makes_every_call_one_that_may_have_begun(pair: Pair, garbage: bytes) -> None:
    pair.call(1)
    assert pair.near._page is not None and pair.near._page.words is not None
    pair.near._page.words.cast("B")[: len(garbage)] = garbage
    pair.far.close()
    pair.hear()
    assert pair.begun(1, 2) == [1, 2]


# -- pages that cannot be trusted ------------------------------------------------------------------------------------


def made(size: int, *, sealable: bool = True) -> int:
    descriptor = os.memfd_create("page", os.MFD_ALLOW_SEALING if sealable else 0)
    os.ftruncate(descriptor, size)
    return descriptor


def unsealed() -> list[int]:
    return [made(4096)]


def too_small() -> list[int]:
    import fcntl

    descriptor = made(8)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return [descriptor]


def read_only() -> list[int]:
    import fcntl

    descriptor = made(4096)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    return [descriptor]


def a_pipe() -> list[int]:
    return list(os.pipe())


def a_file() -> list[int]:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(4096))
        file.flush()
        return [os.dup(file.fileno())]


@pytest.mark.parametrize("make", [unsealed, too_small, read_only, a_pipe, a_file])
def test_what_could_shrink_under_the_one_who_writes_is_not_mapped(make: object) -> None:
    """Touching memory that is gone would end the process. Whatever came is closed."""
    assert adopted(make()) is None  # type: ignore[operator]


def test_a_page_that_was_passed_keeps_no_descriptor_on_either_side() -> None:
    before = len(os.listdir("/proc/self/fd"))
    pair = Pair(BegunPage())
    pair.call(1)
    assert len(os.listdir("/proc/self/fd")) == before + 2  # the sockets
    pair.far.begin(1)
    pair.far.close()
    pair.hear()
    assert pair.begun(1, 2) == [1]
    pair.near.close()


def test_pages_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the cyclic collector, and where the C library has to be asked for the memory."""

    def pages() -> int:
        with open("/proc/self/maps") as maps:
            return sum("engine-begun" in line for line in maps)

    for version in ((3, 12), (3, 10)):
        monkeypatch.setattr(mapping.sys, "version_info", version)
        gc.disable()
        try:
            before = pages()
            pair = Pair(BegunPage())
            pair.call(1)
            assert pages() == before + 2
            pair.far.close()
            pair.hear()
            pair.near.close()
            assert pages() == before
        finally:
            gc.enable()


def test_an_interpreter_without_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mapping, "ctypes", raising=False)
    mapping._from_the_c_library.cache_clear()
    pair = Pair(BegunPage())
    pair.call(1)
    pair.far.begin(1)
    pair.far.close()
    pair.hear()
    assert pair.begun(1, 2) == [1]
    pair.near.close()


def test_a_page_whose_maker_is_interrupted_anywhere_leaves_no_descriptor() -> None:
    near, far = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    kept: list[BegunPage | None] = [None]

    def make() -> None:
        for kept[0] in BegunPage.made(near):
            break

    place = 0
    while where := struck(make, place, KeyboardInterrupt()):
        if kept[0] is not None:
            kept[0].close()
            kept[0] = None
        assert len(os.listdir("/proc/self/fd")) == before, where
        place += 1
    assert place > 10
    assert kept[0] is not None
    kept[0].close()
    near.close()
    far.close()


def test_a_page_cannot_shrink() -> None:
    page = BegunPage()
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(page.fd, size)
    assert page.read() is None
    words = adopted([os.dup(page.fd)])
    assert words is not None
    words[FIRST_PLACE] = 7
    assert [number for number in (1, 7, 8) if page.read().may_have(number)] == [7]  # type: ignore[union-attr]
    page.close()
    page.close()
    assert page.read() is None


# -- where the caller has to prove who it is -------------------------------------------------------------------------


class ProvingPair(Pair):
    """As `Pair`, of a caller that has gone through a handshake and sent its greeting, which nobody has read."""

    def __init__(self) -> None:
        near, far = socket.socketpair()
        self.caller, self.service = FakeListener(), FakeListener()
        server, page = ServerHandshake(SECRET), BegunPage()
        opening = Opening(near, "a socket pair", False, ClientHandshake(SECRET), greets=True, page=page)
        self.near = SocketChannel(near, self.caller, Undriven(), greet=False, opening=opening, page=page)
        self.near.send(call(1))
        while not server.complete:
            self.near.on_writable()
            far.sendall(server.feed(far.recv(server.wanted)))
        self.near.flush_blocking()
        self.far = channel_of_calls(far, self.service, Undriven(), greet=False)


@pytest.fixture
def proving_pair() -> Iterator[ProvingPair]:
    pair = ProvingPair()
    yield pair
    pair.near.close()
    pair.far.close()


def test_a_peer_that_died_before_it_read_the_greeting(proving_pair: ProvingPair) -> None:
    """It may be at other calls meanwhile, for long."""
    proving_pair.far.close()
    proving_pair.hear()
    assert not proving_pair.near.opened


def test_a_peer_that_died_after_it_read_the_greeting(proving_pair: ProvingPair) -> None:
    proving_pair.call(2)
    proving_pair.far.begin(1)
    proving_pair.far.close()
    proving_pair.hear()
    assert proving_pair.near.opened
    assert proving_pair.begun(1, 2) == [1]


def test_a_peer_that_read_the_greeting_and_keeps_no_page(
    proving_pair: ProvingPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_wire.opening.adopted", close_all)
    proving_pair.call(2)
    proving_pair.far.close()
    proving_pair.hear()
    assert proving_pair.near.opened
    assert proving_pair.begun(1, 2) == [1, 2]


# -- the greeting ----------------------------------------------------------------------------------------------------


def test_a_greeting_may_come_in_pieces_and_with_calls_behind_it() -> None:
    near, far = socket.socketpair()
    listener = FakeListener()
    channel = channel_of_calls(far, listener, Undriven(), greet=True)
    page = BegunPage()
    greet_with(near, GREETING[:5], page)
    assert channel.drive(lambda: False, 0.01)
    assert "opening" in repr(channel)
    near.sendall(GREETING[5:] + encode(call(1)) + encode(call(2)))
    assert channel.drive(lambda: len(listener.heard) == 2, PATIENCE_S)
    assert near.recv(100) == GREETING
    channel.begin(1)
    begun = page.read()
    assert begun is not None
    assert begun.may_have(1)
    assert not begun.may_have(2)
    channel.close()
    page.close()
    near.close()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", GREETING[:-1] + b"\x07", b""])
def test_strangers_are_turned_away(said: bytes) -> None:
    near, far = socket.socketpair()
    listener = FakeListener()
    channel = channel_of_calls(far, listener, Undriven(), greet=True)
    page = BegunPage()
    greet_with(near, said[:3] or b"x", page)
    near.sendall(said[3:])
    near.shutdown(socket.SHUT_WR)
    channel.drive(lambda: listener.losses > 0, PATIENCE_S)
    assert listener.losses == 1
    channel.close()
    page.close()
    near.close()


def test_a_greeting_interrupted_anywhere_leaves_no_descriptor() -> None:
    """Either the channel is there and works, or it is lost, and its caller calls elsewhere."""
    for place in range(500):
        pair = Pair(BegunPage())
        pair.near.send(call(1))
        where = struck(lambda pair=pair: pair.far.on_readable(), place, KeyboardInterrupt())  # type: ignore[misc]
        pair.far.drive(lambda pair=pair: bool(pair.service.heard or pair.service.losses), PATIENCE_S)  # type: ignore[misc]
        if not pair.service.losses:
            pair.far.begin(1)
            pair.far.close()
            pair.hear()
            assert pair.begun(1, 2) == [1], where
        pair.near.close()
        pair.far.close()
        if not where:
            break
    assert 5 < place < 499
    gc.collect()  # what struck knows the frames in which it did, and what they held
