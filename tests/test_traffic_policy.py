"""Picking a backend by weight or by shard key."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from harness import run_python

from engine.calling.traffic import TrafficPolicy, hash_fraction, validate_proportion, validate_weights
from engine.errors import InvalidArgument


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((("a", 1.0),), {0.0: "a", 0.5: "a", 0.999: "a"}),
        ((("a", 0.25), ("b", 0.75)), {0.0: "a", 0.2499: "a", 0.25: "b", 0.999: "b"}),
        ((("a", 0.0), ("b", 1.0)), {0.0: "b", 0.5: "b"}),
        ((("a", 1.0), ("b", 0.0)), {0.0: "a", 0.999999: "a"}),
        # Rounding may leave the last bound below 1: what lies beyond it goes to the last backend.
        ((("a", 0.5), ("b", 0.4999999)), {math.nextafter(1.0, 0.0): "b"}),
    ],
)
def test_which_backend_a_fraction_falls_to(weights: tuple[tuple[str, float], ...], expected: dict[float, str]) -> None:
    policy = TrafficPolicy(weights)
    assert {fraction: policy.pick(fraction) for fraction in expected} == expected


@pytest.mark.parametrize(
    ("weights", "single"),
    [
        ((("a", 1.0),), "a"),
        ((("a", 0.0), ("b", 1.0)), "b"),
        ((("a", 0.5), ("b", 0.5)), None),
    ],
)
def test_one_backend_may_get_everything(weights: tuple[tuple[str, float], ...], single: str | None) -> None:
    assert TrafficPolicy(weights).single == single


def test_shares_follow_the_weights_exactly() -> None:
    policy = TrafficPolicy((("a", 0.1), ("b", 0.2), ("c", 0.7)))
    counted = Counter(policy.pick((step + 0.5) / 1000) for step in range(1000))
    assert counted == {"a": 100, "b": 200, "c": 700}


def test_keys_spread_evenly_and_stay() -> None:
    fractions = [hash_fraction(f"key-{number}") for number in range(4000)]
    assert all(0 <= fraction < 1 for fraction in fractions)
    assert fractions == [hash_fraction(f"key-{number}") for number in range(4000)]
    per_tenth = Counter(int(fraction * 10) for fraction in fractions)
    assert set(per_tenth) == set(range(10))
    assert all(300 < count < 500 for count in per_tenth.values())


def test_a_key_means_the_same_in_every_process() -> None:
    script = "from engine.calling.traffic import hash_fraction; print(repr(hash_fraction('k\\u00e4se')))"
    assert float(run_python("-c", script)) == hash_fraction("käse")


@pytest.mark.parametrize(
    "weights", [{"a": 1}, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 1.0}, {str(number): 0.1 for number in range(10)}]
)
def test_weights_that_are_fine(weights: dict[str, float]) -> None:
    checked = validate_weights(weights)
    assert checked == weights
    assert all(type(weight) is float for weight in checked.values())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "traffic must be a dict of backend tag to weight, at least one, not {}"),
        ([("a", 1)], "traffic must be a dict of backend tag to weight, at least one, not [('a', 1)]"),
        (None, "traffic must be a dict of backend tag to weight, at least one, not None"),
        ({3: 1}, "traffic: a backend tag must be a str, not 3"),
        ({"a": "1"}, "traffic: the weight of 'a' must be a finite number of at least 0, not '1'"),
        ({"a": True}, "traffic: the weight of 'a' must be a finite number of at least 0, not True"),
        ({"a": math.nan}, "traffic: the weight of 'a' must be a finite number of at least 0, not nan"),
        ({"a": math.inf}, "traffic: the weight of 'a' must be a finite number of at least 0, not inf"),
        ({"a": -0.5, "b": 1.5}, "traffic: the weight of 'a' must be at least 0, not -0.5"),
        ({"a": 10**400}, "traffic: the weight of 'a' must be a finite number of at least 0, not 1" + 400 * "0"),
        ({"a": 1e308, "b": 1e308}, "traffic: the weights must sum to 1, but {'a': 1e+308, 'b': 1e+308} sums to inf"),
        ({"a": 0.5, "b": 0.4}, "traffic: the weights must sum to 1, but {'a': 0.5, 'b': 0.4} sums to 0.9"),
        ({"a": 0.0}, "traffic: the weights must sum to 1, but {'a': 0.0} sums to 0"),
    ],
)
def test_weights_that_are_not(weights: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate_weights(weights)
    assert str(caught.value) == message


@pytest.mark.parametrize("proportion", [0, 0.25, 1])
def test_proportions_that_are_fine(proportion: float) -> None:
    assert validate_proportion(proportion) == proportion


@pytest.mark.parametrize("proportion", [-0.1, 1.1, "0.5", None, True, math.nan, math.inf, 10**400])
def test_proportions_that_are_not(proportion: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate_proportion(proportion)
    assert str(caught.value) == f"shadow traffic: the proportion must be a number from 0 to 1, not {proportion!r}"
