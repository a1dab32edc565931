"""The accepting side: services on a blocking loop and on an event loop, reached over real Unix sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import until

from engine.seam.channel import Channel, ChannelClosed
from engine.seam.event_loop import close_event_loop, new_event_loop
from engine.seam.messages import PYTHON, Call, Cancel, Message, Reply
from engine.seam.service import ServiceLoop
from engine.testing.fakes import FakeListener
from engine.testing.instruments import PATIENCE_S, Footprint, eventually
from engine_wire import (
    Acceptor,
    AsyncServiceLoop,
    BlockingServiceLoop,
    Poller,
    SocketChannel,
    addresses,
    connect,
    listen_unix,
    service_loops,
)
from engine_wire.protocol import GREETING, encode

LARGE = 500_000


def call(number: int, payload: bytes = b"") -> Call:
    return Call(number, PYTHON, "m", None, "", b"", payload)


def reply(number: int, payload: bytes = b"") -> Reply:
    return Reply(number, 0, b"", payload)


class Echo:
    """Answers every call at once with its own payload; runs what `run` is given as if it were user code."""

    def __init__(self, *, on_loop: bool = False) -> None:
        self.event_loop = new_event_loop() if on_loop else None
        self.heard: list[Message] = []
        self.readers: list[str] = []  # the thread that read each message
        self.lost_channels = 0
        self.attached = threading.Event()
        self.loop: ServiceLoop
        self.turns = 0
        self.delays: list[str] = []
        self._work: deque[Callable[[], object]] = deque()
        self._leaving = False

    # the service

    def attach(self, loop: ServiceLoop) -> None:
        self.loop = loop
        self.attached.set()

    def received(self, channel: Channel, message: Message) -> None:
        self.readers.append(threading.current_thread().name)
        self.heard.append(message)
        if isinstance(message, Call):
            channel.send(reply(message.id, message.payload))

    def lost(self, channel: Channel, reason: str) -> None:
        self.lost_channels += 1

    def run_next(self) -> float | None:
        self.turns += 1
        if self._work:
            work = self._work.popleft()
            self.loop.step_out()
            try:
                work()
            finally:
                self.loop.step_in()
        return 0.0 if self._work else None

    def delayed(self) -> None:
        self.delays.append(threading.current_thread().name)

    def finished(self) -> bool:
        return self._leaving

    # what a test does with it

    def run(self, work: Callable[[], object]) -> None:
        self._work.append(work)
        self.loop.wake()

    def leave(self) -> None:
        self._leaving = True
        self.loop.wake()


class Blocked:
    """User code that lasts as long as the test wants."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.end = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> None:
        self.began.set()
        assert self.end.wait(PATIENCE_S)
        self.ended.set()


@pytest.fixture
def path(leaves_nothing: Footprint) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        yield str(Path(directory, "s"))


@pytest.fixture
def poller(leaves_nothing: Footprint) -> Iterator[Poller]:
    poller = Poller("test-poller")
    yield poller
    poller.close()


@contextmanager
def serving(
    kind: type[AsyncServiceLoop | BlockingServiceLoop], service: Echo, where: str | socket.socket
) -> Iterator[None]:
    """Run a service on a thread called "server"."""
    loop = kind([listen_unix(where) if isinstance(where, str) else where], service)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            loop.run()
        except BaseException as error:
            failures.append(error)
            service.attached.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    assert service.attached.wait(PATIENCE_S)
    try:
        yield
    finally:
        service.leave()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        if service.event_loop is not None:
            close_event_loop(service.event_loop)
    assert not failures, failures


@contextmanager
def connected(path: str, poller: Poller) -> Iterator[tuple[SocketChannel, FakeListener]]:
    listener = FakeListener()
    channel = connect(f"unix:{path}", listener, on_loop=False, poller=poller)
    channel.watch()
    try:
        yield channel, listener
    finally:
        channel.close()


KINDS = pytest.mark.parametrize(
    ("kind", "on_loop"),
    [pytest.param(BlockingServiceLoop, False, id="blocking"), pytest.param(AsyncServiceLoop, True, id="async")],
)


# -- both loops ------------------------------------------------------------------------------------------------------


@KINDS
def test_a_call_is_answered(kind: Any, on_loop: bool, path: str, poller: Poller) -> None:
    service = Echo(on_loop=on_loop)
    with serving(kind, service, path), connected(path, poller) as (channel, listener):
        channel.send(call(1, b"x"))
        eventually(lambda: listener.heard == [reply(1, b"x")])
        assert service.readers == ["server"]
        assert service.loop.open_channels() == 1


@KINDS
def test_large_answers_to_a_slow_caller_hold_up_nobody(kind: Any, on_loop: bool, path: str, poller: Poller) -> None:
    service = Echo(on_loop=on_loop)
    with serving(kind, service, path), socket.socket(socket.AF_UNIX) as slow, connected(path, poller) as (fast, heard):
        slow.connect(path)
        slow.settimeout(PATIENCE_S)
        slow.sendall(GREETING + b"".join(encode(call(number, b"x" * LARGE)) for number in range(3)))
        eventually(lambda: len(service.heard) == 3)
        fast.send(call(9))
        eventually(lambda: heard.heard == [reply(9)])
        expected = GREETING + b"".join(encode(reply(number, b"x" * LARGE)) for number in range(3))
        received = bytearray()
        while len(received) < len(expected):
            received += slow.recv(1 << 16)
        assert received == expected


@KINDS
def test_the_service_hears_of_callers_that_leave(kind: Any, on_loop: bool, path: str, poller: Poller) -> None:
    service = Echo(on_loop=on_loop)
    with serving(kind, service, path):
        with connected(path, poller) as (channel, listener):
            channel.send(call(1))
            eventually(lambda: listener.heard == [reply(1)])
        eventually(lambda: service.lost_channels == 1)
        eventually(lambda: service.loop.open_channels() == 0)


@KINDS
def test_a_caller_that_is_gone_before_it_was_accepted(kind: Any, on_loop: bool, path: str, poller: Poller) -> None:
    service = Echo(on_loop=on_loop)
    listening = listen_unix(path)
    with socket.socket(socket.AF_UNIX) as early:
        early.connect(path)
    with serving(kind, service, listening):
        eventually(lambda: service.lost_channels == 1)
        with connected(path, poller) as (channel, listener):
            channel.send(call(1))
            eventually(lambda: listener.heard == [reply(1)])


@KINDS
def test_callers_hear_that_the_service_left(kind: Any, on_loop: bool, path: str, poller: Poller) -> None:
    with ExitStack() as callers:
        with serving(kind, Echo(on_loop=on_loop), path):
            channel, listener = callers.enter_context(connected(path, poller))
            channel.send(call(1))
            eventually(lambda: listener.heard == [reply(1)])
        assert listener.gone.wait(PATIENCE_S)
        assert listener.reason == "the peer closed the connection"


# -- the blocking loop -----------------------------------------------------------------------------------------------


def test_while_user_code_runs_another_thread_stands_in(path: str, poller: Poller) -> None:
    service, work = Echo(), Blocked()
    with serving(BlockingServiceLoop, service, path), connected(path, poller) as (channel, listener):
        service.run(work)
        assert work.began.wait(PATIENCE_S)
        channel.send(call(1))
        eventually(lambda: listener.heard == [reply(1)])
        assert service.readers == ["engine-stand-in"]
        assert not work.ended.is_set()
        work.end.set()
        eventually(lambda: service.turns > 1 and work.ended.is_set())
        channel.send(call(2))
        eventually(lambda: listener.heard == [reply(1), reply(2)])


def test_the_turn_comes_back_as_soon_as_user_code_ends(path: str, poller: Poller) -> None:
    """No message comes that would wake the one who stands in."""
    service, work, after = Echo(), Blocked(), threading.Event()
    with serving(BlockingServiceLoop, service, path), connected(path, poller) as (channel, listener):
        service.run(work)
        assert work.began.wait(PATIENCE_S)
        channel.send(call(1))
        eventually(lambda: bool(service.readers))  # the stand-in has the turn
        service.run(after.set)
        work.end.set()
        assert after.wait(PATIENCE_S)
        eventually(lambda: listener.heard == [reply(1)])


def test_the_stand_in_returns_after_a_nap(path: str, poller: Poller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_loops, "_TICKS_A_RUN", 1)
    service = Echo()
    with serving(BlockingServiceLoop, service, path), connected(path, poller) as (channel, listener):
        loop: Any = service.loop
        for number in range(3):
            service.run(lambda: None)
            eventually(lambda: loop._dozing)
            work = Blocked()
            service.run(work)
            assert work.began.wait(PATIENCE_S)
            channel.send(call(number))
            eventually(lambda number=number: reply(number) in listener.heard)
            assert not work.ended.is_set()
            work.end.set()
            assert work.ended.wait(PATIENCE_S)


def test_one_run_of_user_code_keeps_the_stand_in_awake_for_a_moment_only(path: str) -> None:
    service, ran = Echo(), threading.Event()
    with serving(BlockingServiceLoop, service, path):
        loop: Any = service.loop
        service.run(lambda: None)
        eventually(lambda: loop._dozing)
        looks: list[float | None] = []
        wait = loop._bell.wait
        loop._bell.wait = lambda timeout_s: (looks.append(timeout_s), wait(timeout_s))
        service.run(ran.set)
        assert ran.wait(PATIENCE_S)
        eventually(lambda: loop._dozing and looks[-1:] == [None])
        assert 0 < len(looks) < 2 * service_loops._TICKS_A_RUN < service_loops._MOST_TICKS


def test_short_user_code_needs_no_stand_in(path: str, poller: Poller) -> None:
    service, done = Echo(), threading.Semaphore(0)
    with serving(BlockingServiceLoop, service, path), connected(path, poller) as (channel, listener):
        for number in range(200):
            service.run(done.release)
            channel.send(call(number))
        for _ in range(200):
            assert done.acquire(timeout=PATIENCE_S)
        eventually(lambda: len(listener.heard) == 200)
        assert listener.heard == [reply(number) for number in range(200)]


def test_callers_come_and_go_while_user_code_runs(path: str, poller: Poller) -> None:
    service, work = Echo(), Blocked()
    with serving(BlockingServiceLoop, service, path):
        service.run(work)
        assert work.began.wait(PATIENCE_S)
        for number in range(3):
            with connected(path, poller) as (channel, listener):
                channel.send(call(number))
                eventually(lambda number=number, listener=listener: listener.heard == [reply(number)])
            eventually(lambda number=number: service.lost_channels == number + 1)
        work.end.set()


def test_failing_user_code_leaves_the_turn_where_it_belongs(path: str, poller: Poller) -> None:
    service, work, loop_left = Echo(), Blocked(), threading.Event()

    def fail() -> None:
        work()
        raise LookupError("out")

    loop = BlockingServiceLoop([listen_unix(path)], service)

    def run() -> None:
        with pytest.raises(LookupError):
            loop.run()
        loop_left.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert service.attached.wait(PATIENCE_S)
    service.run(fail)
    assert work.began.wait(PATIENCE_S)
    work.end.set()
    assert loop_left.wait(PATIENCE_S)
    thread.join()
    loop.wake()  # too late, and harmless


def test_a_flood_of_wake_ups_is_one(path: str) -> None:
    service, work = Echo(), Blocked()
    with serving(BlockingServiceLoop, service, path):
        service.run(work)
        assert work.began.wait(PATIENCE_S)
        for _ in range(5000):  # more than the socket holds
            service.loop.wake()
        work.end.set()
        assert work.ended.wait(PATIENCE_S)


def test_reading_on_demand(path: str, poller: Poller) -> None:
    """A replica that streams reads credit and cancellations in between."""
    service, heard = Echo(), threading.Event()
    with serving(BlockingServiceLoop, service, path), connected(path, poller) as (channel, _):

        def stream() -> None:
            service.loop.step_in()
            while not any(isinstance(message, Cancel) for message in service.heard):
                service.loop.poll(None)
            service.loop.step_out()
            heard.set()

        service.run(stream)
        channel.send(Cancel(1))
        assert heard.wait(PATIENCE_S)
        assert service.readers == ["server"]


# -- the async loop --------------------------------------------------------------------------------------------------


def test_an_async_loop_serves_by_itself(path: str) -> None:
    service = Echo(on_loop=True)
    with serving(AsyncServiceLoop, service, path):
        service.loop.poll(None)  # nothing to do for a service that has a loop
        service.loop.step_out()
        service.loop.step_in()
        service.loop.wake()  # to no purpose: it looks and goes on
        assert service.turns == 0


# -- accepting and connecting ----------------------------------------------------------------------------------------


def test_an_acceptor_counts_and_closes_its_channels(path: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[tuple[Channel, FakeListener]] = []

        def accept(channel: Channel) -> FakeListener:
            accepted.append((channel, FakeListener()))
            return accepted[-1][1]

        listening = listen_unix(path)
        acceptor = Acceptor([listening], accept, loop)
        poller = Poller()
        callers = [FakeListener(), FakeListener()]
        channels = [connect(f"unix:{path}", caller, on_loop=True, poller=poller) for caller in callers]
        for number, channel in enumerate(channels):
            channel.send(Cancel(number))
        await until(lambda: len(accepted) == 2 and all(listener.heard for _, listener in accepted))
        assert [listener.heard for _, listener in accepted] == [[Cancel(0)], [Cancel(1)]]
        assert acceptor.open_channels() == 2
        channels[0].close()
        await until(lambda: accepted[0][1].losses == 1)
        assert acceptor.open_channels() == 1
        acceptor._on_connection(listening)  # woken for a caller that another process was faster to accept
        assert len(accepted) == 2
        acceptor.close()
        acceptor.close()
        await until(lambda: callers[1].losses == 1)
        assert acceptor.open_channels() == 0
        assert accepted[1][1].losses == 0  # its own side knows
        with pytest.raises(ChannelClosed, match=r"^nobody answers at .* \(Connection refused\)$"):
            connect(f"unix:{path}", FakeListener(), on_loop=True, poller=poller)

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a listening socket ends with its last holder")
@pytest.mark.parametrize("kind", [BlockingServiceLoop, AsyncServiceLoop])
def test_nobody_is_left_to_connect_to_a_copy_of_a_socket(kind: Any, path: str, poller: Poller) -> None:
    """Processes that were forked from this one have one, and answer nobody."""
    listening = listen_unix(path)
    with listening.dup():
        with serving(kind, Echo(on_loop=kind is AsyncServiceLoop), listening):
            pass
        with pytest.raises(ChannelClosed, match="nobody answers"):
            connect(f"unix:{path}", FakeListener(), on_loop=False, poller=poller)


def test_addresses_that_lead_nowhere(path: str, poller: Poller) -> None:
    with pytest.raises(ChannelClosed, match="cannot reach 'inline:x': the scheme must be 'unix' or 'tcp'"):
        connect("inline:x", FakeListener(), on_loop=False, poller=poller)
    with pytest.raises(ChannelClosed, match=r"^nobody answers at .* \(No such file or directory\)$"):
        connect(f"unix:{path}", FakeListener(), on_loop=False, poller=poller)


def test_a_path_is_bound_once(path: str) -> None:
    with listen_unix(path), pytest.raises(OSError, match="Address already in use"):
        listen_unix(path)


@pytest.mark.parametrize("proves_itself", [False, True])
def test_processes_of_other_users_are_turned_away(
    tmp_path: Path, proves_itself: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(addresses, "_credential", lambda sock, position: (4711, os.geteuid() + 1)[position])
    with listen_unix(str(tmp_path / "s")) as listening, socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(tmp_path / "s"))
        accepted = addresses.accept_from(listening, proves_itself=proves_itself)
        if proves_itself:  # it is asked for the secret
            assert accepted is not None
            accepted[0].close()
            assert caplog.messages == []
        else:
            assert accepted is None
            assert stranger.recv(1) == b""
            assert caplog.messages == [
                f"dropped a connection from process 4711: it belongs to another user ({os.geteuid() + 1})"
            ]


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="the system does not tell")
def test_who_is_behind_a_connection(tmp_path: Path) -> None:
    near, far = socket.socketpair()
    with near, far:
        assert (addresses.process_behind(near), addresses._user_behind(near)) == (os.getpid(), os.geteuid())
    assert (addresses.process_behind(near), addresses._user_behind(near)) == (None, None)
