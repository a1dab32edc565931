"""Channels over real sockets: who reads, who writes, and what happens when either end goes."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
import uvloop
from fakes import decoded

from engine.errors import InvalidArgument
from engine.seam.channel import Channel, ChannelClosed
from engine.seam.messages import PYTHON, Call, Cancel, Item, Message, Reply
from engine.seam.scribe import scribe
from engine.testing.fakes import FakeListener
from engine.testing.instruments import PATIENCE_S, Footprint, eventually
from engine.testing.strikes import struck
from engine_wire import LoopDriver, Poller, SocketChannel, Undriven, protocol
from engine_wire.protocol import GREETING, Decoder, encode

T = TypeVar("T")

SMALL_BUFFER = 4096
LARGE = 300_000
"""Bytes of a message that no small buffer takes at once, and that the decoder collects in place."""


def call(number: int, payload: bytes = b"") -> Call:
    return Call(number, PYTHON, "m", None, "", b"", payload)


def reply(number: int, payload: bytes = b"") -> Reply:
    return Reply(number, 0, b"", payload)


class Peer:
    """The other end of a channel: a plain socket that the test reads and writes itself."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE_S)
        self.sock = sock
        self.decoder = Decoder(greeting=False)
        self.heard: list[Message] = []

    def say(self, *messages: Message) -> None:
        self.sock.sendall(b"".join(map(encode, messages)))

    def hear(self, count: int) -> list[Message]:
        """Wait for so many messages and return them."""
        while len(self.heard) < count:
            data = self.sock.recv(1 << 16)
            assert data, "the channel was closed"
            self.heard += decoded(self.decoder, data)
        heard, self.heard = self.heard[:count], self.heard[count:]
        return heard

    def hear_end(self) -> None:
        """Wait until the channel is closed; nothing else may come."""
        assert self.sock.recv(1) == b""


class LoopThread:
    """An event loop that runs in a thread of its own."""

    def __init__(self, make: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.loop = make()
        self.thread = threading.Thread(target=self.loop.run_forever, name="test-loop")
        self.thread.start()

    def run(self, function: Callable[[], T]) -> T:
        """Run a function on the loop."""

        async def main() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(main(), self.loop).result(PATIENCE_S)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Setting:
    """Makes channels on one kind of driver and closes everything at the end."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.stack = ExitStack()
        self.pool = self.stack.enter_context(ThreadPoolExecutor(8))
        self.loop: LoopThread | None = None
        self.driver: Any
        if kind == "poller":
            self.driver = Poller("test-poller")
            self.stack.callback(self.driver.close)
        elif kind == "undriven":
            self.driver = Undriven()
        else:
            self.loop = LoopThread({"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[kind])
            self.stack.callback(self.loop.close)
            self.driver = self.loop.run(lambda: LoopDriver(asyncio.get_running_loop()))

    def on_home(self, function: Callable[[], T]) -> T:
        """Run a function where channels of this driver belong: on its loop, or here."""
        return function() if self.loop is None else self.loop.run(function)

    def open(
        self, listener: FakeListener, *, buffer: int | None = None, greet: bool = False
    ) -> tuple[SocketChannel, Peer]:
        near, far = socket.socketpair()
        self.stack.callback(far.close)
        for sock in (near, far) if buffer else ():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        channel = SocketChannel(near, listener, self.driver, greet=greet)
        self.stack.callback(lambda: self.on_home(channel.close))
        return channel, Peer(far)


@pytest.fixture
def setting(request: pytest.FixtureRequest, leaves_nothing: Footprint) -> Iterator[Setting]:
    setting = Setting(request.param)
    with setting.stack:
        yield setting


EVERY = pytest.mark.parametrize("setting", ["poller", "asyncio", "uvloop", "undriven"], indirect=True)
WATCHING = pytest.mark.parametrize("setting", ["poller", "asyncio", "uvloop"], indirect=True)
LOOPS = pytest.mark.parametrize("setting", ["asyncio", "uvloop"], indirect=True)
DRIVABLE = pytest.mark.parametrize("setting", ["poller", "undriven"], indirect=True)
POLLER = pytest.mark.parametrize("setting", ["poller"], indirect=True)
UNDRIVEN = pytest.mark.parametrize("setting", ["undriven"], indirect=True)


def never() -> bool:
    return False


# -- writing ---------------------------------------------------------------------------------------------------------


@EVERY
def test_messages_arrive_in_order(setting: Setting) -> None:
    channel, peer = setting.open(FakeListener())
    messages = [call(number, b"x" * number) for number in range(50)]
    for message in messages:
        setting.on_home(lambda message=message: channel.send(message))
    assert peer.hear(50) == messages


@EVERY
def test_both_ends_greet(setting: Setting) -> None:
    channel, peer = setting.open(FakeListener(), greet=True)
    channel.send(call(1))
    assert peer.sock.recv(len(GREETING), socket.MSG_WAITALL) == GREETING
    assert peer.hear(1) == [call(1)]


@EVERY
def test_what_the_kernel_does_not_take_follows_later(setting: Setting) -> None:
    channel, peer = setting.open(FakeListener(), buffer=SMALL_BUFFER)
    messages: list[Message] = [call(number, bytes([number]) * LARGE) for number in range(10)]

    def send_all() -> None:
        for message in messages:
            channel.send(message)

    sending = setting.pool.submit(send_all)
    if setting.kind != "undriven":  # there, whoever sends waits
        sending.result(PATIENCE_S)
        assert "unsent=0" not in repr(channel)
    assert peer.hear(10) == messages
    sending.result(PATIENCE_S)
    eventually(lambda: "unsent=0" in repr(channel))
    channel.send(Cancel(1))
    assert peer.hear(1) == [Cancel(1)]


@EVERY
def test_threads_do_not_mix_their_messages(setting: Setting) -> None:
    channel, peer = setting.open(FakeListener(), buffer=SMALL_BUFFER)

    def send_all(thread: int) -> None:
        for number in range(100):
            channel.send(Item(thread, bytes([number]), bytes([thread]) * (37 * number)))

    sending = [setting.pool.submit(send_all, thread) for thread in range(4)]
    heard = peer.hear(400)
    for future in sending:
        future.result(PATIENCE_S)
    for thread in range(4):
        mine = [message for message in heard if isinstance(message, Item) and message.id == thread]
        assert mine == [Item(thread, bytes([number]), bytes([thread]) * (37 * number)) for number in range(100)]


@POLLER
def test_bytes_that_come_up_while_the_last_ones_leave_are_not_forgotten(setting: Setting) -> None:
    channel, peer = setting.open(FakeListener(), buffer=SMALL_BUFFER)
    original = channel.on_writable
    late = [call(2, b"y" * LARGE), call(3)]

    def on_writable() -> bool:
        done = original()
        if done and late:  # exactly between the last write and the end of the poller's interest
            channel.send(late.pop(0))
        return done

    channel.on_writable = on_writable  # type: ignore[method-assign]
    channel.send(call(1, b"x" * LARGE))
    assert peer.hear(2) == [call(1, b"x" * LARGE), call(2, b"y" * LARGE)]


@EVERY
def test_a_message_that_is_too_large_breaks_nothing(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 1000)
    channel, peer = setting.open(FakeListener())
    with pytest.raises(InvalidArgument, match="more than the 1000 of one frame"):
        channel.send(call(1, b"x" * 1000))
    channel.send(call(2))
    assert peer.hear(1) == [call(2)]


# -- reading ---------------------------------------------------------------------------------------------------------


@WATCHING
def test_a_watched_channel_delivers_by_itself(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    setting.on_home(channel.watch)
    setting.on_home(channel.watch)
    messages: list[Message] = [reply(1), reply(2, b"x" * LARGE), Item(3, b"", b"")]
    peer.say(*messages)
    eventually(lambda: len(listener.heard) == 3)
    assert listener.heard == messages
    assert "armed" in repr(channel)


@WATCHING
def test_a_deadline_arrives_as_it_was_sent(setting: Setting) -> None:
    """Both ends have one clock, so that the time on the way counts."""
    listener = FakeListener()
    channel, peer = setting.open(listener)
    setting.on_home(channel.watch)
    sent = call(1)._replace(deadline=time.monotonic() + 1000)
    peer.say(sent)
    assert eventually(lambda: listener.heard) == [sent]


@DRIVABLE
def test_a_driven_channel_delivers_on_the_calling_thread(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    channel.send(call(1))
    channel.send(call(2))
    peer.say(reply(2), reply(1))
    assert channel.drive(lambda: reply(1) in listener.heard, PATIENCE_S)
    assert listener.heard == [reply(2), reply(1)]
    assert "idle" in repr(channel)


@WATCHING
def test_a_watched_channel_reads_while_it_writes(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener, buffer=SMALL_BUFFER)
    setting.on_home(channel.watch)
    for number in range(3):
        channel.send(call(number, b"x" * LARGE))
        peer.say(reply(number))
        eventually(lambda number=number: reply(number) in listener.heard)
    assert "unsent=0" not in repr(channel)
    assert peer.hear(3) == [call(number, b"x" * LARGE) for number in range(3)]
    peer.say(reply(3))
    eventually(lambda: reply(3) in listener.heard)


@LOOPS
def test_a_loops_channel_is_not_driven(setting: Setting) -> None:
    channel, _ = setting.open(FakeListener())
    assert not channel.drive(never, 0.0)


@DRIVABLE
def test_driving_ends_in_time(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    assert channel.drive(never, 0.0)
    assert channel.drive(never, 0.01)
    assert not listener.heard
    peer.say(reply(1))
    assert channel.drive(lambda: bool(listener.heard), None)


@DRIVABLE
def test_driving_writes_what_is_left(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener, buffer=SMALL_BUFFER)
    messages = [call(number, b"x" * LARGE) for number in range(3)]
    sending = setting.pool.submit(lambda: [channel.send(message) for message in messages])
    if setting.kind == "poller":
        sending.result(PATIENCE_S)
    driving = setting.pool.submit(channel.drive, lambda: bool(listener.heard), None)
    assert peer.hear(3) == messages
    peer.say(reply(1))
    assert driving.result(PATIENCE_S)
    sending.result(PATIENCE_S)


@POLLER
def test_one_thread_drives_for_all(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    inside = threading.Event()
    channel.send(call(1))

    def first_done() -> bool:
        inside.set()
        return reply(1) in listener.heard

    first = setting.pool.submit(channel.drive, first_done, None)
    assert inside.wait(PATIENCE_S)
    assert "driven" in repr(channel)
    channel.send(call(2))
    assert not channel.drive(never, None)  # somebody else does
    channel.watch()  # changes nothing now
    peer.say(reply(1))
    assert first.result(PATIENCE_S)
    peer.say(reply(2))  # the poller reads what the driver left behind
    eventually(lambda: reply(2) in listener.heard)


@POLLER
def test_a_late_event_of_the_poller_leaves_no_call_unread(setting: Setting) -> None:
    """The poller may come to read what a thread has disarmed meanwhile, and just then another thread calls."""
    inside, go_on = threading.Event(), threading.Event()

    class Listener(FakeListener):
        def received(self, channel: Channel, message: Message) -> None:
            super().received(channel, message)
            inside.set()
            assert go_on.wait(PATIENCE_S)

    listener = Listener()
    channel, peer = setting.open(listener)
    channel.send(call(1))
    peer.say(reply(1))
    assert not channel.armed
    late = setting.pool.submit(channel.on_readable)
    assert inside.wait(PATIENCE_S)
    channel.send(call(2))
    assert not channel.drive(never, None)
    channel.watch()  # somebody reads already
    go_on.set()
    late.result(PATIENCE_S)
    peer.say(reply(2))
    eventually(lambda: reply(2) in listener.heard)


@POLLER
def test_a_thread_takes_over_from_the_poller(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    channel.watch()
    assert channel.armed
    channel.send(call(1))
    channel.send(call(2))
    peer.hear(2)
    peer.say(reply(1), reply(2))
    assert channel.drive(lambda: reply(2) in listener.heard, PATIENCE_S)
    assert not channel.armed  # nobody has to read: no call is open


@POLLER
def test_many_threads_call_through_one_channel(setting: Setting) -> None:
    """Every thread gets its answer, whoever reads it."""
    arrived = {number: threading.Event() for number in range(400)}

    class Listener(FakeListener):
        def received(self, channel: Channel, message: Message) -> None:
            assert isinstance(message, Reply)
            arrived[message.id].set()

    channel, peer = setting.open(Listener())

    def echo() -> None:
        for _ in range(400):
            (message,) = peer.hear(1)
            assert isinstance(message, Call)
            peer.say(reply(message.id))

    def call_all(numbers: range) -> None:
        for number in numbers:
            channel.send(call(number))
            if not channel.drive(arrived[number].is_set, None):
                channel.watch()
            assert arrived[number].wait(PATIENCE_S)

    echoing = setting.pool.submit(echo)
    calling = [setting.pool.submit(call_all, range(first, 400, 4)) for first in range(4)]
    for future in (*calling, echoing):
        future.result(PATIENCE_S)


# -- the peer goes ---------------------------------------------------------------------------------------------------


@WATCHING
def test_a_dead_peer_is_told_once_after_its_last_message(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    setting.on_home(channel.watch)
    peer.say(reply(1))
    peer.sock.close()
    assert listener.gone.wait(PATIENCE_S)
    assert (listener.heard, listener.reason) == ([reply(1)], "the peer closed the connection")
    setting.on_home(channel.close)
    assert listener.losses == 1
    assert channel.closed
    assert "closed" in repr(channel)


@LOOPS
@pytest.mark.parametrize("alive", [True, False])
def test_the_last_words_are_read_before_a_channel_is_closed(setting: Setting, alive: bool) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    peer.say(reply(1), reply(2))
    if not alive:
        peer.sock.close()

    def close() -> None:
        channel.read_rest()
        channel.close()
        channel.read_rest()  # nothing is left

    setting.on_home(close)
    assert listener.heard == [reply(1), reply(2)]
    assert listener.losses == (0 if alive else 1)


@DRIVABLE
def test_the_peer_dies_while_its_channel_is_driven(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    inside = threading.Event()
    driving = setting.pool.submit(channel.drive, lambda: bool(inside.set()), None)
    assert inside.wait(PATIENCE_S)
    peer.sock.close()
    assert driving.result(PATIENCE_S)
    assert (listener.losses, listener.reason) == (1, "the peer closed the connection")
    assert channel.sock.fileno() == -1


@WATCHING
def test_a_peer_that_breaks_the_protocol_is_cut_off(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener, greet=True)
    setting.on_home(channel.watch)
    peer.say(reply(1))  # without a greeting
    assert listener.gone.wait(PATIENCE_S)
    assert listener.reason == "the peer broke the protocol: the peer did not greet"
    eventually(lambda: "the peer broke the protocol: the peer did not greet" in caplog.text)
    assert len(caplog.records) == 1
    assert not listener.heard
    peer.sock.recv(len(GREETING))
    peer.hear_end()


@WATCHING
def test_a_connection_that_breaks(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    channel.send(call(1))
    peer.sock.close()  # with the call unread: the kernel resets the connection
    setting.on_home(channel.watch)
    assert listener.gone.wait(PATIENCE_S)
    assert listener.reason == "the connection broke (Connection reset by peer)"


@WATCHING
def test_a_connection_that_breaks_behind_the_last_words(setting: Setting) -> None:
    """A loop may tell of both at once and only once."""
    listener = FakeListener()
    channel, peer = setting.open(listener)
    channel.send(call(1))
    peer.say(reply(1, b"x" * 100_000), reply(2))
    peer.sock.close()
    setting.on_home(channel.watch)
    assert listener.gone.wait(PATIENCE_S)
    assert listener.heard == [reply(1, b"x" * 100_000), reply(2)]
    assert listener.reason == "the connection broke (Connection reset by peer)"


@EVERY
@pytest.mark.parametrize("heard", [True, False], ids=["call-read", "call-unread"])
@pytest.mark.parametrize(("greet", "greeted"), [(True, True), (True, False), (False, False)])
def test_a_peer_that_ends_before_it_greets_never_accepted(
    setting: Setting, greet: bool, greeted: bool, heard: bool
) -> None:
    """It may listen no more while connections wait for it; then what was sent on them was heard by nobody."""
    listener = FakeListener()
    channel, peer = setting.open(listener, greet=greet)
    channel.send(call(1))
    if heard:
        peer.sock.recv(1 << 16)
    if greeted:
        peer.sock.sendall(GREETING)
    peer.sock.close()
    if setting.kind == "undriven":
        channel.drive(never, PATIENCE_S)
    else:
        setting.on_home(channel.watch)
    assert listener.gone.wait(PATIENCE_S)
    assert channel.opened == (greeted or not greet)


@UNDRIVEN
def test_a_channel_that_is_given_up_here_may_still_be_accepted(setting: Setting) -> None:
    listener = FakeListener()
    channel, _peer = setting.open(listener, greet=True)
    channel.send(call(1))
    inside = threading.Event()
    driving = setting.pool.submit(channel.drive, lambda: bool(inside.set()), None)
    assert inside.wait(PATIENCE_S)
    channel.lose("it could not be served")
    assert driving.result(PATIENCE_S)
    assert channel.opened


@WATCHING
@pytest.mark.parametrize("half", [True, False], ids=["half-a-frame", "no-frame"])
def test_a_connection_that_takes_no_more_is_ended(
    setting: Setting, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the kernel's reason, so that whoever reads it finds an end."""
    refusing = threading.Event()

    class Refusing(socket.socket):
        def send(self, *args: Any) -> int:
            if refusing.is_set():
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            return super().send(*args)

    near, far = socket.socketpair()
    setting.stack.callback(far.close)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    listener = FakeListener()
    channel = SocketChannel(Refusing(fileno=near.detach()), listener, setting.driver, greet=False)
    setting.stack.callback(lambda: setting.on_home(channel.close))
    if half:
        channel.send(call(1, b"x" * LARGE))
        refusing.set()
    else:
        refusing.set()
        with pytest.raises(ChannelClosed, match="No buffer space"):
            channel.send(call(1))
    setting.on_home(channel.watch)
    far.settimeout(PATIENCE_S)
    while far.recv(1 << 16):
        pass
    far.close()
    assert listener.gone.wait(PATIENCE_S)


@EVERY
def test_sending_to_a_dead_peer(setting: Setting) -> None:
    channel, peer = setting.open(FakeListener())
    peer.sock.close()
    with pytest.raises(ChannelClosed, match=r"^the peer is gone \(Broken pipe\)$"):
        channel.send(call(1))


@EVERY
def test_the_peer_dies_before_it_took_everything(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener, buffer=SMALL_BUFFER)
    sending = setting.pool.submit(channel.send, call(1, b"x" * LARGE))
    if setting.kind != "undriven":
        sending.result(PATIENCE_S)
    peer.sock.recv(1)
    peer.sock.close()
    sending.result(PATIENCE_S)
    eventually(lambda: "unsent=0" in repr(channel))  # a broken socket is found by who reads
    if setting.kind == "undriven":
        channel.drive(never, PATIENCE_S)
    else:
        setting.on_home(channel.watch)
    assert listener.gone.wait(PATIENCE_S)


def test_a_peer_that_is_gone_before_the_greeting(leaves_nothing: Footprint) -> None:
    near, far = socket.socketpair()
    far.close()
    listener = FakeListener()
    channel = SocketChannel(near, listener, Undriven())  # type: ignore[arg-type]
    assert channel.drive(never, PATIENCE_S)
    assert listener.losses == 1


# -- this end goes ---------------------------------------------------------------------------------------------------


@EVERY
def test_a_closed_channel_takes_nothing_and_says_nothing(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    setting.on_home(channel.watch)
    for _ in range(2):
        setting.on_home(channel.close)
    with pytest.raises(ChannelClosed, match=r"^the channel is closed$"):
        channel.send(call(1))
    setting.on_home(channel.watch)
    assert not channel.armed
    peer.hear_end()
    assert channel.sock.fileno() == -1
    assert listener.losses == 0
    if channel.drive(never, None):  # returns at once
        assert setting.kind in ("poller", "undriven")


class _Recorded(socket.socket):
    """Remembers which threads closed it."""

    closers: list[threading.Thread]

    def close(self) -> None:
        self.closers.append(threading.current_thread())
        super().close()


@DRIVABLE
def test_closing_wakes_the_thread_that_drives_and_leaves_the_descriptor_to_it(setting: Setting) -> None:
    near, far = socket.socketpair()
    with far, _Recorded(fileno=near.detach()) as sock:
        sock.closers = []
        listener = FakeListener()
        channel = SocketChannel(sock, listener, setting.driver, greet=False)
        inside = threading.Event()

        def drive() -> threading.Thread:
            assert channel.drive(lambda: bool(inside.set()), None)
            return threading.current_thread()

        driving = setting.pool.submit(drive)
        assert inside.wait(PATIENCE_S)
        channel.close()
        driver = driving.result(PATIENCE_S)
        # Closed by another thread, the descriptor could be somebody else's before the driver is out of its read.
        assert sock.closers[0] is driver
        assert listener.losses == 0


@DRIVABLE
def test_an_interrupt_between_two_messages_does_no_harm(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        channel.drive(interrupted, None)
    peer.say(reply(1))
    assert channel.drive(lambda: bool(listener.heard), None)
    assert listener.losses == 0


@DRIVABLE
def test_an_interrupt_in_the_middle_of_a_message_breaks_the_channel(setting: Setting) -> None:
    class Listener(FakeListener):
        def received(self, channel: Channel, message: Message) -> None:
            raise KeyboardInterrupt

    listener = Listener()
    channel, peer = setting.open(listener)
    peer.say(reply(1), reply(2))  # nobody knows any more who got which of them
    with pytest.raises(KeyboardInterrupt):
        channel.drive(never, None)
    assert (listener.losses, listener.reason) == (1, "taking a message from it was interrupted")
    assert channel.closed
    peer.hear_end()


@WATCHING
def test_a_listener_may_close_its_channel(setting: Setting) -> None:
    class Listener(FakeListener):
        def received(self, channel: Channel, message: Message) -> None:
            super().received(channel, message)
            channel.close()

    listener = Listener()
    channel, peer = setting.open(listener)
    setting.on_home(channel.watch)
    peer.say(reply(1))
    peer.hear_end()
    eventually(lambda: channel.sock.fileno() == -1)
    assert listener.losses == 0


@LOOPS
def test_a_channel_may_be_closed_after_its_loop(setting: Setting) -> None:
    channel, peer = setting.open(FakeListener(), buffer=SMALL_BUFFER)
    setting.on_home(channel.watch)
    channel.send(call(1, b"x" * LARGE))
    assert setting.loop is not None
    loop = LoopThread(asyncio.new_event_loop)
    other = loop.run(lambda: LoopDriver(asyncio.get_running_loop()))
    near, far = socket.socketpair()
    orphan = SocketChannel(near, FakeListener(), other, greet=False)
    loop.run(orphan.watch)
    loop.close()
    orphan.close()
    assert far.recv(1) == b""
    far.close()
    assert peer.hear(1) == [call(1, b"x" * LARGE)]


# -- signal handlers that raise ----------------------------------------------------------------------------------------


def _torn(heard: list[Message], sent: list[Message]) -> bool:
    """Whether what the peer heard is anything but some of the messages, in order."""
    rest = iter(sent)
    return not all(message in rest for message in heard)


@POLLER
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
@pytest.mark.parametrize("armed", [False, True], ids=["idle", "armed"])
def test_no_strike_loses_a_message_or_the_role(setting: Setting, error: type[BaseException], armed: bool) -> None:
    """Whatever was sent arrives whole, and every answer is delivered."""
    places = itertools.takewhile(lambda place: _survives_a_strike(setting, place, error("struck"), armed), range(1000))
    assert 20 < len(list(places)) < 1000


def _survives_a_strike(setting: Setting, place: int, error: BaseException, armed: bool) -> bool:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    if armed:
        channel.watch()
    calls = [call(1), call(2), call(3), call(4)]
    answering = setting.pool.submit(_answer_until, peer, call(4))

    def exchange() -> None:
        for message in calls[:3]:
            channel.send(message)
        channel.drive(lambda: reply(2) in listener.heard, None)

    where = struck(exchange, place, error)
    eventually(lambda: "driven" not in repr(channel))
    channel.watch()  # as whoever gives a call up
    eventually(lambda: "open_calls=0 unsent=0" in repr(channel))
    channel.send(call(4))
    channel.drive(lambda: reply(4) in listener.heard, PATIENCE_S)
    eventually(lambda: reply(4) in listener.heard)
    heard = answering.result(PATIENCE_S)
    assert not _torn(heard, calls), where
    # An answer may come twice, which its listener has to bear.
    assert [message.id for message, _ in itertools.groupby(listener.heard)] == [each.id for each in heard], where
    eventually(lambda: "open_calls=0 unsent=0" in repr(channel))
    assert listener.losses == 0, where
    channel.close()
    peer.sock.close()
    assert channel.sock.fileno() == -1
    return bool(where)


@POLLER
def test_no_strike_tears_what_takes_several_reads_and_writes(setting: Setting) -> None:
    places = itertools.takewhile(lambda place: _survives_a_strike_at_length(setting, place), range(1000))
    assert 20 < len(list(places)) < 1000


def _survives_a_strike_at_length(setting: Setting, place: int) -> bool:
    listener = FakeListener()
    channel, peer = setting.open(listener, buffer=LARGE // 8)
    calls = [call(1, b"x" * LARGE), call(2), call(3, b"z" * LARGE)]
    answering = setting.pool.submit(_answer_until, peer, calls[-1])

    def exchange() -> None:
        for message in calls[:2]:
            channel.send(message)
        channel.drive(lambda: len(listener.heard) == 2, None)

    where = struck(exchange, place, KeyboardInterrupt())
    channel.watch()
    channel.send(calls[-1])
    channel.watch()
    heard = answering.result(PATIENCE_S)
    assert not _torn(heard, calls), where
    eventually(lambda: "open_calls=0 unsent=0" in repr(channel))
    answers = [message for message, _ in itertools.groupby(listener.heard)]
    assert answers == [reply(each.id, each.payload) for each in heard], where
    assert listener.losses == 0, where
    channel.close()
    peer.sock.close()
    return bool(where)


def _answer_until(peer: Peer, last: Call) -> list[Any]:
    heard: list[Any] = []
    while last not in heard:
        heard += peer.hear(1)
        peer.say(reply(heard[-1].id, heard[-1].payload))
    return heard


@POLLER
def test_whoever_comes_takes_over_from_a_reader_that_left_without_a_word(setting: Setting) -> None:
    """As one that is struck while it leaves because it was struck."""
    listener = FakeListener()
    channel, peer = setting.open(listener)
    channel._leave = channel._recover = lambda me: None  # type: ignore[method-assign]
    channel.send(call(1))
    with pytest.raises(KeyboardInterrupt):
        channel.drive(_interrupted, None)
    del channel._leave, channel._recover
    assert channel._role
    peer.say(reply(1))
    assert channel.drive(lambda: bool(listener.heard), PATIENCE_S)
    assert not channel._role


@POLLER
def test_nobody_takes_over_from_a_reader_that_is_followed_by_another_one(setting: Setting) -> None:
    """Whoever finds the role taken may look at its holder when that one has left and the next one has come."""
    channel, _peer = setting.open(FakeListener())
    first, second = threading.Lock(), threading.Lock()
    first.acquire()
    second.acquire()

    class Role(dict[str, threading.Lock]):
        def setdefault(self, key: str, default: threading.Lock) -> threading.Lock:  # type: ignore[override]
            holder = super().setdefault(key, default)
            if holder is first and channel._taking_over.locked():
                self[key] = second
                first.release()
            return holder

    channel._role = role = Role(reader=first)
    assert not channel.drive(never, 0.0)
    channel.on_readable()
    assert role == {"reader": second}
    del role["reader"]


def _interrupted() -> bool:
    raise KeyboardInterrupt


@POLLER
@pytest.mark.parametrize("logged", [True, False])
def test_a_listener_that_raises_loses_its_own_channel_alone(
    setting: Setting, logged: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the application's own code raises when it is told so."""

    class Broken(FakeListener):
        def received(self, channel: Channel, message: Message) -> None:
            raise SystemExit("from a listener")

    def filtered(record: logging.LogRecord) -> bool:
        if not logged:
            raise SystemExit("from a filter")
        return True

    monkeypatch.setattr(logging.getLogger("engine.wire"), "filters", [filtered])
    sound, broken = FakeListener(), Broken()
    channel, peer = setting.open(sound)
    other, its_peer = setting.open(broken)
    channel.watch()
    other.watch()
    its_peer.say(reply(1))
    assert broken.gone.wait(PATIENCE_S)
    peer.say(reply(2))
    eventually(lambda: sound.heard == [reply(2)])
    assert (other.closed, broken.losses, sound.losses) == (True, 1, 0)
    scribe().flush(PATIENCE_S)
    assert ("from a listener" in caplog.text) is logged


# -- the poller ------------------------------------------------------------------------------------------------------


def poller_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "test-poller"]


@POLLER
def test_a_poller_starts_with_the_first_channel_that_nobody_drives(setting: Setting) -> None:
    listener = FakeListener()
    channel, peer = setting.open(listener)
    channel.send(call(1))
    peer.say(reply(1))
    assert channel.drive(lambda: bool(listener.heard), None)
    assert not poller_threads()
    channel.watch()
    assert len(poller_threads()) == 1
    setting.driver.close()
    assert not poller_threads()


@POLLER
def test_a_closed_poller_reads_nothing_and_lets_channels_close(setting: Setting) -> None:
    listener = FakeListener()
    watched, _ = setting.open(listener)
    writing, _ = setting.open(listener, buffer=SMALL_BUFFER)
    watched.watch()
    writing.send(call(1, b"x" * LARGE))
    setting.driver.close()
    setting.driver.close()
    idle, peer = setting.open(listener, buffer=SMALL_BUFFER)
    idle.watch()
    idle.send(call(1, b"x" * LARGE))
    peer.say(reply(1))
    for channel in (watched, writing, idle):
        channel.close()
    assert not poller_threads()
    assert not listener.heard


@POLLER
def test_a_listener_may_close_the_poller(setting: Setting) -> None:
    class Listener(FakeListener):
        def received(self, channel: Channel, message: Message) -> None:
            setting.driver.close()

    channel, peer = setting.open(Listener())
    channel.watch()
    peer.say(reply(1))
    eventually(lambda: not poller_threads())
    channel.close()


@POLLER
def test_a_descriptor_that_comes_back_belongs_to_its_new_channel(setting: Setting) -> None:
    listener = FakeListener()
    old, _ = setting.open(listener)
    old.watch()
    number = old.fd
    old.close()
    new, peer = setting.open(listener)
    others = []
    while new.fd != number and len(others) < 10:
        others.append(new)
        new, peer = setting.open(listener)
    assert new.fd == number
    new.watch()
    setting.driver.disarm(old)  # a belated word on the old one
    setting.driver.forget(old)
    peer.say(reply(1))
    eventually(lambda: listener.heard == [reply(1)])


@UNDRIVEN
def test_closing_ends_a_send_that_waits_for_its_peer(setting: Setting) -> None:
    channel, peer = setting.open(FakeListener(), buffer=SMALL_BUFFER)
    sending = setting.pool.submit(channel.send, call(1, b"x" * LARGE))
    assert peer.sock.recv(1)  # it has begun
    channel.close()
    sending.result(PATIENCE_S)
