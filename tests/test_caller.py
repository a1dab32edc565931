"""A caller between its router and its channels: placing, answering, giving up, and losing replicas.

The other side is scripted: nothing is answered, refused or broken unless the test says so.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from fakes import a_call, backend_entry, snapshot

from engine.calling import replica_set
from engine.calling.caller import Caller
from engine.calling.line import bytes_of
from engine.calling.ref import Ref, wait
from engine.calling.slot import Slot
from engine.errors import (
    DeadlineExceeded,
    EndpointNotFound,
    EngineClosed,
    InvalidArgument,
    NoReplica,
    Overloaded,
    ReplicaDied,
)
from engine.seam.channel import Channel, ChannelClosed
from engine.seam.messages import ANY_CALL, Call, Cancel, Control, Credit, End, Failure, FailureKind, Item, Reply
from engine.seam.serialization import dumps
from engine.seam.snapshot import BackendEntry, RoutingSnapshot
from engine.testing.fakes import FakeAdapter, FakeChannel, FakeHome, FakeSlot
from engine.testing.instruments import PATIENCE_S, eventually
from engine.testing.strikes import struck


def submit(caller: Caller, call: Call, slot: Slot) -> None:
    slot.endpoint, slot.call = "e", call
    caller.submit(slot)


class World:
    """A caller and everything around it."""

    def __init__(self, adapter: Any = None) -> None:
        self.adapter = adapter or FakeAdapter()
        self.home = FakeHome()
        self.snapshot = RoutingSnapshot(version=-1)
        self.caller = Caller(self.adapter, self.home, self)

    def show(self, *backends: BackendEntry, apply: bool = True, **options: Any) -> None:
        """Let a newer snapshot rule."""
        self.snapshot = snapshot(self.snapshot.version + 1, *backends, **options)
        if apply:
            self.caller.apply(self.snapshot)

    def submit(self, name: str = "", *args: Any, **options: Any) -> FakeSlot:
        slot = FakeSlot(name)
        submit(self.caller, a_call(name, *args, **options), slot)
        return slot

    def channel(self, replica: str) -> FakeChannel:
        return self.adapter.channel(replica)

    def calls(self, replica: str) -> list[Call]:
        """What was sent to a replica over its newest channel."""
        return self.channel(replica).of_type(Call)

    def names(self, replica: str) -> list[str]:
        return [name_of(call) for call in self.calls(replica)]

    def reply(self, replica: str, index: int = -1, *, load: int = 0) -> None:
        self.channel(replica).answer(Reply(self.calls(replica)[index].id, load, b"", b"result"))

    def refuse(self, replica: str, index: int = -1, kind: int = FailureKind.REFUSED) -> None:
        self.channel(replica).answer(Failure(self.calls(replica)[index].id, 9, kind, b"", b""))

    def counted(self, tag: str = "b") -> dict[str, int]:
        numbers: dict[str, int] = self.caller.statistics()["backends"][tag]
        replica_set = self.caller._router.replica_sets[tag]
        queued = [bytes_of(slot.call) for slot in (*replica_set.waiting, *replica_set.pausing)]
        assert numbers.pop("queued_bytes") == sum(queued), "whatever became of calls"
        assert replica_set.copies.bytes == sum(bytes_of(slot.call) for slot in replica_set.copies)
        return numbers


def name_of(call: Call) -> str:
    import pickle

    return str(pickle.loads(call.payload)[0][0])


IDLE = {"queued": 0, "in_flight": 0, "queued_copies": 0, "dropped_copies": 0}


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.show(backend_entry("b", ["r1"]))
    yield world
    world.caller.close()


@pytest.fixture
def two(world: World) -> World:
    """Two replicas, and a call that holds "r1" or "r2" goes where there is room."""
    world.show(backend_entry("b", ["r1", "r2"]))
    return world


# -- the plain way ---------------------------------------------------------------------------------------------------


def test_a_call_and_its_answer(world: World) -> None:
    slot = world.submit("a")
    (call,) = world.calls("r1")
    assert (call.method, call.deadline, call.request_id, call.head) == ("__call__", None, "", b"")
    assert world.counted() == {**IDLE, "in_flight": 1}
    assert world.channel("r1").watched
    world.reply("r1")
    assert slot.heard == [Reply(call.id, 0, b"", b"result")]
    assert world.counted() == IDLE
    assert world.caller.statistics()["endpoints"] == {"e": {"calls": 1}}
    assert len(world.adapter.channels) == 1
    world.submit("b")
    assert len(world.adapter.channels) == 1


def test_a_failure_of_user_code_is_an_answer(world: World) -> None:
    slot = world.submit("a")
    (call,) = world.calls("r1")
    failure = Failure(call.id, 0, FailureKind.USER, b"", b"packed")
    world.channel("r1").answer(failure)
    assert slot.heard == [failure]
    assert world.counted() == IDLE


def test_a_stream_ends_with_its_end(world: World) -> None:
    slot = world.submit("a")
    (call,) = world.calls("r1")
    answers: list[Any] = [Item(call.id, b"head", b"1"), Item(call.id, b"", b"2"), End(call.id, 0, False)]
    for answer in answers:
        assert world.counted()["in_flight"] == 1
        world.channel("r1").answer(answer)
    assert slot.heard == answers
    assert world.counted() == IDLE
    world.channel("r1").answer(Item(call.id, b"", b"3"))
    assert slot.heard == answers


def test_a_ref_may_be_opened_by_two_threads_at_once() -> None:
    class Interleaved(Ref[str]):
        """Another thread opens it between two steps of whoever does that first."""

        __slots__ = ("_begun", "_was_opened")

        @property
        def _opened(self) -> bool:
            before: bool = self._was_opened
            if not before and not self._begun:
                self._begun = True
                assert self.result() == "result"
            return before

        @_opened.setter
        def _opened(self, value: bool) -> None:
            self._begun = self._was_opened = value

    ref = Interleaved(None, "e")
    ref.deliver(Reply(1, 0, b"", dumps("result", "the result")))
    assert ref.result() == "result"


@pytest.mark.parametrize("how", ["result", "wait", "asyncio", "trio"])
def test_who_looks_for_a_result_again_and_again_leaves_nothing_behind(how: str) -> None:
    ref: Ref[Any] = Ref(None, "e")
    heard: list[Ref[Any]] = []
    ref.add_done_callback(heard.append)
    before = list(ref._callbacks or ())

    async def look() -> None:
        with anyio.move_on_after(0):
            await ref

    for _ in range(3):
        if how == "result":
            with pytest.raises(DeadlineExceeded):
                ref.result(timeout=0)
        elif how == "wait":
            assert wait([ref], timeout=0) == ([], [ref])
        else:
            anyio.run(look, backend=how)
    assert ref._callbacks == before
    ref.fail(EngineClosed("over"))
    assert heard == [ref]


def test_a_thread_that_drives_need_not_be_watched_over(world: World) -> None:
    class Driving(FakeSlot):
        drives = True

    submit(world.caller, a_call("a"), Driving())
    assert not world.channel("r1").watched
    world.show(backend_entry("b", ["r1"], limit=1))
    queued = Driving()
    submit(world.caller, a_call("b"), queued)
    world.reply("r1")
    assert world.names("r1") == ["a", "b"]
    assert world.channel("r1").watched  # it waited in the queue, so nobody drives that channel for it


@pytest.mark.parametrize("how", ["refused", "queued"])
def test_a_call_that_moves_to_another_channel_is_watched_over(world: World, how: str) -> None:
    """Its thread drives the channel that it was sent on first, or none."""

    class Driving(FakeSlot):
        drives = True

    world.show(backend_entry("b", ["r1"], limit=1))
    submit(world.caller, a_call("a"), Driving())
    if how == "queued":
        submit(world.caller, a_call("b"), Driving())
    world.show(backend_entry("c", ["r2"]))
    if how == "refused":
        world.refuse("r1", kind=FailureKind.DRAINING)
    assert world.names("r2") == ["a" if how == "refused" else "b"]
    assert world.channel("r2").watched


def test_a_caller_knows_where_it_lives(world: World) -> None:
    loop = World()
    loop.home.on_loop = True
    loop.show(backend_entry("b", ["r1"]))
    loop.submit()
    world.submit()
    assert (loop.channel("r1").on_loop, world.channel("r1").on_loop) == (True, False)
    assert repr(loop.caller).startswith("<Caller loop pending=1 <Router version=0 ")
    assert repr(world.caller).startswith("<Caller threads pending=1 ")


def test_the_newest_snapshot_rules_even_before_it_was_applied(world: World) -> None:
    world.show(backend_entry("c", ["r2"]), apply=False)
    world.submit("a")
    assert world.names("r2") == ["a"]


@pytest.mark.parametrize("number", range(4))
def test_what_cannot_be_routed_fails(world: World, number: int) -> None:
    entry, error = [
        (None, EndpointNotFound),
        (backend_entry("b", [], expecting=False, failures=3), NoReplica),
        (backend_entry("b", [], expecting=False), EngineClosed),  # it is being shut down
        (backend_entry("b", [], max_queued=0), Overloaded),
    ][number]
    world.show(*[entry] if entry else [])  # type: ignore[list-item]
    slot = world.submit("a")
    assert isinstance(slot.error, error)
    assert slot.settled == 1
    assert slot.error.__traceback__ is None, "it knows the frames of the call, which would stay in memory with it"


def test_what_a_channel_does_not_carry_is_passed_over(world: World) -> None:
    slot = world.submit("a")
    channel = world.channel("r1")
    for message in (Control("x"), Cancel(1), Credit(1, 1), Reply(999, 0, b"", b""), Item(999, b"", b"")):
        channel.answer(message)
    assert not slot.settled
    assert world.counted()["in_flight"] == 1
    world.reply("r1")
    world.reply("r1")  # a second answer is nobody's
    assert slot.settled == 1
    assert world.counted() == IDLE


# -- the queue -------------------------------------------------------------------------------------------------------


def test_calls_wait_until_there_is_room(world: World) -> None:
    slots = [world.submit(name) for name in "abc"]
    assert world.names("r1") == ["a"]
    assert world.counted() == {**IDLE, "queued": 2, "in_flight": 1}
    world.reply("r1")
    assert world.names("r1") == ["a", "b"]
    world.reply("r1")
    world.reply("r1")
    assert world.names("r1") == ["a", "b", "c"]
    assert all(slot.settled == 1 for slot in slots)
    assert world.counted() == IDLE


def test_calls_that_wait_for_no_replica_learn_of_it(world: World) -> None:
    """At first one is expected; later the last ones have failed, one after another."""
    held, waiting = world.submit("a"), world.submit("b")
    world.show(backend_entry("b", [], failures=1, dead=["r1"]))
    late = world.submit("c")
    assert (waiting.settled, late.settled) == (0, 0)
    world.show(backend_entry("b", [], expecting=False, failures=3, dead=["r1"]))
    for slot in (waiting, late):
        assert isinstance(slot.error, NoReplica)
        assert slot.settled == 1
        assert "the last 3 tries to start one failed" in str(slot.error)
    assert world.counted()["queued"] == 0
    assert not held.settled
    world.show(backend_entry("b", ["r2"]))
    assert world.submit("d").error is None
    assert world.names("r2") == ["d"]


def test_calls_that_wait_for_no_replica_go_to_the_backend_that_gets_the_calls_now(world: World) -> None:
    world.submit("a")
    waiting = world.submit("b")
    hopeless = backend_entry("b", [], expecting=False, failures=3, dead=["r1"])
    world.show(hopeless, backend_entry("c", ["r2"]), endpoints={"e": {"c": 1.0}})
    assert waiting.error is None
    assert world.names("r2") == ["b"]


def test_a_call_that_was_never_sent_does_not_wait_for_no_replica(world: World) -> None:
    slot = world.submit("a")
    world.channel("r1").opened = False
    world.show(backend_entry("b", [], expecting=False, failures=3, dead=["r1"]))
    world.home.fire()
    assert isinstance(slot.error, NoReplica)
    assert slot.settled == 1


def test_a_refused_call_keeps_its_place(world: World) -> None:
    slots = [world.submit(name) for name in "abc"]
    world.refuse("r1")
    assert world.counted() == {**IDLE, "queued": 3}
    assert len(world.home.timers) == 1
    eventually(lambda: world.home.fire() or len(world.calls("r1")) == 2)
    for _ in range(3):
        world.reply("r1")
    assert world.names("r1") == ["a", "a", "b", "c"]
    assert [slot.settled for slot in slots] == [1, 1, 1]
    assert world.counted() == IDLE


def test_a_refused_call_goes_to_another_replica_at_once(two: World) -> None:
    slot = two.submit("a")
    first = "r1" if two.adapter.channels[0].address == "fake:r1" else "r2"
    other = "r2" if first == "r1" else "r1"
    two.refuse(first)
    assert two.names(other) == ["a"]
    two.reply(other)
    assert slot.settled == 1
    assert two.counted() == IDLE


def test_one_whose_turn_it_is_sends_one_call_and_waits_for_the_next_turn(world: World) -> None:
    """A full replica says whom it has a place for: others' calls are in its other places."""
    world.show(backend_entry("b", ["r1"], limit=8))
    for name in "abcd":
        world.submit(name)
    for index in range(4):
        world.refuse("r1", index)
    assert world.counted() == {**IDLE, "queued": 4}
    channel = world.channel("r1")
    channel.answer(Credit(ANY_CALL, 1))
    assert world.names("r1")[4:] == ["a"]
    world.reply("r1", load=7)
    assert world.names("r1")[4:] == ["a"], "the place it had is another's now"
    channel.answer(Credit(ANY_CALL, 1))
    assert world.names("r1")[4:] == ["a", "b"]
    channel.answer(Credit(ANY_CALL, 8))  # there are no others any more
    assert world.names("r1")[4:] == ["a", "b", "c", "d"]
    assert channel.of_type(Cancel) == []
    assert world.counted() == {**IDLE, "in_flight": 3}


def test_one_that_hears_of_no_places_looks_for_them(world: World) -> None:
    world.show(backend_entry("b", ["r1"], limit=2))
    for name in "abc":
        world.submit(name)
    world.refuse("r1", 0)
    world.channel("r1").answer(Credit(ANY_CALL, 1))
    assert world.names("r1") == ["a", "b", "a"]
    world.reply("r1", 1)
    assert world.names("r1") == ["a", "b", "a"]
    eventually(lambda: world.home.fire() or world.names("r1") == ["a", "b", "a", "c"])


def test_one_that_wants_no_place_says_so(world: World) -> None:
    world.show(backend_entry("b", ["r1"], limit=2))
    slot = world.submit("a")
    channel = world.channel("r1")
    world.refuse("r1")
    world.caller.cancel(slot)
    channel.answer(Credit(ANY_CALL, 1))
    assert channel.of_type(Cancel) == [Cancel(ANY_CALL)]
    world.show(backend_entry("b", []))
    channel.answer(Credit(ANY_CALL, 1))  # it has hung up there
    assert world.counted() == IDLE


@pytest.mark.parametrize("kind", [FailureKind.REFUSED, FailureKind.DRAINING])
def test_a_call_that_is_refused_while_the_queue_is_full_is_one_too_many(world: World, kind: int) -> None:
    world.show(backend_entry("b", ["r1"], max_queued=1))
    first, second = world.submit("a"), world.submit("b")
    world.refuse("r1", kind=kind)
    assert isinstance(first.error, Overloaded)
    assert world.counted() == {**IDLE, "queued": 1}
    eventually(lambda: world.home.fire() or len(world.calls("r1")) == 2)
    world.reply("r1")
    assert second.settled == 1


def test_a_draining_replica_passes_its_calls_on(two: World) -> None:
    slots = [two.submit(name) for name in "ab"]
    (moved,) = two.names("r1")
    two.refuse("r1", kind=FailureKind.DRAINING)
    two.show(backend_entry("b", ["r2"]))  # the controller took it out
    two.reply("r2")
    assert two.names("r2")[1:] == [moved]
    two.reply("r2")
    assert [slot.settled for slot in slots] == [1, 1]
    assert two.counted() == IDLE


def test_a_call_that_is_handed_back_goes_to_an_idle_replica(two: World) -> None:
    two.show(backend_entry("b", ["r1", "r2"], limit=8))
    slots = [two.submit(name) for name in "abcd"]
    (last,) = set(two.names("r1")[1:])
    two.reply("r2", 0)
    two.reply("r2", 1)
    two.refuse("r1", kind=FailureKind.BUSY)
    assert two.names("r2")[2:] == [last]
    two.reply("r1", 0)
    two.reply("r2")
    assert [slot.settled for slot in slots] == [1] * 4
    assert two.home.timers == [], "nobody has to look again: the answer of the long call says when there is room"
    assert two.counted() == IDLE


def test_calls_that_are_handed_back_keep_their_order(world: World) -> None:
    world.show(backend_entry("b", ["r1"], limit=8))
    for name in "abcd":
        world.submit(name)
    for index in (1, 2, 3):
        world.refuse("r1", index, kind=FailureKind.BUSY)
    world.reply("r1", 0)
    for _ in "bcd":
        world.reply("r1")
    assert world.names("r1") == list("abcdbcd")
    assert [call.informed for call in world.calls("r1")] == [False] * 4 + [True] * 3
    assert world.counted() == IDLE


def test_a_call_that_is_handed_back_is_not_overtaken(world: World) -> None:
    """Else others could go before it again and again, as long as there are any."""
    world.show(backend_entry("b", ["r1"], limit=8))
    for name in "abc":
        world.submit(name)
    for index in (1, 2):
        world.refuse("r1", index, kind=FailureKind.BUSY)
    world.reply("r1", 0)
    assert world.names("r1") == list("abcb")
    world.refuse("r1", kind=FailureKind.BUSY)  # another caller's call is a long one
    assert world.names("r1") == list("abcbb")
    world.reply("r1")
    world.reply("r1")
    assert world.names("r1") == list("abcbbc")
    assert world.counted() == IDLE


def test_the_retry_timer_is_set_once(world: World) -> None:
    world.submit("a")
    world.refuse("r1")
    for _ in range(5):
        world.submit("x")
    assert len(world.home.timers) == 1


def test_the_word_on_the_load_makes_the_other_replica_the_better_one(world: World) -> None:
    world.show(backend_entry("b", ["r1", "r2"], limit=100))
    world.submit("a")
    busy = world.adapter.channels[0].address.removeprefix("fake:")
    world.reply(busy, load=50)
    world.submit("b")
    assert world.adapter.channels[-1].address != f"fake:{busy}"


# -- replicas that die -----------------------------------------------------------------------------------------------


def test_calls_die_with_their_replica(two: World) -> None:
    slots = {name: two.submit(name) for name in "abc"}
    on_r1, on_r2 = two.names("r1")[0], two.names("r2")[0]
    two.channel("r1").break_off("was killed by SIGKILL")
    assert isinstance(slots[on_r1].error, ReplicaDied)
    text = str(slots[on_r1].error)
    assert "replica r1 died while it held this call (was killed by SIGKILL)" in text
    assert "the call may have run" in text
    assert not slots[on_r2].settled
    assert two.counted() == {**IDLE, "queued": 1, "in_flight": 1}
    two.reply("r2")
    assert two.names("r2")[1:] == ["c"]
    two.reply("r2")
    assert [slot.settled for slot in slots.values()] == [1, 1, 1]
    assert two.counted() == IDLE


def test_calls_on_a_connection_that_never_stood_go_elsewhere(two: World) -> None:
    """As when a replica's host is gone: nothing was sent, so nothing can have run."""
    slots = [two.submit("a"), two.submit("b")]
    (name,) = two.names("r1")
    two.channel("r1").opened = False
    two.channel("r1").break_off("nobody answers")
    assert [slot.settled for slot in slots] == [0, 0]
    assert two.counted() == {**IDLE, "queued": 1, "in_flight": 1}
    two.reply("r2")
    assert two.names("r2")[1:] == [name]
    two.reply("r2")
    assert [slot.settled for slot in slots] == [1, 1]
    assert two.counted() == IDLE


def test_calls_that_a_dead_replica_had_not_begun_go_elsewhere_at_their_place(world: World) -> None:
    world.show(backend_entry("b", ["r1"], limit=4))
    slots = {name: world.submit(name) for name in "abcd"}
    later = world.submit("e")
    world.show(backend_entry("b", ["r1", "r2"], limit=4))
    assert world.names("r2") == ["e"]
    lost = world.channel("r1")
    lost.begun = world.calls("r1")[1].id
    world.show(backend_entry("b", ["r2"], limit=1, dead=["r1"]))
    waiting = world.submit("f")
    lost.break_off()
    for name in "ab":
        assert isinstance(slots[name].error, ReplicaDied)
    world.reply("r2")
    world.reply("r2")
    world.reply("r2")
    assert world.names("r2") == ["e", "c", "d", "f"]
    world.reply("r2")
    assert [slot.settled for slot in (*slots.values(), later, waiting)] == [1] * 6
    assert world.counted() == IDLE


def test_a_call_that_had_not_begun_needs_no_room_in_the_queue(world: World) -> None:
    """It was accepted once."""
    world.show(backend_entry("b", ["r1"], max_queued=1))
    held, waiting, refused = [world.submit(name) for name in "abc"]
    assert isinstance(refused.error, Overloaded)
    world.show(backend_entry("b", [], max_queued=1, dead=["r1"]))
    world.channel("r1").begun = 0
    world.channel("r1").break_off()
    world.show(backend_entry("b", ["r2"], max_queued=1))
    world.reply("r2")
    world.reply("r2")
    assert world.names("r2") == ["a", "b"]
    assert [slot.error for slot in (held, waiting)] == [None, None]


def test_a_call_that_had_not_begun_is_told_if_there_is_no_other_replica_to_come(world: World) -> None:
    slot = world.submit("a")
    world.show(backend_entry("b", [], expecting=False, failures=3, dead=["r1"]))
    world.channel("r1").begun = 0
    world.channel("r1").break_off()
    assert isinstance(slot.error, NoReplica)
    assert world.counted() == IDLE


def test_calls_die_with_a_replica_whose_connection_only_falls_silent(two: World) -> None:
    """As when a replica's host loses its power: the kernel takes long to give the connection up."""
    slots = [two.submit("a"), two.submit("b")]
    (name,) = two.names("r1")
    two.show(backend_entry("b", ["r2", "r3"], dead=["r1"]))
    assert not two.channel("r1").closed, "what it answered before it died is thrown away"
    two.home.fire()
    assert two.channel("r1").closed
    lost, kept = sorted(slots, key=lambda slot: slot.name != name)
    assert isinstance(lost.error, ReplicaDied)
    assert "replica r1 died while it held this call (the engine has found it dead); it is being repl" in str(lost.error)
    two.reply("r2")
    assert kept.heard and kept.error is None
    assert two.counted() == IDLE
    two.show(backend_entry("b", ["r2", "r3"], dead=["r1"]))
    two.home.fire()
    assert [slot.settled for slot in slots] == [1, 1]


def test_what_a_dead_replica_had_answered_counts(two: World) -> None:
    slots = [two.submit("a"), two.submit("b")]
    two.show(backend_entry("b", ["r2"], dead=["r1"]))
    two.reply("r1")
    assert two.channel("r1").closed
    two.home.fire()
    two.reply("r2")
    assert [slot.error for slot in slots] == [None, None]


def test_calls_that_still_connect_to_a_replica_go_elsewhere_once_it_is_known_to_be_dead(two: World) -> None:
    slots = [two.submit("a"), two.submit("b")]
    (name,) = two.names("r1")
    two.channel("r1").opened = False
    two.show(backend_entry("b", ["r2", "r3"], dead=["r1"]))
    [timer] = two.home.timers
    assert timer.delay_s == 0
    two.home.fire()
    assert two.names("r3") == [name]
    two.reply("r3")
    two.reply("r2")
    assert [slot.error for slot in slots] == [None, None]


def test_nobody_connects_to_a_replica_that_died_meanwhile(two: World) -> None:
    """Between the choice of a replica and the connection to it."""
    connect = two.caller._connect

    def news_comes(target: Any) -> Any:
        two.caller._connect = connect  # type: ignore[method-assign]
        two.show(backend_entry("b", ["r3"], dead=["r1", "r2"]))
        return connect(target)

    two.caller._connect = news_comes  # type: ignore[method-assign]
    slot = two.submit("a")
    assert [channel.address for channel in two.adapter.channels] == ["fake:r3"]
    two.reply("r3")
    assert slot.heard and slot.error is None
    assert two.counted() == IDLE


def test_a_channel_is_lost_once(world: World) -> None:
    slot = world.submit("a")
    channel = world.channel("r1")
    channel.break_off()
    world.caller.lost(channel, "once more")
    assert slot.settled == 1
    assert world.counted() == IDLE


def test_a_replica_that_answers_again_gets_a_new_channel(world: World) -> None:
    world.submit("a")
    world.channel("r1").break_off()
    slot = world.submit("b")
    assert not slot.settled
    eventually(lambda: world.home.fire() or len(world.adapter.channels) == 2)
    assert world.names("r1") == ["b"]
    world.reply("r1")
    assert slot.settled == 1
    assert world.counted() == IDLE


def test_a_call_that_is_being_sent_when_its_replica_is_found_dead_is_told(two: World) -> None:
    """Nobody reads a channel that was given up, so whatever was sent on it must be known by then."""
    two.show(backend_entry("b", ["r1"], limit=2))
    first = two.submit("a")
    channel = two.channel("r1")
    closing, sent = threading.Event(), threading.Event()
    close = channel.close

    def close_later() -> None:
        closing.set()
        assert sent.wait(PATIENCE_S)
        close()

    class Slow(FakeSlot):
        def send_on(self, channel: Channel) -> None:
            super().send_on(channel)
            two.show(backend_entry("b", ["r2"], dead=["r1"]))
            giving_up.start()
            assert closing.wait(PATIENCE_S)

    giving_up = threading.Thread(target=two.home.fire)
    channel.close = close_later  # type: ignore[method-assign]
    second = Slow("b")
    submit(two.caller, a_call("b"), second)
    sent.set()
    giving_up.join()
    assert isinstance(first.error, ReplicaDied)
    assert isinstance(second.error, ReplicaDied)
    assert two.counted() == IDLE


def test_a_call_that_was_never_sent_goes_elsewhere(two: World) -> None:
    """The channel was found broken when the call was written: the replica cannot have run it."""
    warm = [two.submit(name) for name in "ab"]
    for replica in ("r1", "r2"):
        two.reply(replica)
    for channel in two.adapter.channels:
        channel.die()
    slot = two.submit("c")
    assert all(channel.closed for channel in two.adapter.channels)  # it was tried on both
    assert not slot.settled
    assert two.counted() == {**IDLE, "queued": 1}
    eventually(lambda: two.home.fire() or len(two.adapter.channels) == 3)
    replica = two.adapter.channels[-1].address.removeprefix("fake:")
    two.reply(replica)
    assert [one.settled for one in (*warm, slot)] == [1, 1, 1]
    assert two.counted() == IDLE


@pytest.mark.parametrize("error", [ChannelClosed("the channel is closed"), InvalidArgument("the message is 2 bytes")])
def test_a_connection_refused_while_a_call_is_written_moves_the_call_once(two: World, error: Exception) -> None:
    """Whoever reads the channel finds the refusal, and has sent the call elsewhere before its writer hears of it."""
    opened = two.adapter.open_channel

    def open_channel(*args: Any, **options: Any) -> FakeChannel:
        two.adapter.open_channel = opened  # type: ignore[method-assign]
        channel = opened(*args, **options)
        channel.opened = False

        def send(message: Any) -> None:
            channel.break_off("nobody answers")
            raise error

        channel.send = send  # type: ignore[method-assign]
        return channel

    two.adapter.open_channel = open_channel  # type: ignore[method-assign]
    slot = two.submit("a")
    refused, other = two.adapter.channels
    assert other.address != refused.address
    assert len(other.of_type(Call)) == 1
    assert not other.closed
    assert two.counted() == {**IDLE, "in_flight": 1}
    two.reply(other.address.removeprefix("fake:"))
    assert slot.heard and (slot.error, slot.settled) == (None, 1)
    two.home.fire()
    assert len(two.adapter.channels) == 2
    assert two.counted() == IDLE


def test_calls_in_flight_die_when_the_next_one_finds_the_channel_broken(world: World) -> None:
    world.show(backend_entry("b", ["r1"], limit=5))
    first = world.submit("a")
    world.channel("r1").die("the connection broke")
    second = world.submit("b")
    assert isinstance(first.error, ReplicaDied)
    assert "the connection broke" in str(first.error)
    assert not second.settled
    assert world.counted() == {**IDLE, "queued": 1}
    world.caller.cancel(second)


def test_a_call_that_cannot_be_sent_is_not_forgotten_when_nobody_can_read_the_channel(two: World) -> None:
    """As when there are no threads left to read it with; the call is another one's that waited."""
    slots = [two.submit(name) for name in "abc"]
    broken, other = two.adapter.channels

    def no_thread() -> None:
        raise RuntimeError("can't start new thread")

    broken.watch = no_thread  # type: ignore[method-assign]
    broken.die()
    with pytest.raises(RuntimeError, match="thread"):
        two.reply(broken.address.removeprefix("fake:"))
    settle(two)
    assert [slot.settled for slot in slots] == [1, 1, 1]
    assert len(other.of_type(Call)) == 2


def test_a_replica_that_was_full_when_its_channel_ended_gets_the_calls_that_wait(world: World) -> None:
    """A call was placed there and not yet sent, and takes a new channel: the replica lives."""
    world.submit("a")
    world.reply("r1")
    channel = world.channel("r1")
    send = world.caller._send

    def channel_ends(slot: Slot, **options: Any) -> None:
        world.caller._send = send  # type: ignore[method-assign]
        channel.break_off()
        send(slot, **options)

    world.caller._send = channel_ends  # type: ignore[method-assign]
    world.submit("b")
    world.submit("c")
    assert (world.names("r1"), world.counted()["queued"]) == (["b"], 1)
    world.reply("r1")
    eventually(lambda: world.home.fire() or world.names("r1") == ["b", "c"])
    world.reply("r1")
    assert world.counted() == IDLE


def test_a_replica_that_cannot_be_reached_is_left_alone(two: World) -> None:
    two.adapter.unreachable = {"r1"}
    two.show(backend_entry("b", ["r1", "r2"], limit=3))
    slots = [two.submit(str(number)) for number in range(3)]
    assert sorted(two.names("r2")) == ["0", "1", "2"]
    for index in range(3):
        two.reply("r2", index)
    assert [slot.settled for slot in slots] == [1, 1, 1]
    assert two.counted() == IDLE


def test_calls_wait_while_nobody_can_be_reached(world: World) -> None:
    world.adapter.unreachable = {"r1"}
    slots = [world.submit(name) for name in "ab"]
    world.home.fire()
    assert world.counted() == {**IDLE, "queued": 2}
    world.adapter.unreachable = set()
    eventually(lambda: world.home.fire() or bool(world.adapter.channels))
    world.reply("r1")
    world.reply("r1")
    assert world.names("r1") == ["a", "b"]
    assert [slot.settled for slot in slots] == [1, 1]


# -- giving up -------------------------------------------------------------------------------------------------------


def test_a_call_given_up_in_the_queue_is_never_sent(world: World) -> None:
    world.submit("a")
    slot = world.submit("b")
    world.caller.cancel(slot)
    world.caller.cancel(slot)
    assert world.counted() == {**IDLE, "in_flight": 1}
    world.reply("r1")
    assert world.names("r1") == ["a"]
    assert not slot.settled
    assert not world.channel("r1").of_type(Cancel)


def test_a_call_given_up_in_flight_counts_until_its_replica_answers(world: World) -> None:
    slot, waiting = world.submit("a"), world.submit("b")
    call_id = world.calls("r1")[0].id
    world.caller.cancel(slot)
    world.caller.cancel(slot)
    assert world.channel("r1").of_type(Cancel) == [Cancel(call_id)]
    assert world.counted() == {**IDLE, "queued": 1, "in_flight": 1}
    world.channel("r1").answer(Item(call_id, b"", b"late"))
    world.reply("r1", 0)
    assert world.names("r1") == ["a", "b"]
    assert not slot.settled  # it hears nothing any more
    world.reply("r1", 0)  # and a second answer frees nothing
    assert world.counted() == {**IDLE, "in_flight": 1}
    world.reply("r1")
    assert waiting.settled == 1
    assert world.counted() == IDLE


@pytest.mark.parametrize("how", ["refused", "died"])
def test_a_call_given_up_is_not_made_again(world: World, how: str) -> None:
    slot = world.submit("a")
    world.caller.cancel(slot)
    if how == "refused":
        world.refuse("r1")
    else:
        world.channel("r1").break_off()
    world.home.fire()
    assert world.counted() == IDLE
    assert len(world.calls("r1")) == 1
    assert not slot.settled


def test_giving_up_what_is_answered_does_nothing(world: World) -> None:
    slot = world.submit("a")
    world.reply("r1")
    world.caller.cancel(slot)
    world.caller.credit(slot, 1)
    assert len(world.channel("r1").sent) == 1
    assert slot.settled == 1
    world.caller.cancel(FakeSlot())  # it was never submitted


def test_giving_up_on_a_broken_channel_loses_it(world: World) -> None:
    world.show(backend_entry("b", ["r1"], limit=2))
    slot, other = world.submit("a"), world.submit("b")
    world.channel("r1").die()
    world.caller.cancel(slot)
    assert not slot.settled
    assert isinstance(other.error, ReplicaDied)
    assert world.counted() == IDLE


@pytest.mark.parametrize("kind", [FailureKind.REFUSED, FailureKind.DRAINING])
def test_those_behind_a_call_that_was_given_up_and_refused_are_not_forgotten(world: World, kind: int) -> None:
    slot, waiting = world.submit("a"), world.submit("b")
    world.caller.cancel(slot)
    world.refuse("r1", kind=kind)
    eventually(lambda: world.home.fire() or world.names("r1") == ["a", "b"])
    world.reply("r1")
    assert (slot.settled, waiting.settled) == (0, 1)
    assert world.counted() == IDLE


def test_a_call_given_up_while_its_channel_is_opened(world: World) -> None:
    slots: list[FakeSlot] = []
    opened = world.adapter.open_channel

    def open_channel(*args: Any, **options: Any) -> FakeChannel:
        world.caller.cancel(slots[0])
        return opened(*args, **options)

    world.adapter.open_channel = open_channel  # type: ignore[method-assign]
    slots.append(FakeSlot())
    submit(world.caller, a_call("a"), slots[0])
    assert world.calls("r1") == []
    assert not slots[0].settled
    assert world.counted() == IDLE


def test_calls_that_wait_behind_one_that_is_given_up_while_it_is_sent_go_on(world: World) -> None:
    """No answer is due then from the replica, which handed one of them back and refused the other."""
    world.show(backend_entry("b", ["r1"], limit=8))
    opened = world.adapter.open_channel
    given_up = FakeSlot("given up")

    def open_channel(*args: Any, **options: Any) -> FakeChannel:
        world.adapter.open_channel = opened  # type: ignore[method-assign]
        world.submit("b")
        world.submit("c")
        world.refuse("r1", 0, kind=FailureKind.BUSY)
        world.refuse("r1", 1)
        world.caller.cancel(given_up)
        return opened(*args, **options)

    world.adapter.open_channel = open_channel  # type: ignore[method-assign]
    submit(world.caller, a_call("a"), given_up)
    channel = world.adapter.channels[0]  # the one that "a" had opened was not wanted any more
    eventually(lambda: world.home.fire() or len(channel.of_type(Call)) == 3)
    assert [name_of(call) for call in channel.of_type(Call)] == list("bcb")


# -- opening and closing channels --------------------------------------------------------------------------------------


class SlowAdapter(FakeAdapter):
    """Opens a channel to r1 only when it is told to, as one would that has to ask a cluster first."""

    def __init__(self) -> None:
        super().__init__()
        self.opening = threading.Semaphore(0)  # released when somebody begins to open one
        self.go_on = threading.Event()

    def open_channel(self, address: str, listener: Any, *, on_loop: bool) -> FakeChannel:
        if address == "fake:r1":
            self.opening.release()
            assert self.go_on.wait(PATIENCE_S)
        return super().open_channel(address, listener, on_loop=on_loop)


@pytest.fixture
def slow() -> Iterator[World]:
    world = World(SlowAdapter())
    world.show(backend_entry("b", ["r1"], limit=5))
    yield world
    world.adapter.go_on.set()


def test_while_a_channel_is_opened_others_are_routed_and_counted(slow: World) -> None:
    slow.show(
        backend_entry("b", ["r1"], limit=5), backend_entry("c", ["r2"]), endpoints={"e": {"b": 1.0}, "f": {"c": 1.0}}
    )
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.submit, "a")
        assert slow.adapter.opening.acquire(timeout=PATIENCE_S)
        assert slow.counted("b")["in_flight"] == 1
        queued = FakeSlot()
        queued.endpoint, queued.call = "nothing", a_call()
        slow.caller.submit(queued)
        assert isinstance(queued.error, EndpointNotFound)
        slow.caller.cancel(queued)
        assert not first.done()
        slow.adapter.go_on.set()
        first.result(PATIENCE_S)
    assert slow.names("r1") == ["a"]


def test_many_calls_at_once_open_one_channel(slow: World) -> None:
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(slow.submit, name) for name in "abcd"]
        assert slow.adapter.opening.acquire(timeout=PATIENCE_S)
        eventually(lambda: slow.counted()["in_flight"] == 4)
        slow.adapter.go_on.set()
        for call in calls:
            call.result(PATIENCE_S)
    assert len(slow.adapter.channels) == 1
    assert sorted(slow.names("r1")) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("how", ["closed", "found dead"])
def test_a_channel_that_is_opened_too_late_is_closed(slow: World, how: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(slow.submit, "a")
        assert slow.adapter.opening.acquire(timeout=PATIENCE_S)
        if how == "closed":
            slow.caller.close()
        else:
            slow.show(backend_entry("b", [], dead=["r1"]))
        slow.adapter.go_on.set()
        slot = calling.result(PATIENCE_S)
    assert [channel.closed for channel in slow.adapter.channels] == [True]
    if how == "closed":
        assert (type(slot.error), slot.settled) == (EngineClosed, 1)
    else:
        assert not slot.settled  # another replica is on its way
        slow.show(backend_entry("b", ["r2"]))
        assert slow.names("r2") == ["a"]
        assert slow.counted() == {**IDLE, "in_flight": 1}


def test_an_adapter_that_calls_back_while_it_opens_a_channel(world: World) -> None:
    inner: list[FakeSlot] = []
    opened = world.adapter.open_channel

    def open_channel(*args: Any, **options: Any) -> FakeChannel:
        if not inner:
            inner.append(FakeSlot())
            submit(world.caller, a_call("inner"), inner[0])
        return opened(*args, **options)

    world.adapter.open_channel = open_channel  # type: ignore[method-assign]
    world.show(backend_entry("b", ["r1"], limit=2))
    world.submit("outer")
    first, second = world.adapter.channels
    assert (first.closed, second.closed) == (False, True)
    assert [name_of(call) for call in first.of_type(Call)] == ["inner", "outer"]


def test_a_channel_is_closed_where_nobody_waits_for_the_lock(world: World) -> None:
    """Closing one takes system calls, and wakes threads."""
    world.submit("a")
    world.reply("r1")
    free: list[bool] = []
    channel = world.channel("r1")
    close = channel.close

    def close_slowly() -> None:
        with ThreadPoolExecutor(1) as pool:
            free.append(bool(pool.submit(world.caller.statistics).result(PATIENCE_S)))
        close()

    channel.close = close_slowly  # type: ignore[method-assign]
    world.show(backend_entry("b", ["r2"]))
    assert (free, channel.closed) == ([True], True)


def test_a_call_that_was_given_up_before_it_is_submitted_goes_nowhere(world: World) -> None:
    """A ref is given up while its arguments are still on their way."""
    world.show(backend_entry("b", ["r1"]), backend_entry("shadow", ["s1"]), shadows=(("shadow", 1.0),))
    slot = FakeSlot()
    world.caller.cancel(slot)
    submit(world.caller, a_call("a"), slot)
    assert world.adapter.channels == []
    assert (world.counted(), world.counted("shadow"), slot.settled) == (IDLE, IDLE, 0)
    assert world.caller.statistics()["endpoints"]["e"]["calls"] == 0


def test_a_call_that_is_given_up_lets_go_of_its_arguments(world: World) -> None:
    slot = world.submit("x" * 1000)
    world.caller.cancel(slot)
    assert slot.call.payload == b""


def test_a_call_whose_backend_is_gone_can_be_given_up(world: World) -> None:
    """It has left its queue by then."""
    world.submit("a")
    slot = world.submit("b")
    assert slot.queue is not None
    world.caller.begin_close(EngineClosed("the engine was shut down"))
    assert slot.queue is None
    world.caller.cancel(slot)


def test_a_call_given_up_before_it_is_sent(world: World) -> None:
    """A listener of the first call gives up the second, which was taken from the queue just before."""
    world.show(backend_entry("b", ["r1"], limit=2))
    world.adapter.unreachable = {"r1"}
    slots = [world.submit(name) for name in "ab"]
    world.adapter.unreachable = set()
    opened = world.adapter.open_channel

    def open_channel(*args: Any, **options: Any) -> FakeChannel:
        world.caller.cancel(slots[1])
        return opened(*args, **options)

    world.adapter.open_channel = open_channel  # type: ignore[method-assign]
    eventually(lambda: world.home.fire() or bool(world.adapter.channels))
    assert len(world.calls("r1")) == 1
    world.reply("r1")
    assert [slot.settled for slot in slots] == [1, 0]
    assert world.counted() == IDLE


def test_a_call_that_is_late_already_goes_nowhere(world: World) -> None:
    world.show(backend_entry("b", ["r1"]), endpoints={"e": {"b": 1.0}}, shadows=(("b", 1.0),))
    slot = FakeSlot("late")
    submit(world.caller, a_call("late")._replace(deadline=time.monotonic() - 1), slot)
    assert slot.settled == 0, "whoever waits looks at the clock as well"
    assert world.counted() == IDLE
    assert not world.adapter.channels
    world.caller.cancel(slot)


def test_a_call_that_got_late_while_queued_is_not_sent(world: World) -> None:
    first, late, last = world.submit("first"), FakeSlot("late"), FakeSlot("last")
    deadline = time.monotonic() + 0.05
    submit(world.caller, a_call("late")._replace(deadline=deadline), late)
    submit(world.caller, a_call("last"), last)
    eventually(lambda: time.monotonic() > deadline)
    world.reply("r1")
    assert first.settled == 1
    assert world.names("r1") == ["first", "last"]
    assert late.settled == 0
    world.caller.cancel(late)
    world.reply("r1")
    assert world.counted() == IDLE


def test_a_ref_expires_once_and_its_replica_is_told(world: World) -> None:
    ref = Ref(world.caller, "e")
    submit(world.caller, a_call("a"), ref)
    ref.expire_at(time.monotonic() + 0.5, 0.5)
    (call,) = world.calls("r1")
    assert [timer.delay_s for timer in world.home.timers] == [pytest.approx(0.5, abs=0.4)]
    world.home.fire()
    with pytest.raises(DeadlineExceeded, match=r"^endpoint 'e' did not answer within timeout_s=0.5$"):
        ref.result()
    assert world.channel("r1").of_type(Cancel) == [Cancel(call.id)]
    assert world.counted() == {**IDLE, "in_flight": 1}
    world.reply("r1")
    assert world.counted() == IDLE
    assert repr(ref) == "<Ref 'e' failed>"


def test_credit_goes_where_the_call_went(world: World) -> None:
    slot = world.submit("a")
    world.caller.credit(slot, 5)
    assert world.channel("r1").of_type(Credit) == [Credit(world.calls("r1")[0].id, 5)]
    world.channel("r1").die()
    world.caller.credit(slot, 5)
    assert isinstance(slot.error, ReplicaDied)
    world.caller.credit(slot, 5)
    assert slot.settled == 1


def test_a_message_that_is_too_large_fails_alone(world: World) -> None:
    world.submit("a")
    large, next_one = world.submit("b"), world.submit("c")
    channel = world.channel("r1")
    channel.raises = InvalidArgument("the message is 2 bytes")
    world.reply("r1")
    assert isinstance(large.error, InvalidArgument)
    assert large.error.__traceback__ is None
    assert world.names("r1") == ["a", "c"]
    world.reply("r1")
    assert next_one.settled == 1
    assert world.counted() == IDLE
    assert not channel.closed


# -- shadows ---------------------------------------------------------------------------------------------------------


def test_a_copy_is_sent_and_its_answer_dropped(world: World) -> None:
    world.show(backend_entry("b", ["r1"]), backend_entry("s", ["r2"]), shadows=(("s", 1.0),))
    slot = world.submit("a")
    assert world.names("r1") == world.names("r2") == ["a"]
    assert world.counted("s")["in_flight"] == 1
    call = world.calls("r2")[0]
    world.channel("r2").answer(Item(call.id, b"", b"1"))
    world.reply("r2")
    assert not slot.settled
    assert world.counted("s") == IDLE
    world.reply("r1")
    assert slot.settled == 1


def test_copies_wait_for_room_in_a_queue_of_their_own(world: World) -> None:
    shadowing = backend_entry("b", ["r1"], limit=9), backend_entry("s", ["r2"], max_queued=2)
    world.show(*shadowing, shadows=(("s", 1.0),), endpoints={"e": {"b": 1.0}})
    for name in "abcd":
        world.submit(name)
    assert world.names("r2") == ["a"]
    assert world.counted("s") == {**IDLE, "in_flight": 1, "queued_copies": 2, "dropped_copies": 1}
    assert world.names("r1") == list("abcd")
    for _ in "abc":
        world.reply("r2")
    assert world.names("r2") == list("abc")
    assert world.counted("s") == {**IDLE, "dropped_copies": 1}


def test_copies_wait_behind_the_calls_of_their_backend(world: World) -> None:
    """Also behind those that come later: a copy delays nobody."""
    shadowing = backend_entry("b", ["r1"], limit=9), backend_entry("s", ["r2"])
    world.show(*shadowing, shadows=(("s", 1.0),))
    world.submit("a")
    world.submit("copied")
    world.show(*shadowing, endpoints={"e": {"s": 1.0}})
    slot = world.submit("own")
    assert world.counted("s") == {**IDLE, "in_flight": 1, "queued": 1, "queued_copies": 1}
    world.reply("r2")
    assert world.names("r2") == ["a", "own"]
    world.reply("r2")
    assert slot.settled == 1
    assert world.names("r2") == ["a", "own", "copied"]


@pytest.mark.parametrize("how", ["late", "given up", "hopeless", "removed"])
def test_copies_do_not_wait_for_ever(world: World, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shadowing = backend_entry("b", ["r1"], limit=9), backend_entry("s", ["r2"])
    world.show(*shadowing, shadows=(("s", 1.0),))
    for name in "abc":
        world.submit(name)
    assert world.counted("s")["queued_copies"] == 2
    if how == "late":
        monkeypatch.setattr(replica_set, "_COPY_PATIENCE_S", -1.0)
        world.home.fire()
    elif how == "given up":
        world.caller.begin_close(EngineClosed("over"))
    elif how == "hopeless":
        world.show(shadowing[0], backend_entry("s", [], expecting=False), shadows=(("s", 1.0),))
    else:
        held = world.caller._router.replica_sets["s"]
        world.show(shadowing[0])
        assert not held.copies
        return
    assert world.counted("s") == {**IDLE, "in_flight": 0 if how == "hopeless" else 1, "dropped_copies": 2}
    assert not world.home.timers or how != "late", "and nobody looks again"


@pytest.mark.parametrize("how", ["refused", "handed back", "unreachable", "broken"])
def test_a_copy_that_is_not_taken_is_sent_again(world: World, how: str) -> None:
    world.show(backend_entry("b", ["r1"], limit=9), backend_entry("s", ["r2"], limit=9), shadows=(("s", 1.0),))
    if how == "unreachable":
        world.adapter.unreachable = {"r2"}
    elif how == "broken":
        world.submit("a")
        world.reply("r2")
        world.channel("r2").raises = ChannelClosed("gone")
    world.submit("b")
    if how == "refused":
        world.refuse("r2")
    elif how == "handed back":
        world.refuse("r2", kind=FailureKind.BUSY)
    else:
        assert world.counted("s") == {**IDLE, "queued_copies": 1}
        world.adapter.unreachable = set()
    eventually(lambda: world.home.fire() or world.counted("s")["in_flight"] == 1)
    assert world.names("r2")[-1] == "b"
    world.reply("r2")
    assert world.counted("s") == IDLE


def test_a_shadow_that_dies_harms_nobody(world: World) -> None:
    world.show(backend_entry("b", ["r1"]), backend_entry("s", ["r2"]), shadows=(("s", 1.0),))
    slot = world.submit("a")
    world.channel("r2").break_off()
    assert not slot.settled
    assert world.counted("s") == IDLE
    world.reply("r1")
    assert slot.heard and slot.error is None


def test_a_call_that_is_routed_again_is_counted_and_copied_once(world: World) -> None:
    backends = [backend_entry(tag, replicas, limit=9) for tag, replicas in (("b", []), ("s", ["r2"]), ("c", ["r3"]))]
    world.show(*backends, shadows=(("s", 1.0),))
    world.submit("a")
    assert world.names("r2") == ["a"]
    world.show(*backends[1:], endpoints={"e": {"c": 1.0}}, shadows=(("s", 1.0),))
    assert world.names("r3") == ["a"]
    assert world.names("r2") == ["a"]
    assert world.caller.statistics()["endpoints"] == {"e": {"calls": 1}}


# -- newer snapshots -------------------------------------------------------------------------------------------------


def test_calls_without_a_backend_are_routed_again(world: World) -> None:
    slots = [world.submit(name) for name in "abc"]
    world.show(backend_entry("c", ["r2"], limit=2))
    assert world.names("r2") == ["b", "c"]
    world.reply("r1")  # what is in flight finishes where it is
    assert slots[0].settled == 1
    assert world.channel("r1").closed


def test_calls_that_are_routed_again_go_before_those_that_came_later(world: World) -> None:
    backends = [backend_entry("b", ["r1"]), backend_entry("c", ["r2"])]
    world.show(*backends)
    world.submit("a")
    world.submit("b")
    world.show(*backends, endpoints={"e": {"c": 1.0}})
    world.submit("c")
    world.submit("d")
    world.show(backends[1])
    for _ in range(3):
        world.reply("r2")
    assert world.names("r2") == ["c", "b", "d"]


def test_calls_without_an_endpoint_fail(world: World) -> None:
    world.submit("a")
    slot = world.submit("b")
    world.show(backend_entry("b", ["r1"]), endpoints={"other": {"b": 1.0}})
    assert not slot.settled  # its backend still is
    world.show()
    assert isinstance(slot.error, EndpointNotFound)


def test_a_new_replica_takes_what_waits(world: World) -> None:
    for name in "abc":
        world.submit(name)
    world.show(backend_entry("b", ["r1", "r2"]))
    assert world.names("r2") == ["b"]
    assert world.counted() == {**IDLE, "queued": 1, "in_flight": 2}


def test_an_idle_replica_that_left_is_hung_up_on_at_once(world: World) -> None:
    world.submit("a")
    world.reply("r1")
    world.show(backend_entry("b", ["r2"]))
    assert world.channel("r1").closed


def test_a_busy_replica_that_left_is_hung_up_on_when_it_has_answered(world: World) -> None:
    world.show(backend_entry("b", ["r1"], limit=2))
    world.submit("a")
    world.submit("b")
    world.show(backend_entry("b", ["r2"]))
    world.reply("r1", 0)
    assert not world.channel("r1").closed
    world.reply("r1", 1)
    assert world.channel("r1").closed


def test_a_call_refused_by_a_backend_that_left_is_routed_again(world: World) -> None:
    slot = world.submit("a")
    world.show(backend_entry("c", ["r2"]))
    world.refuse("r1", kind=FailureKind.DRAINING)
    assert world.names("r2") == ["a"]
    world.reply("r2")
    assert slot.settled == 1


# -- the end ---------------------------------------------------------------------------------------------------------


def test_closing_fails_everything(world: World) -> None:
    slots = [world.submit(name) for name in "abc"]
    cancelled = world.submit("d")
    world.caller.cancel(cancelled)
    channel = world.channel("r1")
    error = EngineClosed("the engine is gone")
    world.caller.close(error)
    world.caller.close()
    assert [slot.error for slot in slots] == [error] * 3
    assert [slot.settled for slot in slots] == [1, 1, 1]
    assert not cancelled.settled
    assert channel.closed
    assert world.home.closed
    late = world.submit("e")
    assert late.error is error
    channel.answer(Reply(1, 0, b"", b""))  # a last answer that was on its way
    assert slots[0].settled == 1


def test_closing_by_itself_says_that_the_engine_was_shut_down(world: World) -> None:
    slot = world.submit("a")
    world.caller.close()
    assert str(slot.error) == "the engine was shut down"


def test_before_the_end_calls_in_flight_may_finish(world: World) -> None:
    running, waiting = world.submit("a"), world.submit("b")
    error = EngineClosed("the engine was shut down")
    world.caller.begin_close(error)
    assert (running.settled, waiting.error) == (0, error)
    assert world.submit("c").error is error
    world.reply("r1")
    assert running.heard
    assert world.counted() == IDLE


def test_a_call_refused_after_the_end_began_fails(world: World) -> None:
    slot = world.submit("a")
    error = EngineClosed("the engine was shut down")
    world.caller.begin_close(error)
    world.refuse("r1")
    assert slot.error is error
    assert world.counted() == IDLE


def test_a_call_whose_caller_is_closed_while_it_connects_is_told(world: World) -> None:
    """The end comes between a call's place and its channel."""
    slot = FakeSlot()
    original = world.caller._connect

    def connect(target: Any) -> Any:
        world.caller.close()
        return original(target)

    world.caller._connect = connect  # type: ignore[method-assign]
    submit(world.caller, a_call("a"), slot)
    assert isinstance(slot.error, EngineClosed)
    assert slot.settled == 1
    assert not world.adapter.channels


# -- many threads ----------------------------------------------------------------------------------------------------


class Replying:
    """Answers, refuses and streams on threads of its own, in any order."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.chance = random.Random(5)
        self.running = 0
        self.lock = threading.Lock()

    def heard(self, channel: FakeChannel, message: Any) -> None:
        if isinstance(message, Call):
            self.pool.submit(self.answer, channel, message)

    def answer(self, channel: FakeChannel, call: Call) -> None:
        luck = self.chance.random()
        if luck < 0.2:
            channel.answer(Failure(call.id, 0, FailureKind.REFUSED, b"", b""))
        elif luck < 0.4:
            channel.answer(Item(call.id, b"", b""))
            channel.answer(End(call.id, 0, False))
        else:
            channel.answer(Reply(call.id, 0, b"", b""))


class WaitingSlot(FakeSlot):
    __slots__ = ("over",)

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def deliver(self, message: Any) -> None:
        super().deliver(message)
        if not isinstance(message, Item):
            self.over.set()

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self.over.set()


@pytest.fixture
def impatient_interpreter() -> Iterator[None]:
    """Let threads take turns as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_nothing_is_lost_or_counted_twice_among_threads(impatient_interpreter: None) -> None:
    world = World()
    with ThreadPoolExecutor(4) as replicas, ThreadPoolExecutor(4) as callers, ThreadPoolExecutor(1) as timers:
        replying = Replying(replicas)
        opened = world.adapter.open_channel

        def open_channel(*args: Any, **options: Any) -> FakeChannel:
            channel = opened(*args, **options)
            channel.on_send = lambda message: replying.heard(channel, message)
            return channel

        world.adapter.open_channel = open_channel  # type: ignore[method-assign]
        world.show(backend_entry("b", ["r1", "r2", "r3"], limit=2))
        finished = threading.Event()

        def run_timers() -> None:
            while not finished.wait(0.001):
                world.home.fire()

        timing = timers.submit(run_timers)

        def make_calls(number: int) -> None:
            chance = random.Random(number)
            for _ in range(150):
                slot = WaitingSlot()
                submit(world.caller, a_call("x"), slot)
                if chance.random() < 0.3:
                    world.caller.cancel(slot)
                else:
                    assert slot.over.wait(PATIENCE_S)

        try:
            for making in [callers.submit(make_calls, number) for number in range(4)]:
                making.result(PATIENCE_S * 2)
            eventually(lambda: world.counted() == IDLE and "pending=0" in repr(world.caller))
        finally:
            finished.set()
        timing.result(PATIENCE_S)
    world.caller.close()


# -- signal handlers that raise ----------------------------------------------------------------------------------------


def each_strike(*backends: BackendEntry) -> Iterator[tuple[World, Callable[[Callable[[], object]], str]]]:
    """A fresh world for each place at which a handler can strike, and what strikes there while it runs a function."""
    for place in range(2000):
        world = World()
        world.show(*backends)
        passed = []

        def strike(function: Callable[[], object], place: int = place, passed: list[str] = passed) -> str:
            passed.append(struck(function, place, KeyboardInterrupt()))
            return passed[-1]

        yield world, strike
        world.caller.close()
        if not any(passed):
            assert place > 5
            return
    raise AssertionError("it never passed all places")


def settle(world: World, *replicas: str) -> None:
    """Let replicas answer all that they were sent, until nothing more is."""
    answered: set[int] = set()
    for _ in range(20):
        world.home.fire()
        for channel in world.adapter.channels:
            for call in channel.of_type(Call):
                if call.id not in answered and not channel.closed:
                    answered.add(call.id)
                    channel.answer(Reply(call.id, 0, b"", b"result"))


def test_an_answer_is_taken_wherever_it_is_interrupted() -> None:
    """It is told again then, as a channel does; the calls that waited for its place go on, each once."""
    for world, strike in each_strike(backend_entry("b", ["r1"])):
        slots = [world.submit(name) for name in "abcd"]
        answer = Reply(world.calls("r1")[0].id, 0, b"", b"result")
        where = strike(lambda world=world, answer=answer: world.channel("r1").answer(answer))
        if where:
            world.channel("r1").answer(answer)
        assert world.names("r1") == ["a", "b"], where
        settle(world)
        assert world.names("r1") == ["a", "b", "c", "d"], where
        assert all(slot.heard and slot.error is None for slot in slots), where
        assert world.counted() == IDLE, where
        assert "pending=0" in repr(world.caller), where


def test_a_refused_call_goes_elsewhere_wherever_that_is_interrupted() -> None:
    for world, strike in each_strike(backend_entry("b", ["r1", "r2"])):
        held, waiting = [world.submit("a"), world.submit("b")], world.submit("c")
        refusing = world.channel("r1" if "a" in world.names("r1") else "r2")
        (call,) = refusing.of_type(Call)
        refusal = Failure(call.id, 9, FailureKind.REFUSED, b"", b"")
        where = strike(lambda refusing=refusing, refusal=refusal: refusing.answer(refusal))
        if where:
            refusing.answer(refusal)
        settle(world)
        assert all(slot.heard and slot.error is None for slot in (*held, waiting)), where
        sent = sorted(name_of(call) for channel in world.adapter.channels for call in channel.of_type(Call))
        assert sent == ["a", "a", "b", "c"], where
        assert world.counted() == IDLE, where


@pytest.mark.parametrize("fate", ["begun", "not begun", "not opened"])
def test_a_lost_channel_is_seen_to_wherever_that_is_interrupted(fate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_set, "UNREACHABLE_S", 1e-6)
    for world, strike in each_strike(backend_entry("b", ["r1"])):
        held, waiting = world.submit("a"), world.submit("b")
        channel = world.channel("r1")
        channel.opened = fate != "not opened"
        channel.begun = 0 if fate == "not begun" else None
        where = strike(channel.break_off)
        if where:
            channel.break_off()
        for _ in range(20):
            settle(world)
        assert isinstance(held.error, ReplicaDied) if fate == "begun" else held.heard, where
        assert waiting.heard, where
        assert world.counted() == IDLE, where
        assert "pending=0" in repr(world.caller), where


_OUTSIDE = (__file__, "fakes.py", "threading.py", "<string>")


def test_a_call_that_moved_and_was_answered_is_not_sent_again_wherever_that_is_interrupted() -> None:
    """Another thread reads its answer while the one that told of the loss is still at it."""
    for place in range(2000):
        world = World()
        world.show(backend_entry("b", ["r1", "r2"]))
        slots = [world.submit(name) for name in "ab"]
        lost, other = world.adapter.channels
        other.answer(Reply(other.of_type(Call)[0].id, 0, b"", b"result"))

        def answer(message: Any, other: FakeChannel = other) -> None:
            if isinstance(message, Call):
                reading = threading.Thread(target=other.answer, args=(Reply(message.id, 0, b"", b"result"),))
                reading.start()
                reading.join()

        other.on_send = answer
        lost.opened = False
        where = struck(lost.break_off, place, KeyboardInterrupt(), spare=_OUTSIDE)
        if where:
            lost.break_off()
        eventually(lambda world=world, slots=slots: world.home.fire() or all(slot.settled for slot in slots))
        assert sorted(map(name_of, other.of_type(Call))) == ["a", "b"], where
        world.caller.close()
        if not where:
            return


def test_a_call_interrupted_while_it_is_made_is_given_up_and_no_other() -> None:
    for world, strike in each_strike(backend_entry("b", ["r1", "r2"])):
        other = world.submit("other")
        mine = FakeSlot("mine")
        where = strike(lambda world=world, mine=mine: submit(world.caller, a_call("mine"), mine))
        last = [world.submit("last") for _ in range(2)]
        settle(world)
        assert other.heard and all(slot.heard for slot in last), where
        assert mine.heard or where
        assert world.counted() == IDLE, where
        assert "pending=0" in repr(world.caller), where


def test_giving_up_may_be_interrupted() -> None:
    for world, strike in each_strike(backend_entry("b", ["r1"])):
        held, waiting = world.submit("a"), world.submit("b")
        strike(lambda world=world, held=held: world.caller.cancel(held))
        where = strike(lambda world=world, waiting=waiting: world.caller.cancel(waiting))
        if where:
            world.caller.cancel(held)
            world.caller.cancel(waiting)
        assert world.channel("r1").of_type(Cancel), where
        last = world.submit("last")
        settle(world)
        assert last.heard and not held.heard and not waiting.heard, where
        assert world.counted() == IDLE, where


@pytest.mark.parametrize(
    ("what", "timer"),
    [
        ("calls that wait", Caller._retry),
        ("a call that pauses", Caller._resume),
        ("copies that wait", Caller._retry_copies),
    ],
)
def test_timers_do_their_work_wherever_they_are_interrupted(
    what: str, timer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a loop nobody else does it. Only where one begins nothing of it has run yet."""
    monkeypatch.setattr(replica_set, "RETRY_S", 60.0)  # none is over before its time is made to be
    begins = f"{timer.__code__.co_filename}:{timer.__code__.co_firstlineno} "
    entry = dataclasses.replace(backend_entry("b", ["r1"]), max_retries=1)
    for world, strike in each_strike(entry):
        world.show(entry, backend_entry("s", ["r2"]), shadows=(("s", 1.0),) if "copies" in what else ())
        slots = [world.submit("a")]
        if "copies" in what:
            slots.append(world.submit("b"))
            make_room(world, "s")
        elif "pauses" in what:
            world.refuse("r1", kind=FailureKind.REPEATABLE)
        else:
            world.refuse("r1")
            make_room(world, "b")
        assert [one.function.__name__ for one in world.home.timers] == [timer.__name__]
        where = strike(world.home.fire)
        if where.startswith(begins) or where.endswith(" in fire"):
            continue
        settle(world)
        assert all(slot.heard and slot.error is None for slot in slots), where
        assert world.names("r1") == (["a", "b"] if "copies" in what else ["a", "a"]), where
        assert world.counted() == world.counted("s") == IDLE, where
        assert "pending=0" in repr(world.caller), where


def make_room(world: World, tag: str) -> None:
    """The replica of a backend has room from now on, and nobody has noticed yet."""
    its_set = world.caller._router.replica_sets[tag]
    for target in its_set.targets.values():
        target.limit = 2
        target.blocked_until = min(target.blocked_until, time.monotonic())
        its_set._file(target)
