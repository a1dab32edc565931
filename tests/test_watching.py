"""What a replica sees of its own calls and its own loop, with the time as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from fakes import FakeServiceLoop, http_call, outcome, python_call, until

from engine import accept_batch
from engine.config import BackendConfig
from engine.errors import DeadlineExceeded
from engine.seam.control_messages import Drain, Reconfigure, Unhealthy
from engine.seam.log import Log
from engine.seam.may_block import awaited_thread
from engine.seam.messages import Credit, End, Failure, FailureKind, Item, Reply
from engine.seam.scribe import Scribe
from engine.serving import blocking_replica, call_limit
from engine.serving import watchdog as watchdog_module
from engine.serving.blocking_replica import BlockingReplica
from engine.serving.call_limit import CallLimit
from engine.serving.health import Health, Look
from engine.serving.loop_replica import LoopReplica
from engine.serving.stacks import stack_of_thread
from engine.serving.user_callable import UserCallable
from engine.serving.watchdog import Watchdog
from engine.testing.fakes import FakeChannel
from engine.testing.instruments import eventually

LIMIT_S = 1000.0
"""Far more than a test takes: the time it is over comes when the test says so."""


# -- the watchdog ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dogs() -> Iterator[Callable[..., Watchdog]]:
    made: list[Watchdog] = []

    def make(look: Any) -> Watchdog:
        made.append(Watchdog("engine-watchdog-test", look))
        return made[-1]

    yield make
    for dog in made:
        dog.stop()
    eventually(lambda: not any(thread.name == "engine-watchdog-test" for thread in threading.enumerate()))


def test_it_looks_when_it_said_it_would_and_when_it_is_woken(dogs: Any) -> None:
    looks: list[float] = []

    def look(now: float, late_s: float) -> float | None:
        looks.append(late_s)
        return 0.001 if len(looks) == 1 else None

    dog = dogs(look)
    dog.wake()
    eventually(lambda: len(looks) == 2)
    dog.wake()
    eventually(lambda: len(looks) == 3)
    assert looks == [0.0] * 3


def test_a_look_that_fails_is_not_the_last(dogs: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "_AFTER_FAILURE_S", 0.001)
    looks = itertools.count()
    seen: list[int] = []

    def look(now: float, late_s: float) -> float | None:
        seen.append(next(looks))
        return 1 / (len(seen) - 1) and None

    dogs(look).wake()
    eventually(lambda: len(seen) >= 2)
    eventually(lambda: "engine-watchdog-test failed to look" in caplog.text)  # logged by another thread


def test_a_look_that_logs_does_not_wait_for_handlers(dogs: Any) -> None:
    """What hangs may be a handler, which keeps its lock then."""
    handler = logging.NullHandler()
    handler.handle = lambda record: bool(opened.wait(20))  # type: ignore[method-assign]
    opened, looked = threading.Event(), threading.Event()

    def look(now: float, late_s: float) -> None:
        Log("engine.backend").warning("it hangs")
        looked.set()

    logging.getLogger("engine.backend").addHandler(handler)
    try:
        dogs(look).wake()
        assert looked.wait(10)
    finally:
        opened.set()
        logging.getLogger("engine.backend").removeHandler(handler)


def test_what_is_logged_is_handled_before_the_process_may_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[str] = []
    waited_for = threading.Event()
    flush = Scribe.flush

    def flushes(self: Scribe, timeout_s: float) -> None:
        waited_for.set()
        flush(self, timeout_s)

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            waited_for.wait(5)
            handled.append(record.getMessage())

    monkeypatch.setattr(Scribe, "flush", flushes)
    handler = Slow()
    logging.getLogger("engine.backend").addHandler(handler)
    try:
        with awaited_thread():
            Log("engine.backend").warning("it hangs")
        seen: list[list[str]] = []
        world = PlainWorld(lambda request: None)
        world.replica._tell = lambda body: seen.append([*handled])
        world.replica._ask_to_be_replaced("hangs", hung=True)
        assert seen == [["it hangs"]]
    finally:
        waited_for.set()
        logging.getLogger("engine.backend").removeHandler(handler)


def test_a_process_that_stood_still_is_told_for_how_long(dogs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "_STOOD_STILL_S", -1.0)  # any look is late then
    looks: list[float] = []

    def look(now: float, late_s: float) -> float | None:
        looks.append(late_s)
        return 0.001 if len(looks) < 3 else None

    dogs(look).wake()
    eventually(lambda: len(looks) == 3)
    assert all(0 < late_s < 10 for late_s in looks[1:])


# -- plain replicas --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Closes what the tests have made."""
    yield
    while PlainWorld.made:
        PlainWorld.made.pop().replica.close()


class PlainWorld:
    """A replica that is looked at when the test says so. Its loop lets messages be delivered when it is woken."""

    made: ClassVar[list[PlainWorld]] = []

    def __init__(self, target: Any, **options: Any) -> None:
        self.made.append(self)
        self.told: list[Any] = []
        self.loop = FakeServiceLoop()
        self.loop.channels = 1
        self.loop.wake = self.wake  # type: ignore[method-assign]
        self.deaf = False
        user = UserCallable("b", target, (), {})
        config = BackendConfig(**{"max_call_s": LIMIT_S, **options})
        self.replica = BlockingReplica("b", user, config, self.hear, debug=False, replica_tag="b#1")
        self.replica._watchdog.stop()
        self.replica.attach(self.loop)
        self.caller = FakeChannel("caller", self.replica)

    def hear(self, body: Any) -> None:
        if isinstance(body, Unhealthy):
            self.told.append(body)

    def wake(self) -> None:
        if not self.deaf:
            self.replica.delayed()

    def look(self, after_s: float, late_s: float = 0.0) -> float | None:
        return self.replica._look(time.monotonic() + after_s, late_s)

    def ask(self, *messages: Any) -> list[Any]:
        for message in messages:
            self.caller.answer(message)
        while self.replica.run_next() == 0.0:
            pass
        return self.caller.sent


def test_a_call_that_is_late_is_told_on_and_all_that_wait_are_sent_elsewhere(caplog: Any) -> None:
    def work(request: Any) -> Any:
        world.replica._told.add(world.caller)  # type: ignore[arg-type]
        world.caller.answer(python_call(3, "keeps waiting here"))
        remaining_s = world.look(LIMIT_S / 2)
        assert remaining_s is not None and LIMIT_S / 2 - 10 < remaining_s <= LIMIT_S / 2
        assert not world.told
        assert world.look(LIMIT_S + 1) == LIMIT_S
        return "too late"

    world = PlainWorld(work)
    sent = world.ask(python_call(1))
    assert [(type(answer), answer.id) for answer in sent] == [(Failure, 3), (Failure, 1)]
    assert sent[0].kind == FailureKind.DRAINING
    assert isinstance(outcome(sent[1]), DeadlineExceeded)
    assert world.told == [Unhealthy(f"has been in one call for {LIMIT_S + 1:.1f} s (max_call_s=1000)", hung=True)]
    assert "replica 'b#1' of backend 'b': a call of backend 'b'" in caplog.text
    assert "in work" in caplog.text
    world.ask(python_call(4))
    assert sent[-1].kind == FailureKind.DRAINING


def test_who_takes_no_messages_meanwhile_does_not_keep_it_from_being_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs where an argument is rebuilt, say."""
    monkeypatch.setattr(blocking_replica, "_LAST_WORD_S", 0.001)

    def work(request: Any) -> Any:
        world.deaf = True
        world.look(LIMIT_S + 1)
        world.look(LIMIT_S + 2)  # whom it told may have failed to act

    world = PlainWorld(work)
    world.ask(python_call(1))
    assert [told.hung for told in world.told] == [True, True]


def test_what_ends_before_anybody_was_told_that_it_hangs_is_no_reason_to_be_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next call runs by then."""
    monkeypatch.setattr(blocking_replica, "_LAST_WORD_S", 0.001)

    def end_and_begin_another() -> None:
        world.replica._began = time.monotonic()

    world = PlainWorld(lambda request: world.look(LIMIT_S + 1))
    world.loop.wake = end_and_begin_another  # type: ignore[method-assign]
    sent = world.ask(python_call(1))
    assert [type(answer) for answer in sent] == [Reply]
    assert not world.told
    world.replica._began = 1.0
    world.replica.delayed()
    world.replica._began = None
    sent = world.ask(python_call(2))
    assert [type(answer) for answer in sent] == [Reply, Reply], "it takes calls as before"


def test_time_in_which_the_process_stood_still_does_not_count() -> None:
    def work(request: Any) -> Any:
        assert world.look(LIMIT_S + 50, late_s=100.0)
        assert world.look(LIMIT_S + 90)
        assert not world.told
        world.look(LIMIT_S + 101)
        assert world.told

    world = PlainWorld(work)
    world.ask(python_call(1))
    assert world.told


def test_nothing_runs_between_calls() -> None:
    world = PlainWorld(lambda request: None)
    world.ask(python_call(1))
    assert world.look(10 * LIMIT_S) == LIMIT_S
    assert not world.told


def test_without_a_limit_nobody_looks() -> None:
    world = PlainWorld(lambda request: None, max_call_s=None)
    assert world.look(LIMIT_S) is None
    assert not world.replica._is_watched()


def test_a_stream_may_take_long_but_not_one_step_of_it() -> None:
    def stream(request: Any) -> Any:
        yield "1"
        world.replica._began = -LIMIT_S  # the call began long ago
        yield "2"
        assert world.look(1.0)
        assert not world.told
        world.look(LIMIT_S + 1)
        yield "never"

    world = PlainWorld(stream)
    sent = world.ask(http_call(1))
    assert [type(answer) for answer in sent] == [Item, Item, End]
    assert sent[-1].failed
    assert [told.hung for told in world.told] == [True]


def test_a_step_that_has_ended_waits_for_its_client_as_long_as_that_takes() -> None:
    def stream(request: Any) -> Any:
        yield from "12345678901234567890"

    def look() -> None:
        world.look(10 * LIMIT_S)
        world.caller.answer(Credit(1, 100))

    world = PlainWorld(stream)
    world.loop.script = [lambda: None] * 16 + [look] * 5
    world.ask(http_call(1))
    assert not world.told


def test_a_batch_that_is_late_fails_whole() -> None:
    class Batched:
        @accept_batch
        def __call__(self, requests: Any) -> Any:
            world.look(LIMIT_S + 1)
            return requests

    world = PlainWorld(Batched, max_batch_size=2)
    sent = world.ask(python_call(1), python_call(2), python_call(3))
    assert [answer.id for answer in sent] == [3, 1, 2]
    assert sent[0].kind == FailureKind.DRAINING
    assert all(isinstance(outcome(answer), DeadlineExceeded) for answer in sent[1:])
    assert [told.hung for told in world.told] == [True]


# -- replicas on a loop ----------------------------------------------------------------------------------------------


class LoopWorld:
    """A replica on the running loop that is looked at when the test says so."""

    def __init__(self, target: Any, **options: Any) -> None:
        self.told: list[Any] = []
        user = UserCallable("b", target, (), {})
        self.replica = LoopReplica(
            "b",
            user,
            BackendConfig(**options),
            self.hear,
            debug=False,
            replica_tag="b#1",
            event_loop=asyncio.get_running_loop(),
        )
        self.replica._watchdog.stop()
        self.replica.attach(FakeServiceLoop())
        self.caller = FakeChannel("caller", self.replica)

    def hear(self, body: Any) -> None:
        if isinstance(body, Unhealthy):
            self.told.append(body)

    async def ask(self, *messages: Any, answers: int = 1) -> list[Any]:
        for message in messages:
            self.caller.answer(message)
        await until(lambda: len(self.caller.sent) >= answers)
        return self.caller.sent


def on_loop(test: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            try:
                await asyncio.wait_for(test(*args, **kwargs), 20)
            finally:
                from engine.seam.may_block import unmark_loop_thread

                unmark_loop_thread()

        asyncio.run(main())

    return functools.update_wrapper(run, test)


async def nothing(request: Any) -> None:
    pass


@on_loop
async def test_a_loop_that_turns_is_asked_from_time_to_time() -> None:
    world = LoopWorld(nothing)
    now = time.monotonic()
    assert world.replica._look(now, 0.0) == 15.0
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert world.replica._look(now + 100, 0.0) == 15.0  # it had turned, and is asked again
    assert not world.told


@on_loop
async def test_a_loop_that_does_not_turn_is_told_on(caplog: pytest.LogCaptureFixture) -> None:
    world = LoopWorld(nothing)
    now = time.monotonic()
    world.replica._look(now, 0.0)
    assert world.replica._look(now + 20, 0.0) == 40.0
    assert world.replica._look(now + 70, 30.0) == 20.0  # it stood still for half a minute
    assert not world.told
    world.replica._look(now + 91, 0.0)
    assert world.told == [Unhealthy("has kept its event loop from turning for 61.0 s (stuck_after_s=60)", hung=True)]
    assert "in test_a_loop_that_does_not_turn_is_told_on" in caplog.text
    assert caplog.text.count("It is here") == 1
    world.replica._look(now + 200, 0.0)
    assert len(world.told) == 2, "whom it told may not have heard it"
    assert caplog.text.count("It is here") == 1


@on_loop
async def test_a_call_that_cannot_be_cancelled_ends_its_replica(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else it does may end in peace."""
    monkeypatch.setattr(call_limit, "_GRACE_S", 0.01)
    opened = asyncio.Event()

    async def stubborn(request: Any) -> str:
        while not opened.is_set():
            try:
                await opened.wait()
            except asyncio.CancelledError:
                pass
        return "at last"

    world = LoopWorld(stubborn, max_call_s=0.01)
    sent = await world.ask(python_call(1))
    assert isinstance(outcome(sent[0]), DeadlineExceeded)
    assert world.told == [Unhealthy("cannot end a call that runs for too long", hung=False)]
    assert "goes on although it was cancelled" in caplog.text
    assert "in stubborn" in caplog.text
    opened.set()
    await until(lambda: not world.replica._limits)
    assert len(sent) == 1, "it was answered already"


@on_loop
async def test_a_call_whose_limit_is_taken_away_while_it_is_ended_is_answered_too() -> None:
    async def lingering(request: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            config = pickle.dumps(BackendConfig())
            world.replica.control(Reconfigure(1, config, user_config_changed=False))

    world = LoopWorld(lingering, max_call_s=0.01)
    sent = await world.ask(python_call(1))
    assert "max_call_s=0.01" in str(outcome(sent[0]))


@on_loop
async def test_a_stream_that_bears_being_cancelled_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_limit, "_GRACE_S", 0.01)

    async def stream(request: Any) -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        yield "1"
        await asyncio.Event().wait()

    world = LoopWorld(stream, max_call_s=0.01)
    sent = await world.ask(http_call(1), answers=2)
    assert [type(answer) for answer in sent] == [Item, End]
    assert sent[-1].failed


@on_loop
async def test_a_batch_has_a_limit_too() -> None:
    class Batched:
        @accept_batch
        async def __call__(self, requests: Any) -> Any:
            await asyncio.Event().wait()

    world = LoopWorld(Batched, max_call_s=0.01, max_batch_size=2)
    sent = await world.ask(python_call(1), python_call(2), answers=2)
    assert all(isinstance(outcome(answer), DeadlineExceeded) for answer in sent)


@on_loop
async def test_steps_of_a_stream_have_each_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float | None] = []
    paused: list[int] = []
    begin, pause = CallLimit.begin, CallLimit.pause
    monkeypatch.setattr(CallLimit, "begin", lambda self, limit_s: (begun.append(limit_s), begin(self, limit_s)))
    monkeypatch.setattr(CallLimit, "pause", lambda self: (paused.append(len(begun)), pause(self)))

    async def stream(request: Any) -> Any:
        yield "1"
        yield "2"

    world = LoopWorld(stream, max_call_s=LIMIT_S)
    sent = await world.ask(http_call(1), answers=3)
    assert [type(answer) for answer in sent] == [Item, Item, End]
    assert not sent[-1].failed
    assert begun == [LIMIT_S] * 5  # the call, three steps, and the stream's being closed
    assert paused.count(2) >= 1 and paused.count(3) >= 1  # between the steps


@on_loop
async def test_what_a_call_returns_although_it_was_cancelled_is_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def rescued(request: Any) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "partly"
        return "never"

    world = LoopWorld(rescued, max_call_s=0.01)
    sent = await world.ask(python_call(1))
    assert isinstance(sent[0], Reply)
    assert outcome(sent[0]) == "partly"


# -- health ----------------------------------------------------------------------------------------------------------


CONFIG = BackendConfig(health_check_period_s=10, health_check_timeout_s=30)


def middling() -> float:
    return 0.5


def test_checks_come_a_period_after_the_last_has_ended() -> None:
    health = Health(middling)
    assert health.look(0.0, 0.0, CONFIG) == Look(False, False, 10.0)
    assert health.look(4.0, 0.0, CONFIG) == Look(False, False, 6.0)
    assert health.look(10.0, 0.0, CONFIG) == Look(True, False, 30.0)
    health.begun(11.0)
    assert health.ended(well=True) == 0
    assert health.look(15.0, 0.0, CONFIG) == Look(False, False, 10.0)


def test_checks_of_replicas_that_began_together_drift_apart() -> None:
    assert Health(lambda: 0.0).look(0.0, 0.0, CONFIG).again_s == pytest.approx(9.0)
    assert Health(lambda: 1.0).look(0.0, 0.0, CONFIG).again_s == pytest.approx(11.0)


def test_a_shorter_period_rules_at_once() -> None:
    health = Health(middling)
    health.look(0.0, 0.0, CONFIG)
    again_s = health.look(1.0, 0.0, CONFIG.updated({"health_check_period_s": 2})).again_s
    assert again_s == pytest.approx(2.2)
    assert health.look(1.0, 0.0, CONFIG.updated({"health_check_period_s": None})).again_s is None


def test_a_check_that_cannot_begin_is_not_late() -> None:
    """A long call is under way."""
    health = Health(middling)
    health.look(0.0, 0.0, CONFIG)
    assert health.look(10.0, 0.0, CONFIG).check
    assert health.look(1000.0, 0.0, CONFIG) == Look(False, False, 30.0)
    health.begun(1001.0)
    assert health.look(1030.0, 0.0, CONFIG) == Look(False, False, 1.0)
    assert health.look(1040.0, 10.0, CONFIG) == Look(False, False, 1.0)  # it stood still for ten seconds
    assert health.look(1041.0, 0.0, CONFIG).late


def test_failures_are_counted_in_a_row() -> None:
    health = Health(middling)
    assert [health.ended(well=well) for well in (False, False, True, False)] == [1, 2, 0, 1]


class Ill:
    """Says so as often as it is asked."""

    def check_health(self) -> None:
        raise LookupError("lost the GPU")

    def __call__(self, request: Any) -> Any:
        return None


def test_a_plain_replica_is_checked_between_calls() -> None:
    world = PlainWorld(Ill, health_check_threshold=2)
    for failures in (1, 2, 3):
        world.look(0.0)
        world.look(20.0)
        assert world.replica._health.failures == failures - 1
        world.ask()
        assert world.replica._health.failures == failures
        assert len(world.told) == failures - 1, "and it says so again, should nobody have acted on it"
    assert world.told[0] == Unhealthy("is unhealthy: LookupError: lost the GPU", hung=False)


def test_calls_that_wait_for_a_check_that_hangs_go_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    class Hangs(Ill):
        def check_health(self) -> None:
            world.caller.answer(python_call(1))
            world.look(LIMIT_S + 1)

    world = PlainWorld(Hangs, max_call_s=None, health_check_timeout_s=LIMIT_S)
    world.look(0.0)
    world.look(20.0)
    world.ask()
    assert [answer.kind for answer in world.caller.sent] == [FailureKind.DRAINING]
    assert world.told[0] == Unhealthy("has not returned from check_health within 1000 s", hung=True)
    assert "in check_health" in caplog.text


def test_a_replica_that_leaves_is_not_checked() -> None:
    world = PlainWorld(Ill, max_call_s=None)
    world.replica.control(Drain(10.0))
    assert world.look(100.0) is None


@on_loop
async def test_a_check_that_keeps_the_loop_from_turning_is_told_on(caplog: pytest.LogCaptureFixture) -> None:
    class Hangs(Ill):
        async def __call__(self, request: Any) -> None:
            pass

        def check_health(self) -> None:
            look(30.5)
            assert not world.told, "a loop that turns gives it up itself"
            look(31.5)

    def look(after_s: float) -> None:
        world.replica._look(started + after_s, 0.0)

    world = LoopWorld(Hangs, stuck_after_s=math.inf)
    started = time.monotonic()
    look(0.0)
    look(100.0)
    await until(lambda: world.told)
    assert [told.hung for told in world.told] == [True]
    assert "since check_health began (health_check_timeout_s=30)" in world.told[0].reason
    assert "in check_health" in caplog.text


@on_loop
async def test_whoever_leaves_does_not_wait_for_a_check(caplog: pytest.LogCaptureFixture) -> None:
    class Checked:
        async def __call__(self, request: Any) -> None:
            pass

        async def check_health(self) -> None:
            checking.set()
            await asyncio.Event().wait()

        def close(self) -> None:
            closed.set()

    checking, closed = asyncio.Event(), asyncio.Event()
    world = LoopWorld(Checked)
    now = time.monotonic()
    world.replica._look(now, 0.0)
    world.replica._look(now + 100, 0.0)
    await checking.wait()
    world.replica.control(Drain(1000.0))
    await world.replica._leave()
    assert closed.is_set()
    assert "check_health" not in caplog.text


def test_the_stack_of_a_thread_that_has_ended() -> None:
    assert "has ended" in stack_of_thread(None)
    assert "test_the_stack_of_a_thread" in stack_of_thread(threading.get_ident())
