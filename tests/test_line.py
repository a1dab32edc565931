"""Calls of two priorities that wait for the same: which is next, and what all of them take."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import sys

import pytest
from fakes import backend_entry

from engine.calling.line import Line, bytes_of, share_of_low
from engine.calling.pace import Pace
from engine.calling.replica_set import RETRY_S, ReplicaSet
from engine.calling.slot import Slot
from engine.errors import Overloaded
from engine.seam.messages import LOW, NORMAL, PYTHON, Call
from engine.testing.fakes import FakeSlot

NOW = 1000.0


def slot_of(name: str, size: int = 1, *, deadline: float | None = None, since: float = NOW) -> FakeSlot:
    """A call of low priority if it is named in lower case."""
    slot = FakeSlot(name)
    slot.call = Call(0, PYTHON, "m", deadline, "", b"", bytes(size), priority=LOW if name.islower() else NORMAL)
    slot.since = since
    return slot


def line_of(names: str) -> Line:
    line = Line()
    for name in names:
        line.add(slot_of(name))
    return line


def known_with(names: str = "", **options: object) -> ReplicaSet:
    """A replica set with one replica, which is full, and these calls in its queue."""
    known = ReplicaSet(backend_entry("b", ["r1"], limit=1, **options))  # type: ignore[arg-type]
    first = slot_of("A")
    target = known.place(first, NOW)
    assert target is not None
    target.holds[first] = None
    for name in names:
        assert known.place(slot_of(name, 10), NOW) is None
    return known


def order_of(known: ReplicaSet) -> str:
    """The names of those that wait as they leave, one after the other."""
    names = ""
    while True:
        placed: list[Slot] = []
        known.answered(known.targets["r1"], 0, NOW)
        known.next_placements(NOW, placed)
        if not placed:
            return names
        [slot] = placed
        assert isinstance(slot, FakeSlot)
        names += slot.name


@pytest.mark.parametrize(
    ("came", "leave"),
    [
        ("ABC", "ABC"),
        ("abc", "abc"),
        ("aBcD", "BDac"),
        ("ab" + "ABCDEFGHIJKL", "ABCDEFGHIaJKLb"),
        ("ab" + "ABCDEFGHIJKLMNOPQRSTU", "ABCDEFGHIaJKLMNOPQRbSTU"),
    ],
)
def test_the_order(came: str, leave: str) -> None:
    known = known_with(came)
    assert order_of(known) == leave
    assert known.waiting.bytes == 0


def test_however_many_others_come_every_tenth_is_low() -> None:
    known = known_with("abc")
    names = ""
    for _ in range(40):
        known.place(slot_of("N"), NOW)
        placed: list[Slot] = []
        known.answered(known.targets["r1"], 0, NOW)
        known.next_placements(NOW, placed)
        names += placed[0].name  # type: ignore[attr-defined]
    assert [index for index, name in enumerate(names) if name != "N"] == [9, 19, 29]


@pytest.mark.parametrize(
    ("waiting", "normal", "low"), [("", 0, 0), ("aaa", 0, 3), ("AAA", 3, 3), ("aaA", 1, 3), ("aaa" + 18 * "A", 20, 21)]
)
def test_how_many_go_before_one_that_comes(waiting: str, normal: int, low: int) -> None:
    line = line_of(waiting)
    assert (line.before(low=False), line.before(low=True)) == (normal, low)


@pytest.mark.parametrize(("bound", "share"), [(0, 0), (1, 1), (2, 1), (1000, 500)])
def test_low_ones_have_half_of_what_there_is(bound: int, share: int) -> None:
    assert share_of_low(bound) == share
    known = known_with(share * "a", max_queued=bound)
    with pytest.raises(Overloaded, match=f"max_queued_requests={bound}, of which calls of low priority have half"):
        known.place(slot_of("b"), NOW)
    for _ in range(bound - share):
        assert known.place(slot_of("B"), NOW) is None
    with pytest.raises(Overloaded, match=rf"max_queued_requests={bound}\)"):
        known.place(slot_of("B"), NOW)


@pytest.mark.parametrize(
    ("waiting", "name", "size", "refused"),
    [
        ("", "A", 1000, False),  # alone, it may be as large as it likes
        ("", "a", 1000, False),
        ("A", "A", 90, False),
        ("A", "A", 91, True),
        ("A", "a", 40, False),
        ("A", "a", 41, True),
    ],
)
def test_what_is_too_large(waiting: str, name: str, size: int, refused: bool) -> None:
    known = known_with(waiting, max_queued_bytes=100)
    if refused:
        half = ", of which calls of low priority have half" if name == "a" else ""
        expected = rf"already have 10 bytes, and those of this one {size} \(max_queued_bytes=100{half}\)"
        with pytest.raises(Overloaded, match=expected):
            known.place(slot_of(name, size), NOW)
    else:
        assert known.place(slot_of(name, size), NOW) is None
        assert known.waiting.bytes == 10 * len(waiting) + size


@pytest.mark.parametrize(("name", "refused"), [("B", False), ("b", True)])
def test_low_ones_may_be_expected_to_wait_half_as_long(name: str, refused: bool) -> None:
    known = known_with("ABCDE", max_queue_wait_s=4.0)
    for second in (1, 2):
        known.answered(known.targets["r1"], 0, NOW + second)
        known.next_placements(NOW + second, [])
    assert len(known.waiting) == 3  # which take a second each
    if refused:
        with pytest.raises(Overloaded, match="max_queue_wait_s=4, of which calls of low priority have half"):
            known.place(slot_of(name), NOW + 2)
    else:
        assert known.place(slot_of(name), NOW + 2) is None


def test_who_is_refused_for_a_load_that_lasts_is_told_what_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "most_waiting", lambda self, in_flight: 4.0)
    known = known_with("ABC", max_queue_wait_s=7.0)
    known._pace.crowded_since = NOW - 8.0
    told = (
        r"and 4 are enough, of which calls of low priority have half, to keep the replicas busy .*max_queue_wait_s is"
    )
    with pytest.raises(Overloaded, match=told):
        known.place(slot_of("a"), NOW)
    assert known.place(slot_of("D"), NOW) is None
    with pytest.raises(Overloaded, match="and 4 are enough to keep the replicas busy"):
        known.place(slot_of("E"), NOW)


def test_what_is_counted_stays_exact_whatever_becomes_of_calls() -> None:
    """Calls leave a queue in turn, because they are late, because they are given up, or with all others."""
    chance = random.Random(4)
    known = ReplicaSet(backend_entry("b", ["r1"], limit=4))
    left = 0
    numbers = itertools.count()
    now = NOW
    for _ in range(2000):
        now += 0.1
        what = chance.random()
        waiting = list(known.waiting)
        if what < 0.5:
            name = chance.choice("aA")
            deadline = now + 1 if chance.random() < 0.2 else None
            slot = slot_of(name, next(numbers) % 100, deadline=deadline, since=now - chance.random())
            with contextlib.suppress(Overloaded):  # it would be late
                target = known.place(slot, now)
                if target is not None:
                    target.holds[slot] = None
        elif what < 0.7 and waiting:
            slot = chance.choice(waiting)
            slot.give_up()
            slot.give_up()
            assert slot.queue is None
        elif what < 0.95:
            target = known.targets["r1"]
            held = [slot for slot in target.holds if chance.random() < 0.5]
            for slot in held:
                del target.holds[slot]
            for number, slot in enumerate(held):
                known.refused(target, 0, now)
                if number % 2 and not slot.given_up:
                    known.put_back(slot, now)
            placed: list[Slot] = []
            known.next_placements(now + RETRY_S, placed)
            left += len(placed)
        else:
            known.give_up_waiting()
        sizes = [bytes_of(slot.call) for slot in known.waiting]
        assert known.waiting.bytes == sum(sizes)
        assert all(slot.queue is known.waiting for slot in known.waiting)
    assert left > 100
    known.give_up_waiting()
    assert (known.waiting.bytes, len(known.waiting)) == (0, 0)


@pytest.mark.parametrize("fate", ["placed", "given up", "late", "all given up"])
def test_nothing_is_kept_of_what_has_left_the_queue(fate: str) -> None:
    """Without the help of the cyclic collector: arguments may be large."""
    payload = random.Random(0).randbytes(1000)
    gc.disable()
    try:
        known = known_with()
        before = sys.getrefcount(payload)
        for name in "AbC":
            slot = slot_of(name)
            slot.call = slot.call._replace(payload=payload, deadline=NOW + 1)
            assert known.place(slot, NOW) is None
            if fate == "given up":
                slot.give_up()
        assert known.waiting.bytes == (0 if fate == "given up" else 3000)
        del slot
        if fate == "all given up":
            known.give_up_waiting()
        for _ in range(3):
            known.targets["r1"].holds.clear()
            known.answered(known.targets["r1"], 0, NOW)
            known.next_placements(NOW + (2 if fate == "late" else 0), [])
        known.targets["r1"].holds.clear()
        assert (sys.getrefcount(payload), known.waiting.bytes) == (before, 0)
    finally:
        gc.enable()


def test_what_was_torn_is_made_anew() -> None:
    line = line_of("AbC")
    sizes = line.bytes
    line.bytes = 77
    for slot in line:
        slot.queue = None
    line.mend()
    assert line.bytes == sizes
    assert [slot.queue for slot in line] == [line] * 3
