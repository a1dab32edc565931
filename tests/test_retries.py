"""When a call that has begun is repeated: the decisions alone, and a caller that makes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fakes import a_call, backend_entry
from test_caller import IDLE, World, each_strike, settle

from engine.calling.handle import CallOptions
from engine.calling.retries import MOST_LOSSES, RetryBudget, allowance, pause_s
from engine.errors import EngineClosed, InvalidArgument, ReplicaDied
from engine.seam.messages import AS_CONFIGURED, AS_CONFIGURED_FOR_POSTS, LOW, Call, Failure, FailureKind, Item
from engine.seam.snapshot import BackendEntry
from engine.testing.fakes import FakeSlot

# -- the decisions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "most", "posts", "expected"),
    [
        (AS_CONFIGURED, 3, False, 3),
        (AS_CONFIGURED_FOR_POSTS, 3, False, 0),
        (AS_CONFIGURED_FOR_POSTS, 3, True, 3),
        (0, 3, True, 0),
        (5, 0, False, 5),
    ],
)
def test_how_often_a_call_may_be_repeated(says: int, most: int, posts: bool, expected: int) -> None:
    assert allowance(says, most, posts=posts) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, AS_CONFIGURED),
        ({"idempotent": False}, 0),
        ({"idempotent": True}, 2),
        ({"idempotent": True, "max_retries": 0}, 0),
        ({"idempotent": True, "max_retries": 7}, 7),
    ],
)
def test_what_the_options_of_a_call_say(options: dict[str, Any], expected: int) -> None:
    assert CallOptions(**options).retries() == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"idempotent": 1}, "idempotent must be True, False or None, not 1"),
        ({"idempotent": True, "max_retries": -1}, "max_retries must be an integer of at least 0 or None, not -1"),
        ({"max_retries": 1}, "max_retries=1 without idempotent=True"),
    ],
)
def test_options_that_say_nothing_sensible(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        CallOptions(**options)


def spent(budget: RetryBudget, calls: int, now: float) -> int:
    """How many repeats a budget grants at a time."""
    granted = 0
    while budget.spend(calls, now):
        granted += 1
    return granted


def test_a_budget_is_a_share_of_the_calls_and_a_few() -> None:
    assert spent(RetryBudget(0, 100.0), 0, 100.0) == 10
    assert spent(RetryBudget(1000, 100.0), 1000, 100.0) == 210


def test_a_budget_comes_back_with_calls_and_with_time() -> None:
    budget = RetryBudget(0, 100.0)
    assert spent(budget, 0, 100.0) == 10
    assert spent(budget, 100, 100.0) == 20
    assert spent(budget, 100, 100.0) == 0
    assert spent(budget, 100, 1000.0) == 10


def test_a_budget_forgets_what_is_long_ago() -> None:
    """An hour of many calls allows no more than ten seconds of them."""
    rate = 100
    budget = RetryBudget(0, 0.0)
    assert spent(budget, 3600 * rate, 3600.0) == pytest.approx(0.2 * 10 * rate + 10, abs=1)


def test_where_everything_fails_repeats_add_a_fifth() -> None:
    budget = RetryBudget(0, 0.0)
    repeats = sum(budget.spend(call, call / 100) for call in range(1, 10_001))
    assert 0.19 * 10_000 < repeats < 0.23 * 10_000


def test_pauses_grow_to_a_bound_and_differ() -> None:
    assert [pause_s(number, 0.5) for number in (0, 1, 2)] == pytest.approx([0.02, 0.04, 0.08])
    assert pause_s(50, 1.0) == pause_s(5000, 1.0) == pytest.approx(1.5)
    assert pause_s(0, 0.0) < pause_s(0, 1.0)


# -- a caller --------------------------------------------------------------------------------------------------------


def entry(*replicas: str, **options: Any) -> BackendEntry:
    return replace(backend_entry("b", list(replicas), limit=8), max_retries=2, **options)


@pytest.fixture
def world() -> World:
    world = World()
    world.show(entry("r1"))
    return world


def lose(world: World, replica: str, *others: str) -> None:
    """Let a replica die; others are there, or come."""
    world.show(entry(*others, dead=(replica,)))
    world.channel(replica).break_off()


def fail(world: World, replica: str, kind: int = FailureKind.REPEATABLE) -> Failure:
    failure = Failure(world.calls(replica)[-1].id, 0, kind, b"", b"packed")
    world.channel(replica).answer(failure)
    return failure


def test_a_call_that_had_begun_is_repeated_after_a_pause(world: World) -> None:
    slot = world.submit("a")
    lose(world, "r1", "r2")
    assert world.counted() == {**IDLE, "queued": 1}
    assert world.caller.held() == {"b"}
    assert not any(channel.address == "fake:r2" for channel in world.adapter.channels)
    assert 0.01 <= world.home.timers[-1].delay_s <= 0.03
    world.home.fire()
    assert world.names("r2") == ["a"]
    world.reply("r2")
    assert (slot.error, slot.settled) == (None, 1)
    assert world.counted() == IDLE


@pytest.mark.parametrize(
    "options", [{"max_retries": 0}, {"retry_deaths": False}, {"max_retries": 0, "retry_posts": True}]
)
def test_a_backend_that_does_not_allow_it(world: World, options: dict[str, Any]) -> None:
    world.show(replace(entry("r1"), **options))
    slot = world.submit("a")
    world.channel("r1").break_off()
    assert "it is being replaced, and the call may have run: repeat it only if that is safe" in str(slot.error)
    assert world.counted() == IDLE


def submit(world: World, call: Call) -> FakeSlot:
    slot = FakeSlot()
    slot.endpoint, slot.call = "e", call
    world.caller.submit(slot)
    return slot


def test_what_the_call_says_counts_more(world: World) -> None:
    world.show(replace(entry("r1"), max_retries=0))
    willing, unwilling = submit(world, a_call("a")._replace(retries=1)), submit(world, a_call("b")._replace(retries=0))
    world.show(replace(entry("r2", dead=("r1",)), max_retries=2))
    world.channel("r1").break_off()
    world.home.fire()
    assert world.names("r2") == ["a"]
    assert isinstance(unwilling.error, ReplicaDied)
    assert not willing.settled


def test_a_call_that_two_replicas_died_of_is_given_to_no_other(world: World) -> None:
    slot = submit(world, a_call("a")._replace(retries=9))
    lose(world, "r1", "r2")
    world.home.fire()
    lose(world, "r2", "r3")
    world.home.fire()
    assert isinstance(slot.error, ReplicaDied)
    assert "2 have died with this call, so it is given to no other: it may be what they die of" in str(slot.error)
    assert not any(channel.address == "fake:r3" for channel in world.adapter.channels)
    assert world.counted() == IDLE


def test_a_call_with_which_many_die_before_they_begin_any_is_given_to_no_other(world: World) -> None:
    """Reading it may be what kills them: it would go round for ever."""
    slot = world.submit("a")
    for number in range(1, MOST_LOSSES + 1):
        assert not slot.settled, number
        world.channel(f"r{number}").begun = 0
        lose(world, f"r{number}", f"r{number + 1}")
        world.home.fire()
    assert isinstance(slot.error, ReplicaDied)
    assert "died before it began this call" in str(slot.error)
    assert world.counted() == IDLE


def test_those_behind_a_call_that_kills_are_not_suspected(world: World) -> None:
    behind = world.submit("behind")
    for number in range(1, MOST_LOSSES + 3):
        replica = f"r{number}"
        submit(world, a_call("killer")._replace(retries=0))
        lost = world.channel(replica)
        begun = world.calls(replica)[world.names(replica).index("killer")].id
        lost.may_have_begun = lambda call_id, begun=begun: call_id == begun  # type: ignore[method-assign]
        lose(world, replica, f"r{number + 1}")
    world.reply(f"r{MOST_LOSSES + 3}")
    assert (behind.error, behind.settled) == (None, 1)


def test_what_the_backend_names_is_repeated_until_it_works_or_was_enough(world: World) -> None:
    slot, other = world.submit("a"), submit(world, a_call("b")._replace(retries=0))
    plain = fail(world, "r1")  # of the one that must not be repeated
    assert other.heard == [plain]
    first = world.calls("r1")[0].id
    world.channel("r1").answer(Failure(first, 0, FailureKind.REPEATABLE, b"", b""))
    for _ in range(2):
        assert world.counted() == {**IDLE, "queued": 1}
        world.home.fire()
        assert not slot.settled
        last = fail(world, "r1")
    assert world.names("r1") == ["a", "b", "a", "a"]
    assert slot.heard == [last]
    assert world.counted() == IDLE


def test_what_is_repeated_keeps_its_priority(world: World) -> None:
    world.show(replace(entry("r1"), max_retries=1))
    submit(world, a_call("a")._replace(priority=LOW))
    fail(world, "r1")
    world.home.fire()
    fail(world, "r1", FailureKind.BUSY)
    assert [call.priority for call in world.calls("r1")] == [LOW] * 3


def test_other_failures_are_not_repeated(world: World) -> None:
    slot = world.submit("a")
    failure = fail(world, "r1", FailureKind.USER)
    assert slot.heard == [failure]


def test_a_call_of_whose_answer_a_part_was_delivered_is_not_repeated(world: World) -> None:
    slot = world.submit("a")
    world.channel("r1").answer(Item(world.calls("r1")[0].id, b"head", b"1"))
    world.channel("r1").break_off()
    assert "the call is not repeated: a part of its answer has been delivered" in str(slot.error)


def test_a_call_whose_time_is_nearly_over_is_not_repeated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.calling.repeating.pause_s", lambda repeats, chance: 1e6)
    slot = submit(world, a_call("a")._replace(deadline=1e12))
    late = submit(world, a_call("b")._replace(deadline=time.monotonic() + 1e5))
    lose(world, "r1", "r2")
    assert "its time is nearly over" in str(late.error)
    assert not slot.settled


def test_an_outage_is_not_multiplied(world: World) -> None:
    slots = [submit(world, a_call(str(number))._replace(retries=1)) for number in range(8)]
    world.show(replace(entry("r1"), max_concurrent_queries=100))
    slots += [submit(world, a_call(str(number))._replace(retries=1)) for number in range(8, 40)]
    world.channel("r1").break_off()
    told = [str(slot.error) for slot in slots if slot.error is not None]
    assert len(told) == 40 - (10 + 8)
    assert all("too many of those of endpoint 'e' are" in text for text in told)


@pytest.mark.parametrize("how", ["cancel", "close", "delete"])
def test_a_call_that_pauses_can_be_ended(world: World, how: str) -> None:
    slot = world.submit("a")
    lose(world, "r1", "r2")
    if how == "cancel":
        world.caller.cancel(slot)
        world.home.fire()
        assert not slot.settled
    elif how == "close":
        world.caller.close()
        assert isinstance(slot.error, EngineClosed)
        world.home.fire()
    else:
        world.show(replace(backend_entry("c", ["r9"]), max_retries=2))
        assert world.names("r9") == ["a"]  # which gets the calls of the endpoint now
        world.home.fire()
        assert world.names("r9") == ["a"]
        return
    assert world.counted() == IDLE
    assert slot.settled == (how == "close")


@pytest.mark.parametrize("how", ["close", "fire"])
def test_a_call_that_pauses_after_its_backend_was_deleted_is_not_forgotten(world: World, how: str) -> None:
    slot = world.submit("a")
    world.show(replace(backend_entry("c", ["r9"]), max_retries=2))  # it gets the calls of the endpoint now
    fail(world, "r1")
    assert (world.caller.held(), slot.settled) == ({"c"}, 0)
    if how == "close":
        world.caller.close()
        assert isinstance(slot.error, EngineClosed)
    world.home.fire()
    assert slot.settled == (how == "close")
    if how == "fire":
        assert world.names("r9") == ["a"]


def test_a_thread_that_drives_the_channel_stops_when_its_call_pauses(world: World) -> None:
    """Nothing more would come there, and it would not look at what comes elsewhere."""
    slot = world.submit("a")
    assert slot.channel is not None
    fail(world, "r1")
    assert slot.channel is None


@pytest.mark.parametrize("what", ["death", "failure"])
def test_a_repeat_is_seen_to_wherever_it_is_interrupted(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.calling.replica_set.UNREACHABLE_S", 1e-6)
    for world, strike in each_strike(entry("r1")):
        held, waiting = world.submit("a"), world.submit("b")
        channel = world.channel("r1")
        happens: Callable[[], object] = channel.break_off
        if what == "failure":
            failure = Failure(world.calls("r1")[0].id, 0, FailureKind.REPEATABLE, b"", b"")
            happens = lambda channel=channel, failure=failure: channel.answer(failure)  # noqa: E731
        where = strike(happens)
        if where:
            happens()
        for _ in range(20):
            settle(world)
        assert held.heard and held.settled == 1, where
        assert waiting.heard and waiting.settled == 1, where
        assert world.counted() == IDLE, where
        assert "pending=0" in repr(world.caller), where
