"""Workers that are stopped: nobody waits for them for ever, and others take their places."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from engine import errors
from engine.control import ingress_fleet, pulse
from engine.seam.scribe import scribe
from engine.testing.instruments import PATIENCE_S, eventually, is_running

pytestmark = pytest.mark.usefixtures("seen")


@pytest.fixture
def seen(adapter):
    if not adapter.sees_processes:
        pytest.skip("this adapter has no processes, or cannot look at them")


@pytest.fixture
def quick(monkeypatch):
    """Look as often as a test can wait for."""
    monkeypatch.setattr(pulse, "PERIOD_S", 0.02)
    monkeypatch.setattr(pulse, "STOPPED_S", 0.1)


class Mortal:
    def __call__(self, request):
        return os.getpid()


class AsyncMortal(Mortal):
    async def __call__(self, request):
        return super().__call__(request)


@pytest.mark.parametrize("backend", [Mortal, AsyncMortal])
def test_a_stopped_replica_is_replaced_and_its_calls_end(serve, engine, caplog, quick, backend):
    served = serve(backend, route=None)
    pid = served.call()
    os.kill(pid, signal.SIGSTOP)
    refs = [served.handle.remote() for _ in range(3)]
    ends = set()
    for ref in refs:
        try:
            ends.add(engine.get(ref, timeout=PATIENCE_S))
        except errors.ReplicaDied:
            ends.add(errors.ReplicaDied)
    assert pid not in ends
    eventually(lambda: not is_running(pid))
    assert served.call() != pid
    scribe().flush(PATIENCE_S)
    assert f"replica.{served.tag}.1 has not answered for" in caplog.text
    assert "(its process is stopped) and was killed" in caplog.text


def test_a_replica_that_is_stopped_while_it_starts_takes_no_longer_than_any(engine):
    class Backend:
        def __init__(self):
            os.kill(os.getpid(), signal.SIGSTOP)

        def __call__(self, request):
            return "never"

    started = time.monotonic()
    with pytest.raises(errors.BackendStartError, match="start_timeout_s=1; it was killed"):
        engine.create_backend("stopped", Backend, config={"start_timeout_s": 1})
    assert time.monotonic() - started < 5, "its end was waited for"


def test_native_code_that_keeps_the_lock_is_left_alone(serve, caplog, quick, monkeypatch):
    """The replica is as silent as one that is stopped, but works."""
    monkeypatch.setattr(pulse, "FROZEN_S", 0.3)

    def backend(request):
        if request.data:
            re.match(r"(a+)+$", "a" * request.data + "b")  # twice as long for one more letter
        return os.getpid()

    served = serve(backend, route=None)
    pid = served.call(0)
    letters = 22
    while "native code that keeps Python's lock is likely the cause" not in caplog.text:
        assert served.call(letters) == pid
        letters += 1
    assert served.call(0) == pid


def test_a_stopped_ingress_is_replaced_at_its_address(own_engine, quick):
    engine = own_engine(workers=1)
    engine.create_backend("b", Mortal)
    engine.create_endpoint("e", backend="b", route="/e")
    url = f"{engine.http_url}/e"
    replica = httpx.get(url).text
    (ingress,) = engine.statistics()["ingresses"].values()
    os.kill(ingress["pid"], signal.SIGSTOP)

    def answer():
        try:
            return httpx.get(url, timeout=PATIENCE_S).text
        except httpx.HTTPError:
            return None

    with ThreadPoolExecutor(3) as pool:
        assert {one.result(PATIENCE_S) for one in [pool.submit(answer) for _ in range(3)]} <= {replica, None}
    assert eventually(answer) == replica
    assert engine.http_url == url.removesuffix("/e")
    (other,) = engine.statistics()["ingresses"].values()
    assert other["pid"] != ingress["pid"]


def test_an_ingress_whose_event_loop_is_blocked_is_replaced(own_engine, quick, monkeypatch, caplog):
    monkeypatch.setattr(ingress_fleet, "STUCK_AFTER_S", 1.0)

    def blocking(app):
        async def middleware(scope, receive, send):
            if scope.get("path") == "/block":
                threading.Event().wait()
            await app(scope, receive, send)

        return middleware

    engine = own_engine(workers=1, middlewares=[blocking])
    engine.create_backend("b", Mortal)
    engine.create_endpoint("e", backend="b", route="/e")
    url = engine.http_url
    assert httpx.get(f"{url}/e").status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/block", timeout=PATIENCE_S)

    def answer():
        try:
            return httpx.get(f"{url}/e", timeout=PATIENCE_S).status_code
        except httpx.HTTPError:
            return None

    eventually(lambda: answer() == 200)
    scribe().flush(PATIENCE_S)
    assert "its event loop does not turn; nothing may take so long there) and was killed" in caplog.text
