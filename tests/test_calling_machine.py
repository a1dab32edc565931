"""A caller and its router, driven at random: calls, answers, refusals, deaths, snapshots and time, in any order.

After each step every call is in one place, counted once, and no call waits where there is room; at the end, once all is
well again, every call has been told one end, and nothing is left. Channels, timers and the clock are fakes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes import a_call
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.calling import caller as caller_module
from engine.calling.caller import Caller
from engine.calling.replica_set import ReplicaSet, Target
from engine.calling.retries import MOST_LOSSES
from engine.calling.slot import Slot
from engine.errors import (
    EndpointNotFound,
    EngineClosed,
    EngineError,
    NoReplica,
    Overloaded,
    ReplicaDied,
    ResourcesUnavailable,
)
from engine.seam.channel import ChannelClosed
from engine.seam.messages import AS_CONFIGURED, Call, End, Failure, FailureKind, Item, Message, Reply
from engine.seam.snapshot import BackendEntry, EndpointEntry, ReplicaEntry, RoutingSnapshot
from engine.testing.fakes import FakeAdapter, FakeChannel, FakeHome, FakeTimer

EXAMPLES = int(os.environ.get("ENGINE_TEST_EXAMPLES", "60"))
STEPS = 50
START = 1000.0
ENDPOINTS = ("e", "f")
BACKENDS = ("a", "b", "c")
BEGUN = (FailureKind.USER, FailureKind.ENGINE, FailureKind.REPEATABLE)
PICK = st.integers(0, 999)


class Clock:
    """Stands still unless it is put forward; what is to happen later happens then."""

    def __init__(self) -> None:
        self.now = START

    def monotonic(self) -> float:
        return self.now


class Home(FakeHome):
    """Timers that go off when their time has come."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.due: dict[FakeTimer, float] = {}

    def call_later(self, delay_s: float, function: Any, *args: Any) -> FakeTimer:
        timer = super().call_later(delay_s, function, *args)
        self.due[timer] = self._clock.now + delay_s
        return timer

    def put_forward(self, seconds: float) -> None:
        end = self._clock.now + seconds
        while ripe := [timer for timer in self.timers if self.due[timer] <= end]:
            timer = min(ripe, key=self.due.__getitem__)
            self._clock.now = max(self._clock.now, self.due.pop(timer))
            self.timers.remove(timer)
            if not timer.cancelled:
                timer.function(*timer.args)
        self._clock.now = end


FakeTimer.__hash__ = object.__hash__  # type: ignore[method-assign]


class Told(Slot):
    """A call, and what its caller and the replicas have made of it."""

    __slots__ = ("began", "ended", "lost", "machine", "name", "repeatable")

    def __init__(self, machine: Machine, name: str, endpoint: str, call: Call, shard_key: str | None) -> None:
        super().__init__(endpoint, call, shard_key)
        self.machine = machine
        self.name = name
        self.repeatable = call.retries > 0
        self.began: set[tuple[FakeChannel, int]] = set()  # where replicas have begun it, or may have
        self.lost = 0  # how often a replica died that had not
        self.ended: list[Any] = []

    def __repr__(self) -> str:
        return f"<{self.name} began={len(self.began)} ended={self.ended}>"

    def deliver(self, message: Any) -> None:
        assert not self.given_up, f"{self} was given up"
        assert not self.ended, f"{self} is told {message}, too"
        if not isinstance(message, Item):
            self.ended.append(message)

    def fail(self, error: EngineError) -> None:
        assert not self.given_up, f"{self} was given up"
        assert not self.ended, f"{self} is told {error!r}, too"
        self.machine.check_reason(self, error)
        self.ended.append(error)

    @property
    def alive(self) -> bool:
        return not (self.ended or self.given_up)


@dataclass
class Backend:
    """What the controller would know of a backend."""

    replicas: dict[str, ReplicaEntry] = field(default_factory=dict)
    limit: int = 2
    max_queued: int | None = None
    expecting: bool = True
    max_retries: int = 0
    dead: tuple[str, ...] = ()
    started: int = 0

    def entry(self, tag: str) -> BackendEntry:
        return BackendEntry(
            tag,
            tuple(self.replicas.values()),
            self.limit,
            self.max_queued,
            self.expecting,
            failures=0 if self.expecting else 3,
            dead=self.dead,
            max_retries=self.max_retries,
        )


class Channel(FakeChannel):
    """It may not take a call, or answer it while it is sent, as a channel does that leads to the same process."""

    instant = False
    refuses = False

    def send(self, message: Message) -> None:
        if isinstance(message, Call) and self.refuses:
            self.refuses = False
            raise ResourcesUnavailable("no descriptors")
        super().send(message)
        if isinstance(message, Call) and self.instant:
            self.opened = True
            self.answer(Reply(message.id, 0, b"", b""))


class Adapter(FakeAdapter):
    """Opens such channels."""

    instant = False
    opens_slowly = False

    def open_channel(self, address: str, listener: Any, *, on_loop: bool) -> FakeChannel:
        if address.removeprefix("fake:") in self.unreachable:
            raise ChannelClosed(f"nobody answers at {address}")
        channel = Channel(address, listener, on_loop=on_loop)
        channel.instant = self.instant
        channel.opened = not self.opens_slowly
        self.channels.append(channel)
        return channel


class Machine(RuleBasedStateMachine):
    """Drives one caller."""

    def __init__(self) -> None:
        super().__init__()
        self.clock: Clock = caller_module.time  # type: ignore[assignment]
        self.clock.now = START
        self.adapter = Adapter()
        self.home = Home(self.clock)
        self.snapshot = RoutingSnapshot(version=-1)
        self.caller = Caller(self.adapter, self.home, self)
        self.calls: list[Told] = []
        self.backends: dict[str, Backend] = {}
        self.endpoints: dict[str, EndpointEntry] = {}
        self.refused_by_system = False
        self.generation = 0
        self.answered: dict[FakeChannel, int] = {}  # the highest number of a call that was

    # -- the world -----------------------------------------------------------------------------------------------------

    @initialize(replicas=st.integers(1, 3), limit=st.integers(1, 3))
    def begin(self, replicas: int, limit: int) -> None:
        for tag in BACKENDS[:2]:
            self.backends[tag] = Backend(limit=limit)
            for _ in range(replicas):
                self._start(tag)
        for name in ENDPOINTS:
            self.endpoints[name] = EndpointEntry(name, None, ("GET",), (("a", 1.0),))
        self._publish(True)

    def _start(self, tag: str) -> None:
        backend = self.backends[tag]
        backend.started += 1
        name = f"{tag}#{backend.started}"
        backend.replicas[name] = ReplicaEntry(name, f"fake:{name}@{self.generation}")

    def _publish(self, push: bool) -> None:
        entries = {tag: backend.entry(tag) for tag, backend in self.backends.items()}
        self.snapshot = RoutingSnapshot(self.snapshot.version + 1, dict(self.endpoints), entries)
        if push:
            self.caller.apply(self.snapshot)

    def check_reason(self, call: Told, error: EngineError) -> None:
        pictures = (self.snapshot, self.caller._router.snapshot)
        entries = [entry for picture in pictures for entry in picture.backends.values()]
        reasons = {
            ReplicaDied: bool(call.began) or call.lost >= MOST_LOSSES or self._may_run(call),
            NoReplica: any(not entry.replicas and not entry.expecting for entry in entries),
            Overloaded: any(entry.max_queued_requests is not None for entry in entries)
            or call.call.deadline is not None,
            EndpointNotFound: any(call.endpoint not in picture.endpoints for picture in pictures),
            ResourcesUnavailable: self.refused_by_system,
            EngineClosed: self.snapshot.closing,
        }
        assert reasons.get(type(error)), f"{call} failed with {error!r} for no reason"

    # -- calls ---------------------------------------------------------------------------------------------------------

    @rule(
        endpoint=st.sampled_from(ENDPOINTS),
        timeout_s=st.sampled_from([None, None, 0.02, 5.0]),
        retries=st.sampled_from([AS_CONFIGURED, AS_CONFIGURED, 0, 1, 2]),
        shard_key=st.sampled_from([None, "k"]),
        count=st.integers(1, 6),
    )
    def call(self, endpoint: str, timeout_s: float | None, retries: int, shard_key: str | None, count: int) -> None:
        for _ in range(count):
            deadline = None if timeout_s is None else self.clock.now + timeout_s
            one = a_call(len(self.calls))._replace(deadline=deadline, retries=retries)
            call = Told(self, f"call {len(self.calls)}", endpoint, one, shard_key)
            call.repeatable = retries > 0 or (
                retries == AS_CONFIGURED and any(one.max_retries for one in self.backends.values())
            )
            self.calls.append(call)
            self.caller.submit(call)

    @precondition(lambda self: self._living())
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        living = self._living()
        self.caller.cancel(living[pick % len(living)])

    @rule(seconds=st.sampled_from([0.001, 0.006, 0.02, 0.06, 0.3, 1.5, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.home.put_forward(seconds)
        for call in self._living():
            if call.call.deadline is not None and call.call.deadline <= self.clock.now:
                self.caller.cancel(call)  # which is what those do that wait for an answer

    # -- replicas ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self._held())
    @rule(pick=PICK, load=st.integers(0, 3), kind=st.sampled_from(["reply", "reply", "stream", *range(6)]))
    def answer(self, pick: int, load: int, kind: Any) -> None:
        held = self._held()
        channel, number = held[pick % len(held)]
        self._answer(channel, number, load, kind)

    def _answer(self, channel: FakeChannel, number: int, load: int, kind: Any) -> None:
        channel.opened = True
        call = self._call_of(channel, number)
        if kind in ("reply", "stream", *BEGUN):
            self.answered[channel] = max(self.answered.get(channel, 0), number)
            self._began(call, channel, number)
        if kind == "stream":
            channel.answer(Item(number, b"", b""))
            channel.answer(End(number, load, False))
        elif kind == "reply":
            channel.answer(Reply(number, load, b"", b""))
        else:
            channel.answer(Failure(number, load, kind, b"", b""))

    @precondition(lambda self: self._open())
    @rule(pick=PICK, begun=st.none() | st.integers(0, 4), noticed=st.booleans())
    def a_replica_dies(self, pick: int, begun: int | None, noticed: bool) -> None:
        open_ = self._open()
        channel = open_[pick % len(open_)]
        sent = sorted(channel.unanswered)
        if begun is not None:
            channel.begun = max(self.answered.get(channel, 0), *sent[:begun], 0)
        for number in sent:
            if channel.opened and channel.may_have_begun(number):
                self._began(self._call_of(channel, number), channel, number)
            elif (call := self._call_of(channel, number)) is not None:
                call.lost += 1
        if noticed:
            channel.break_off()
        else:
            channel.die()

    @precondition(lambda self: self._open())
    @rule(pick=PICK)
    def the_system_refuses(self, pick: int) -> None:
        open_ = self._open()
        open_[pick % len(open_)].refuses = True
        self.refused_by_system = True

    @rule(pick=PICK)
    def a_replica_cannot_be_reached(self, pick: int) -> None:
        addresses = [one.address for backend in self.backends.values() for one in backend.replicas.values()]
        if addresses:
            self.adapter.unreachable ^= {addresses[pick % len(addresses)].removeprefix("fake:")}

    @rule(instant=st.booleans(), opens_slowly=st.booleans())
    def channels_are_quick_or_slow(self, instant: bool, opens_slowly: bool) -> None:
        self.adapter.instant, self.adapter.opens_slowly = instant, opens_slowly
        for channel in self._open():
            channel.instant = instant

    # -- snapshots -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.backends)
    @rule(pick=PICK, push=st.booleans())
    def a_replica_starts(self, pick: int, push: bool) -> None:
        self._start(self._backend(pick))
        self._publish(push)

    @precondition(lambda self: any(backend.replicas for backend in self.backends.values()))
    @rule(pick=PICK, died=st.booleans(), push=st.booleans())
    def a_replica_leaves(self, pick: int, died: bool, push: bool) -> None:
        tag = self._backend(pick)
        backend = self.backends[tag]
        if not backend.replicas:
            return
        name = list(backend.replicas)[pick % len(backend.replicas)]
        del backend.replicas[name]
        if died:
            backend.dead = (*backend.dead, name)
        self._publish(push)

    @precondition(lambda self: self.backends)
    @rule(
        pick=PICK,
        limit=st.integers(1, 3),
        max_queued=st.sampled_from([None, 0, 2]),
        expecting=st.booleans(),
        max_retries=st.integers(0, 1),
        push=st.booleans(),
    )
    def a_configuration_changes(
        self, pick: int, limit: int, max_queued: int | None, expecting: bool, max_retries: int, push: bool
    ) -> None:
        backend = self.backends[self._backend(pick)]
        backend.limit, backend.max_queued, backend.expecting = limit, max_queued, expecting
        backend.max_retries = max_retries
        if max_retries:
            for call in self.calls:
                call.repeatable |= call.call.retries == AS_CONFIGURED
        self._publish(push)

    @rule(name=st.sampled_from(ENDPOINTS), share=st.sampled_from([0.0, 0.5, 1.0]), pick=PICK, push=st.booleans())
    def traffic_changes(self, name: str, share: float, pick: int, push: bool) -> None:
        tags = sorted(self.backends)
        if not tags:
            return
        one, other = tags[pick % len(tags)], tags[(pick + 1) % len(tags)]
        weights = {other: 1.0 - share, one: share} if one != other else {one: 1.0}
        shadows = ((other, 1.0),) if pick % 3 == 0 else ()
        self.endpoints[name] = EndpointEntry(name, None, ("GET",), tuple(sorted(weights.items())), shadows)
        self._publish(push)

    @rule(name=st.sampled_from(ENDPOINTS), push=st.booleans())
    def an_endpoint_is_deleted(self, name: str, push: bool) -> None:
        self.endpoints.pop(name, None)
        self._publish(push)

    @rule(pick=PICK, push=st.booleans())
    def a_backend_is_created(self, pick: int, push: bool) -> None:
        tag = BACKENDS[pick % len(BACKENDS)]
        if tag not in self.backends:
            self.generation += 1
            self.backends[tag] = Backend()
            self._start(tag)
            self._publish(push)

    @rule(pick=PICK, push=st.booleans())
    def a_backend_is_deleted(self, pick: int, push: bool) -> None:
        used = {tag for entry in self.endpoints.values() for tag, _ in (*entry.traffic, *entry.shadows)}
        unused = sorted(set(self.backends) - used)
        if unused:
            del self.backends[unused[pick % len(unused)]]
            self._publish(push)

    # -- what must hold ------------------------------------------------------------------------------------------------

    @invariant()
    def every_call_is_in_one_place(self) -> None:
        targets = self._targets()
        for call in self.calls:
            holding = [target for target in targets if call in target.holds]
            waiting = [one for one in self._replica_sets() if call in one.waiting or call in one.pausing]
            assert len(holding) + len(waiting) <= 1, f"{call} is in {holding} and {waiting}"
            if call.ended:
                assert not holding and not waiting, f"{call} is over, and in {holding} and {waiting}"
            elif not call.given_up:
                deadline = call.call.deadline
                late = deadline is not None and deadline <= self.clock.now
                assert holding or waiting or late, f"{call} is lost"
            else:  # one that was to be repeated is dropped when its pause is over
                assert not any(call in one.waiting for one in waiting), f"{call} was given up, and waits"
            assert len(call.began) <= 1 or call.repeatable, f"{call} ran twice"

    @invariant()
    def what_is_held_is_counted(self) -> None:
        for target in self._targets():
            assert target.in_flight == len(target.holds), target
            assert target.in_flight >= 0, target

    @invariant()
    def nobody_waits_where_there_is_room(self) -> None:
        for one in self._replica_sets():
            if one.waiting:
                assert not (one._idle or one._roomy or one._aside), one
                if one.some_blocked(self.clock.now):
                    assert one.retry_scheduled, f"{one} is never looked at again"
            if one.retry_scheduled:
                functions = [timer.function for timer in self.home.timers if one in timer.args]
                assert self.caller._retry in functions, f"{one}: the timer is lost"

    def teardown(self) -> None:
        """All becomes well: then every call comes to its end, and nothing is left."""
        if not self.endpoints and not self.backends:
            return  # it did not even begin
        self.adapter.unreachable.clear()
        self.adapter.instant = False
        for tag in BACKENDS:
            self.backends.setdefault(tag, Backend())
            backend = self.backends[tag]
            backend.expecting = True
            backend.max_queued = None
            if not backend.replicas:
                self._start(tag)
        for name in ENDPOINTS:
            self.endpoints.setdefault(name, EndpointEntry(name, None, ("GET",), (("a", 1.0),)))
        self._publish(True)
        for _ in range(500):
            for channel in self.adapter.channels:
                channel.instant = channel.refuses = False
                channel.watch()
            for channel, number in self._held():
                self._answer(channel, number, 0, "reply")
            resting = not any(one.copies or one.pausing for one in self._replica_sets())
            if resting and not self._living() and not self.caller._pending:
                break
            self.time_passes(0.1)
        assert not self._living(), "some calls never end"
        self.every_call_is_in_one_place()
        self.what_is_held_is_counted()
        nothing = {"queued": 0, "in_flight": 0, "queued_copies": 0}
        for tag, counted in self.caller.statistics()["backends"].items():
            assert counted | nothing == counted, f"{tag}: {counted}"
        assert not self.caller._pending
        assert not self.caller.held()
        assert not [target for target in self.caller._channels.values() if target.gone]
        self.caller.close()
        assert all(channel.closed for channel in self.adapter.channels), "a channel is left open"

    # -- looking -------------------------------------------------------------------------------------------------------

    def _living(self) -> list[Told]:
        return [call for call in self.calls if call.alive]

    def _open(self) -> list[Channel]:
        return [channel for channel in self.adapter.channels if not channel.closed and channel._died_of is None]

    def _held(self) -> list[tuple[Channel, int]]:
        return [(channel, number) for channel in self._open() for number in channel.unanswered]

    def _call_of(self, channel: FakeChannel, number: int) -> Told | None:
        """The call that was sent under a number; None for a copy."""
        return next((call for call in self.calls if call.call_id == number and call.channel is channel), None)

    def _began(self, call: Told | None, channel: FakeChannel, number: int) -> None:
        if call is not None:
            call.began.add((channel, number))

    def _may_run(self, call: Told) -> bool:
        """Whether it is with a replica that was found dead, of which nobody knows more."""
        channel = call.channel
        return channel is not None and call.target.dead and channel.opened and channel.may_have_begun(call.call_id)

    def _backend(self, pick: int) -> str:
        tags = sorted(self.backends)
        return tags[pick % len(tags)]

    def _replica_sets(self) -> list[ReplicaSet]:
        return list(self.caller._router.replica_sets.values())

    def _targets(self) -> set[Target]:
        known = {target for one in self._replica_sets() for target in one.targets.values()}
        return known | set(self.caller._channels.values()) | {call.target for call in self.calls if call.target}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(caller_module, "time", clock)
    yield clock


@pytest.mark.usefixtures("clock")
def test_calls_answers_deaths_and_snapshots_in_any_order() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize="ENGINE_TEST_EXAMPLES" not in os.environ,
            database=None,
            report_multiple_bugs=False,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
