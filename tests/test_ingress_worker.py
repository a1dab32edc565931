"""The life of an ingress worker, with a scripted host in the place of an adapter."""

from __future__ import annotations

import os
import pickle
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from engine import errors
from engine.calling.client import Client
from engine.calling.slot import Slot
from engine.config import HTTPOptions
from engine.http import ingress_worker as worker_module
from engine.http.ingress_worker import IngressSpec, main
from engine.http.results import encode_result
from engine.seam.control_messages import Drain, Drained, Ping, Pong, Ready, Started, StartFailed, Subscribe
from engine.seam.messages import Reply
from engine.seam.serialization import unpack_exception
from engine.seam.snapshot import EndpointEntry, RoutingSnapshot
from engine_http import HypercornServer

PATIENCE_S = 10


class FakeCaller:
    """Answers "fine", except where it is told to hold on to the call."""

    def __init__(self) -> None:
        self.held: queue.Queue[Any] = queue.Queue()

    def submit(self, slot: Slot) -> None:
        if slot.endpoint == "held":
            self.held.put(slot)
        else:
            self.answer(slot)

    def answer(self, slot: Slot) -> None:
        encoded = encode_result("fine")
        slot.deliver(Reply(1, 0, encoded.head, encoded.body))

    def cancel(self, slot: Slot) -> None:
        pass

    def credit(self, slot: Slot, amount: int) -> None:
        pass


class FakeClient:
    def __init__(self) -> None:
        names = ("fine", "held")
        endpoints = {name: EndpointEntry(name, f"/{name}", ("GET",), (("b", 1.0),)) for name in names}
        self.snapshot = RoutingSnapshot(1, endpoints, {})
        self.caller = FakeCaller()

    def loop_caller(self) -> FakeCaller:
        return self.caller


class Host:
    """A worker's host; runs the worker in a thread."""

    worker_id = "w"

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.said: queue.Queue[Any] = queue.Queue()
        self.control: Callable[[Any], None] | None = None
        self.thread: threading.Thread | None = None
        self.client = FakeClient()

    def start(self, options: HTTPOptions, *, server: str = "hypercorn") -> None:
        payload = pickle.dumps(IngressSpec("e", "fake", "address", options, "w", server))
        self.thread = threading.Thread(target=main, args=(self, payload))
        self.thread.start()

    def hears(self) -> Any:
        return self.said.get(timeout=PATIENCE_S)

    def says(self, body: Any) -> None:
        assert self.control is not None
        self.control(body)

    def ended(self) -> None:
        assert self.thread is not None
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.sock.getsockname()[1]}{path}"

    # what the worker uses

    def tell(self, body: Any) -> None:
        if isinstance(body, Started):
            assert body.pid == os.getpid()
        else:
            self.said.put(body)

    def connector(self) -> Any:
        return self

    def listen_sockets(self) -> list[Any]:
        return [self.sock]

    def on_control(self, handler: Callable[[Any], None]) -> None:
        self.control = handler


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host()

    def subscribe(engine_id: str, connector: Any, control_address: str, request: Any) -> Any:
        assert (engine_id, connector, control_address) == ("e", host, "address")
        assert request == Subscribe(ingress=True, worker_id="w")
        return host.client

    monkeypatch.setattr(Client, "subscribe", subscribe)
    monkeypatch.setattr(worker_module, "load_server", lambda name: HypercornServer())
    yield host
    host.sock.close()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_serves_until_drained(host: Host, monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    if loop == "asyncio":
        monkeypatch.setitem(__import__("sys").modules, "uvloop", None)
    host.start(HTTPOptions())
    assert host.hears() == Ready("")
    assert httpx.get(host.url("/fine")).text == "fine"
    host.says(Ping(7))
    assert host.hears().token == 7
    host.says("something newer")
    host.says(Drain(PATIENCE_S))
    host.says(Drain(PATIENCE_S))
    assert host.hears() == Drained()
    host.ended()
    host.says(Drain(PATIENCE_S))


def test_finishes_what_is_in_flight(host: Host) -> None:
    host.start(HTTPOptions())
    assert host.hears() == Ready("")
    with httpx.stream("GET", host.url("/-/healthz")):
        answers: queue.Queue[Any] = queue.Queue()
        browser = threading.Thread(target=lambda: answers.put(httpx.get(host.url("/held"))))
        browser.start()
        slot = host.client.caller.held.get(timeout=PATIENCE_S)
        host.says(Ping(1))
        assert host.hears() == Pong(1, 1)
        host.says(Drain(PATIENCE_S))
        assert host.said.empty()
        slot.loop.call_soon_threadsafe(host.client.caller.answer, slot)
        assert answers.get(timeout=PATIENCE_S).text == "fine"
        browser.join()
    assert host.hears() == Drained()
    host.ended()


def test_breaks_off_what_takes_too_long(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.start(HTTPOptions())
    assert host.hears() == Ready("")
    failures: queue.Queue[Any] = queue.Queue()

    def browse() -> None:
        try:
            httpx.get(host.url("/held"), timeout=PATIENCE_S)
        except httpx.TransportError as error:
            failures.put(error)

    browser = threading.Thread(target=browse)
    browser.start()
    host.client.caller.held.get(timeout=PATIENCE_S)
    host.says(Drain(0.01))
    assert host.hears() == Drained()
    assert isinstance(failures.get(timeout=PATIENCE_S), httpx.RemoteProtocolError)
    browser.join()
    host.ended()
    assert "1 HTTP requests did not end within 0.01 s" in caplog.text


def _broken(app: Any) -> Any:
    raise KeyError("of the middleware")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (HTTPOptions(middlewares=[_broken]), KeyError),
        (HTTPOptions(server_options={"nonsense": 1}), errors.InvalidArgument),
    ],
)
def test_says_why_it_cannot_start(host: Host, options: HTTPOptions, error: type[Exception]) -> None:
    host.start(options)
    said = host.hears()
    assert isinstance(said, StartFailed)
    assert isinstance(unpack_exception(said.error), error)
    host.ended()


def test_says_so_when_its_specification_is_unreadable(host: Host) -> None:
    main(host, b"nonsense")  # type: ignore[arg-type]
    assert isinstance(host.hears(), StartFailed)


def test_connections_that_are_no_connections_are_not_logged(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    import asyncio
    import ssl

    loop = asyncio.new_event_loop()
    worker_module._on_loop_error(loop, {"message": "handshake", "exception": ssl.SSLError()})
    assert caplog.text == ""
    worker_module._on_loop_error(loop, {"message": "a mistake", "exception": ValueError()})
    assert "a mistake" in caplog.text
    loop.close()
