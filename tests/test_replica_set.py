"""Placing calls on the replicas of one backend, decided without any clock, thread or channel."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from fakes import backend_entry

from engine.calling import replica_set
from engine.calling.answers import CopySlot
from engine.calling.replica_set import RETRY_S, UNREACHABLE_S, ReplicaSet, Target
from engine.calling.slot import Slot
from engine.errors import NoReplica, Overloaded
from engine.seam.messages import PYTHON, Call
from engine.seam.snapshot import ReplicaEntry
from engine.testing.fakes import FakeSlot

NOW = 1000.0


def make(*replicas: str, **options: Any) -> ReplicaSet:
    return ReplicaSet(backend_entry("b", replicas, **options))


def place(known: ReplicaSet, name: str = "", now: float = NOW) -> str | None:
    """Place a call; returns the replica's id, or None when it waits."""
    target = known.place(FakeSlot(name), now)
    return None if target is None else target.replica_tag


def placed(known: ReplicaSet, now: float = NOW) -> list[tuple[str, str]]:
    """Which waiting calls go where now."""
    slots: list[Slot] = []
    known.next_placements(now, slots)
    return [(slot.name, slot.target.replica_tag) for slot in slots if isinstance(slot, FakeSlot)]


def hold(known: ReplicaSet, key: str, count: int) -> None:
    """Let a replica hold so many calls of this caller, whatever others hold there."""
    target = known.targets[key]
    while target.in_flight > count:
        known.answered(target, target.in_flight - 1, NOW)
    target.in_flight = count
    known._file(target)


def others(known: ReplicaSet, key: str, count: int, now: float = NOW) -> None:
    """Let a replica say how many calls of others it holds, as it answers a call."""
    target = known.targets[key]
    target.in_flight += 1
    known.answered(target, target.in_flight - 1 + count, now)


def test_what_is_late_leaves_the_queue_unplaced() -> None:
    known = make("r1")
    assert place(known, "first") == "r1"
    slots = []
    for name, deadline in [("late", NOW - 1), ("now", NOW), ("in time", NOW + 1), ("ever", None)]:
        slot = FakeSlot(name)
        slot.call = Call(0, PYTHON, "m", deadline, "", b"", b"")
        assert known.place(slot, NOW - 2) is None
        slots.append(slot)
    hold(known, "r1", 0)
    assert placed(known) == [("in time", "r1")]
    assert [slot.name for slot in known.waiting if isinstance(slot, FakeSlot)] == ["ever"]
    assert [slot.queue is None for slot in slots] == [True, True, True, False]
    assert known.targets["r1"].in_flight == 1


# -- choosing --------------------------------------------------------------------------------------------------------


def test_the_only_replica_takes_calls_until_it_is_full() -> None:
    known = make("r1", limit=2)
    assert [place(known) for _ in range(3)] == ["r1", "r1", None]
    assert known.targets["r1"].in_flight == 2


@pytest.mark.parametrize("busy", ["r1", "r2"])
def test_of_two_replicas_the_less_busy_one_is_chosen(busy: str) -> None:
    known = make("r1", "r2", limit=10)
    for key in ("r1", "r2"):
        hold(known, key, 3 if key == busy else 1)
    chosen = {known.choose(NOW) for _ in range(20)}
    assert chosen == {target for key, target in known.targets.items() if key != busy}


def test_two_random_ones_are_compared_and_never_one_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    known = make("r0", "r1", "r2", limit=10)
    for load, key in enumerate(known.targets):
        hold(known, key, 1 + load)
    picks: dict[tuple[float, float], Any] = {}
    for first in (0.0, 0.4, 0.9):
        for second in (0.0, 0.9):
            numbers = iter((first, second))
            monkeypatch.setattr(replica_set, "_random", lambda numbers=numbers: next(numbers))
            chosen = known.choose(NOW)
            assert chosen is not None
            picks[first, second] = chosen.replica_tag
    assert picks == {
        (0.0, 0.0): "r0",  # of 0 and 1
        (0.0, 0.9): "r0",  # of 0 and 2
        (0.4, 0.0): "r0",  # of 1 and 0
        (0.4, 0.9): "r1",  # of 1 and 2
        (0.9, 0.0): "r0",  # of 2 and 0
        (0.9, 0.9): "r1",  # of 2 and 1
    }


def test_equal_replicas_share_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_set, "_random", random.Random(7).random)
    known = make(*[f"r{number}" for number in range(5)], limit=1000)
    counted = Counter(place(known) for _ in range(1000))
    assert set(counted) == set(known.targets)
    assert max(counted.values()) - min(counted.values()) < 10  # random alone would differ by about forty


def test_one_free_replica_among_many_full_ones_is_found() -> None:
    known = make(*[f"r{number}" for number in range(20)], limit=1)
    for key in known.targets:
        hold(known, key, 0 if key == "r13" else 1)
    assert place(known) == "r13"
    assert place(known) is None


def test_a_word_on_its_load_is_believed_while_it_is_fresh() -> None:
    known = make("r1", "r2", limit=10)
    others(known, "r1", 5)
    hold(known, "r2", 2)
    assert {known.choose(NOW + 0.05) for _ in range(10)} == {known.targets["r2"]}
    assert {known.choose(NOW + 5.0) for _ in range(10)} == {known.targets["r1"]}


def test_calls_of_others_do_not_count_against_the_limit() -> None:
    known = make("r1", limit=1)
    others(known, "r1", 5)
    assert place(known) == "r1"


@pytest.mark.parametrize("count", [2, 3, 8, 16, 200])
def test_calls_that_come_at_once_find_an_idle_replica_each(count: int) -> None:
    known = make(*[f"r{number}" for number in range(count)], limit=8)
    for _ in range(10):
        assert len({place(known) for _ in range(count)}) == count
        for target in known.targets.values():
            known.answered(target, 0, NOW)


class Timed:
    """A set of replicas over time: each of ``quick`` answers a call within so many seconds, the others never do.

    Attributes:
        got: How many calls each replica got.
    """

    def __init__(self, *replicas: str, quick: str, takes_s: float, limit: int = 10) -> None:
        self.known = make(*replicas, limit=limit)
        self.now = NOW
        self.got: Counter[str | None] = Counter()
        self._quick = quick.split()
        self._takes_s = takes_s
        self._due: list[tuple[float, Target]] = []
        for key in replicas:  # each has answered before
            others(self.known, key, 0, NOW - takes_s)
            self.known.targets[key].heard_at = NOW - takes_s
            self.known.targets[key].in_flight += 1
            self.known.answered(self.known.targets[key], 0, NOW)

    def call(self, calls: int, every_s: float) -> None:
        """Make calls at regular times."""
        for _ in range(calls):
            while self._due and self._due[0][0] <= self.now:
                at, target = self._due.pop(0)
                self.known.answered(target, target.in_flight - 1, at)
            target = self.known.take(self.now)
            self.got[None if target is None else target.replica_tag] += 1
            if target is not None and target.replica_tag in self._quick:
                self._due.append((self.now + self._takes_s, target))
            self.now += every_s


def test_a_replica_that_says_nothing_more_attracts_few_calls() -> None:
    timed = Timed("r1", "r2", "r3", quick="r1 r2", takes_s=0.01, limit=100)
    timed.call(20_000, every_s=0.003)  # for a minute, so that each of them is busy
    assert timed.got[None] == 0
    assert timed.got["r3"] < 25
    timed.known.answered(timed.known.targets["r3"], 0, timed.now)  # it is back
    hold(timed.known, "r3", 0)
    timed.call(10, every_s=0.003)
    assert timed.known.targets["r3"].in_flight


def test_a_silent_replica_gets_calls_when_no_other_has_room() -> None:
    timed = Timed("r1", "r2", quick="r1", takes_s=100.0, limit=4)
    known = timed.known
    known._usual_s = 0.01
    timed.call(2, every_s=1.0)
    timed.call(6, every_s=0.001)
    assert timed.got == {"r1": 4, "r2": 4}, "what one of them does not get, the other one does"
    timed.call(1, every_s=1.0)
    assert timed.got[None] == 1


def test_what_takes_all_replicas_long_makes_none_of_them_silent() -> None:
    timed = Timed("r1", "r2", quick="r1 r2", takes_s=5.0)
    timed.call(400, every_s=0.7)
    assert abs(timed.got["r1"] - timed.got["r2"]) < 20
    assert not timed.known._aside


def test_silent_replicas_that_are_alone_share_the_calls() -> None:
    timed = Timed("r1", "r2", "r3", quick="", takes_s=0.01, limit=1000)
    timed.call(300, every_s=0.1)
    assert timed.got[None] == 0
    assert max(timed.got.values()) - min(timed.got.values()) <= 30


def test_before_anybody_has_answered_nobody_is_silent() -> None:
    known = make("r1", "r2", limit=10)
    for key in ("r1", "r2"):
        hold(known, key, 2 if key == "r2" else 1)
    assert {known.choose(NOW + 100.0) for _ in range(20)} == {known.targets["r1"]}


def test_a_silent_replica_is_put_aside_and_tried_less_and_less_often() -> None:
    timed = Timed("r1", "r2", quick="r1", takes_s=0.5, limit=1000)
    timed.known._usual_s = 0.01
    tried: list[float] = []
    while timed.now < NOW + 100:
        before = timed.got["r2"]
        timed.known._usual_s = 0.01
        timed.call(1, every_s=0.05)
        if timed.got["r2"] > before and timed.now > NOW + 1:
            tried.append(timed.now - NOW)
    assert len(tried) <= 8
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(tried))


def test_replicas_at_calls_that_take_for_ever_are_not_left_alone_for_as_long() -> None:
    """They may be sending streams: one that answers other calls as quickly as ever takes its share of them."""
    timed = Timed("r1", "r2", "r3", quick="r1 r2 r3", takes_s=0.02, limit=100)
    for target in timed.known.targets.values():
        target.in_flight += 1
        timed.known._file(target)
    timed.now += 3600.0
    timed.call(1000, every_s=0.01)
    timed.got.clear()
    timed.call(1000, every_s=0.01)
    assert min(timed.got[key] for key in ("r1", "r2", "r3")) > 200, timed.got


def test_a_replica_that_became_idle_gets_the_next_call_whatever_the_others_hold() -> None:
    known = make(*[f"r{number}" for number in range(8)], limit=8)
    for _ in range(8):
        place(known)
    for number in range(8):
        known.answered(known.targets[f"r{number}"], 0, NOW)
        assert place(known) == f"r{number}"


def test_a_replica_at_the_calls_of_others_is_not_idle_while_its_word_is_fresh() -> None:
    known = make("r1", "r2", "r3", limit=8)
    others(known, "r1", 1)
    others(known, "r3", 1)
    assert place(known) == "r2"
    assert {place(known, now=NOW + 1) for _ in range(2)} == {"r1", "r3"}, "time made them idle"


def test_a_replica_that_refused_is_idle_again_after_a_moment() -> None:
    known = make("r1", "r2", limit=8)
    refusing = place(known)
    assert refusing is not None
    known.refused(known.targets[refusing], 0, NOW)
    other = place(known)
    assert other not in (refusing, None)
    assert place(known) == other, "the other one is left alone"
    assert place(known, now=NOW + RETRY_S) == refusing


def test_choosing_does_not_look_at_every_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with many idle, many busy nor many full ones."""
    known = make(*[f"r{number}" for number in range(200)], limit=2)
    looked_at: list[Target] = []
    busyness = Target.busyness

    def counting(target: Target, now: float) -> int:
        looked_at.append(target)
        return busyness(target, now)

    monkeypatch.setattr(Target, "busyness", counting)
    assert None not in [place(known) for _ in range(200)]
    assert looked_at == []
    placed_so_far = sum(place(known) is not None for _ in range(200))
    assert placed_so_far == 200
    assert len(looked_at) <= 2 * 200
    assert place(known) is None
    assert len(looked_at) <= 2 * 200


def test_a_replica_that_handed_a_call_back_gets_one_at_a_time() -> None:
    known = make("r1", limit=8)
    assert [place(known) for _ in range(3)] == ["r1"] * 3
    target = known.targets["r1"]
    for load in (2, 1):
        known.handed_back(target, load, NOW)
    assert place(known, "waits") is None, "one is there"
    known.answered(target, 0, NOW)
    assert placed(known) == [("waits", "r1")]
    for _ in range(replica_set._QUICK_AGAIN - 1):
        assert target.slow_for and place(known, "one too many") is None
        known.give_up_waiting()
        known.answered(target, 0, NOW)
        assert place(known) == "r1"
    assert place(known) == "r1", "it answered so many since that its calls must be short again"


def test_a_replica_that_handed_a_call_back_gets_none_while_another_one_is_idle() -> None:
    """However long ago that was: it may still be at the same call, of another caller, and would keep the next one."""
    known = make("r1", "r2", limit=8)
    for slot in (FakeSlot("a"), FakeSlot("b")):
        known.place(slot, NOW)
    known.handed_back(known.targets["r1"], 1, NOW)
    known.answered(known.targets["r2"], 0, NOW)
    for seconds in range(1, 50):
        assert place(known, now=NOW + seconds) == "r2"
        known.answered(known.targets["r2"], 0, NOW + seconds)
    assert {place(known, now=NOW + 50), place(known, now=NOW + 50)} == {"r1", "r2"}


def test_a_call_that_was_handed_back_waits_where_others_are_at_work_if_nobody_is_idle() -> None:
    """It is sent to the same replica again at once, which keeps it now; a second one is not."""
    known = make("r1", limit=8)
    assert place(known) == "r1"
    known.handed_back(known.targets["r1"], 1, NOW)
    assert (place(known), place(known)) == ("r1", None)


@pytest.mark.parametrize("max_queued", [0, 2])
def test_what_slow_replicas_could_hold_does_not_count_as_queued(max_queued: int) -> None:
    """Whether calls are refused depends on how many there are, not on where they wait."""
    known = make("r1", limit=4, max_queued=max_queued)
    slots = [FakeSlot(str(number)) for number in range(4)]
    assert {known.place(slot, NOW) for slot in slots} == {known.targets["r1"]}
    for slot in slots[1:]:
        known.handed_back(known.targets["r1"], 1, NOW)
        assert known.refusal(FakeSlot()) is None
        known.put_back(slot, NOW)
    assert [place(known) for _ in range(max_queued)] == [None] * max_queued
    with pytest.raises(Overloaded, match=f"and {max_queued} calls of this caller wait"):
        place(known)


# -- calls that would wait too long ----------------------------------------------------------------------------------


def served_every(known: ReplicaSet, interval_s: float, calls: int) -> float:
    """Let a replica answer one call after the other while others wait; returns when it answered the last."""
    assert [place(known, str(number)) for number in range(calls)] == ["r1"] + [None] * (calls - 1)
    now = NOW
    for _ in range(calls):
        now += interval_s
        known.answered(known.targets["r1"], 0, now)
        placed(known, now)
    return now


def test_a_call_that_would_wait_too_long_is_refused() -> None:
    known = make("r1", limit=1, max_queue_wait_s=1.0)
    now = served_every(known, 0.25, 20)
    accepted = [place(known, now=now) for _ in range(6)]
    assert accepted == ["r1"] + [None] * 5, "the fifth that waits will do so for one second"
    with pytest.raises(Overloaded, match=r"wait for about 1\.2 s \(max_queue_wait_s=1\)"):
        place(known, now=now)


def test_what_is_not_known_yet_keeps_nobody_out() -> None:
    known = make("r1", limit=1, max_queue_wait_s=0.001)
    assert [place(known) for _ in range(100)] == ["r1"] + [None] * 99


def test_a_call_that_cannot_make_its_deadline_is_refused() -> None:
    known = make("r1", limit=1)
    now = served_every(known, 0.25, 20)
    assert place(known, now=now) == "r1"
    for _ in range(3):
        assert place(known, now=now) is None
    late, timely, patient = FakeSlot("late"), FakeSlot("timely"), FakeSlot("patient")
    for slot, deadline in ((late, now + 0.9), (timely, now + 1.1), (patient, None)):
        slot.call = Call(0, PYTHON, "", deadline, "", b"", b"")
    with pytest.raises(Overloaded, match=r"about 0\.75 s \(its deadline is in 0\.9 s\)"):
        known.place(late, now)
    assert known.place(timely, now) is None
    assert known.place(patient, now) is None


def test_how_fast_calls_were_served_is_forgotten_after_a_pause() -> None:
    """Else slow calls of yesterday could keep quick ones out for ever, since none that waits would tell."""
    known = make("r1", limit=1, max_queue_wait_s=1.0)
    now = served_every(known, 10.0, 3) + 1.0
    assert [place(known, now=now) for _ in range(50)] == ["r1"] + [None] * 49


def test_the_time_without_replicas_says_nothing_about_how_fast_they_are() -> None:
    known = make("r1", limit=1, max_queue_wait_s=1.0)
    now = served_every(known, 0.01, 20)
    assert place(known, now=now) == "r1"
    entry = backend_entry("b", [], limit=1, max_queue_wait_s=1.0)
    for picture, later_s in ((entry, 0.0), (replace(entry, replicas=(ReplicaEntry("r2", "fake:r2"),)), 10.0)):
        known.apply(picture)
        assert [place(known, now=now) for _ in range(5)] == [None] * 5
        now += later_s
    assert len(placed(known, now)) == 1
    assert [place(known, now=now) for _ in range(20)] == [None] * 20


def test_what_a_call_did_before_it_came_back_says_nothing_about_the_queue() -> None:
    known = make("r1", limit=1, max_queue_wait_s=1.0)
    slot = FakeSlot("long")
    target = known.place(slot, NOW)
    assert target is known.targets["r1"]
    now = NOW + 60.0
    known.answered(target, 0, now)
    known.put_back(slot, now)  # it failed, and is repeated
    assert placed(known, now) == [("long", "r1")]
    assert [place(known, now=now) for _ in range(20)] == [None] * 20


def test_slow_calls_are_forgotten_while_quick_ones_are_served() -> None:
    known = make("r1", limit=1, max_queue_wait_s=1.0)
    now = served_every(known, 10.0, 3)
    place(known, now=now)
    for _ in range(100):
        place(known, now=now)  # the only one that waits is never refused
        now += 0.01
        known.answered(known.targets["r1"], 0, now)
        placed(known, now)
    assert [place(known, now=now) for _ in range(10)] == [None] * 10


# -- replicas that are left alone ------------------------------------------------------------------------------------


def test_a_blocked_replica_gets_nothing_until_its_time() -> None:
    known = make("r1", limit=5)
    known.unreachable(known.targets["r1"], 0, NOW + 1 - UNREACHABLE_S)
    assert place(known, "a") is None
    assert placed(known, NOW + 0.9) == []
    assert placed(known, NOW + 1) == [("a", "r1")]
    assert known.targets["r1"].blocked_until == 0.0


@pytest.mark.parametrize("word", ["answered", "handed_back", "refused"])
def test_the_last_words_of_a_replica_that_cannot_be_reached_bring_it_no_calls(word: str) -> None:
    """They arrive after its end was noticed; to look again at each of them would take long where many wait."""
    known = make("r1", limit=3)
    target = known.targets["r1"]
    for name in "abcde":
        place(known, name)
    known.unreachable(target, 1, NOW)
    for _ in range(2):
        getattr(known, word)(target, 0, NOW)
        assert placed(known) == []
    assert placed(known, NOW + UNREACHABLE_S - 1e-3) == []
    assert [name for name, _ in placed(known, NOW + UNREACHABLE_S)][:1] == ["d"]


def test_one_that_could_not_be_reached_gets_one_call_until_it_answers() -> None:
    known = make("r1", "r2", limit=9)
    target = known.targets["r1"]
    known.unreachable(target, 0, NOW)
    now = NOW + UNREACHABLE_S
    assert [place(known, now=now) for _ in range(5)].count("r1") <= 1
    while target.in_flight < 1:
        place(known, now=now)
    assert [place(known, now=now) for _ in range(3)] == ["r2"] * 3
    known.answered(target, 0, now)
    assert [place(known, now=now) for _ in range(3)] == ["r1"] * 3


def test_one_that_takes_its_time_after_it_could_not_be_reached_gets_others_soon() -> None:
    """It may be at a long call, and have room beside it."""
    known = make("r1", limit=3)
    known.unreachable(known.targets["r1"], 0, NOW)
    now = NOW + UNREACHABLE_S
    assert [place(known, name, now=now) for name in "abc"] == ["r1", None, None]
    assert known.some_blocked(now), "nobody looks again"
    assert placed(known, now + 0.2) == []
    assert placed(known, now + 0.25) == [("b", "r1"), ("c", "r1")]


def test_one_that_hands_back_its_first_call_after_it_could_not_be_reached_is_at_a_long_one() -> None:
    known = make("r1", limit=5)
    known.unreachable(known.targets["r1"], 0, NOW)
    now = NOW + UNREACHABLE_S
    assert place(known, now=now) == "r1"
    known.handed_back(known.targets["r1"], 1, now)
    assert [place(known, name, now=now) for name in "abc"] == ["r1", None, None]
    assert placed(known, now + 0.3) == []


def test_the_other_one_takes_over_meanwhile() -> None:
    known = make("r1", "r2", limit=5)
    known.unreachable(known.targets["r1"], 0, NOW + 1 - UNREACHABLE_S)
    assert [place(known) for _ in range(5)] == ["r2"] * 5
    assert place(known) is None


# -- the queue -------------------------------------------------------------------------------------------------------


def test_calls_wait_in_order() -> None:
    known = make("r1", limit=1)
    assert [place(known, name) for name in "abc"] == ["r1", None, None]
    hold(known, "r1", 0)
    assert placed(known) == [("b", "r1")]
    hold(known, "r1", 0)
    assert placed(known) == [("c", "r1")]
    assert placed(known) == []


def test_thousands_of_calls_that_come_back_are_not_looked_at_each_time() -> None:
    looks = 0

    class Counting(FakeSlot):
        @property
        def since(self) -> float:
            nonlocal looks
            looks += 1
            return self._placed_at

        @since.setter
        def since(self, value: float) -> None:
            self._placed_at = value

    known = make("r1", limit=1)
    place(known)
    slots = [Counting(str(number)) for number in range(1000)]
    for number, slot in enumerate(slots):
        slot.since = NOW + number
    shuffled = random.sample(slots, len(slots))
    for slot in shuffled:
        known.put_back(slot, NOW)
    assert list(known.waiting) == slots
    assert looks < 20 * len(slots)


def test_nobody_overtakes_those_who_wait() -> None:
    known = make("r1", limit=1)
    place(known, "a")
    place(known, "b")
    hold(known, "r1", 0)
    assert place(known, "c") is None
    assert placed(known) == [("b", "r1")]


def test_a_large_call_is_not_sent_again_soon() -> None:
    known = make("r1", limit=2)
    for size in (0, 10_000_000):
        slot = FakeSlot("a")
        target = known.place(slot, NOW)
        assert target is not None
        known.refused(target, 0, NOW, size)
        known.put_back(slot, NOW)
        assert placed(known, NOW + size * 0.99e-8) == []
        assert placed(known, NOW + RETRY_S + size * 1.01e-8) == [("a", "r1")]
        hold(known, "r1", 0)


def test_calls_that_are_put_back_keep_their_order() -> None:
    known = make("r1", limit=3)
    slots = [FakeSlot(name) for name in "abcde"]
    for later, slot in enumerate(slots):
        known.place(slot, NOW + later)
    target = known.targets["r1"]
    for slot in slots[:3]:
        known.refused(target, 0, NOW + 9)
        known.put_back(slot, NOW)
    assert [slot.name for slot in known.waiting if isinstance(slot, FakeSlot)] == list("abcde")
    assert all(slot.queue is known.waiting for slot in slots)
    assert [name for name, _ in placed(known, NOW + 10)] == list("abc")


@pytest.mark.parametrize("room", [0, 1, 3])
def test_the_queue_is_bounded(room: int) -> None:
    known = make("r1", "r2", limit=1, max_queued=room)
    assert {place(known), place(known)} == {"r1", "r2"}
    assert [place(known) for _ in range(room)] == [None] * room
    with pytest.raises(Overloaded) as caught:
        place(known)
    assert f"all of its 2 replicas are full and {room} calls of this caller wait" in str(caught.value)
    assert f"max_queued_requests={room}" in str(caught.value)
    assert len(known.waiting) == room


def test_the_queue_may_be_without_bound() -> None:
    known = make("r1", limit=1, max_queued=None)
    for _ in range(5000):
        place(known)
    assert len(known.waiting) == 4999
    assert known.refusal(FakeSlot()) is None


def test_calls_wait_for_a_replica_that_is_expected() -> None:
    known = make(expecting=True)
    assert place(known, "a") is None
    known.apply(backend_entry("b", ["r1"]))
    assert placed(known) == [("a", "r1")]


def test_calls_are_refused_when_no_replica_is_expected() -> None:
    known = make(expecting=False, failures=4)
    told = "backend 'b' has no replica: the last 4 tries to start one failed"
    with pytest.raises(NoReplica, match=rf"{told}\. The engine") as caught:
        place(known)
    assert "The engine keeps trying" in str(caught.value)
    assert "see the log (engine.controller)" in str(caught.value)
    assert not known.waiting
    known.apply(replace(backend_entry("b", [], expecting=False, failures=4), last_error="OSError: no model"))
    with pytest.raises(NoReplica, match=rf"{told}, the last one because of OSError: no model\. The engine"):
        place(known)


# -- copies of shadowed calls ------------------------------------------------------------------------------------------


def copy_of(size: int, deadline: float | None = None) -> CopySlot:
    return CopySlot(call=Call(0, PYTHON, "__call__", deadline, "", b"", bytes(size)))


def test_copies_that_wait_are_bounded_in_number_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_set, "_MAX_COPIES", 3)
    monkeypatch.setattr(replica_set, "_MAX_COPY_BYTES", 100)
    known = make("r1", limit=1, max_queued=None)
    assert known.place_copy(copy_of(90), NOW) is known.targets["r1"]
    for size in (90, 20, 5, 5, 0):
        assert known.place_copy(copy_of(size), NOW) is None
    assert [len(copy.call.payload) for copy in known.copies] == [90, 5, 5]
    assert known.dropped_copies == 2
    for left in (10, 5):
        known.answered(known.targets["r1"], 0, NOW)
        known.next_placements(NOW, [])
        assert known.copies.bytes == left


def test_a_copy_whose_deadline_has_passed_is_not_sent() -> None:
    known = make("r1", limit=1)
    place(known)
    for deadline in (NOW + 1, NOW + 3, None):
        known.place_copy(copy_of(1, deadline), NOW)
    known.answered(known.targets["r1"], 0, NOW)
    placements: list[Slot] = []
    known.next_placements(NOW + 2, placements)
    [copy] = placements
    assert (copy.call.deadline, known.dropped_copies, len(known.copies)) == (NOW + 3, 1, 1)
    known.drop_late_copies(NOW + 20)
    assert len(known.copies) == 1
    known.drop_late_copies(NOW + 31)
    assert (known.dropped_copies, list(known.copies), known.copies.bytes) == (2, [], 0)
    known.answered(known.targets["r1"], 0, NOW)
    known.place_copy(copy_of(1), NOW)
    known.place_copy(copy_of(1, NOW), NOW)
    known.answered(known.targets["r1"], 0, NOW)
    placements: list[Slot] = []
    known.next_placements(NOW + 1, placements)
    assert placements == []
    assert known.targets["r1"].in_flight == 0


# -- newer pictures --------------------------------------------------------------------------------------------------


def test_a_newer_picture_adds_and_removes_replicas() -> None:
    known = make("r1", "r2", limit=1)
    stays, leaves = known.targets["r1"], known.targets["r2"]
    hold(known, "r1", 1)
    left = known.apply(backend_entry("b", ["r1", "r3"], limit=2, max_queued=7))
    assert left == [leaves]
    assert leaves.gone and not stays.gone
    assert known.targets["r1"] is stays  # with all it counted
    assert known.targets["r3"].address == "fake:r3"
    assert (known.limit, known.max_queued) == (2, 7)
    assert Counter(place(known) for _ in range(4)) == {"r1": 1, "r3": 2, None: 1}


def test_representations_tell_the_state() -> None:
    known = make("r1", limit=2)
    place(known)
    assert repr(known) == "<ReplicaSet b targets=[<Target r1 open in_flight=1 elsewhere=0>] waiting=0>"
    target: Target = known.targets["r1"]
    target.blocked_until = NOW
    assert "blocked" in repr(target)
    target.gone = True
    assert "gone" in repr(target)


def test_a_replica_of_the_same_name_elsewhere_is_another_one() -> None:
    """A caller may skip the picture in which the backend was deleted, before it was created again."""
    known = make("r1")
    former = known.targets["r1"]
    again = backend_entry("b", ["r1"])
    left = known.apply(replace(again, replicas=(ReplicaEntry("r1", "fake:elsewhere"),)))
    assert left == [former]
    assert former.gone
    assert known.targets["r1"].address == "fake:elsewhere"
    assert known.choose(NOW) is known.targets["r1"]
