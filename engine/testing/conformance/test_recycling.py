"""Replicas that others take the places of because they have done their share: no call is lost."""

from __future__ import annotations

import pytest

from engine import get_replica_context
from engine.serving.wear import resident_mb
from engine.testing.conformance.load import Load
from engine.testing.instruments import eventually


def who(request):
    return get_replica_context().replica_tag


async def who_async(request):
    return get_replica_context().replica_tag


class Hoards:
    """Answers with its name and the memory that it had when it was asked first, of which it takes more then."""

    def __init__(self):
        self.hoard = b""

    def __call__(self, request):
        if not self.hoard:
            self.before_mb = resident_mb()
            self.hoard = b"1" * 60_000_000
        return get_replica_context().replica_tag, self.before_mb


@pytest.mark.parametrize(
    ("backend", "wear"),
    [
        pytest.param(who, {"max_calls_per_replica": 20}, id="by calls"),
        pytest.param(who_async, {"max_calls_per_replica": 20, "max_surge": 0, "max_unavailable": 1}, id="in the place"),
        pytest.param(who, {"max_age_s": 0.05}, id="by age"),
    ],
)
def test_under_load(engine, serve, backend, wear):
    served = serve(backend, config={"num_replicas": 2, **wear}, route=None)
    with Load(served.handle.call) as load:
        eventually(lambda: len(set(load.answers)) >= 4 or load.failures)
    assert load.failures == []
    engine.update_backend_config(served.tag, {"max_calls_per_replica": None, "max_age_s": None})
    assert engine.statistics()["backends"][served.tag]["last_error"] is None


def test_by_memory(adapter, engine, serve):
    """Not where replicas share the application's process, whose memory is not theirs."""
    served = serve(Hoards, route=None)
    first, before_mb = served.call()
    with Load(served.handle.call) as load:
        engine.update_backend_config(served.tag, {"max_rss_mb": before_mb + 30})
        if adapter.processes:
            eventually(lambda: load.answers and load.answers[-1][0] != first)
        engine.update_backend_config(served.tag, {"max_rss_mb": None})
    assert load.failures == []
    assert adapter.processes or {name for name, _ in load.answers} == {first}


def test_less_memory_than_any_replica_needs(adapter, engine, serve):
    """Another one would be no better: they serve, and people are told."""
    if not adapter.processes:
        pytest.skip("replicas share the application's process, whose memory is not theirs")
    served = serve(who, config={"max_rss_mb": 1}, route=None)

    def notice():
        return engine.statistics()["backends"][served.tag]["notice"]

    with Load(served.handle.call) as load:
        eventually(notice)
        told = len(load.answers)
        eventually(lambda: len(load.answers) > told + 100)
    assert load.failures == []
    assert set(load.answers) == {f"{served.tag}#1", f"{served.tag}#2"}
    assert "(max_rss_mb=1)" in notice()
    engine.update_backend_config(served.tag, {"max_rss_mb": None})
    assert notice() is None


def test_a_limit_that_is_set_later_counts_the_calls_before(engine, serve):
    served = serve(who, route=None)
    before = {served.call() for _ in range(5)}
    engine.update_backend_config(served.tag, {"max_calls_per_replica": 3})
    eventually(lambda: served.call() not in before)
