"""When replicas are started again, as a function of what has happened and when."""

from __future__ import annotations

import math

import pytest

from engine.control.backoff import backoff_s
from engine.control.restarts import Restarts


def restarts(jitter: float = 1.0) -> Restarts:
    return Restarts(lambda: jitter)


@pytest.mark.parametrize(("jitter", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_pauses_grow_up_to_a_limit_and_are_spread(jitter: float, share: float) -> None:
    pauses = [backoff_s(failures, lambda: jitter) for failures in (1, 2, 3, 7, 8, 1000)]
    assert pauses == pytest.approx([share * s for s in (0.1, 0.2, 0.4, 6.4, 10.0, 10.0)])
    assert 0.05 <= backoff_s(1) <= 0.1


def test_one_that_has_answered_is_replaced_at_once_however_many_die() -> None:
    known = restarts()
    assert {known.died(0.0, answered=True, replicas=1) for _ in range(1000)} == {0.0}
    assert not known.hopeless(math.inf)
    assert known.failures == 0


@pytest.mark.parametrize(("replicas", "at_once"), [(1, 10), (4, 12), (100, 300)])
def test_those_that_have_not_are_replaced_at_once_up_to_a_rate(replicas: int, at_once: int) -> None:
    known = restarts(jitter=0.0)
    waits = [known.died(50.0, answered=False, replicas=replicas) for _ in range(at_once + 3)]
    apart_s = 10.0 / at_once
    assert waits == pytest.approx([0.0] * at_once + [apart_s, 2 * apart_s, 3 * apart_s])
    assert known.died(63.0, answered=False, replicas=replicas) == 0.0  # ten seconds later all is as before, and more
    known = restarts(jitter=0.0)
    assert {known.died(time * apart_s, answered=False, replicas=replicas) for time in range(1000)} == {0.0}


def test_waits_are_spread() -> None:
    for jitter, wait_s in ((0.0, 1.0), (1.0, 1.5)):
        known = restarts(jitter)
        assert [known.died(0.0, answered=False, replicas=1) for _ in range(11)][-1] == wait_s


def test_starts_that_fail_are_tried_again_more_and_more_slowly() -> None:
    known = restarts()
    now = 100.0
    for failures, pause_s in enumerate((0.1, 0.2, 0.4, 0.8), start=1):
        known.failed(now, now + 1)
        assert known.failures == failures
        assert known.not_before == pytest.approx(now + 1 + pause_s)
        assert known.hopeless(math.inf) == (failures >= 3)
        now = known.not_before
    known.reset()
    assert (known.failures, known.hopeless(math.inf)) == (0, False)
    assert known.not_before < now


def test_starts_that_fail_side_by_side_are_one_failure() -> None:
    known = restarts()
    for _ in range(4):
        known.failed(0.0, 5.0)
    assert known.failures == 1
    known.failed(5.01, 5.02)  # another place, whose first try need not wait
    assert known.failures == 1
    known.failed(5.1, 5.2)
    assert known.failures == 2


def test_one_that_goes_on_since_before_the_others_failed_leaves_hope() -> None:
    known = restarts()
    for now in (10.0, 20.0, 30.0):
        known.failed(now, now + 1)
    assert known.hopeless(math.inf)
    assert known.hopeless(11.5)
    assert not known.hopeless(9.0)
