"""What `Engine.statistics` says of an engine's calls."""

from __future__ import annotations

from typing import Any

from engine.testing.instruments import eventually


def name_it(request: Any) -> str:
    return "done"


async def hold(request: Any) -> str:
    await request.data.apass_through()
    return "done"


def test_calls_are_counted_whichever_way_they_are_made(engine, serve):
    served = serve(name_it)
    before = engine.statistics()["endpoints"][served.name]["calls"]
    for _ in range(2):
        served.handle.call()
    engine.get([served.handle.remote() for _ in range(3)])
    assert engine.statistics()["endpoints"][served.name]["calls"] - before == 5


def test_calls_in_flight_and_queued_are_told_apart(engine, serve, gate):
    served = serve(hold, config={"max_concurrent_queries": 2})
    refs = [served.handle.remote(gate) for _ in range(3)]
    gate.wait_for_arrivals(2)

    def held() -> tuple[int, int]:
        counted = engine.statistics()["backends"][served.tag]
        return counted["in_flight"], counted["queued"]

    eventually(lambda: held() == (2, 1))
    gate.open()
    assert engine.get(refs) == ["done"] * 3
    eventually(lambda: held() == (0, 0))
