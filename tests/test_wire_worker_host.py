"""What every worker's host does with its control channel, over a TCP connection with a handshake."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import decoded

from engine.seam.control_messages import Ready
from engine.seam.messages import Control
from engine.testing.instruments import PATIENCE_S, Footprint, eventually
from engine_wire import Undriven, WireWorkerHost, connect, listen_tcp, tcp_address
from engine_wire.handshake import ServerHandshake
from engine_wire.protocol import Decoder, encode

SECRET = b"the secret of this test's engine"


class Host(WireWorkerHost):
    """Notes the end instead of ending the process."""

    def __init__(self, address: str) -> None:
        self.ends: list[tuple[str, str]] = []
        super().__init__("w", lambda host: connect(address, host, on_loop=False, poller=Undriven(), secret=SECRET))

    def control_lost(self, reason: str) -> None:
        self.ends.append((reason, threading.current_thread().name))


class Controller:
    """The other end, read and written by the test."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.decoder = Decoder(greeting=False)
        handshake = ServerHandshake(SECRET)
        while handshake.wanted:
            sock.sendall(handshake.feed(sock.recv(handshake.wanted)))

    def say(self, *bodies: Any) -> None:
        self.sock.sendall(b"".join(encode(Control(body)) for body in bodies))

    def hear(self) -> list[Any]:
        return [
            message.body for message in decoded(self.decoder, self.sock.recv(1 << 16)) if isinstance(message, Control)
        ]


@pytest.fixture
def ends(leaves_nothing: Footprint) -> Iterator[tuple[Host, Controller]]:
    with listen_tcp("127.0.0.1") as listening:
        host = Host(tcp_address(listening))
        host.tell("before the connection stands")
        host.start()
        sock = listening.accept()[0]
    with sock:
        sock.settimeout(PATIENCE_S)
        yield host, Controller(sock)
    eventually(lambda: "engine-control" not in [thread.name for thread in threading.enumerate()])


def test_the_controller_hears_what_is_told(ends: tuple[Host, Controller]) -> None:
    host, controller = ends
    assert controller.hear() == ["before the connection stands"]
    assert not host.settled
    host.tell(Ready("tcp:x"))
    assert controller.hear() == [Ready("tcp:x")]
    assert host.settled


def test_bodies_come_in_order_though_the_handler_is_late(ends: tuple[Host, Controller]) -> None:
    host, controller = ends
    heard: list[int] = []
    controller.say(*range(50))
    eventually(lambda: len(host._early) == 50)
    controller.say(*range(50, 100))
    host.on_control(heard.append)
    controller.say(*range(100, 150))
    eventually(lambda: len(heard) == 150)
    assert heard == list(range(150))


def test_a_handler_that_fails_is_logged_and_asked_again(
    ends: tuple[Host, Controller], caplog: pytest.LogCaptureFixture
) -> None:
    host, controller = ends
    heard: list[Any] = []

    def handler(body: Any) -> None:
        heard.append(body)
        if body == "bad":
            raise LookupError(body)

    host.on_control(handler)
    controller.say("bad", "good")
    eventually(lambda: heard == ["bad", "good"])
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("engine.wire", logging.ERROR)
    assert record.getMessage() == "a control message could not be handled"


def test_the_adapter_says_what_the_end_of_the_channel_means(ends: tuple[Host, Controller]) -> None:
    host, controller = ends
    controller.sock.close()
    eventually(lambda: host.ends)
    ((reason, thread),) = host.ends
    assert reason in ("the peer closed the connection", "the connection broke (Connection reset by peer)")
    assert thread == "engine-control"
    host.tell("too late, and harmless")


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # as user code forks: with threads
def test_a_fork_of_the_worker_does_not_speak_for_it(ends: tuple[Host, Controller]) -> None:
    host, controller = ends
    controller.hear()
    child = os.fork()
    if not child:
        host.tell("from the copy")
        os._exit(0 if host.is_copy and host._channel.sock.fileno() == -1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    host.tell("from the worker")
    assert controller.hear() == ["from the worker"]
