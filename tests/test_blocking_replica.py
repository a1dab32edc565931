"""A replica of plain callables, with its host and its callers replaced by the test."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeServiceLoop, Telling, http_call, outcome, python_call

from engine import accept_batch
from engine.config import BackendConfig
from engine.errors import (
    BackendError,
    DeadlineExceeded,
    InvalidArgument,
    MethodNotFound,
    NotSerializable,
    ResultNotSerializable,
)
from engine.seam.channel import ChannelClosed
from engine.seam.control_messages import Answered, Drain, Ping, Pong, Reconfigure, Reconfigured, Unhealthy
from engine.seam.messages import ANY_CALL, INITIAL_CREDIT, Call, Cancel, Credit, End, Failure, FailureKind, Item, Reply
from engine.seam.serialization import dumps, unpack_exception
from engine.serving import blocking_replica
from engine.serving import replica as replica_module
from engine.serving.blocking_replica import BlockingReplica
from engine.serving.user_callable import UserCallable
from engine.testing.fakes import FakeChannel
from engine.testing.instruments import eventually

PAST = -1.0


class World:
    """A replica, its host, one caller and the controller."""

    def __init__(self, target: Any, *init_args: Any, **options: Any) -> None:
        self.told: list[Any] = []
        self.loop = FakeServiceLoop()
        self.loop.channels = 1
        user = UserCallable("b", target, init_args, {})
        self.replica = BlockingReplica("b", user, BackendConfig(**options), self.told.append, debug=False)
        self.replica.attach(self.loop)
        self.caller = FakeChannel("caller", self.replica)

    def run(self) -> None:
        """Let the replica work until there is nothing to do."""
        while self.replica.run_next() == 0.0:
            pass

    def ask(self, *messages: Any) -> list[Any]:
        """Send messages, let the replica work, and return what it answers."""
        before = len(self.caller.sent)
        for message in messages:
            self.caller.answer(message)
        self.run()
        return self.caller.sent[before:]


def double(request: Any) -> Any:
    return 2 * request.data


@pytest.fixture
def worlds() -> Iterator[Any]:
    made: list[World] = []

    def make(*args: Any, **options: Any) -> World:
        made.append(World(*args, **options))
        return made[-1]

    yield make
    for world in made:
        world.replica.close()


# -- calls -----------------------------------------------------------------------------------------------------------


def test_calls_are_answered_in_order(worlds: Any) -> None:
    world = worlds(double)
    answers = world.ask(*[python_call(number, number) for number in range(3)])
    assert [(answer.id, outcome(answer), answer.load) for answer in answers] == [(0, 0, 2), (1, 2, 1), (2, 4, 0)]
    assert world.loop.steps == ["out", "in"] * 3
    assert repr(world.replica) == "<BlockingReplica b open held=0/8>"
    assert world.replica.run_next() is None


@pytest.mark.parametrize("batched", [False, True])
def test_a_call_has_begun_before_user_code_sees_anything_of_it(worlds: Any, batched: bool) -> None:
    world = worlds(accept_batch(lambda requests: requests) if batched else double, max_batch_size=2)
    telling = Telling(world.caller)
    world.ask(*[python_call(number, [telling]) for number in (1, 2, 3)])
    assert telling.told == [[1], [1, 2], [1, 2, 3]]


def test_a_call_of_a_caller_that_takes_it_elsewhere_is_not_run(worlds: Any) -> None:
    calls: list[Any] = []
    world = worlds(counting(calls))
    world.caller.answer(python_call(1, 1))
    world.caller.close()
    world.run()
    assert calls == []
    assert repr(world.replica) == "<BlockingReplica b open held=0/8>"


# -- long calls ------------------------------------------------------------------------------------------------------


def informed(call: Call) -> Call:
    """Its caller knows that the replica is at a long one."""
    return call._replace(informed=True)


class Working:
    """A backend that is found at its work: while it runs, the others' messages come in."""

    def __init__(self, meanwhile: Any) -> None:
        self.meanwhile = meanwhile

    def __call__(self, request: Any) -> Any:
        if request.data == "long":
            self.meanwhile()
        return request.data

    @accept_batch
    def many(self, requests: Any) -> Any:
        return requests


def test_those_that_wait_for_a_long_call_are_handed_back(worlds: Any) -> None:
    def meanwhile() -> None:
        world.replica.delayed()
        assert world.caller.sent == [
            Failure(number, load, FailureKind.BUSY, b"", b"") for number, load in ((2, 2), (3, 1))
        ]

    world = worlds(Working, meanwhile)
    world.ask(python_call(1, "long"), python_call(2), python_call(3))
    assert [(type(answer), answer.id) for answer in world.caller.sent[2:]] == [(Reply, 1)]


def test_a_call_that_is_cancelled_before_it_began_gives_its_place_back_at_once(worlds: Any) -> None:
    def meanwhile() -> None:
        world.caller.answer(Cancel(2))
        assert [(type(answer), answer.id, answer.load) for answer in world.caller.sent] == [(Failure, 2, 2)]

    world = worlds(Working, meanwhile)
    world.ask(python_call(1, "long"), python_call(2), python_call(3))
    assert [(type(answer), answer.id) for answer in world.caller.sent[1:]] == [(Reply, 1), (Reply, 3)]


def test_whoever_comes_again_waits_for_the_long_call(worlds: Any) -> None:
    """It was told, so it knows of no better place. Who was not told is handed back, whether it waited or comes now."""
    other = FakeChannel("other")

    def meanwhile() -> None:
        world.replica.delayed()
        world.caller.answer(informed(python_call(3, "again")))
        world.replica._began = PAST  # as if it had run for long
        world.replica.received(other, python_call(9, "new"))
        world.replica.delayed()
        assert [(message.id, message.kind) for message in other.sent] == [(9, FailureKind.BUSY)]
        world.replica.received(other, informed(python_call(10, "new, again")))

    world = worlds(Working, meanwhile)
    world.ask(python_call(1, "long"), python_call(2))
    assert [(type(message), message.id) for message in world.caller.sent] == [(Failure, 2), (Reply, 1), (Reply, 3)]
    assert [(type(message), message.id) for message in other.sent[1:]] == [(Reply, 10)]


def test_what_was_on_its_way_when_its_caller_was_told_is_handed_back_too(worlds: Any) -> None:
    def meanwhile() -> None:
        world.replica._began = PAST
        world.replica.delayed()
        world.caller.answer(python_call(3))
        world.caller.answer(informed(python_call(4)))

    world = worlds(Working, meanwhile)
    world.ask(python_call(1, "long"), python_call(2))
    assert [(type(message), message.id) for message in world.caller.sent] == [
        (Failure, 2),
        (Failure, 3),
        (Reply, 1),
        (Reply, 4),
    ]


def test_what_was_told_of_one_long_call_says_nothing_of_the_next(worlds: Any) -> None:
    world = worlds(Working, lambda: world.replica.delayed())
    world.ask(python_call(1, "long"), python_call(2))
    world.ask(python_call(3, "long"), python_call(4))
    assert [(type(message), message.id) for message in world.caller.sent] == [
        (Failure, 2),
        (Reply, 1),
        (Failure, 4),
        (Reply, 3),
    ]


def test_a_call_that_waited_for_a_long_one_once_does_not_go_away_for_the_next(worlds: Any) -> None:
    def meanwhile() -> None:
        world.replica.delayed()
        if len(world.caller.sent) == 1:
            world.caller.answer(informed(python_call(3, "long")))
            world.caller.answer(informed(python_call(4)))

    world = worlds(Working, meanwhile)
    world.ask(python_call(1, "long"), python_call(2))
    assert [message.id for message in world.caller.sent] == [2, 1, 3, 4]


def test_a_batch_that_gathers_is_not_handed_back(worlds: Any) -> None:
    world = worlds(Working, lambda: world.replica.delayed(), max_batch_size=4)
    answers = world.ask(python_call(1, "long"), python_call(2, 2, method="many"), python_call(3, 3, method="many"))
    assert [(type(answer), answer.id) for answer in answers] == [(Reply, 1), (Reply, 2), (Reply, 3)]


def test_a_replica_that_leaves_finishes_what_waits(worlds: Any) -> None:
    def meanwhile() -> None:
        world.replica.control(Drain(20.0))
        world.replica.delayed()

    world = worlds(Working, meanwhile)
    world.ask(python_call(1, "long"), python_call(2))
    assert [(type(message), message.id) for message in world.caller.sent] == [(Reply, 1), (Reply, 2)]


def test_a_caller_that_left_is_not_remembered_as_told(worlds: Any) -> None:
    def meanwhile() -> None:
        world.replica.delayed()
        assert world.replica._told
        world.caller.break_off()
        assert not world.replica._told

    world = worlds(Working, meanwhile)
    world.ask(python_call(1, "long"), python_call(2))


class Methods:
    def __init__(self, base: int = 0) -> None:
        self.base = base

    def add(self, first: int, second: int = 0) -> int:
        return self.base + first + second

    async def later(self) -> str:
        return "later"

    def fails(self) -> None:
        raise LookupError("no luck")

    def leaves(self) -> None:
        raise SystemExit(3)

    def unpicklable(self) -> Any:
        return iter([1]), (value for value in "x")


def test_methods_take_arguments_as_they_were_given(worlds: Any) -> None:
    world = worlds(Methods, 100)
    (answer,) = world.ask(python_call(1, 20, second=3, method="add"))
    assert outcome(answer) == 123


@pytest.mark.parametrize(
    ("method", "kind", "error"),
    [
        ("fails", FailureKind.USER, LookupError),
        ("nothing", FailureKind.ENGINE, MethodNotFound),
        ("_private", FailureKind.ENGINE, MethodNotFound),
        ("unpicklable", FailureKind.ENGINE, ResultNotSerializable),
    ],
)
def test_a_call_that_fails_gives_its_slot_back(worlds: Any, method: str, kind: int, error: type[Exception]) -> None:
    world = worlds(Methods, max_concurrent_queries=1)
    for number in range(3):
        (answer,) = world.ask(python_call(number, method=method))
        assert (answer.id, answer.load, answer.kind) == (number, 0, kind)
        assert isinstance(outcome(answer), error)


def test_a_call_that_would_leave_the_process_only_fails(worlds: Any) -> None:
    world = worlds(Methods)
    (answer,) = world.ask(python_call(1, method="leaves"))
    assert isinstance(answer, Failure)
    assert outcome(world.ask(python_call(2, 1, method="add"))[0]) == 1


def test_an_argument_that_cannot_be_rebuilt(worlds: Any) -> None:
    world = worlds(double)
    (answer,) = world.ask(python_call(1)._replace(payload=b"garbage"))
    assert isinstance(outcome(answer), NotSerializable)
    assert "the argument cannot be rebuilt in the replica" in str(outcome(answer))


def test_a_stray_coroutine_is_awaited(worlds: Any) -> None:
    def returns_a_coroutine(request: Any) -> Any:
        return Methods().later()

    world = worlds(returns_a_coroutine)
    assert [outcome(answer) for answer in world.ask(python_call(1), python_call(2))] == ["later", "later"]


# -- slots -----------------------------------------------------------------------------------------------------------


def test_a_full_replica_refuses(worlds: Any) -> None:
    world = worlds(double, max_concurrent_queries=2)
    for number in range(3):
        world.caller.answer(python_call(number, number))
    assert world.caller.sent == [Failure(2, 2, FailureKind.REFUSED, b"", b"")]
    world.run()
    assert [answer.id for answer in world.caller.sent[1:] if not isinstance(answer, Credit)] == [0, 1]
    assert world.caller.sent[2] == Credit(ANY_CALL, 2), "it is told as soon as there is a place"
    assert outcome(world.ask(python_call(3, 3))[0]) == 6


def test_places_go_round_the_callers_that_were_refused(worlds: Any) -> None:
    world = worlds(double, max_concurrent_queries=2)
    flood, other, third = world.caller, FakeChannel("other", world.replica), FakeChannel("third", world.replica)
    for number in range(2):
        flood.answer(python_call(number, number))
    other.answer(python_call(0, 10))
    third.answer(python_call(0, 20))
    assert [channel.of_type(Failure) for channel in (other, third)] == [
        [Failure(0, 2, FailureKind.REFUSED, b"", b"")]
    ] * 2
    assert world.replica.run_next() == 0.0  # one of the two is answered
    assert other.of_type(Credit) == [Credit(ANY_CALL, 1)]
    flood.answer(python_call(2, 2))
    assert flood.of_type(Failure)[-1] == Failure(2, 1, FailureKind.REFUSED, b"", b""), "the place is kept for another"
    other.answer(python_call(1, 10))
    assert repr(world.replica) == "<BlockingReplica b open held=2/2>"
    world.run()
    assert outcome(other.of_type(Reply)[-1]) == 20
    assert [len(channel.of_type(Credit)) for channel in (other, third, flood)] == [2, 1, 0]
    third.answer(Cancel(ANY_CALL))  # it has none any more
    assert flood.of_type(Credit) == [Credit(ANY_CALL, 1)]
    flood.break_off()
    other.answer(Cancel(ANY_CALL))
    assert world.replica._turns is None
    assert repr(world.replica) == "<BlockingReplica b open held=0/2>"


def test_what_is_handed_back_is_no_answer(worlds: Any) -> None:
    """Else a backend that dies of each call would pass for one that works, and be started again without a pause."""

    def work(request: Any) -> Any:
        world.replica._began -= 1.0  # it has taken long
        world.caller.answer(python_call(2, 2))
        return len(world.told)

    world = worlds(work)
    handed_back, answer = world.ask(python_call(1, 1))
    assert handed_back.kind == FailureKind.BUSY
    assert outcome(answer) == 0
    assert world.told == [Answered()]


def test_one_that_outlasts_its_cancellation_hands_back_what_waits_before_it_is_ended(worlds: Any) -> None:
    """Where nobody else knows what had begun, say over TCP, its callers could not tell that these had not."""

    def work(request: Any) -> None:
        replica = world.replica
        [job] = [job for job in replica._jobs.values() if job.call.id == 1]
        told = threading.Thread(target=replica._outlasted, args=(job, 0.5))
        told.start()
        eventually(lambda: replica._hangs is not None)
        assert not any(isinstance(body, Unhealthy) for body in world.told)
        replica.delayed()  # as whoever reads meanwhile does once it is woken
        told.join()
        assert [(failure.id, failure.kind) for failure in world.caller.of_type(Failure)] == [
            (2, FailureKind.DRAINING),
            (1, FailureKind.ENGINE),
        ]

    world = worlds(work)
    world.ask(python_call(1), python_call(2))
    reason = "has gone on with backend 'b' for 0.5 s after it was cancelled"
    assert [body for body in world.told if isinstance(body, Unhealthy)] == [Unhealthy(reason, hung=True)]


@pytest.mark.parametrize("then", ["another call", "nothing"])
def test_one_that_ends_as_its_time_is_over_costs_no_replica(worlds: Any, then: str) -> None:
    def run(request: Any) -> Any:
        if request.data == 2:
            replica._outlasted(job, 0.5)
        return request.data

    world = worlds(run)
    replica = world.replica
    world.caller.answer(python_call(1, 1))
    (job,) = replica._jobs.values()
    world.run()
    if then == "nothing":
        replica._outlasted(job, 0.5)
    else:
        (answer,) = world.ask(python_call(2, 2))
        assert outcome(answer) == 2
    assert not any(isinstance(body, Unhealthy) for body in world.told)


def test_what_waits_is_bounded_in_bytes(worlds: Any) -> None:
    world = worlds(lambda request: len(request.data), max_queued_bytes=5000)
    replica = world.replica
    for number, size in enumerate(
        (10_000, 10_000, 10)
    ):  # what runs next does not wait, nor is what waits alone too large
        world.caller.answer(python_call(number, bytes(size)))
    assert world.caller.sent == [Failure(2, 2, FailureKind.REFUSED, b"", b"")]
    assert 10_000 < replica._waiting_bytes < 10_200
    replica.run_next()
    assert world.caller.of_type(Credit) == [], "there is no room yet"
    replica.run_next()
    assert world.caller.of_type(Credit) == [Credit(ANY_CALL, 8)]
    assert replica._waiting_bytes == 0
    for number, size in enumerate((10, 3000, 3000, 1000)):
        world.caller.answer(python_call(number, bytes(size)))
    refused, waiting = world.caller.of_type(Failure)[1:], replica._waiting_bytes
    assert ([failure.id for failure in refused], 4000 < waiting < 4400) == ([2], True)
    world.caller.answer(Cancel(1))
    assert 1000 < replica._waiting_bytes < 1200
    world.caller.break_off()
    world.run()
    assert (replica._waiting_bytes, replica._held, replica._turns) == (0, 0, None)


def test_a_batch_of_so_many_bytes_is_full(worlds: Any) -> None:
    config = {"max_batch_size": 10, "batch_wait_timeout": 1000.0, "max_queued_bytes": 5000}
    world = worlds(accept_batch(lambda requests: [len(requests)] * len(requests)), **config)
    world.caller.answer(python_call(0, bytes(3000)))
    assert world.replica.run_next() > 0, "it waits for others"
    world.caller.answer(python_call(1, bytes(3000)))
    world.caller.answer(python_call(2, b"too many"))
    assert [message.kind for message in world.caller.sent] == [FailureKind.REFUSED]
    world.replica.run_next()
    assert [outcome(answer) for answer in world.caller.of_type(Reply)] == [2, 2]
    assert world.replica._waiting_bytes == 0
    world.caller.answer(python_call(3, b""))
    world.caller.answer(Cancel(3))
    assert world.replica._waiting_bytes == 0


def test_calls_of_different_callers_may_have_the_same_number(worlds: Any) -> None:
    world = worlds(double)
    other = FakeChannel("other", world.replica)
    world.caller.answer(python_call(1, 10))
    other.answer(python_call(1, 20))
    other.answer(Cancel(1))
    world.run()
    assert outcome(world.caller.sent[0]) == 20
    assert isinstance(outcome(other.sent[0]), DeadlineExceeded)


def test_the_load_is_told_on_request(worlds: Any) -> None:
    world = worlds(double)
    world.caller.answer(python_call(1, 1))
    world.replica.control(Ping(7))
    assert world.told == [Pong(7, 1)]
    world.run()


# -- giving up -------------------------------------------------------------------------------------------------------


def counting(calls: list[Any]) -> Any:
    def function(request: Any) -> Any:
        calls.append(request.data)
        return request.data

    return function


@pytest.mark.parametrize("how", ["cancelled", "expired", "lost"])
def test_a_call_that_nobody_waits_for_is_answered_without_being_run(worlds: Any, how: str) -> None:
    calls: list[Any] = []
    world = worlds(counting(calls))
    world.caller.answer(python_call(1, "a", deadline=time.monotonic() + PAST if how == "expired" else None))
    if how == "cancelled":
        world.caller.answer(Cancel(1))
    elif how == "lost":
        world.caller.break_off()
    world.run()
    assert calls == []
    assert repr(world.replica).endswith("held=0/8>")
    if how == "lost":
        assert world.caller.sent == []
    else:
        (answer,) = world.caller.sent
        assert isinstance(outcome(answer), DeadlineExceeded)


@pytest.mark.parametrize("batched", [False, True])
def test_a_call_whose_deadline_passes_while_it_waits_is_not_run(worlds: Any, batched: bool) -> None:
    calls: list[Any] = []

    def in_batches(requests: list[Any]) -> list[Any]:
        calls.extend(request.data for request in requests)
        return [None for _ in requests]

    world = worlds(accept_batch(in_batches) if batched else counting(calls))
    deadline = time.monotonic() + 0.05
    world.caller.answer(python_call(1, "a", deadline=deadline))
    world.caller.answer(python_call(2, "b"))
    assert not world.caller.sent or time.monotonic() > deadline
    eventually(lambda: time.monotonic() > deadline)
    world.run()
    assert calls == ["b"]
    assert isinstance(outcome(world.caller.sent[0]), DeadlineExceeded)
    assert repr(world.replica).endswith("held=0/8>")


def test_cancelling_what_is_not_there_does_nothing(worlds: Any) -> None:
    world = worlds(double)
    assert world.ask(Cancel(5), Credit(5, 1)) == []
    (answer,) = world.ask(python_call(1, 1))
    assert world.ask(Cancel(1)) == []
    assert outcome(answer) == 2


def test_an_answer_that_is_too_large_becomes_a_failure(worlds: Any) -> None:
    world = worlds(double)
    world.caller.raises = InvalidArgument("the message is 5 bytes")
    (answer,) = world.ask(python_call(1, 1))
    assert answer.kind == FailureKind.ENGINE
    assert isinstance(outcome(answer), ResultNotSerializable)
    assert "cannot be sent: the message is 5 bytes" in str(outcome(answer))


def test_a_caller_that_is_gone_gets_no_answer(worlds: Any) -> None:
    world = worlds(double)
    world.caller.raises = ChannelClosed("gone")
    assert world.ask(python_call(1, 1)) == []
    assert repr(world.replica).endswith("held=0/8>")


# -- batches ---------------------------------------------------------------------------------------------------------


@accept_batch
def double_all(requests: list[Any]) -> list[Any]:
    return [(len(requests), 2 * request.data) for request in requests]


def test_waiting_calls_come_in_batches(worlds: Any) -> None:
    world = worlds(double_all, max_batch_size=3, max_concurrent_queries=10)
    answers = world.ask(*[python_call(number, number) for number in range(7)])
    assert [outcome(answer) for answer in answers] == [(3, 0), (3, 2), (3, 4), (3, 6), (3, 8), (3, 10), (1, 12)]
    assert [answer.load for answer in answers] == [6, 5, 4, 3, 2, 1, 0]


def test_a_batch_waits_for_more(worlds: Any) -> None:
    world = worlds(double_all, max_batch_size=2, batch_wait_timeout=1000.0)
    world.caller.answer(python_call(1, 1))
    wait = world.replica.run_next()
    assert wait is not None
    assert 0 < wait < 1001  # rounding may add a little
    again = world.replica.run_next()
    assert again is not None
    assert again <= wait  # the time runs from the first call on
    answers = world.ask(python_call(2, 2))
    assert [outcome(answer) for answer in answers] == [(2, 2), (2, 4)]


def test_a_batch_does_not_wait_for_ever(worlds: Any) -> None:
    world = worlds(double_all, max_batch_size=2, batch_wait_timeout=0.001)
    world.caller.answer(python_call(1, 1))
    deadline = time.monotonic() + 20
    while not world.caller.sent:
        assert time.monotonic() < deadline
        world.replica.run_next()
    assert outcome(world.caller.sent[0]) == (1, 2)


def test_a_draining_replica_waits_for_no_batch(worlds: Any) -> None:
    world = worlds(double_all, max_batch_size=2, batch_wait_timeout=1000.0)
    world.caller.answer(python_call(1, 1))
    world.replica.control(Drain(5.0))
    assert world.replica.run_next() == 0.0
    assert outcome(world.caller.sent[0]) == (1, 2)


def test_calls_given_up_do_not_come_with_the_batch(worlds: Any) -> None:
    world = worlds(double_all, max_batch_size=5, max_concurrent_queries=10)
    late = time.monotonic() + PAST
    answers = world.ask(
        python_call(1, 1), python_call(2, 2), python_call(3, 3, deadline=late), python_call(4, 4), Cancel(2)
    )
    assert {answer.id for answer in answers if isinstance(answer, Failure)} == {2, 3}
    assert [outcome(answer) for answer in answers if isinstance(answer, Reply)] == [(2, 2), (2, 8)]


def test_a_batch_that_never_came_about_holds_its_calls_and_their_object_no_longer(worlds: Any) -> None:
    ended = []

    class Backend:
        @accept_batch
        def __call__(self, requests: list[Any]) -> list[Any]:
            return requests

        def __del__(self) -> None:
            ended.append(self)

    world = worlds(Backend, max_batch_size=2, batch_wait_timeout=1000.0)
    world.caller.answer(python_call(1, 1))
    assert world.replica.run_next()
    world.ask(Cancel(1))
    world.replica._user.drop()  # as when it leaves
    assert len(ended) == 1


class Mixed:
    @accept_batch
    def many(self, requests: list[Any]) -> list[Any]:
        return [len(requests)] * len(requests)

    def one(self, value: Any) -> Any:
        return value


def test_only_calls_of_one_method_share_a_batch(worlds: Any) -> None:
    world = worlds(Mixed, max_batch_size=5, max_concurrent_queries=10)
    answers = world.ask(python_call(1, method="many"), python_call(2, "x", method="one"), python_call(3, method="many"))
    assert {answer.id: outcome(answer) for answer in answers} == {1: 2, 2: "x", 3: 2}


def test_a_batch_of_calls_that_were_all_given_up_is_not_run(worlds: Any) -> None:
    calls: list[int] = []

    @accept_batch
    def function(requests: list[Any]) -> list[Any]:
        calls.append(len(requests))
        return requests

    world = worlds(function, max_batch_size=2)
    world.ask(python_call(1), Cancel(1), python_call(2), Cancel(2))
    assert calls == []
    assert len(world.caller.sent) == 2


@pytest.mark.parametrize(
    ("result", "said"), [([1], "returned 1 results"), ([1, 2, 3], "returned 3 results"), ("xy", "returned a str")]
)
def test_a_batch_must_return_as_many(worlds: Any, result: Any, said: str) -> None:
    world = worlds(accept_batch(lambda requests: result), max_batch_size=2)
    answers = world.ask(python_call(1), python_call(2))
    assert len(answers) == 2
    for answer in answers:
        assert isinstance(outcome(answer), BackendError)
        assert said in str(outcome(answer))
        assert "got 2 requests" in str(outcome(answer))


def test_a_batch_that_fails_fails_for_all(worlds: Any) -> None:
    def function(requests: list[Any]) -> Any:
        raise LookupError("no luck")

    world = worlds(accept_batch(function), max_batch_size=2)
    answers = world.ask(python_call(1), python_call(2))
    assert [type(outcome(answer)) for answer in answers] == [LookupError, LookupError]


# -- streams over HTTP -----------------------------------------------------------------------------------------------


class Streaming:
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def count(self, request: Any) -> Any:
        try:
            for number in range(INITIAL_CREDIT + 4):
                yield f"{number}\n"
        finally:
            self.events.append("closed")

    def breaks(self, request: Any) -> Any:
        yield "first"
        raise LookupError("in the middle")

    def breaks_at_once(self, request: Any) -> Any:
        raise LookupError("before anything was sent")
        yield "never"


def test_a_stream_goes_on_as_far_as_there_is_credit(worlds: Any) -> None:
    events: list[str] = []
    world = worlds(Streaming, events)
    seen: list[int] = []

    def give_credit() -> None:
        seen.append(len(world.caller.sent))
        world.caller.answer(Credit(1, 3))

    def give_more() -> None:
        seen.append(len(world.caller.sent))
        world.caller.answer(Credit(1, 10))

    world.loop.script = [lambda: None] * (INITIAL_CREDIT + 1) + [give_credit] + [lambda: None] * 3 + [give_more]
    answers = world.ask(http_call(1, method="count"))
    assert seen == [INITIAL_CREDIT, INITIAL_CREDIT + 3]
    assert [answer.payload for answer in answers[:-1]] == [b"%d\n" % number for number in range(INITIAL_CREDIT + 4)]
    assert answers[-1] == End(1, 0, False)
    assert events == ["closed"]


def test_large_items_take_more_of_the_credit(worlds: Any) -> None:
    large = b"x" * (INITIAL_CREDIT // 2 << 16)
    world = worlds(lambda request: iter([large] * 3 + [large * 3] * 2))
    seen: list[int] = []

    def give(amount: int) -> Any:
        def give_credit() -> None:
            seen.append(len(world.caller.sent))
            world.caller.answer(Credit(1, amount))

        return give_credit

    world.loop.script = [lambda: None] * 3 + [give(INITIAL_CREDIT // 2)] + [lambda: None] + [give(INITIAL_CREDIT)]
    world.loop.script += [lambda: None, give(8), give(1)]
    answers = world.ask(http_call(1))
    assert seen == [2, 3, 4, 4], "one that is larger than all that is left is sent, too, but then it is owed for"
    assert [len(answer.payload) for answer in answers[:-1]] == [len(large)] * 3 + [3 * len(large)] * 2


def test_each_step_of_a_stream_is_user_code(worlds: Any) -> None:
    world = worlds(lambda request: iter(["a", "b"]))
    world.loop.script = [lambda: None] * 2
    world.ask(http_call(1))
    # the call, two items, the end, and closing it
    assert world.loop.steps == ["out", "in"] * 5


def test_a_stream_that_nobody_reads_is_closed(worlds: Any) -> None:
    events: list[str] = []
    world = worlds(Streaming, events)
    world.loop.script = [lambda: None] * (INITIAL_CREDIT + 1) + [lambda: world.caller.answer(Cancel(1))]
    answers = world.ask(http_call(1, method="count"))
    assert [type(answer) for answer in answers] == [Item] * INITIAL_CREDIT + [End]
    assert answers[-1] == End(1, 0, True)
    assert events == ["closed"]


@pytest.mark.parametrize("has_credit", [True, False])
def test_those_that_wait_for_a_long_stream_of_short_steps_are_handed_back(worlds: Any, has_credit: bool) -> None:
    world = worlds(Streaming, [])

    def grow_long() -> None:
        world.replica._began = PAST

    def end() -> None:
        meanwhile.extend(world.caller.of_type(Failure))
        world.caller.answer(Cancel(1))

    meanwhile: list[Failure] = []

    quick: list[Any] = [lambda: None] * (INITIAL_CREDIT + 1)
    world.loop.script = [grow_long, *quick] if has_credit else [*quick, grow_long]
    world.loop.script.append(end)
    world.ask(http_call(1, method="count"), python_call(2, method="count"))
    assert meanwhile == [Failure(2, 1, FailureKind.BUSY, b"", b"")]
    waits = world.loop.polls[INITIAL_CREDIT + 1 :]
    assert all(timeout_s is None for timeout_s in waits[not has_credit :])
    assert has_credit or 0 < waits[0] <= blocking_replica._LONG_S


def test_a_stream_that_breaks_in_the_middle_says_so(worlds: Any, caplog: pytest.LogCaptureFixture) -> None:
    world = worlds(Streaming, [])
    answers = world.ask(http_call(1, method="breaks"))
    assert [type(answer) for answer in answers] == [Item, End]
    assert answers[-1].failed
    assert "'b'.breaks failed in the middle of its stream, request request-1" in caplog.text


def test_a_stream_that_breaks_at_once_is_a_failure(worlds: Any, caplog: pytest.LogCaptureFixture) -> None:
    world = worlds(Streaming, [])
    (answer,) = world.ask(http_call(1, method="breaks_at_once"))
    assert isinstance(answer, Failure)
    assert b"500" in answer.head
    assert "before anything was sent" in caplog.text


def test_a_whole_answer_over_http(worlds: Any) -> None:
    world = worlds(lambda request: {"path": request.url.path})
    (answer,) = world.ask(http_call(1))
    assert isinstance(answer, Reply)
    assert answer.payload == b'{"path":"/"}'
    assert answer.head.startswith(b"[200,")


# -- reconfiguring ---------------------------------------------------------------------------------------------------


class Configured:
    def __init__(self) -> None:
        self.config: Any = None

    def reconfigure(self, user_config: Any) -> None:
        if user_config == "bad":
            raise ValueError("no such model")
        self.config = user_config

    def __call__(self, request: Any) -> Any:
        return self.config


def reconfigure(token: int, *, changed: bool = True, **options: Any) -> Reconfigure:
    return Reconfigure(token, dumps(BackendConfig(**options), "config"), changed)


def test_a_configuration_is_taken_between_two_calls(worlds: Any) -> None:
    world = worlds(Configured)
    world.replica.control(reconfigure(1, user_config="new", max_concurrent_queries=3))
    assert world.told == []  # it is not this thread that runs user code
    assert world.loop.wakes == 1
    (answer,) = world.ask(python_call(1))
    assert outcome(answer) == "new"
    assert world.told == [Reconfigured(1, None), Answered()]
    assert repr(world.replica) == "<BlockingReplica b open held=0/3>"


def test_a_configuration_that_fails_changes_nothing(worlds: Any) -> None:
    world = worlds(Configured)
    world.replica.control(reconfigure(1, user_config="bad", max_concurrent_queries=3))
    world.run()
    (told,) = world.told
    assert told.token == 1
    assert isinstance(unpack_exception(told.error), ValueError)
    assert repr(world.replica) == "<BlockingReplica b open held=0/8>"


def test_a_configuration_that_took_long_does_not_undo_a_later_one(worlds: Any) -> None:
    world = worlds(Configured)
    world.replica.control(reconfigure(1, user_config="new", max_concurrent_queries=3))
    world.replica.control(reconfigure(2, changed=False, max_concurrent_queries=4))
    world.run()
    assert world.told == [Reconfigured(2, None), Reconfigured(1, None)]
    assert repr(world.replica) == "<BlockingReplica b open held=0/4>"


def test_user_code_is_only_asked_when_its_configuration_changed(worlds: Any) -> None:
    world = worlds(double)  # has no reconfigure
    world.replica.control(reconfigure(1, changed=False, max_concurrent_queries=3))
    assert world.told == [Reconfigured(1, None)]  # at once: it does not wait for what runs
    world.replica.control(reconfigure(2, changed=True, user_config=1))
    world.run()
    assert isinstance(unpack_exception(world.told[1].error), MethodNotFound)
    assert repr(world.replica) == "<BlockingReplica b open held=0/3>"


# -- leaving ---------------------------------------------------------------------------------------------------------


def test_a_draining_replica_finishes_what_it_holds_and_takes_no_more(worlds: Any) -> None:
    world = worlds(double)
    world.caller.answer(python_call(1, 1))
    world.replica.control(Drain(5.0))
    assert "draining" in repr(world.replica)
    assert not world.replica.finished()
    world.caller.answer(python_call(2, 2))
    assert world.caller.sent == [Failure(2, 1, FailureKind.DRAINING, b"", b"")]
    assert world.replica.run_next() == 0.0
    assert outcome(world.caller.sent[1]) == 2
    assert not world.replica.finished()  # a caller is still connected, and may have sent more
    wait = world.replica.run_next()
    assert wait is not None
    assert 0 < wait < replica_module.FAREWELL_S + 0.001
    world.loop.channels = 0
    world.caller.break_off()
    assert world.loop.wakes == 2  # for the drain, and for the caller that hung up
    assert world.replica.finished()


def test_an_idle_replica_that_nobody_calls_leaves_at_once(worlds: Any) -> None:
    world = worlds(double)
    world.loop.channels = 0
    assert not world.replica.finished()
    world.replica.control(Drain(5.0))
    assert world.replica.finished()


def test_callers_that_do_not_hang_up_are_not_waited_for_long(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "FAREWELL_S", 0.0)
    world = worlds(double)
    world.replica.control(Drain(5.0))
    assert world.replica.finished()


def test_a_configuration_is_answered_before_leaving(worlds: Any) -> None:
    world = worlds(Configured)
    world.loop.channels = 0
    world.replica.control(reconfigure(1, user_config="new"))
    world.replica.control(Drain(5.0))
    assert not world.replica.finished()
    world.replica.run_next()
    assert world.told == [Reconfigured(1, None)]
    assert world.replica.finished()


def test_what_is_said_before_it_has_a_host_is_kept() -> None:
    told: list[Any] = []
    user = UserCallable("b", Configured, (), {})
    replica = BlockingReplica("b", user, BackendConfig(), told.append, debug=False)
    replica.control(reconfigure(1, user_config="new"))
    replica.control("nonsense")
    replica.attach(FakeServiceLoop())
    replica.run_next()
    assert told == [Reconfigured(1, None)]
    replica.close()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("call", [http_call(1), python_call(1)], ids=["http", "handle"])
def test_whoever_forgets_to_await_the_body_is_told(worlds: Any, call: Any, caplog: pytest.LogCaptureFixture) -> None:
    world = worlds(lambda request: request.json()["a"])
    (answer,) = world.ask(call)
    told = caplog.text if answer.head else str(outcome(answer).__cause__)
    if answer.head or sys.version_info >= (3, 11):
        assert "request.json(), body() and form() must be awaited: write `async def`" in told
