"""From an endpoint's name to a replica set, and what a newer snapshot changes."""

from __future__ import annotations

from collections import Counter

import pytest
from fakes import backend_entry, snapshot

from engine.calling import router as router_module
from engine.calling.router import Router
from engine.calling.traffic import hash_fraction
from engine.errors import EndpointNotFound, EngineClosed
from engine.seam.snapshot import RoutingSnapshot
from engine.testing.fakes import FakeSlot

NOW = 1000.0


def test_a_call_goes_to_the_backend_of_its_endpoint() -> None:
    router = Router()
    router.apply(
        snapshot(1, backend_entry("b1", []), backend_entry("b2", []), endpoints={"x": {"b1": 1}, "y": {"b2": 1}})
    )
    assert router.route("x", None)[0] is router.replica_sets["b1"]
    assert router.route("y", None)[0] is router.replica_sets["b2"]


def test_an_unknown_endpoint_is_named_with_those_there_are() -> None:
    router = Router()
    with pytest.raises(EndpointNotFound, match=r"^there is no endpoint 'x'; there are no endpoints$"):
        router.route("x", None)
    router.apply(snapshot(1, backend_entry("b", []), endpoints={"z": {"b": 1}, "a": {"b": 1}}))
    with pytest.raises(EndpointNotFound, match=r"the endpoints are: 'a', 'z'$"):
        router.route("x", None)


def test_there_is_nothing_to_call_while_the_engine_shuts_down() -> None:
    router = Router()
    router.apply(snapshot(1, backend_entry("b", [])))
    router.apply(RoutingSnapshot(2, closing=True))
    with pytest.raises(EngineClosed, match="the engine is shutting down"):
        router.route("e", None)


def test_traffic_is_split_by_a_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    router.apply(
        snapshot(1, backend_entry("b1", []), backend_entry("b2", []), endpoints={"e": {"b1": 0.25, "b2": 0.75}})
    )
    numbers = iter([0.0, 0.24, 0.25, 0.99])
    monkeypatch.setattr(router_module.random, "random", lambda: next(numbers))
    assert [router.route("e", None)[0].tag for _ in range(4)] == ["b1", "b1", "b2", "b2"]


def test_a_shard_key_stays_with_its_backend() -> None:
    router = Router()
    router.apply(snapshot(1, backend_entry("b1", []), backend_entry("b2", []), endpoints={"e": {"b1": 0.5, "b2": 0.5}}))
    for number in range(50):
        key = f"key-{number}"
        tags = {router.route("e", key)[0].tag for _ in range(3)}
        assert tags == {"b1" if hash_fraction(key) < 0.5 else "b2"}


def test_shadows_get_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    entries = [backend_entry(tag, []) for tag in ("b", "half", "all")]
    router.apply(snapshot(1, *entries, shadows=(("all", 1.0), ("half", 0.5))))
    _, endpoint = router.route("e", None)
    numbers = iter([0.9, 0.4, 0.9, 0.6])
    monkeypatch.setattr(router_module.random, "random", lambda: next(numbers))
    assert [known.tag for known in router.shadows(endpoint)] == ["all", "half"]
    assert [known.tag for known in router.shadows(endpoint)] == ["all"]


def test_what_was_counted_survives_a_snapshot() -> None:
    router = Router()
    router.apply(snapshot(1, backend_entry("b", [])))
    router.route("e", None)[1].calls += 3
    router.apply(snapshot(2, backend_entry("b", [])))
    assert router.route("e", None)[1].calls == 3


def test_an_older_snapshot_changes_nothing() -> None:
    router = Router()
    newer = snapshot(2, backend_entry("b", ["r1"]))
    router.apply(newer)
    for version in (1, 2):
        assert router.apply(snapshot(version)) == ([], [])
    assert router.snapshot is newer
    assert set(router.replica_sets) == {"b"}
    assert repr(router).startswith("<Router version=2 [<ReplicaSet b ")


def test_a_backend_that_left_gives_up_its_replicas_and_its_queue() -> None:
    router = Router()
    router.apply(snapshot(1, backend_entry("b", ["r1", "r2"]), backend_entry("c", ["r3"])))
    known = router.replica_sets["b"]
    targets = set(known.targets.values())
    slots = [FakeSlot(name) for name in "abcd"]
    placements = Counter(known.place(slot, NOW) is not None for slot in slots)
    assert placements == {True: 2, False: 2}
    left, homeless = router.apply(snapshot(2, backend_entry("c", ["r3"])))
    assert set(left) == targets
    assert all(target.gone for target in left)
    assert homeless == slots[2:]
    assert not known.waiting
    assert set(router.replica_sets) == {"c"}


def test_a_replica_that_left_is_given_up_while_its_backend_stays() -> None:
    router = Router()
    router.apply(snapshot(1, backend_entry("b", ["r1", "r2"])))
    known = router.replica_sets["b"]
    left, homeless = router.apply(snapshot(2, backend_entry("b", ["r2", "r3"])))
    assert [target.replica_tag for target in left] == ["r1"]
    assert homeless == []
    assert router.replica_sets["b"] is known
