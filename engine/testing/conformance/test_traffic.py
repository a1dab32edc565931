"""Traffic policies: weights, shard keys, switching, and shadows."""

from __future__ import annotations

from collections import Counter

import pytest

from engine import errors
from engine.testing.conformance.load import Load
from engine.testing.instruments import eventually

ROOMY = {"max_concurrent_queries": 1000}  # a shadow that is full gets no copy


def first(request):
    return "first"


def second(request):
    return "second"


@pytest.fixture
def split(serve, engine):
    """Two backends behind one endpoint, and a function that sets their weights."""
    served, other = serve(first), serve(second)

    def weights(to_first, to_second):
        engine.set_traffic(served.name, {served.tag: to_first, other.tag: to_second})

    served.other = other
    served.weights = weights
    return served


def count(served, keys):
    refs = [served.handle.options(shard_key=key).remote() for key in keys]
    return Counter(served.engine.get(refs, timeout=20))


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.9])
def test_weights_hold_over_many_keys(split, weight):
    split.weights(weight, 1 - weight)
    counted = count(split, [f"key-{number}" for number in range(600)])
    expected, deviation = 600 * weight, (600 * weight * (1 - weight)) ** 0.5
    assert abs(counted["first"] - expected) < 5 * deviation
    assert counted["first"] + counted["second"] == 600


def test_weights_hold_without_keys(split):
    split.weights(0.25, 0.75)
    counted = count(split, [None] * 600)
    assert abs(counted["first"] - 150) < 6 * (600 * 0.25 * 0.75) ** 0.5


def test_all_or_nothing(split):
    split.weights(0, 1)
    assert count(split, [None] * 50) == {"second": 50}
    split.weights(1.0, 0.0)
    assert count(split, [None] * 50) == {"first": 50}


def test_weights_may_be_off_by_rounding(split):
    split.weights(0.1 + 0.2, 0.7)
    assert sum(count(split, [None] * 10).values()) == 10


def test_the_same_key_goes_to_the_same_backend(split):
    split.weights(0.5, 0.5)
    keys = [f"key-{number}" for number in range(20)] + [f"Schlüssel-{number}-☃" for number in range(10)]
    by_key = {key: split.call(shard_key=key) for key in keys}
    assert set(by_key.values()) == {"first", "second"}
    for key in keys:
        assert {split.call(shard_key=key) for _ in range(3)} == {by_key[key]}
        assert split.http(headers={"X-SERVE-SHARD-KEY": key.encode()}).text == by_key[key], "callers must agree"


def test_keys_stay_when_other_weights_grow(split):
    """A key that was on the growing backend stays there."""
    keys = [f"key-{number}" for number in range(100)]
    split.weights(0.2, 0.8)
    before = {key for key in keys if split.call(shard_key=key) == "first"}
    split.weights(0.5, 0.5)
    after = {key for key in keys if split.call(shard_key=key) == "first"}
    assert before < after or before == after


def test_http_follows_the_weights(split):
    split.weights(0, 1)
    assert {split.http().text for _ in range(10)} == {"second"}
    split.weights(1, 0)
    assert {split.http().text for _ in range(10)} == {"first"}


def test_listed(split, engine):
    split.weights(0.25, 0.75)
    assert engine.list_endpoints()[split.name]["traffic"] == {split.tag: 0.25, split.other.tag: 0.75}


@pytest.mark.parametrize("way", ["handle", "http"])
def test_switching_under_load_loses_nothing(split, way):
    with Load(split.call if way == "handle" else split.http_text) as load:
        for _ in range(10):
            for weights, expected in (((0, 1), "second"), ((1, 0), "first")):
                split.weights(*weights)
                enough = load.answers.count(expected) + 3
                eventually(
                    lambda enough=enough, expected=expected: load.answers.count(expected) > enough or load.failures
                )
    assert load.failures == []
    assert set(load.answers) == {"first", "second"}


def test_replacing_a_backend_under_load_loses_nothing(split, engine):
    """Blue and green: traffic moves over, the old backend goes, and no caller notices."""
    with Load(split.call) as load:
        eventually(lambda: len(load.answers) > 10)
        engine.set_traffic(split.name, {split.other.tag: 1.0})
        engine.delete_backend(split.tag)
        seen = len(load.answers)
        eventually(lambda: len(load.answers) > seen + 10 or load.failures)
    assert load.failures == []
    assert (load.answers[0], load.answers[-1]) == ("first", "second")


@pytest.fixture
def shadowed(serve, engine, journal):
    """A backend and another one, not yet its shadow, that writes what it gets into the journal."""

    def shadow(request):
        journal.add(request.query_params.get("n"))

    served = serve(first)
    served.shadow = serve(shadow, route=None, config=ROOMY).tag
    return served


def test_shadow_fires_for_handles_and_http(shadowed, engine, journal):
    engine.shadow_traffic(shadowed.name, shadowed.shadow, 1.0)
    for number in range(10):
        assert shadowed.handle.call(n=number) == "first"
    for number in range(10, 20):
        assert shadowed.http(params={"n": number}).text == "first"
    eventually(lambda: len(journal.lines()) >= 20)
    assert sorted(journal.lines(), key=int) == [str(number) for number in range(20)]


def test_no_copy_is_lost_while_the_shadow_is_busy_for_a_moment(serve, engine, journal, gate):
    def shadow(request):
        gate.pass_through()
        journal.add(request.query_params.get("n"))

    served = serve(first, route=None)
    shadowing = serve(shadow, route=None, config={"max_concurrent_queries": 1}).tag
    engine.shadow_traffic(served.name, shadowing, 1.0)
    for number in range(10):
        assert served.handle.call(n=number) == "first"
    counted = engine.statistics()["backends"][shadowing]
    assert counted["queued_copies"] + counted["in_flight"] == 10
    gate.open()
    eventually(lambda: len(journal.lines()) == 10)
    assert engine.statistics()["backends"][shadowing]["dropped_copies"] == 0


def test_shadow_fires_with_its_proportion(shadowed, engine, journal):
    engine.shadow_traffic(shadowed.name, shadowed.shadow, 0.5)
    for number in range(200):
        shadowed.handle.call(n=number)
    engine.shadow_traffic(shadowed.name, shadowed.shadow, 1.0)
    shadowed.handle.call(n="last")
    eventually(lambda: "last" in journal.lines())
    assert abs(len(journal.lines()) - 1 - 100) < 6 * (200 * 0.25) ** 0.5


def test_shadow_ends(shadowed, engine, journal):
    engine.shadow_traffic(shadowed.name, shadowed.shadow, 1.0)
    shadowed.handle.call(n=1)
    engine.shadow_traffic(shadowed.name, shadowed.shadow, 0)
    for _ in range(10):
        shadowed.handle.call(n=2)
    engine.shadow_traffic(shadowed.name, shadowed.shadow, 1.0)
    shadowed.handle.call(n=3)
    eventually(lambda: len(journal.lines()) >= 2)
    assert journal.lines() == ["1", "3"]


def test_a_backend_cannot_go_while_it_is_a_shadow(shadowed, engine):
    shadow = shadowed.shadow
    engine.delete_endpoint(shadow)  # serve gave it an endpoint of its own
    engine.shadow_traffic(shadowed.name, shadow, 1.0)
    with pytest.raises(errors.InvalidArgument, match=shadowed.name):
        engine.delete_backend(shadow)
    engine.shadow_traffic(shadowed.name, shadow, 0)
    engine.delete_backend(shadow)


def test_a_failing_shadow_changes_nothing(serve, engine, journal):
    def fails(request):
        journal.add("failed")
        raise ValueError("in the shadow")

    served, shadow = serve(first), serve(fails, route=None, config=ROOMY)
    engine.shadow_traffic(served.name, shadow.tag, 1.0)
    assert {served.call() for _ in range(10)} == {"first"}
    assert served.http().status_code == 200
    eventually(lambda: len(journal.lines()) == 11)


def test_a_slow_and_full_shadow_changes_nothing(serve, engine, gate):
    def slow(request):
        gate.pass_through()

    served = serve(first)
    shadow = serve(slow, route=None, config={"max_concurrent_queries": 1, "max_queued_requests": 1})
    engine.shadow_traffic(served.name, shadow.tag, 1.0)
    assert {served.call() for _ in range(10)} == {"first"}
    assert {served.http().text for _ in range(3)} == {"first"}
    assert not gate.is_open(), "all answers came while the shadow was still at its first call"
