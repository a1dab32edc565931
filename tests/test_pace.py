"""How long a call would wait, and how many may: judged by what came to a queue, and left it."""

from __future__ import annotations

import heapq
import math
import random

import pytest
from fakes import backend_entry

from engine.calling.pace import Pace
from engine.calling.replica_set import ReplicaSet
from engine.calling.slot import Slot
from engine.errors import Overloaded
from engine.seam.messages import PYTHON, Call

NOW = 1000.0


def test_nothing_is_known_in_the_beginning() -> None:
    pace = Pace()
    pace.come(NOW)
    assert pace.expect(NOW, 100, 1) == 0.0
    assert pace.most_waiting(8) == math.inf


def test_a_wait_is_as_long_as_those_before() -> None:
    pace = Pace()
    pace.come(NOW)
    for number in range(1, 10):
        pace.leave(NOW + number)
    assert pace.expect(NOW + 9, 5, 1) == pytest.approx(5.0)


def test_who_waits_first_for_long_tells_before_it_leaves() -> None:
    pace = Pace()
    pace.come(NOW)
    assert pace.expect(NOW + 2, 10, 1) == pytest.approx(20.0), "each takes two seconds at least, as far as is known"
    pace.leave(NOW + 2)
    pace.leave(NOW + 3)
    assert pace.expect(NOW + 10, 5, 1) == pytest.approx(7.0 + 4 * pace.interval_s), "it is slow only now"
    assert pace.expect(NOW + 10, 5, 0) == pytest.approx(5 * pace.interval_s), "nobody is at work: time says nothing"


def test_replicas_that_began_together_do_not_look_quick() -> None:
    pace = Pace()
    pace.come(NOW + 0.01)  # shortly after four replicas were given a call of a second each
    for _ in range(4):
        pace.leave(NOW + 1.0)
    assert pace.interval_s == pytest.approx(0.25, rel=0.02)


def test_calls_that_hardly_had_to_wait_do_not_make_a_queue_look_quick() -> None:
    pace = Pace()
    for number in range(100):
        pace.come(NOW + number / 10)
        pace.leave(NOW + number / 10 + 0.001)
    pace.come(NOW + 10)
    assert pace.expect(NOW + 10.09, 10, 1) == pytest.approx(0.9)


def test_a_crowd_that_came_while_replicas_had_stopped_is_no_lasting_load() -> None:
    pace = Pace()
    pace.come(NOW)
    for _ in range(1000):
        pace.expect(NOW, 1, 1)
    pace.leave(NOW + 1)
    assert pace.load <= 2.0
    for number in range(100):
        pace.leave(NOW + 1 + number)
    assert pace.load == 1.0


def test_the_greater_the_load_the_shorter_the_queue() -> None:
    """Two replicas take 20 ms for each call. At any load, nearly all that they can serve is served."""
    for load, waits_s in ((0.9, 0.0), (1.0, 0.1), (1.5, 0.08), (3.0, 0.04), (10.0, 0.02), (100.0, 0.02)):
        served, longest_s = _served(load)
        assert served > 0.97 * min(load, 1.0), f"at {load} times the load"
        assert longest_s <= waits_s + 0.001, f"at {load} times the load"


@pytest.mark.parametrize("load", [0.7, 0.9])
def test_calls_that_come_at_random_are_no_lasting_load(load: float) -> None:
    """Calls of 10 ms on average, as M/M/1 has them: where they would wait for less than they may, none is refused."""
    known = ReplicaSet(backend_entry("b", ["r1"], limit=1, max_queue_wait_s=10.0))
    chance = random.Random(2)
    now = end = NOW
    for _ in range(5000):
        now += chance.expovariate(100 * load)
        while end <= now and (held := [slot for target in known.targets.values() for slot in target.holds]):
            (target,) = known.targets.values()
            del target.holds[held[0]]
            known.answered(target, 0, end)
            ready: list[Slot] = []
            known.next_placements(end, ready)
            end += chance.expovariate(100) if ready else math.inf
        slot = Slot("e", Call(0, PYTHON, "", None, "", b"", b""))
        if (placed := known.place(slot, now)) is not None:
            slot.target = placed
            placed.holds[slot] = None
            end = now + chance.expovariate(100)


def _served(load: float) -> tuple[float, float]:
    """The share of what can be served that is, and the longest wait after the first second."""
    known = ReplicaSet(backend_entry("b", ["r1", "r2"], limit=1, max_queue_wait_s=0.1))
    came: dict[Slot, float] = {}
    ends: list[tuple[float, int, Slot]] = []
    waits_s: list[float] = []

    def begin(slot: Slot, now: float) -> None:
        heapq.heappush(ends, (now + 0.02, id(slot), slot))
        if now > NOW + 1.0:
            waits_s.append(now - came[slot])

    for number in range(int(300 * load)):  # three seconds
        now = NOW + number / (100 * load)
        while ends and ends[0][0] <= now:
            end, _, slot = heapq.heappop(ends)
            del slot.target.holds[slot]
            known.answered(slot.target, 0, end)
            ready: list[Slot] = []
            known.next_placements(end, ready)
            for waited in ready:
                begin(waited, end)
        slot = Slot("e", Call(0, PYTHON, "", None, "", b"", b""))
        came[slot] = now
        try:
            target = known.place(slot, now)
        except Overloaded:
            continue
        if target is not None:
            slot.target = target
            target.holds[slot] = None
            begin(slot, now)
    return len(waits_s) / 200, max(waits_s)
