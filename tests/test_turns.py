"""Whose call a replica takes next: of those that a full one refused, and of those that wait in it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.calling.line import MOST_PASSED
from engine.seam.messages import LOW, NORMAL, PYTHON, Call
from engine.serving.replica import Job
from engine.serving.turns import KEPT_S, Turns, next_of
from engine.testing.fakes import FakeChannel

NOW = 1000.0
A, B, C = (FakeChannel(name) for name in "ABC")
NAMES = {A: "A", B: "B", C: "C"}


def drawn(turns: Turns, count: int) -> str:
    """Who gets the next places, each of whom comes and is refused again."""
    names = ""
    for _ in range(count):
        channel: Any = turns.next(NOW)
        if channel is None:
            return names
        names += NAMES[channel]
        turns.came(channel)
    return names


def test_callers_get_places_one_after_the_other_and_round_again() -> None:
    turns = Turns()
    assert not turns
    assert turns.next(NOW) is None
    for channel in (A, B, A, C, A):
        turns.refused(channel, low=False)
    assert drawn(turns, 7) == "ABCABCA"


def test_each_has_one_place_at_a_time() -> None:
    turns = Turns()
    for channel in (A, B):
        turns.refused(channel, low=False)
    assert [turns.next(NOW) for _ in range(3)] == [A, B, None]
    assert turns.kept == 2
    turns.came(A)
    turns.came(A)
    assert turns.kept == 1
    assert turns.next(NOW) is A


def test_one_that_wants_none_for_a_while_loses_nothing_by_that() -> None:
    turns = Turns()
    for channel in (A, B):
        turns.refused(channel, low=False)
    assert drawn(turns, 2) == "AB"
    turns.declined(A)
    assert drawn(turns, 2) == "BB"
    turns.refused(A, low=False)
    assert drawn(turns, 3) == "ABA"


def test_a_place_is_not_kept_for_ever() -> None:
    turns = Turns()
    for channel in (A, B):
        turns.refused(channel, low=False)
    assert turns.next(NOW) is A
    turns.lapse(NOW + KEPT_S / 2)
    assert turns.kept == 1
    turns.lapse(NOW + KEPT_S)
    assert turns.kept == 0
    assert drawn(turns, 2) == "BB", "the one that has not come is asked no more"
    turns.declined(B)
    assert not turns


def test_of_one_that_is_gone_nothing_is_left() -> None:
    turns = Turns()
    turns.refused(A, low=False)
    turns.refused(B, low=True)
    assert (turns.only(A), turns.only(B)) == (False, False)
    assert turns.next(NOW) is A
    turns.forget(A)
    assert turns.only(B)
    turns.forget(B)
    assert not turns
    assert repr(turns) == "<Turns row=0 wants=0 kept=0>"


def test_every_tenth_place_is_for_one_with_calls_of_low_priority() -> None:
    turns = Turns()
    turns.refused(C, low=True)
    turns.refused(A, low=False)
    turns.refused(B, low=False)
    names = drawn(turns, 30)
    assert names[: MOST_PASSED + 1] == "ABABABABAC"
    assert [place for place, name in enumerate(names) if name == "C"] == [9, 19, 29]
    turns.refused(C, low=False)
    turns.refused(C, low=True)  # it has both: the more urgent ones count
    assert sorted(drawn(turns, 3)) == ["A", "B", "C"]


def order_of(jobs: str) -> str:
    """How calls leave a replica's queue: A1 is the first of caller A, a2 one of low priority."""
    calls = [
        Job(
            {"A": A, "B": B, "C": C}[name.upper()],
            Call(number, PYTHON, "m", None, "", b"", b"", priority=LOW if name.islower() else NORMAL),
        )
        for number, name in enumerate(jobs)
    ]
    names = ""
    passed, last = 0, None
    while calls:
        place, passed = next_of(calls, passed, last)
        job = calls.pop(place)
        last = job.channel
        names += jobs[job.call.id]
        ids = [other.call.id for other in calls if other.channel is last and other.call.priority == job.call.priority]
        assert all(other > job.call.id for other in ids), "calls of one caller that are equally urgent keep their order"
    return names


@pytest.mark.parametrize(
    ("came", "leave"),
    [
        ("AAA", "AAA"),
        ("AAAB", "ABAA"),
        ("AAABBB", "ABABAB"),
        ("aaB", "Baa"),
        ("aA", "Aa"),
        ("ab" + "C" * 12, "C" * 9 + "a" + "CCC" + "b"),
    ],
)
def test_what_waits_in_a_replica_goes_by_priority_and_then_round_the_callers(came: str, leave: str) -> None:
    assert order_of(came) == leave
