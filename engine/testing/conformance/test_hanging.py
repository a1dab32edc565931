"""Calls that run for too long, and loops that do not turn: told, logged with their stack, and replaced."""

from __future__ import annotations

import asyncio

import pytest

from engine import accept_batch, errors, get_replica_context
from engine.testing.instruments import eventually

LIMIT_S = 0.3


def to_hold(request):
    return "hold" in (getattr(request, "data", request), *getattr(request, "query_params", ()))


class Plain:
    """Holds the calls that are told so at a gate, and says which replica answers the others."""

    def __init__(self, gate):
        self.gate = gate

    def __call__(self, request):
        self.held_if_asked(request)
        return get_replica_context().replica_tag

    def held_if_asked(self, request):
        if to_hold(request):
            self.gate.pass_through()

    def parts(self, request):
        yield "first;"
        self.held_if_asked(request)
        yield "last"

    @accept_batch
    def batch(self, requests):
        return [self(request) for request in requests]


class OnLoop(Plain):
    def __init__(self, gate, journal=None):
        super().__init__(gate)
        self.journal = journal

    async def waits(self, request):
        try:
            if to_hold(request):
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.journal.add("cancelled")
            raise
        return get_replica_context().replica_tag

    async def parts(self, request):
        yield "first;"
        if to_hold(request):
            await asyncio.Event().wait()
        yield "last"


def said(caplog, *texts):
    """Whether one record of the log has all of this."""
    return any(all(text in record.getMessage() for text in texts) for record in caplog.records)


@pytest.mark.parametrize("method", ["__call__", "batch"])
def test_a_plain_call_that_runs_for_too_long(engine, serve, gate, caplog, method):
    served = serve(Plain, gate, config={"max_call_s": LIMIT_S})
    handle = served.handle.options(method_name=method)
    assert handle.call() == f"{served.tag}#1"
    held = handle.remote("hold")
    gate.wait_for_arrivals(1)
    waiting = [served.handle.remote() for _ in range(3)]
    with pytest.raises(errors.DeadlineExceeded, match=rf"a call of .* ran for longer than max_call_s={LIMIT_S}"):
        engine.get(held, timeout=20)
    assert engine.get(waiting, timeout=20) == [f"{served.tag}#2"] * 3
    assert eventually(lambda: said(caplog, f"longer than max_call_s={LIMIT_S}", served.tag, "in held_if_asked"))
    assert eventually(lambda: said(caplog, "has been in one call for", "replacing it"))
    assert not said(caplog, "(request )"), "a call by handle has no number to show"
    assert not said(caplog, "It is here", "replica.py"), "the stack begins where user code does"
    assert list(engine.statistics()["backends"][served.tag]["replicas"].values()) == ["ready"]


def test_over_http_it_is_a_timeout(serve, gate):
    served = serve(Plain, gate, config={"max_call_s": LIMIT_S})
    assert served.http_text() == f"{served.tag}#1"
    assert served.http(params={"hold": "1"}).status_code == 504
    assert served.http_text() == f"{served.tag}#2"


def test_an_async_call_that_runs_for_too_long_is_cancelled(serve, gate, journal, caplog):
    """Its replica goes on with what else it does."""
    served = serve(OnLoop, gate, journal, config={"max_call_s": LIMIT_S})
    handle = served.handle.options(method_name="waits")
    with pytest.raises(errors.DeadlineExceeded, match=rf"ran for longer than max_call_s={LIMIT_S}"):
        handle.call("hold")
    http = served.http(params={"hold": "1"}, headers={"X-SERVE-CALL-METHOD": "waits"})
    assert http.status_code == 504
    assert journal.lines() == ["cancelled"] * 2
    assert handle.call() == f"{served.tag}#1"
    assert eventually(
        lambda: said(caplog, f"longer than max_call_s={LIMIT_S}", served.tag, "in waits", "it is cancelled")
    )
    assert not said(caplog, "(request )"), "a call by handle has no number to show"
    assert not said(caplog, "It is here", "replica.py"), "the stack begins where user code does"


@pytest.mark.parametrize("limit", ["stuck_after_s", "max_call_s"])
def test_a_loop_that_does_not_turn(serve, gate, caplog, limit):
    served = serve(OnLoop, gate, config={limit: LIMIT_S})
    assert served.call() == f"{served.tag}#1"
    with pytest.raises(errors.ReplicaDied):
        served.call("hold")
    assert served.call() == f"{served.tag}#2"
    told = "has kept its event loop from turning for"
    assert eventually(lambda: said(caplog, told, f"{limit}={LIMIT_S}", "in held_if_asked"))


@pytest.mark.parametrize("backend", [Plain, OnLoop])
def test_a_stream_that_stops_is_broken_off(serve, gate, backend):
    """What has come of it is not taken for the whole."""
    served = serve(backend, gate, config={"max_call_s": LIMIT_S})
    parts = {"X-SERVE-CALL-METHOD": "parts"}
    assert served.http_text(headers=parts) == "first;last"
    with pytest.raises(Exception, match=r"(?i)incomplete|without sending complete"):
        served.http(params={"hold": "1"}, headers=parts)
    assert served.http_text(headers=parts) == "first;last"


def test_the_limit_can_be_changed(engine, serve, gate):
    served = serve(Plain, gate, route=None)
    held = served.handle.remote("hold")
    gate.wait_for_arrivals(1)
    engine.update_backend_config(served.tag, {"max_call_s": 0.1})
    with pytest.raises(errors.DeadlineExceeded, match=r"max_call_s=0\.1"):
        engine.get(held, timeout=20)
