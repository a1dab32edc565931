"""Channels to other machines, over TCP on this one: slow connections, handshakes, and what strangers may send."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import uvloop
from test_wire_service_loops import Echo, call, reply

from engine.errors import InvalidArgument
from engine.seam.channel import Channel, ChannelClosed
from engine.seam.event_loop import close_event_loop
from engine.seam.messages import Control, Message
from engine.testing.fakes import FakeListener
from engine.testing.instruments import PATIENCE_S, Footprint, eventually
from engine_wire import (
    Acceptor,
    AsyncServiceLoop,
    BlockingServiceLoop,
    Poller,
    SocketChannel,
    Undriven,
    connect,
    listen_tcp,
    listen_unix,
    lobby,
    tcp_address,
)
from engine_wire.addresses import SILENCE_S, UNACKNOWLEDGED_S, accept_from, notice_silence
from engine_wire.handshake import ClientHandshake, ServerHandshake
from engine_wire.lobby import Lobby
from engine_wire.opening import Opening
from engine_wire.protocol import GREETING, encode
from engine_wire.tls import TLS

SECRET = b"the secret of this test's engine"
OTHER = b"the secret of some other engine."
LARGE = 5_000_000
_names = itertools.count()


@pytest.fixture
def stack(leaves_nothing: Footprint) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# -- the two sides -----------------------------------------------------------------------------------------------------


class Server:
    """A service behind a TCP and an abstract Unix socket, accepted by one of the three that accept."""

    def __init__(self, kind: str, secret: bytes | None, tls: TLS | None = None) -> None:
        self.kind = kind
        self.secret = secret
        self.tls = tls
        tcp, unix = listen_tcp("127.0.0.1"), listen_unix(f"@engine-test-{os.getpid()}-{next(_names)}")
        self.tcp = tcp_address(tcp)
        self.unix = "unix:@" + unix.getsockname()[1:].decode()
        self._listening = [tcp, unix]
        self.service = Echo(on_loop=kind == "async")
        self.shown = 0  # channels that the acceptor asked about
        self._thread = threading.Thread(target=self._run, name="server")
        self._acceptor: Acceptor
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        self._thread.start()
        assert self.service.attached.wait(PATIENCE_S)

    def stop(self) -> None:
        if self.kind == "acceptor":
            self._loop.call_soon_threadsafe(self._loop.stop)
        else:
            self.service.leave()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def open_channels(self) -> int:
        return (self._acceptor if self.kind == "acceptor" else self.service.loop).open_channels()

    def _run(self) -> None:
        if self.kind == "acceptor":
            self._loop = loop = asyncio.new_event_loop()
            self._acceptor = Acceptor(self._listening, self._accept, loop, secret=self.secret, tls=self.tls)
            self.service.attached.set()
            loop.run_forever()
            self._acceptor.close()
            self._acceptor.close()
            loop.close()
        else:
            {"blocking": BlockingServiceLoop, "async": AsyncServiceLoop}[self.kind](
                self._listening, self.service, secret=self.secret, tls=self.tls
            ).run()
            if self.service.event_loop is not None:
                close_event_loop(self.service.event_loop)

    def _accept(self, channel: Channel) -> Echo:
        self.shown += 1
        return self.service


def serving(stack: ExitStack, kind: str, secret: bytes | None = SECRET) -> Server:
    server = Server(kind, secret)
    server.start()
    stack.callback(server.stop)
    return server


class Caller:
    """Opens channels in one of the ways that callers do, and waits in that way."""

    def __init__(self, mode: str, stack: ExitStack, tls: TLS | None = None) -> None:
        self.mode = mode
        self.tls = tls
        self.stack = stack
        self.poller = Poller("test-poller")
        stack.callback(self.poller.close)
        self.loop: asyncio.AbstractEventLoop | None = None
        if mode in ("asyncio", "uvloop"):
            self.loop = (uvloop if mode == "uvloop" else asyncio).new_event_loop()
            thread = threading.Thread(target=self.loop.run_forever, name="caller")
            thread.start()
            stack.callback(self.loop.close)
            stack.callback(thread.join)
            stack.callback(self.loop.call_soon_threadsafe, self.loop.stop)

    def open(
        self, address: str, *, secret: bytes | None = SECRET, calls: bool = False
    ) -> tuple[SocketChannel, FakeListener]:
        listener = FakeListener()

        def make() -> SocketChannel:
            channel = connect(
                address,
                listener,
                on_loop=self.loop is not None,
                poller=self.poller,
                secret=secret,
                calls=calls,
                tls=self.tls,
            )
            if self.mode == "polled":
                channel.watch()
            return channel

        channel = self.on_home(make)
        self.stack.callback(self.on_home, channel.close)
        return channel, listener

    def on_home(self, function: Callable[[], Any]) -> Any:
        if self.loop is None:
            return function()

        async def main() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(main(), self.loop).result(PATIENCE_S)

    def until(self, channel: SocketChannel, done: Callable[[], bool]) -> None:
        if self.mode == "driven":
            channel.drive(done, PATIENCE_S)  # the poller may have been faster to take the role, and keep it a moment
        eventually(done)


@pytest.fixture(params=["driven", "polled", "asyncio", "uvloop"])
def caller(request: pytest.FixtureRequest, stack: ExitStack) -> Caller:
    return Caller(request.param, stack)


KINDS = pytest.mark.parametrize("kind", ["blocking", "async", "acceptor"])


# -- those who belong together ---------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(
    ("way", "secret"), [("tcp", SECRET), ("unix", SECRET), ("tcp", None)], ids=["tcp", "unix", "tcp without a secret"]
)
def test_what_is_sent_before_the_connection_stands_arrives_in_order(
    caller: Caller, kind: str, way: str, secret: bytes | None, stack: ExitStack
) -> None:
    server = Server(kind, secret)
    channel, listener = caller.open(getattr(server, way), secret=secret, calls=kind != "acceptor")
    sizes = [1, LARGE, 0, 70_000, LARGE // 2, 3]
    calls = [call(number, bytes([number]) * size) for number, size in enumerate(sizes)]
    for message in calls:
        channel.send(message)
    assert ("opening" in repr(channel)) is (secret is not None)
    server.start()
    stack.callback(server.stop)
    caller.until(channel, lambda: len(listener.heard) == len(calls))
    assert listener.heard == [reply(number, message.payload) for number, message in enumerate(calls)]
    assert "opening" not in repr(channel)
    assert server.open_channels() == 1
    channel.send(call(99))
    caller.until(channel, lambda: listener.heard[-1] == reply(99))


def test_messages_leave_though_nobody_drives_or_watches(stack: ExitStack) -> None:
    server, caller = Server("blocking", SECRET), Caller("driven", stack)
    channel, _ = caller.open(server.tcp)
    channel.send(call(1))
    server.start()
    stack.callback(server.stop)
    eventually(lambda: server.service.heard == [call(1)])


def test_threads_that_send_meanwhile_lose_nothing(caller: Caller, stack: ExitStack) -> None:
    server = Server("blocking", SECRET)
    channel, listener = caller.open(server.tcp)
    begin = threading.Event()

    def send_all(first: int) -> None:
        for number in range(first, first + 200):
            channel.send(call(number, b"x" * (number * 10)))
            if number == first + 20:
                begin.set()

    senders = [threading.Thread(target=send_all, args=(first,)) for first in (0, 1000, 2000)]
    for sender in senders:
        sender.start()
    assert begin.wait(PATIENCE_S)
    server.start()
    stack.callback(server.stop)
    for sender in senders:
        sender.join()
    caller.until(channel, lambda: len(listener.heard) == 600)
    for first in (0, 1000, 2000):
        mine = [message.id for message in listener.heard if first <= message.id < first + 1000]
        assert mine == list(range(first, first + 200))


def test_without_a_secret_the_bytes_are_those_of_a_unix_socket(caller: Caller, stack: ExitStack) -> None:
    listening = stack.enter_context(listen_tcp("127.0.0.1"))
    channel, listener = caller.open(tcp_address(listening), secret=None)
    channel.send(call(1, b"x"))
    with listening.accept()[0] as peer:
        expected = GREETING + encode(call(1, b"x"))
        assert peer.recv(len(expected), socket.MSG_WAITALL) == expected
        peer.sendall(GREETING + encode(reply(1)))
        caller.until(channel, lambda: listener.heard == [reply(1)])


# -- connections that take their time --------------------------------------------------------------------------------


@contextmanager
def full() -> Iterator[socket.socket]:
    """A listening socket whose queue is full: whoever connects waits for the next try, a second later."""
    with ExitStack() as stack:
        listening = stack.enter_context(listen_tcp("127.0.0.1"))
        listening.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        yield listening


def test_a_slow_connection_holds_up_nobody(caller: Caller) -> None:
    with full() as listening:
        channel, listener = caller.open(tcp_address(listening))
        channel.send(call(1))
        assert "opening" in repr(channel)
        if caller.mode == "driven":
            channel.drive(lambda: False, 0.01)  # ends in time
        ours = channel.sock.getsockname()
        while (peer := listening.accept()[0]).getpeername() != ours:
            peer.close()  # one of those that filled the queue: there is room now
        handshake = ServerHandshake(SECRET)
        with peer:
            peer.sendall(handshake.feed(peer.recv(handshake.wanted, socket.MSG_WAITALL)))
            assert handshake.feed(peer.recv(handshake.wanted, socket.MSG_WAITALL)) == b""
            assert handshake.complete
            expected = encode(call(1))
            assert peer.recv(len(expected), socket.MSG_WAITALL) == expected
            peer.sendall(encode(reply(1)))
            caller.until(channel, lambda: listener.heard == [reply(1)])


def test_a_connection_that_is_refused_late(caller: Caller) -> None:
    with full() as listening:
        address = tcp_address(listening)
        channel, listener = caller.open(address)
        channel.send(call(1))
        listening.close()
        caller.until(channel, listener.gone.is_set)
        assert listener.reason == f"nobody answers at {address} (Connection refused)"
        assert listener.losses == 1
        with pytest.raises(ChannelClosed):
            channel.send(call(2))


def test_closing_a_channel_that_is_not_connected(caller: Caller) -> None:
    with full() as listening:
        channel, listener = caller.open(tcp_address(listening))
        channel.send(call(1))
        inside = threading.Event()
        thread = threading.Thread(target=channel.drive, args=(lambda: bool(inside.set()), None))
        if caller.mode == "driven":
            thread.start()
            assert inside.wait(PATIENCE_S)
        caller.on_home(channel.close)
        if caller.mode == "driven":
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        eventually(lambda: channel.sock.fileno() == -1)
        assert listener.losses == 0


def test_a_connection_that_is_refused_at_once(caller: Caller) -> None:
    with listen_tcp("127.0.0.1") as listening:
        address = tcp_address(listening)
    try:
        channel, listener = caller.open(address)
    except ChannelClosed as error:
        reason: str | None = str(error)
    else:
        caller.until(channel, listener.gone.is_set)
        reason = listener.reason
    assert reason == f"nobody answers at {address} (Connection refused)"


# -- servers that are not who they should be -------------------------------------------------------------------------

UNPROVED = "the peer could not prove that it belongs to this engine"


@KINDS
def test_a_server_with_another_secret(caller: Caller, kind: str, stack: ExitStack) -> None:
    server = serving(stack, kind, OTHER)
    channel, listener = caller.open(server.tcp)
    caller.until(channel, listener.gone.is_set)
    assert listener.reason == f"{UNPROVED} (its secret is another one)"
    assert listener.losses == 1
    assert not server.service.heard


def test_a_server_without_a_secret(caller: Caller, stack: ExitStack) -> None:
    server = serving(stack, "blocking", None)
    channel, listener = caller.open(server.tcp)
    caller.until(channel, listener.gone.is_set)
    assert listener.reason == f"{UNPROVED} (it speaks without a secret)"


def test_a_server_that_is_none(caller: Caller, stack: ExitStack) -> None:
    listening = stack.enter_context(listen_tcp("127.0.0.1"))
    channel, listener = caller.open(tcp_address(listening))
    with listening.accept()[0] as peer:
        peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        caller.until(channel, listener.gone.is_set)
    assert listener.reason == f"{UNPROVED} (it speaks another protocol)"


def test_a_server_that_leaves_in_the_middle(caller: Caller, stack: ExitStack) -> None:
    listening = stack.enter_context(listen_tcp("127.0.0.1"))
    channel, listener = caller.open(tcp_address(listening))
    peer = listening.accept()[0]
    peer.recv(46, socket.MSG_WAITALL)
    peer.close()
    caller.until(channel, listener.gone.is_set)
    assert listener.reason == "the peer closed the connection before it proved that it belongs to this engine"


@pytest.mark.parametrize("proved", [False, True], ids=["opening", "open"])
def test_a_connection_that_breaks(caller: Caller, proved: bool, stack: ExitStack) -> None:
    listening = stack.enter_context(listen_tcp("127.0.0.1"))
    channel, listener = caller.open(tcp_address(listening))
    peer = listening.accept()[0]
    handshake = ServerHandshake(SECRET)
    answer = handshake.feed(peer.recv(handshake.wanted, socket.MSG_WAITALL))
    if proved:
        peer.sendall(answer + encode(reply(7)))
        handshake.feed(peer.recv(handshake.wanted, socket.MSG_WAITALL))
        caller.until(channel, lambda: listener.heard == [reply(7)])
    reset(peer)
    caller.until(channel, listener.gone.is_set)
    assert listener.reason == "the connection broke (Connection reset by peer)"
    assert listener.losses == 1


# -- strangers at the door -------------------------------------------------------------------------------------------


def reset(sock: socket.socket) -> None:
    """Close with a reset rather than a farewell."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Bomb:
    """Something that must never be unpickled."""

    went_off = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        return _explode, ()


def _explode() -> None:
    Bomb.went_off.set()


def wrong_proof(sock: socket.socket) -> None:
    client = ClientHandshake(OTHER)
    sock.sendall(client.hello)
    sock.recv(78, socket.MSG_WAITALL)
    sock.sendall(bytes(32) + encode(Control(Bomb())))


def half_a_greeting(sock: socket.socket) -> None:
    sock.sendall(ClientHandshake(SECRET).hello[:40])
    sock.shutdown(socket.SHUT_WR)


def overheard(sock: socket.socket) -> None:
    """A client's whole side of another handshake, in one go."""
    client, server = ClientHandshake(SECRET), ServerHandshake(SECRET)
    sock.sendall(client.hello + client.feed(server.feed(client.hello)) + encode(Control(Bomb())))


ATTACKS: dict[str, tuple[Callable[[socket.socket], object], int, str]] = {
    "port scan": (lambda sock: sock.close(), logging.DEBUG, r"it left before it had proved"),
    "port scan with a reset": (reset, logging.DEBUG, r"the connection broke \(Connection reset by peer\) before"),
    "http": (
        lambda sock: sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        logging.WARNING,
        r"could not prove .* \(it speaks another protocol\)",
    ),
    "garbage": (lambda sock: sock.sendall(bytes(1 << 20)), logging.WARNING, r"\(it speaks another protocol\)"),
    "huge length": (
        lambda sock: sock.sendall(struct.pack("<IBQ", (1 << 32) - 1, 1, 1)),
        logging.WARNING,
        r"\(it speaks another protocol\)",
    ),
    "no secret": (
        lambda sock: sock.sendall(GREETING + encode(Control(Bomb()))),
        logging.WARNING,
        r"\(it speaks without a secret\)",
    ),
    "a message at once": (
        lambda sock: sock.sendall(encode(Control(Bomb()))),
        logging.WARNING,
        r"\(it speaks another protocol\)",
    ),
    "wrong secret": (wrong_proof, logging.WARNING, r"\(its secret is another one\)"),
    "replay": (overheard, logging.WARNING, r"\(its secret is another one\)"),
    "half a greeting": (half_a_greeting, logging.WARNING, r"it left before it had proved"),
    "half a greeting, then a reset": (
        lambda sock: (sock.sendall(b"engine/"), reset(sock)),
        logging.WARNING,
        r"(broke \(Connection reset by peer\)|it left) before",
    ),
}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """What "engine.wire" logged."""
    caplog.set_level(logging.DEBUG, "engine.wire")
    return lambda: [record for record in caplog.records if record.name == "engine.wire"]


def check_served(server: Server, stack: ExitStack, tls: TLS | None = None) -> None:
    """See that a good caller is served as if nothing had been."""
    channel, listener = Caller("polled", stack, tls).open(server.tcp)
    channel.send(call(1, b"good"))
    eventually(lambda: listener.heard == [reply(1, b"good")])
    assert server.service.heard == [call(1, b"good")]
    assert server.service.lost_channels == 0
    assert server.open_channels() == 1
    assert server.shown in (0, 1)
    assert not Bomb.went_off.is_set()


def dial(server: Server, stack: ExitStack) -> socket.socket:
    host, _, port = server.tcp.removeprefix("tcp:").rpartition(":")
    sock = stack.enter_context(socket.create_connection((host, int(port)), PATIENCE_S))
    return sock


def hears_the_end(sock: socket.socket) -> bool:
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


@KINDS
@pytest.mark.parametrize("attack", ATTACKS)
def test_strangers_are_dropped_and_do_no_harm(
    kind: str, attack: str, stack: ExitStack, log: Callable[[], list[logging.LogRecord]]
) -> None:
    server = serving(stack, kind)
    act, level, text = ATTACKS[attack]
    sock = dial(server, stack)
    name = "{}:{}".format(*sock.getsockname())
    try:
        act(sock)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it was dropped before it had sent all
    (record,) = eventually(log)
    assert record.levelno == level
    message = record.getMessage()
    assert message.startswith(f"dropped a connection from {name}: ")
    assert re.search(text, message)
    if sock.fileno() >= 0:
        assert hears_the_end(sock)
    check_served(server, stack)
    assert len(log()) == 1


@KINDS
def test_a_caller_with_another_secret_is_dropped(
    caller: Caller, kind: str, stack: ExitStack, log: Callable[[], list[logging.LogRecord]]
) -> None:
    server = serving(stack, kind)
    for address in (server.tcp, server.unix):
        channel, listener = caller.open(address, secret=OTHER)
        with suppress(ChannelClosed):  # it may know already
            channel.send(call(5))
        caller.until(channel, listener.gone.is_set)
        assert listener.reason == f"{UNPROVED} (its secret is another one)"
    eventually(lambda: len(log()) == 2)
    assert log()[1].getMessage().startswith(f"dropped a connection from process {os.getpid()}: ")
    check_served(server, stack)


@KINDS
@pytest.mark.parametrize("opening", [b"", b"engine", ClientHandshake(SECRET).hello], ids=["silent", "slow", "stalled"])
def test_who_takes_too_long_is_dropped(
    kind: str,
    opening: bytes,
    stack: ExitStack,
    log: Callable[[], list[logging.LogRecord]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lobby, "PATIENCE_S", 0.05)
    server = serving(stack, kind)
    sock = dial(server, stack)
    sock.sendall(opening)
    assert hears_the_end(sock)
    (record,) = eventually(log)
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("it did not prove within 0.05 s that it belongs to this engine")
    monkeypatch.undo()
    check_served(server, stack)


@KINDS
def test_who_waits_is_not_counted(kind: str, stack: ExitStack) -> None:
    server = serving(stack, kind)
    sock = dial(server, stack)
    sock.sendall(ClientHandshake(SECRET).hello)
    assert len(sock.recv(78, socket.MSG_WAITALL)) == 78
    assert server.open_channels() == 0
    check_served(server, stack)


@KINDS
def test_only_so_many_wait(
    kind: str,
    stack: ExitStack,
    log: Callable[[], list[logging.LogRecord]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert lobby.MAX_WAITING == 64
    monkeypatch.setattr(lobby, "MAX_WAITING", 4)
    server = serving(stack, kind)
    strangers = [dial(server, stack) for _ in range(6)]
    for stranger in strangers[:2]:
        assert hears_the_end(stranger)
    eventually(lambda: len(log()) == 2)
    for stranger in strangers[2:]:
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.recv(1)
        stranger.settimeout(PATIENCE_S)
    check_served(server, stack)
    assert hears_the_end(strangers[2])
    assert [record.getMessage().partition(": ")[2] for record in log()] == [
        "others came while it and 3 more had not proved who they are"
    ] * 3


def test_strangers_are_heard_while_user_code_runs(
    stack: ExitStack, log: Callable[[], list[logging.LogRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby, "PATIENCE_S", 0.05)
    server = serving(stack, "blocking")
    end = threading.Event()
    stack.callback(end.set)
    server.service.run(lambda: end.wait(PATIENCE_S))
    assert hears_the_end(dial(server, stack))
    monkeypatch.undo()
    check_served(server, stack)


# -- the lobby alone -------------------------------------------------------------------------------------------------


class Watching:
    """Remembers whom a lobby wants to hear."""

    def __init__(self) -> None:
        self.callbacks: dict[int, Callable[[], None]] = {}

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        self.callbacks[descriptor] = callback

    def unwatch(self, descriptor: int) -> None:
        del self.callbacks[descriptor]


def test_the_time_in_which_the_process_was_busy_is_not_held_against_a_peer(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted: list[socket.socket] = []
    watching = Watching()
    waiting = Lobby(SECRET, admitted.append, watching)
    assert waiting.remaining_s() is None
    near, far = socket.socketpair()
    stack.callback(near.close)
    stack.callback(far.close)
    monkeypatch.setattr(lobby, "PATIENCE_S", 0.0)
    waiting.enter(near, "a test")
    assert waiting.remaining_s() == 0.0
    monkeypatch.undo()
    client = ClientHandshake(SECRET)
    far.sendall(client.hello)
    waiting.expire()  # late: it greeted in time, and gets time to answer
    assert len(waiting) == 1
    far.sendall(client.feed(far.recv(client.wanted, socket.MSG_WAITALL)) + b"the first message")
    (callback,) = watching.callbacks.values()
    callback()
    assert admitted == [near]
    assert near.recv(100) == b"the first message"
    callback()  # belated
    assert not watching.callbacks
    assert waiting.remaining_s() is None


def test_a_lobby_closes_whom_it_holds() -> None:
    watching = Watching()
    waiting = Lobby(SECRET, lambda sock: None, watching)
    near, far = socket.socketpair()
    waiting.enter(near, "a test")
    waiting.close()
    waiting.close()
    with far:
        assert far.recv(1) == b""
    assert not watching.callbacks


# -- addresses and sockets -------------------------------------------------------------------------------------------


def test_both_ends_notice_a_peer_that_falls_silent(stack: ExitStack) -> None:
    listening = stack.enter_context(listen_tcp("127.0.0.1"))
    channel, _ = Caller("polled", stack).open(tcp_address(listening))
    accepted = accept_from(listening, proves_itself=True)
    assert accepted is not None
    sock, peer = accepted
    stack.enter_context(sock)
    assert peer == "{}:{}".format(*channel.sock.getsockname())
    for end in (channel.sock, sock):
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        tcp = [
            end.getsockopt(socket.IPPROTO_TCP, option)
            for option in (
                socket.TCP_NODELAY,
                socket.TCP_KEEPIDLE,
                socket.TCP_KEEPINTVL,
                socket.TCP_KEEPCNT,
                socket.TCP_USER_TIMEOUT,
            )
        ]
        assert (bool(tcp[0]), *tcp[1:]) == (True, 5, 2, 3, UNACKNOWLEDGED_S * 1000)
        notice_silence(end)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == SILENCE_S * 1000
    notice_silence(sock)


def has_ipv6() -> bool:
    try:
        listen_tcp("::1").close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6(stack: ExitStack) -> None:
    listening = stack.enter_context(listen_tcp("::1"))
    address = tcp_address(listening)
    assert address == f"tcp:[::1]:{listening.getsockname()[1]}"
    caller = Caller("polled", stack)
    caller.open(address)
    accepted = accept_from(listening, proves_itself=True)
    assert accepted is not None
    accepted[0].close()
    assert accepted[1].startswith("[::1]:")


def test_abstract_names_are_not_on_disk(stack: ExitStack) -> None:
    name = f"@engine-test-{os.getpid()}-{next(_names)}"
    listening = stack.enter_context(listen_unix(name))
    assert listening.getsockname() == b"\0" + name[1:].encode()
    with pytest.raises(OSError, match="Address already in use"):
        listen_unix(name)
    listening.close()
    with pytest.raises(ChannelClosed, match=rf"^nobody answers at {name} \(Connection refused\)$"):
        Caller("polled", stack).open(f"unix:{name}")


def test_a_tcp_address_is_exactly_what_was_asked_for(stack: ExitStack) -> None:
    listening = stack.enter_context(listen_tcp("127.0.0.1"))
    host, port = listening.getsockname()
    assert (host, tcp_address(listening)) == ("127.0.0.1", f"tcp:127.0.0.1:{port}")
    with pytest.raises(OSError, match="Address already in use"):
        listen_tcp("127.0.0.1", port)
    for name in ("", "localhost", "x" * 70):
        with pytest.raises(InvalidArgument, match="host must be a numeric address"):
            listen_tcp(name)


@pytest.mark.parametrize(
    "address", ["tcp:", "tcp:127.0.0.1", "tcp:127.0.0.1:", "tcp::80", "tcp:localhost:80", "tcp:127.0.0.1:0", "tcp:::x"]
)
def test_addresses_that_are_none(address: str, stack: ExitStack) -> None:
    with pytest.raises(ChannelClosed, match="it must be tcp:HOST:PORT with a numeric address"):
        Caller("polled", stack).open(address)


def test_a_secret_that_is_none(stack: ExitStack) -> None:
    listening = stack.enter_context(listen_tcp("127.0.0.1"))
    with pytest.raises(ValueError, match="at least 16 random bytes"):
        Caller("polled", stack).open(tcp_address(listening), secret=b"")
    with pytest.raises(ValueError, match="at least 16 random bytes"):
        Lobby(b"", lambda sock: None, Watching())


def test_a_socket_that_finds_itself(stack: ExitStack) -> None:
    """The kernel lets a connection meet itself where nobody listens."""
    sock = stack.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    sock.connect(sock.getsockname())
    opening = Opening(sock, "tcp:here", True, None)
    assert opening.advance() is None
    assert opening.failure == "nobody answers at tcp:here (connected to itself)"
    assert opening.advance() is None
    assert not opening.wants_write


def test_a_thread_may_drive_a_channel_all_its_life(stack: ExitStack) -> None:
    server = serving(stack, "async")
    listener = FakeListener()
    channel = connect(server.tcp, listener, on_loop=False, poller=Undriven(), secret=SECRET)
    messages: list[Message] = [call(1, b"x" * LARGE), call(2)]
    for message in messages:
        channel.send(message)
    assert channel.drive(lambda: len(listener.heard) == 2, PATIENCE_S)
    assert listener.heard == [reply(1, b"x" * LARGE), reply(2)]
    channel.close()
