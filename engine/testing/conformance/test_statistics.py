"""What `Engine.statistics` says of an engine's calls."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engine import errors
from engine.testing.instruments import Gate, eventually


def name_it(request: Any) -> str:
    return "done"


async def hold(request: Any) -> str:
    await request.data.apass_through()
    return "done"


def backend_of(engine, tag):
    return engine.statistics()["backends"].get(tag)


def test_a_backend_shows_what_becomes_of_it(adapter, engine, gate, tmp_path):
    """From before it is there until its last replica is gone."""

    class Held:
        def __init__(self):
            gate.pass_through()

        def __call__(self, request):
            request.data.pass_through()
            return os.getpid()

    end = Gate(tmp_path / "end")
    with ThreadPoolExecutor(1) as pool:
        creating = pool.submit(engine.create_backend, "shown", Held)
        gate.wait_for_arrivals(1)
        eventually(lambda: backend_of(engine, "shown")["details"]["shown#1"]["pid"])
        shown = backend_of(engine, "shown")
        assert (shown["state"], shown["replicas"]) == ("starting", {"shown#1": "starting"})
        assert (shown["failures"], shown["last_error"]) == (0, None)
        detail = shown["details"]["shown#1"]
        assert detail["state"] == "starting"
        assert detail["since_s"] >= 0
        assert (detail["pid"] != os.getpid()) == adapter.processes
        gate.open()
        creating.result(60)
        engine.create_endpoint("shown", backend="shown")
        shown = backend_of(engine, "shown")
        assert (shown["state"], shown["replicas"]) == ("ready", {"shown#1": "ready"})
        ref = engine.get_handle("shown").remote(end)
        end.wait_for_arrivals(1)
        engine.delete_endpoint("shown")
        deleting = pool.submit(engine.delete_backend, "shown")
        eventually(lambda: backend_of(engine, "shown")["replicas"] == {"shown#1": "draining"})
        assert backend_of(engine, "shown")["state"] == "draining"
        end.open()
        assert engine.get(ref, timeout=20) == detail["pid"]
        deleting.result(60)
    assert backend_of(engine, "shown") is None


def test_a_backend_shows_why_it_fails(adapter, engine, serve, tmp_path):
    if not adapter.processes:
        pytest.skip("replicas cannot die alone")

    class Mortal:
        def __init__(self):
            (tmp_path / "made").mkdir()  # fails the second time

        def __call__(self, request):
            os._exit(3)

    served = serve(Mortal, route=None)
    with pytest.raises(errors.ReplicaDied):
        served.call()
    eventually(lambda: backend_of(engine, served.tag)["state"] == "unhealthy")
    shown = backend_of(engine, served.tag)
    assert shown["failures"] >= 3
    assert "FileExistsError" in shown["last_error"]
    assert shown["last_error_s"] >= 0
    assert "ready" not in shown["replicas"].values()
    (tmp_path / "made").rmdir()
    eventually(lambda: backend_of(engine, served.tag)["state"] == "ready")
    assert "FileExistsError" in backend_of(engine, served.tag)["last_error"]  # it is not forgotten


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
