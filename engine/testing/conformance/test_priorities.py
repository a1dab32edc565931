"""Calls of low priority: they yield to others, and are refused first, but get on."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest

from engine import errors
from engine.testing.instruments import eventually

ONE = {"max_concurrent_queries": 1}


def queued(engine, served):
    return engine.statistics()["backends"][served.tag]["queued"]


def hold(served, gate):
    """Keep the only place of a backend busy until the gate opens."""
    ref = served.handle.remote("hold")
    gate.wait_for_arrivals(1)
    return ref


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_waits_goes_by_priority_and_then_in_order(serve, engine, gate, journal, kind):
    def sync(request):
        if request.data == "hold":
            gate.pass_through()
        else:
            journal.add(request.data)

    async def asynchronous(request):
        if request.data == "hold":
            await gate.apass_through()
        else:
            journal.add(request.data)

    served = serve(sync if kind == "sync" else asynchronous, route=None, config=ONE)
    refs = [hold(served, gate)]
    low = served.handle.options(priority="low")
    refs += [low.remote(f"low {number}") for number in range(2)]
    refs += [served.handle.remote(f"normal {number}") for number in range(12)]
    eventually(lambda: queued(engine, served) == 14)
    gate.open()
    engine.get(refs, timeout=20)
    order = [f"normal {number}" for number in range(12)]
    order[9:9] = ["low 0"]  # every tenth is of low priority, however many others there are
    assert journal.lines() == [*order, "low 1"]


def test_low_ones_are_refused_first(serve, engine, gate):
    async def backend(request):
        await gate.apass_through()
        return request.data

    served = serve(backend, route=None, config={**ONE, "max_queued_requests": 4, "max_queued_bytes": 100_000})
    low = served.handle.options(priority="low")
    refs = [hold(served, gate), low.remote(1), low.remote(2)]
    with pytest.raises(errors.Overloaded, match="max_queued_requests=4, of which calls of low priority have half"):
        engine.get(low.remote("third"), timeout=20)
    refs += [served.handle.remote(3), served.handle.remote(4)]
    with pytest.raises(errors.Overloaded, match=r"max_queued_requests=4\)"):
        engine.get(served.handle.remote("fifth"), timeout=20)
    gate.open()
    assert engine.get(refs, timeout=20) == ["hold", 1, 2, 3, 4]
    assert low.call("again") == "again"


@pytest.mark.parametrize("way", ["task", "thread"])
def test_calls_made_by_a_low_one_are_low_unless_they_say_otherwise(serve, engine, gate, way):
    """Shown by when they are refused: two calls may wait, but only one of low priority."""

    async def inner(request):
        await gate.apass_through()
        return "served"

    class Outer:
        def __init__(self, handle, ahandle):
            self.handle = handle
            self.ahandle = ahandle

        async def __call__(self, request):
            priority = request.data
            if way == "task":
                return await asyncio.create_task(self.ahandle.options(priority=priority).call())
            return await asyncio.to_thread(self.handle.options(priority=priority).call)

    within = serve(inner, route=None, config={**ONE, "max_queued_requests": 2})
    outer = serve(Outer, within.handle, within.ahandle, route=None)
    low = outer.handle.options(priority="low")
    refs = [outer.handle.remote()]
    gate.wait_for_arrivals(1)
    for given, why in [(None, "of low priority"), ("normal", r"max_queued_requests=2\)")]:
        [refused], waiting = engine.wait([low.remote(given) for _ in range(2)], num_returns=1, timeout=20)
        with pytest.raises(errors.Overloaded, match=why):
            engine.get(refused)
        refs += waiting
    gate.open()
    assert engine.get(refs, timeout=20) == ["served"] * 3


@pytest.mark.parametrize("header", ["X-Urgency", None])
def test_a_header_gives_the_priority_if_it_may(own_engine, gate, header):
    async def backend(request):
        await gate.apass_through()
        return "served"

    engine = own_engine(priority_header=header)
    engine.create_backend("b", backend, config={**ONE, "max_queued_requests": 2})
    engine.create_endpoint("b", backend="b", route="/b")
    url = f"{engine.http_url}/b"
    if header is not None:
        assert httpx.get(url, headers={"x-urgency": "high"}).text == "X-URGENCY must be normal or low."
    answers: list[int] = []

    def ask(urgency):
        answers.append(httpx.get(url, headers={"x-urgency": urgency}, timeout=30).status_code)

    threads = [threading.Thread(target=ask, args=[urgency]) for urgency in ("normal", "low", "low", "low")]
    threads[0].start()
    gate.wait_for_arrivals(1)
    for thread in threads[1:]:
        thread.start()
    refused = 2 if header is not None else 1  # of two that may wait, only one may be of low priority
    eventually(lambda: len(answers) == refused)
    gate.open()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] * (4 - refused) + [503] * refused
