"""The pure decisions: routes, traffic, exchanges, restarts, repeats, queues, against simple models and invariants."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

from fuzzing import fuzzed
from hypothesis import strategies as st

from engine.calling.pace import Pace
from engine.calling.retries import RetryBudget, pause_s
from engine.calling.traffic import TrafficPolicy, validate_weights
from engine.config import BackendConfig
from engine.control.backoff import backoff_s
from engine.control.restarts import Restarts
from engine.control.rollout import Room
from engine.errors import InvalidArgument
from engine.http.routes import Match, NotFound, RouteTable, WrongMethod, validate_route
from engine.seam.snapshot import EndpointEntry, RoutingSnapshot

# -- routes ------------------------------------------------------------------------------------------------------------

_SEGMENTS = st.sampled_from(
    ["a", "b", "ab", "", "{x}", "{x:int}", "{y}", "{y:path}", "a{x}b", "{x:float}", ".", "a.b", "é"]
)
_ROUTES = st.lists(_SEGMENTS, max_size=3).map(lambda parts: "/" + "/".join(parts))
_PATHS = st.lists(
    st.sampled_from(["a", "b", "ab", "", "7", "1.5", "-1", "aab", "axb", "\n", "9" * 5000, "é", "."]), max_size=4
).map(lambda parts: "/" + "/".join(parts))
_METHODS = st.lists(st.sampled_from(["GET", "POST", "PUT"]), min_size=1, max_size=2, unique=True)
_MODEL = {"str": r"[^/]+", "path": r".*", "int": r"[0-9]+", "float": r"[0-9]+(?:\.[0-9]+)?"}


def _found_by_model(endpoints: list[EndpointEntry], path: str, method: str) -> Any:
    """One route after the other: those without parameters first."""
    allowed: set[str] = set()
    literal = [endpoint for endpoint in endpoints if "{" not in str(endpoint.route)]
    for endpoint in [*literal, *[endpoint for endpoint in endpoints if endpoint not in literal]]:
        parts = re.split(r"\{(\w+)(?::(\w+))?\}", str(endpoint.route))
        pattern = "".join(
            f"({_MODEL[part or 'str']})" if number % 3 == 2 else re.escape(part or "") if number % 3 == 0 else ""
            for number, part in enumerate(parts)
        )
        matched = re.fullmatch(pattern, path) if "{" in str(endpoint.route) else path == endpoint.route
        served = {*endpoint.methods, *(["HEAD"] if "GET" in endpoint.methods else [])}
        if matched and method in served and not re.search("[0-9]{4000}", path):
            return endpoint.name
        if matched:
            allowed |= served
    return sorted(allowed)


@fuzzed(
    routes=st.lists(st.tuples(_ROUTES, _METHODS), max_size=4),
    path=_PATHS,
    method=st.sampled_from(["GET", "HEAD", "POST"]),
)
def test_routes_are_found_as_one_would_look_for_them(routes: list[Any], path: str, method: str) -> None:
    endpoints = []
    for number, (route, methods) in enumerate(routes):
        try:
            validate_route(route)
        except InvalidArgument:
            continue
        endpoints.append(EndpointEntry(f"e{number}", route, tuple(methods), (("b", 1.0),)))
    table = RouteTable(RoutingSnapshot(endpoints={endpoint.name: endpoint for endpoint in endpoints}))
    found = table.match(path, method)
    expected = _found_by_model(endpoints, path, method)
    if re.search("[0-9]{4000}", path):
        return  # what is too long for a number may be a path
    if isinstance(found, Match):
        assert found.endpoint_name == expected
    elif isinstance(found, WrongMethod):
        assert list(found.allowed) == expected
    else:
        assert isinstance(found, NotFound) and expected == []


# -- traffic -----------------------------------------------------------------------------------------------------------


@fuzzed(
    shares=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any),
    fraction=st.one_of(st.floats(0, 1, exclude_max=True), st.just(math.nextafter(1, 0))),
)
def test_traffic_goes_where_its_weights_say(shares: list[int], fraction: float) -> None:
    weights = validate_weights({f"b{number}": share / sum(shares) for number, share in enumerate(shares)})
    policy = TrafficPolicy(tuple(sorted(weights.items())))
    picked = policy.pick(fraction)
    assert weights[picked] > 0
    below = 0.0
    for tag, weight in sorted(weights.items()):
        if weight and below + 1e-9 < fraction < below + weight - 1e-9:
            assert picked == tag
        below += weight


# -- exchanging replicas -----------------------------------------------------------------------------------------------

_SHARES_OF = st.one_of(st.integers(0, 4), st.integers(0, 100).map(lambda percent: f"{percent}%"))


@fuzzed(
    before=st.integers(1, 6),
    wanted=st.integers(1, 6),
    surge=_SHARES_OF,
    unavailable=_SHARES_OF,
    ends=st.lists(st.booleans(), min_size=1, max_size=40),
)
def test_an_exchange_keeps_its_bounds_and_ends(
    before: int, wanted: int, surge: Any, unavailable: Any, ends: list[bool]
) -> None:
    room = Room.between(
        BackendConfig(num_replicas=before),
        BackendConfig(num_replicas=wanted, max_surge=surge, max_unavailable=unavailable),
    )
    assert 0 <= room.least <= min(before, wanted) and room.most >= max(before, wanted)
    old, new, leaving = before, 0, 0
    for step in range(100):
        starting = room.to_start(old, new, leaving)
        assert 0 <= starting and (not starting or old + new + leaving + starting <= room.most)
        succeeds = ends[step % len(ends)]
        new += starting if succeeds else 0
        going = room.to_let_go(old, new)
        assert 0 <= going <= old
        old, leaving = old - going, leaving + going
        assert not going or old + new >= room.least
        leaving = 0 if ends[-1 - step % len(ends)] else leaving
        if not old and new == wanted:
            break
    else:
        assert not any(ends), "it never ended though what was started came up"


# -- failures, repeats, queues -----------------------------------------------------------------------------------------


@fuzzed(failures=st.one_of(st.integers(1, 20), st.integers(1, 10**6)), chance=st.floats(0, 1))
def test_pauses_are_bounded(failures: int, chance: float) -> None:
    assert 0 < backoff_s(failures, lambda: chance) <= 10
    assert 0 < pause_s(failures - 1, chance) <= 1.5


_STEPS = st.lists(
    st.tuples(st.floats(0, 30), st.sampled_from(["idle dies", "busy dies", "fails", "ready"])), max_size=40
)


@fuzzed(steps=_STEPS, replicas=st.integers(1, 20), chance=st.floats(0, 1))
def test_restarts_wait_only_for_what_failed(steps: list[tuple[float, str]], replicas: int, chance: float) -> None:
    restarts, now, failures = Restarts(lambda: chance), 0.0, 0
    for passed_s, what in steps:
        now += passed_s
        if what == "busy dies":
            assert restarts.died(now, answered=True, replicas=replicas) == 0
        elif what == "idle dies":
            wait_s = restarts.died(now, answered=False, replicas=replicas)
            assert 0 <= wait_s <= 1.5 * 10 / max(10, 3 * replicas) * len(steps)
        elif what == "fails":
            restarts.failed(now, now)
            failures += 1
            assert restarts.failures <= failures
        else:
            restarts.reset()
            failures = 0
            assert restarts.failures == 0 and not restarts.hopeless(math.inf)
        assert restarts.not_before <= now + 10
        assert not restarts.hopeless(-math.inf)


@fuzzed(steps=st.lists(st.tuples(st.floats(0, 20), st.integers(0, 50), st.integers(0, 30)), max_size=30))
def test_repeats_are_a_fraction_of_the_calls(steps: list[tuple[float, int, int]]) -> None:
    budget, now, calls, spent = RetryBudget(0, 0.0), 0.0, 0, 0
    for passed_s, came, tries in steps:
        now += passed_s
        calls += came
        spent += sum(budget.spend(calls, now) for _ in range(tries))
        # what has faded is given anew: ten in each ten seconds, and a fifth of all calls
        assert spent <= 0.2 * calls + 10 * (1 + now / 10) + 1


@fuzzed(steps=st.lists(st.tuples(st.floats(0, 5), st.sampled_from(["come", "leave", "stand still"])), max_size=40))
def test_a_pace_lies_between_the_intervals_it_was_measured_by(steps: list[tuple[float, str]]) -> None:
    pace, now, times = Pace(), 0.0, [0.0]
    for passed_s, what in steps:
        now += passed_s
        times.append(now)
        if what == "come":
            pace.come(now)
        elif what == "stand still":
            pace.stand_still()
        elif math.isfinite(max(pace._left_at, pace._came_at)):
            pace.leave(now)
        longest = max((later - earlier for earlier, later in pairwise([0.0, *times])), default=0.0)
        assert 0 <= pace.interval_s <= max(now, longest)
