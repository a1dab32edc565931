"""Channels to other machines by TLS: who is let in, what is on the wire, what a poll does not show, and strikes."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import re
import select
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from test_wire_service_loops import call, reply
from test_wire_tcp import KINDS, LARGE, OTHER, SECRET, UNPROVED, Caller, Server, check_served, dial, hears_the_end

from engine.errors import InvalidArgument
from engine.seam.channel import ChannelClosed
from engine.testing.fakes import FakeListener
from engine.testing.instruments import PATIENCE_S, Footprint, eventually
from engine.testing.strikes import struck
from engine_wire import Undriven, connect, listen_tcp, lobby, secure, tcp_address
from engine_wire.handshake import ServerHandshake
from engine_wire.protocol import encode
from engine_wire.secure import SecureChannel, SecureSocket
from engine_wire.tls import TLS, identity_of, make_tls

MINE = make_tls()


def issued(authority: trustme.CA, **options: Any) -> TLS:
    """A certificate of an authority's, as text."""
    leaf = authority.issue_cert("engine.example", **options)
    return TLS(
        certificate="".join(blob.bytes().decode() for blob in leaf.cert_chain_pems),
        key=leaf.private_key_pem.bytes().decode(),
        authority=authority.cert_pem.bytes().decode(),
    )


@pytest.fixture
def stack(leaves_nothing: Footprint, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(secure, "_complained", set())
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["driven", "polled", "asyncio", "uvloop"])
def caller(request: pytest.FixtureRequest, stack: ExitStack) -> Caller:
    return Caller(request.param, stack, MINE)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What "engine.wire" warned of."""
    caplog.set_level(logging.WARNING, "engine.wire")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "engine.wire"]


def serving(stack: ExitStack, kind: str = "blocking", tls: TLS | None = MINE) -> Server:
    server = Server(kind, SECRET, tls)
    server.start()
    stack.callback(server.stop)
    return server


class Relay:
    """Stands between a caller and a server, and writes down what passes.

    Args:
        stack: Ends it.
        target: Of the server.
        act: Runs with both connections, in place of passing everything on.
        piece: Bytes that it passes on at a time.
    """

    def __init__(self, stack: ExitStack, target: str, act: Any = None, piece: int = 1 << 16) -> None:
        self._listening = stack.enter_context(listen_tcp("127.0.0.1"))
        self.address = tcp_address(self._listening)
        host, _, port = target.removeprefix("tcp:").rpartition(":")
        self._target = (host, int(port))
        self._act = act or self._pass_on
        self._piece = piece
        self.seen = bytearray()
        self.cut = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay")
        self._thread.start()
        stack.callback(self._thread.join, PATIENCE_S)
        stack.callback(self._listening.shutdown, socket.SHUT_RDWR)
        stack.callback(self.cut.set)

    def _run(self) -> None:
        with suppress(OSError), self._listening.accept()[0] as near, socket.create_connection(self._target) as far:
            self._act(near, far)

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not self.cut.is_set():
            for sock in select.select([near, far], [], [], 0.01)[0]:
                data = sock.recv(self._piece)
                if not data:
                    return
                self.seen += data
                (far if sock is near else near).sendall(data)


# -- those who belong together ---------------------------------------------------------------------------------------


@KINDS
def test_what_is_sent_before_the_connection_stands_arrives_in_order(
    caller: Caller, kind: str, stack: ExitStack
) -> None:
    server = Server(kind, SECRET, MINE)
    channel, listener = caller.open(server.tcp, calls=kind != "acceptor")
    sizes = [1, LARGE, 0, 16383, 16384, 16385, 70_000, LARGE // 2, 3]
    calls = [call(number, bytes([number]) * size) for number, size in enumerate(sizes)]
    for message in calls:
        channel.send(message)
    assert "opening" in repr(channel)
    server.start()
    stack.callback(server.stop)
    caller.until(channel, lambda: len(listener.heard) == len(calls))
    assert listener.heard == [reply(number, message.payload) for number, message in enumerate(calls)]
    assert isinstance(channel, SecureChannel)
    assert "opening" not in repr(channel)
    assert server.open_channels() == 1
    channel.send(call(99))
    caller.until(channel, lambda: listener.heard[-1] == reply(99))


def test_threads_that_send_at_a_time_lose_nothing(caller: Caller, stack: ExitStack) -> None:
    server = serving(stack)
    channel, listener = caller.open(server.tcp)

    def send_all(first: int) -> None:
        for number in range(first, first + 100):
            channel.send(call(number, b"x" * (number * 30)))

    senders = [threading.Thread(target=send_all, args=(first,)) for first in (0, 1000, 2000)]
    for sender in senders:
        sender.start()
    caller.until(channel, lambda: len(listener.heard) == 300)
    for sender in senders:
        sender.join()
    for first in (0, 1000, 2000):
        mine = [message.id for message in listener.heard if first <= message.id < first + 1000]
        assert mine == list(range(first, first + 100))


def test_unix_sockets_stay_plain(caller: Caller, stack: ExitStack) -> None:
    server = serving(stack)
    channel, listener = caller.open(server.unix, calls=True)
    channel.send(call(1))
    caller.until(channel, lambda: listener.heard == [reply(1)])
    assert type(channel.sock) is socket.socket


def test_bytes_may_come_one_by_one(caller: Caller, stack: ExitStack) -> None:
    relay = Relay(stack, serving(stack).tcp, piece=1)
    channel, listener = caller.open(relay.address)
    channel.send(call(1, b"one by one"))
    channel.send(call(2))
    caller.until(channel, lambda: listener.heard == [reply(1, b"one by one"), reply(2)])


@pytest.mark.parametrize("tls", [None, MINE], ids=["plain", "tls"])
def test_nothing_that_is_said_can_be_read_on_the_wire(tls: TLS | None, stack: ExitStack) -> None:
    relay = Relay(stack, serving(stack, tls=tls).tcp)
    channel, listener = Caller("polled", stack, tls).open(relay.address)
    word = b"for nobody's eyes"
    channel.send(call(1, word * 1000))
    eventually(lambda: listener.heard == [reply(1, word * 1000)])
    assert len(relay.seen) > 2 * 1000 * len(word)
    for said in (word, b"engine/"):
        assert (said in relay.seen) is (tls is None)
    assert SECRET not in relay.seen


def test_certificates_of_an_authority(caller: Caller, stack: ExitStack) -> None:
    authority = trustme.CA()
    server = serving(stack, tls=issued(authority))
    caller.tls = issued(authority)
    channel, listener = caller.open(server.tcp)
    channel.send(call(1))
    caller.until(channel, lambda: listener.heard == [reply(1)])


# -- those who do not ------------------------------------------------------------------------------------------------


LEFT = "(closed the connection before|Connection reset by peer|Broken pipe)"
"""What a caller hears of a server that drops it without a word: it may find out while it writes."""


def check_refused(caller: Caller, address: str, reason: str) -> None:
    channel, listener = caller.open(address)
    with suppress(ChannelClosed):  # it may know already
        channel.send(call(5, b"a word"))
    caller.until(channel, listener.gone.is_set)
    assert listener.reason is not None and re.search(reason, listener.reason)
    assert listener.losses == 1
    assert not listener.heard


@KINDS
def test_a_plain_caller_is_refused(kind: str, stack: ExitStack, log: Callable[[], list[str]]) -> None:
    server = serving(stack, kind)
    check_refused(Caller("polled", stack, None), server.tcp, LEFT)
    [line] = eventually(log)
    assert "it does not speak TLS" in line
    check_served(server, stack, MINE)


def test_a_server_that_speaks_no_tls(caller: Caller, stack: ExitStack, log: Callable[[], list[str]]) -> None:
    server = serving(stack, tls=None)
    check_refused(caller, server.tcp, LEFT)
    [line] = eventually(log)
    assert "it speaks TLS, which this side does not" in line
    with listen_tcp("127.0.0.1") as listening:
        channel, listener = caller.open(tcp_address(listening))
        with listening.accept()[0] as peer:
            peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            caller.until(channel, listener.gone.is_set)
    assert listener.reason == f"{UNPROVED} (it does not speak TLS, as all processes of this engine do)"


@KINDS
def test_a_certificate_of_another_authority_is_refused_and_mentioned_once(
    kind: str, stack: ExitStack, log: Callable[[], list[str]]
) -> None:
    server = serving(stack, kind)
    stranger = Caller("polled", stack, make_tls())
    for _ in range(3):
        check_refused(stranger, server.tcp, f"{UNPROVED} .its certificate is not accepted: self-signed certificate; ")
    eventually(lambda: len(log()) >= 2)
    assert ["see docs/security.md" in line for line in log()] == [True, True]  # one line of each side
    check_served(server, stack, MINE)


@KINDS
def test_a_caller_that_is_refused_learns_why(kind: str, stack: ExitStack, log: Callable[[], list[str]]) -> None:
    one, another = trustme.CA(), trustme.CA()
    both = "".join(authority.cert_pem.bytes().decode() for authority in (one, another))
    known = issued(one)
    server = serving(stack, kind, known)
    half = issued(another)
    stranger = Caller("polled", stack, TLS(half.certificate, half.key, both))
    for _ in range(2):
        check_refused(stranger, server.tcp, "it does not accept the certificate of this side: tlsv1 alert unknown ca")
    eventually(lambda: len(log()) == 2)  # one of either side
    assert any(
        "its certificate is not accepted: self-signed certificate in certificate chain" in line for line in log()
    )
    check_served(server, stack, known)


OLD = {"no certificate": {}, "an old version": {"maximum_version": ssl.TLSVersion.TLSv1_2}}


@pytest.mark.parametrize("how", OLD)
def test_other_programs_that_speak_tls(how: str, stack: ExitStack, log: Callable[[], list[str]]) -> None:
    server = serving(stack)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=MINE.authority)
    for name, value in OLD[how].items():
        setattr(context, name, value)
    with suppress(ssl.SSLError, ConnectionError), context.wrap_socket(dial(server, stack)) as sock:
        hears_the_end(sock)
    [line] = eventually(log)
    assert {"no certificate": "it has no certificate", "an old version": "TLS: unsupported protocol"}[how] in line
    check_served(server, stack, MINE)


def test_the_secret_is_asked_for_inside(caller: Caller, stack: ExitStack, log: Callable[[], list[str]]) -> None:
    server = serving(stack)
    channel, listener = caller.open(server.tcp, secret=OTHER)
    caller.until(channel, listener.gone.is_set)
    assert listener.reason == f"{UNPROVED} (its secret is another one)"
    eventually(log)
    check_served(server, stack, MINE)


def test_somebody_in_the_middle_who_has_a_certificate_cannot_pass_proofs_on(
    stack: ExitStack, log: Callable[[], list[str]]
) -> None:
    authority = trustme.CA()
    middle = identity_of(issued(authority))

    def impersonate(near: socket.socket, far: socket.socket) -> None:
        with (
            middle.context(server_side=True)[0].wrap_socket(near, server_side=True) as victim,
            middle.context(server_side=False)[0].wrap_socket(far) as server,
        ):
            server.sendall(victim.recv(1 << 16))
            victim.sendall(server.recv(1 << 16))
            hears_the_end(victim)

    relay = Relay(stack, serving(stack, tls=issued(authority)).tcp, impersonate)
    check_refused(Caller("polled", stack, issued(authority)), relay.address, r"\(its secret is another one\)")


@KINDS
@pytest.mark.parametrize("opening", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "slow"])
def test_who_takes_too_long_is_dropped(
    kind: str, opening: bytes, stack: ExitStack, log: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "PATIENCE_S", 0.05)
    server = serving(stack, kind)
    sock = dial(server, stack)
    sock.sendall(opening)
    assert hears_the_end(sock)
    [line] = eventually(log)
    assert line.endswith("it did not prove within 0.05 s that it belongs to this engine")
    monkeypatch.undo()
    check_served(server, stack, MINE)


# -- connections that break ------------------------------------------------------------------------------------------


def test_a_connection_that_is_cut_in_the_middle_of_a_message(caller: Caller, stack: ExitStack) -> None:
    server = serving(stack)
    relay = Relay(stack, server.tcp)
    channel, listener = caller.open(relay.address)
    channel.send(call(1))
    caller.until(channel, lambda: listener.heard == [reply(1)])
    held = threading.Event()
    stack.callback(held.set)
    server.service.run(lambda: held.wait(PATIENCE_S))
    channel.send(call(2, bytes(LARGE)))
    relay.cut.set()
    caller.until(channel, listener.gone.is_set)
    assert listener.losses == 1
    assert listener.heard == [reply(1)]
    assert channel.may_have_begun(2)
    with pytest.raises(ChannelClosed):
        channel.send(call(3))


class Pair:
    """Two ends of one connection, in this thread: a caller's channel, and a server's socket."""

    def __init__(self, stack: ExitStack) -> None:
        listening = stack.enter_context(listen_tcp("127.0.0.1"))
        self.listener = FakeListener()
        self.channel = connect(
            tcp_address(listening), self.listener, on_loop=False, poller=Undriven(), secret=SECRET, tls=MINE
        )
        self.peer = SecureSocket(listening.accept()[0], MINE, server_side=True)
        stack.callback(self.channel.close)
        stack.callback(self.peer.close)
        handshake = ServerHandshake(SECRET, self.peer.binding)
        while not handshake.complete:
            self.channel.drive(lambda: False, 0.001)
            with suppress(BlockingIOError):
                answer = handshake.feed(self.peer.recv(handshake.wanted))
                assert self.peer.send(answer) == len(answer)
        self.channel.drive(lambda: self.channel.opened, PATIENCE_S)

    def say(self, *messages: Any) -> None:
        """Send messages as one piece."""
        data = b"".join(map(encode, messages))
        assert self.peer.send(data) == len(data)

    def heard(self) -> bytes:
        """All that came."""
        select.select([self.peer], [], [], PATIENCE_S)
        got = b""
        with suppress(BlockingIOError):
            while data := self.peer.recv(1 << 20):
                got += data
        return got


def test_what_a_connection_held_goes_with_it(stack: ExitStack) -> None:
    """Without the cyclic collector: that is some memory."""
    listening = stack.enter_context(listen_tcp("127.0.0.1"))
    host = socket.create_connection(listening.getsockname())
    sock = SecureSocket(host, MINE, server_side=False)
    left = weakref.ref(sock)
    gc.disable()
    try:
        sock.close()
        del sock
        assert left() is None
    finally:
        gc.enable()


def test_a_farewell_ends_the_connection_though_the_socket_stays_open(stack: ExitStack) -> None:
    pair = Pair(stack)
    pair.say(reply(1))
    with suppress(ssl.SSLWantReadError):
        pair.peer._tls.unwrap()
    socket.socket.send(pair.peer, pair.peer._outgoing.read())
    pair.channel.drive(pair.listener.gone.is_set, PATIENCE_S)
    assert pair.listener.heard == [reply(1)]
    assert pair.listener.reason == "the peer closed the connection"


def test_bytes_that_somebody_else_put_in(stack: ExitStack) -> None:
    pair = Pair(stack)
    pair.say(reply(1))
    pair.channel.drive(lambda: bool(pair.listener.heard), PATIENCE_S)
    socket.socket.send(pair.peer, b"\x17\3\3\0\x20" + bytes(32))
    pair.channel.drive(pair.listener.gone.is_set, PATIENCE_S)
    assert pair.listener.heard == [reply(1)]
    assert pair.listener.reason is not None and pair.listener.reason.startswith("the connection broke (TLS: ")


def test_bytes_that_somebody_else_put_in_leave_alone_what_a_writer_is_at(stack: ExitStack) -> None:
    """The library has something to say to the peer then. It would say that in the midst of a record of the writer's."""
    pair = Pair(stack)
    pair.say(reply(1))
    pair.channel.drive(lambda: bool(pair.listener.heard), PATIENCE_S)
    sock = pair.channel.sock
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 17))
    assert isinstance(sock, SecureSocket)
    being_sent = [*sock._sealed]
    assert being_sent
    socket.socket.send(pair.peer, b"\x17\3\3\0\x20" + bytes(32))
    select.select([sock], [], [], PATIENCE_S)
    with pytest.raises(ConnectionError):
        sock.recv(1 << 16)
    assert sock._sealed == being_sent


def test_what_a_poll_does_not_show_is_read(stack: ExitStack) -> None:
    """The end of a large message and small ones in one record; more records than one read asks for."""
    pair = Pair(stack)
    large = encode(reply(1, bytes(1 << 19)))
    sent = 0
    rest = large[-100:] + b"".join(encode(reply(number, b"x" * 9000)) for number in range(2, 20))

    def feed() -> None:
        nonlocal sent
        for data in (large[:-100], rest):
            position = 0
            while position < len(data):
                select.select([], [pair.peer], [], PATIENCE_S)
                with suppress(BlockingIOError):
                    position += pair.peer.send(data[position:])

    thread = threading.Thread(target=feed)
    thread.start()
    pair.channel.drive(lambda: len(pair.listener.heard) == 19, PATIENCE_S)
    thread.join(PATIENCE_S)
    assert [message.id for message in pair.listener.heard] == list(range(1, 20))


def test_a_kernel_that_takes_little(stack: ExitStack) -> None:
    pair = Pair(stack)
    pair.channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    got: list[bytes] = []
    large = call(1, os.urandom(1 << 20))
    expected = encode(large) + encode(call(2))

    def listen() -> None:
        while sum(map(len, got)) < len(expected):
            got.append(pair.heard())

    thread = threading.Thread(target=listen)
    thread.start()
    pair.channel.send(large)
    pair.channel.send(call(2))
    thread.join(PATIENCE_S)
    assert b"".join(got) == expected


# -- strikes -----------------------------------------------------------------------------------------------------------


class Struck(BaseException):
    pass


@pytest.mark.parametrize("what", ["reading", "writing"])
def test_strikes_lose_and_repeat_nothing(what: str, stack: ExitStack) -> None:
    pair = Pair(stack)
    answers = [reply(number, bytes([number]) * 20_000) for number in (1, 2, 3)]
    places = 0
    while True:
        pair.listener.heard.clear()
        if what == "reading":
            pair.say(*answers)

            def act() -> None:
                pair.channel.drive(lambda: len(pair.listener.heard) >= 3, PATIENCE_S)

        else:

            def act() -> None:
                pair.channel.send(call(7, b"x" * 40_000))

        where = struck(act, places, Struck(), spare=("/fakes.py",))
        if what == "reading":
            pair.channel.drive(lambda: len(pair.listener.heard) >= 3, PATIENCE_S)
            # An answer may be taken twice; its caller does not care.
            assert [one for one, _ in itertools.groupby(pair.listener.heard)] == answers, where
        else:
            pair.channel.send(call(8))
            got = pair.heard()
            assert got in (encode(call(7, b"x" * 40_000)) + encode(call(8)), encode(call(8))), where
        if not where:
            break
        places += 1
    assert places > 30


def test_a_handler_that_the_library_runs_when_it_has_decrypted_something(stack: ExitStack) -> None:
    pair = Pair(stack)
    library = pair.channel.sock._tls

    class Interrupted:
        """Does what it should, and raises: as `ssl` does when a signal came meanwhile."""

        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

        def read(self, *args: Any) -> int:
            library.read(*args)
            pair.channel.sock._tls = library
            raise Struck

        def write(self, data: bytes) -> int:
            library.write(data)
            pair.channel.sock._tls = library
            raise Struck

    pair.say(reply(1, b"x" * 20_000), reply(2))
    pair.channel.sock._tls = Interrupted()  # type: ignore[assignment]
    with pytest.raises(Struck):
        pair.channel.drive(lambda: len(pair.listener.heard) == 2, PATIENCE_S)
    assert pair.listener.heard == [reply(1, b"x" * 20_000), reply(2)]
    pair.channel.sock._tls = Interrupted()  # type: ignore[assignment]
    with pytest.raises(Struck):
        pair.channel.send(call(1, b"y" * 20_000))
    pair.channel.send(call(2))
    assert pair.heard() == encode(call(1, b"y" * 20_000)) + encode(call(2))


# -- certificates ----------------------------------------------------------------------------------------------------


def test_certificates_from_files_that_are_renewed(stack: ExitStack, tmp_path: Path) -> None:
    authority = trustme.CA()

    def write(tls: TLS, stamp_s: int) -> None:
        for name in ("certificate", "key", "authority"):
            (tmp_path / name).write_text(getattr(tls, name))
            os.utime(tmp_path / name, (stamp_s, stamp_s))

    write(issued(authority), 1)
    tls = TLS(tmp_path / "certificate", tmp_path / "key", tmp_path / "authority")  # type: ignore[arg-type]
    server = serving(stack, tls=tls)
    check_served(server, stack, tls)
    old = identity_of(tls).context(server_side=True)
    assert identity_of(tls).context(server_side=True) == old
    write(issued(authority), 2)
    assert identity_of(tls).context(server_side=True) != old
    channel, listener = Caller("polled", stack, tls).open(server.tcp)
    channel.send(call(1))
    eventually(lambda: listener.heard == [reply(1)])


def test_files_that_are_renewed_wrongly(tmp_path: Path, log: Callable[[], list[str]]) -> None:
    for name in ("certificate", "key", "authority"):
        (tmp_path / name).write_text(getattr(MINE, name))
    tls = TLS(*(str(tmp_path / name) for name in ("certificate", "key", "authority")))
    old = identity_of(tls).context(server_side=True)
    (tmp_path / "key").unlink()
    assert identity_of(tls).context(server_side=True) == old
    assert identity_of(tls).context(server_side=True) == old
    [line] = log()
    assert line.startswith("goes on with the certificate that was read before: TLS: key=")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"certificate": ""}, "TLS: certificate must be a path or PEM text, not ''"),
        ({"key": b"x"}, "TLS: key must be a path or PEM text, not bytes"),
        ({"authority": "/no/such"}, "TLS: authority='/no/such' cannot be read: No such file or directory"),
        ({"key": "a\0b"}, "cannot be read: embedded null byte"),
        ({"certificate": MINE.key}, "TLS: certificate=<PEM> holds no certificate in PEM"),
        ({"key": make_tls().key}, "are not a certificate and its key in PEM: key values mismatch"),
        ({"authority": MINE.key}, "TLS: authority=<PEM> holds no certificate in PEM: "),
    ],
)
def test_what_cannot_be_used(changes: dict[str, Any], text: str) -> None:
    values = {"certificate": MINE.certificate, "key": MINE.key, "authority": MINE.authority, **changes}
    with pytest.raises(InvalidArgument) as caught:
        identity_of(TLS(**values))
    assert text in str(caught.value)
    assert MINE.key not in str(caught.value)


def test_a_key_with_a_passphrase_asks_nobody() -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(MINE.key.encode(), None)
    closed = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"a passphrase"),
    ).decode()
    with pytest.raises(InvalidArgument, match="key needs a passphrase"):
        identity_of(TLS(MINE.certificate, closed, MINE.authority))


def test_the_key_is_shown_to_nobody() -> None:
    assert repr(MINE) == "TLS(certificate=<PEM>, key=<PEM>, authority=<PEM>)"
    assert repr(TLS("/a", "/b", "/c")) == "TLS(certificate='/a', key='/b', authority='/c')"
    assert "key" not in repr(identity_of(MINE)).lower().replace("object", "")
