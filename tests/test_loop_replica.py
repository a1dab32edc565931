"""A replica with coroutines: its calls are tasks on the loop, and so interleave."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fakes import FakeServiceLoop, Telling, http_call, outcome, python_call, until

from engine import accept_batch
from engine.config import BackendConfig
from engine.errors import BackendError, DeadlineExceeded, MethodNotFound, WouldBlock
from engine.seam.control_messages import Drain, Ping, Pong, Reconfigure, Reconfigured
from engine.seam.may_block import check_may_block
from engine.seam.messages import ANY_CALL, INITIAL_CREDIT, Cancel, Credit, End, Failure, FailureKind, Item, Reply
from engine.seam.serialization import dumps, unpack_exception
from engine.serving import loop_replica as loop_replica_module
from engine.serving.farewell import begin_close, finish_close
from engine.serving.loop_replica import LoopReplica
from engine.serving.user_callable import UserCallable
from engine.testing.fakes import FakeChannel


class World:
    """A replica on the running loop, its host, one caller and the controller."""

    def __init__(self, target: Any, *init_args: Any, attach: bool = True, **options: Any) -> None:
        self.told: list[Any] = []
        self.loop = FakeServiceLoop()
        self.loop.channels = 1
        user = UserCallable("b", target, init_args, {})
        assert user.on_loop
        self.replica = LoopReplica(
            "b",
            user,
            BackendConfig(**options),
            self.told.append,
            debug=False,
            shares_process=True,  # as in a test, where nobody watches the loop unless told to
            event_loop=asyncio.get_running_loop(),
        )
        if attach:
            self.replica.attach(self.loop)
        self.caller = FakeChannel("caller", self.replica)

    async def ask(self, *messages: Any, answers: int = 1) -> list[Any]:
        """Send messages and wait for so many answers."""
        before = len(self.caller.sent)
        for message in messages:
            self.caller.answer(message)
        await until(lambda: len(self.caller.sent) >= before + answers)
        assert len(self.caller.sent) == before + answers
        return self.caller.sent[before:]

    @property
    def held(self) -> str:
        return repr(self.replica).rpartition("=")[2].rstrip(">")


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
    """Run a test on a loop of its own."""

    def run() -> None:
        async def main() -> None:
            try:
                await asyncio.wait_for(test(), 20)
            finally:
                loop_replica_module.unmark_loop_thread()

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


class Latch:
    """Lets calls through one by one."""

    def __init__(self) -> None:
        self.began: list[Any] = []
        self.cancelled: list[Any] = []
        self.opened = asyncio.Event()

    async def __call__(self, request: Any) -> Any:
        self.began.append(request.data)
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.data)
            raise
        return request.data


async def double(request: Any) -> Any:
    return request.data * 2


@accept_batch
async def double_all(requests: list[Any]) -> list[Any]:
    return [(len(requests), 2 * request.data) for request in requests]


# -- calls -----------------------------------------------------------------------------------------------------------


@on_loop
async def test_a_batch_of_so_many_bytes_is_full() -> None:
    world = World(double_all, max_batch_size=10, batch_wait_timeout=1000.0, max_queued_bytes=5000)
    world.caller.answer(python_call(0, bytes(3000)))
    assert 3000 < world.replica._waiting_bytes < 3200
    answers = await world.ask(python_call(1, bytes(3000)), answers=2)
    assert [outcome(answer)[0] for answer in answers] == [2, 2]
    world.caller.answer(python_call(2, b""))
    world.caller.answer(Cancel(2))
    assert world.replica._waiting_bytes == 0


@on_loop
async def test_calls_interleave() -> None:
    latch = Latch()
    world = World(latch, max_concurrent_queries=3)
    for number in range(3):
        world.caller.answer(python_call(number, number))
    await until(lambda: len(latch.began) == 3)
    assert repr(world.replica) == "<LoopReplica b open held=3/3>"
    world.replica.control(Ping(7))
    assert world.told == [Pong(7, 3)]
    world.caller.answer(python_call(3, 3))
    assert world.caller.sent == [Failure(3, 3, FailureKind.REFUSED, b"", b"")]
    latch.opened.set()
    first, told, *others = await world.ask(answers=4)
    assert told == Credit(ANY_CALL, 3), "it is told as soon as there is a place"
    assert [(outcome(answer), answer.load) for answer in (first, *others)] == [(0, 2), (1, 1), (2, 0)]
    assert world.replica.run_next() is None


@pytest.mark.parametrize("target", [double, double_all])
def test_a_call_has_begun_before_user_code_sees_anything_of_it(target: Any) -> None:
    @on_loop
    async def main() -> None:
        world = World(target, max_batch_size=2 if target is double_all else None)
        telling = Telling(world.caller)
        await world.ask(*[python_call(number, [telling]) for number in (1, 2, 3)], answers=3)
        assert telling.told == [[1], [1, 2], [1, 2, 3]]

    main()


@on_loop
async def test_a_call_of_a_caller_that_takes_it_elsewhere_is_not_run() -> None:
    latch = Latch()
    world = World(latch)
    world.caller.answer(python_call(1, 1))
    world.caller.close()
    await until(lambda: world.held.startswith("0/"))
    assert latch.began == []


class Methods:
    async def fails(self) -> None:
        raise LookupError("no luck")

    def plain(self, value: int) -> int:
        return value + 1

    def blocks(self) -> None:
        check_may_block("this")


@on_loop
async def test_calls_leave_no_tasks_behind_whoever_begins_them_at_once() -> None:
    """As `asyncio.eager_task_factory` does, which user code may set: a task can end before it is given to its maker."""
    loop: Any = asyncio.get_running_loop()

    def eager(loop: Any, coroutine: Any, **options: Any) -> Any:
        task = asyncio.Task(coroutine, loop=loop, **options)
        if coroutine.__qualname__ == LoopReplica._run_one.__qualname__:
            loop._ready.pop()._run()
        return task

    world = World(double)
    loop.set_task_factory(eager)
    for number in range(3):
        loop.call_soon(world.caller.answer, python_call(number, number))
    await until(lambda: len(world.caller.sent) == 3)
    loop.set_task_factory(None)
    assert [outcome(answer) for answer in world.caller.sent] == [0, 2, 4]
    assert not world.replica._tasks


@on_loop
async def test_plain_methods_run_on_the_loop() -> None:
    world = World(Methods)
    (answer,) = await world.ask(python_call(1, 4, method="plain"))
    assert outcome(answer) == 5
    (answer,) = await world.ask(python_call(1, method="blocks"))
    assert isinstance(outcome(answer), WouldBlock)
    world.replica.close()
    check_may_block("this")  # the mark is off again


@on_loop
async def test_a_call_that_fails_gives_its_slot_back() -> None:
    world = World(Methods, max_concurrent_queries=1)
    for method, error in [("fails", LookupError), ("nothing", MethodNotFound), ("fails", LookupError)]:
        (answer,) = await world.ask(python_call(1, method=method))
        assert isinstance(outcome(answer), error)
        assert world.held == "0/1"


# -- giving up -------------------------------------------------------------------------------------------------------


@on_loop
async def test_a_cancelled_call_is_cancelled_and_answered() -> None:
    latch = Latch()
    world = World(latch)
    world.caller.answer(python_call(1, "a"))
    await until(lambda: latch.began)
    (answer,) = await world.ask(Cancel(1))
    assert isinstance(answer, Failure)
    assert latch.cancelled == ["a"]
    assert world.held.startswith("0/")


@on_loop
async def test_a_call_cancelled_before_it_began_is_answered_too() -> None:
    latch = Latch()
    world = World(latch)
    (answer,) = await world.ask(python_call(1, "a"), Cancel(1))
    assert isinstance(outcome(answer), DeadlineExceeded)
    assert latch.began == []
    assert world.held.startswith("0/")


@on_loop
async def test_a_call_that_comes_too_late_is_not_run() -> None:
    latch = Latch()
    world = World(latch)
    (answer,) = await world.ask(python_call(1, "a", deadline=time.monotonic() - 1))
    assert isinstance(outcome(answer), DeadlineExceeded)
    assert latch.began == []


@on_loop
async def test_the_calls_of_a_caller_that_is_gone_are_cancelled() -> None:
    latch = Latch()
    world = World(latch)
    other = FakeChannel("other", world.replica)
    world.caller.answer(python_call(1, "a"))
    world.caller.answer(python_call(2, "b"))
    other.answer(python_call(1, "c"))
    await until(lambda: len(latch.began) == 3)
    world.caller.break_off()
    await until(lambda: len(latch.cancelled) == 2)
    assert sorted(latch.cancelled) == ["a", "b"]
    latch.opened.set()
    await until(lambda: other.sent)
    assert outcome(other.sent[0]) == "c"
    assert world.held.startswith("0/")


# -- batches ---------------------------------------------------------------------------------------------------------


@on_loop
async def test_a_full_batch_starts_at_once() -> None:
    world = World(double_all, max_batch_size=2, batch_wait_timeout=1000.0)
    answers = await world.ask(python_call(1, 1), python_call(2, 2), answers=2)
    assert [outcome(answer) for answer in answers] == [(2, 2), (2, 4)]


@on_loop
async def test_a_batch_does_not_wait_for_ever() -> None:
    world = World(double_all, max_batch_size=5, batch_wait_timeout=0.001)
    (answer,) = await world.ask(python_call(1, 1))
    assert outcome(answer) == (1, 2)


@on_loop
async def test_calls_given_up_do_not_come_with_the_batch() -> None:
    world = World(double_all, max_batch_size=4, batch_wait_timeout=1000.0)
    late = time.monotonic() - 1
    answers = await world.ask(
        python_call(1, 1),
        python_call(2, 2),
        Cancel(2),
        python_call(3, 3, deadline=late),
        *(python_call(number, number) for number in (4, 5, 6)),
        answers=6,
    )
    assert {answer.id for answer in answers if isinstance(answer, Failure)} == {2, 3}
    assert [outcome(answer) for answer in answers if isinstance(answer, Reply)] == [(4, 2), (4, 8), (4, 10), (4, 12)]


@on_loop
async def test_a_batch_is_cancelled_once_all_of_its_calls_are() -> None:
    began: list[int] = []
    cancelled: list[int] = []

    async def waits(requests: list[Any]) -> list[Any]:
        began.append(len(requests))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(len(requests))
            raise
        return []

    world = World(accept_batch(waits), max_batch_size=2, batch_wait_timeout=1000.0)
    world.caller.answer(python_call(1))
    world.caller.answer(python_call(2))
    await until(lambda: began)
    world.caller.answer(Cancel(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert cancelled == [], "the other one still waits for it"
    assert len(await world.ask(Cancel(2), answers=2)) == 2
    assert (began, cancelled) == ([2], [2])
    assert not world.replica._running
    answers = await world.ask(python_call(1), python_call(2), Cancel(1), Cancel(2), answers=2)
    assert [type(outcome(answer)) for answer in answers] == [DeadlineExceeded] * 2
    assert began == [2], "given up between its start and its first step"
    assert world.held.startswith("0/")


@on_loop
async def test_a_call_that_a_batch_waits_for_no_longer_is_answered_at_once() -> None:
    world = World(double_all, max_batch_size=2, batch_wait_timeout=1000.0)
    (answer,) = await world.ask(python_call(1, 1), Cancel(1))
    assert isinstance(outcome(answer), DeadlineExceeded)
    assert world.held.startswith("0/")
    (answer,) = await world.ask(python_call(2, 2, deadline=time.monotonic() - 1))
    assert isinstance(outcome(answer), DeadlineExceeded)
    assert world.held.startswith("0/")
    assert not world.replica._timers, "nobody waits for a batch of nothing"
    answers = await world.ask(python_call(3, 3), python_call(4, 4), answers=2)
    assert [outcome(answer) for answer in answers] == [(2, 6), (2, 8)]


@on_loop
async def test_a_batch_of_calls_that_were_all_given_up_is_not_run() -> None:
    world = World(double_all, max_batch_size=2, batch_wait_timeout=0.001)
    (answer,) = await world.ask(python_call(1, 1), Cancel(1))
    assert isinstance(outcome(answer), DeadlineExceeded)


@on_loop
async def test_a_batch_that_fails_fails_for_all() -> None:
    async def fails(requests: list[Any]) -> Any:
        raise LookupError("no luck")

    world = World(accept_batch(fails), max_batch_size=2, batch_wait_timeout=1000.0)
    answers = await world.ask(python_call(1), python_call(2), answers=2)
    assert [type(outcome(answer)) for answer in answers] == [LookupError, LookupError]


@on_loop
async def test_a_batch_must_return_as_many() -> None:
    async def short(requests: list[Any]) -> Any:
        return []

    world = World(accept_batch(short), max_batch_size=2, batch_wait_timeout=1000.0)
    answers = await world.ask(python_call(1), python_call(2), answers=2)
    assert [type(outcome(answer)) for answer in answers] == [BackendError, BackendError]


class PlainBatch:
    @accept_batch
    def many(self, requests: list[Any]) -> Any:
        def parts() -> Any:
            yield "part"

        return [parts() for _ in requests]

    async def other(self) -> None: ...


@on_loop
async def test_a_plain_method_may_take_batches_and_answer_with_streams() -> None:
    world = World(PlainBatch, max_batch_size=2, batch_wait_timeout=1000.0)
    answers = await world.ask(http_call(1, method="many"), http_call(2, method="many"), answers=4)
    assert [(type(answer), answer.id) for answer in answers] == [(Item, 1), (End, 1), (Item, 2), (End, 2)]


@on_loop
async def test_a_stream_of_a_batch_that_nobody_reads_does_not_keep_the_others() -> None:
    class Batched:
        @accept_batch
        async def __call__(self, requests: Any) -> Any:
            return [self.parts(), "whole", self.parts()]

        async def parts(self) -> Any:
            begun.set()
            await asyncio.Event().wait()
            yield "never"

    begun = asyncio.Event()
    world = World(Batched, max_batch_size=3, batch_wait_timeout=1000.0)
    await world.ask(http_call(1), http_call(2), http_call(3), answers=1)
    for number in (1, 3):
        await begun.wait()
        begun.clear()
        (answer,) = await world.ask(Cancel(number))
        assert answer.id == number
    await until(lambda: world.held.startswith("0/"))


# -- streams over HTTP -----------------------------------------------------------------------------------------------


class Streaming:
    def __init__(self, events: list[str]) -> None:
        self.events = events

    async def count(self, request: Any) -> Any:
        try:
            for number in range(INITIAL_CREDIT + 4):
                yield f"{number}\n"
        finally:
            self.events.append("closed")


@on_loop
async def test_a_stream_goes_on_as_far_as_there_is_credit() -> None:
    events: list[str] = []
    world = World(Streaming, events)
    await world.ask(http_call(1, method="count"), answers=INITIAL_CREDIT)
    await world.ask(Credit(1, 1), Credit(1, 1), answers=2)
    answers = await world.ask(Credit(1, 10), answers=3)
    assert [type(answer) for answer in answers] == [Item, Item, End]
    assert answers[-1] == End(1, 0, False)
    items = world.caller.of_type(Item)
    assert [item.payload for item in items] == [b"%d\n" % number for number in range(INITIAL_CREDIT + 4)]
    assert events == ["closed"]


@pytest.mark.parametrize("how", ["cancelled", "lost"])
def test_a_stream_that_nobody_reads_is_closed(how: str) -> None:
    @on_loop
    async def main() -> None:
        events: list[str] = []
        world = World(Streaming, events)
        await world.ask(http_call(1, method="count"), answers=INITIAL_CREDIT)
        if how == "cancelled":
            (end,) = await world.ask(Cancel(1))
            assert end == End(1, 0, True)
        else:
            world.caller.break_off()
        await until(lambda: world.held.startswith("0/"))
        assert events == ["closed"]

    main()


# -- reconfiguring ---------------------------------------------------------------------------------------------------


class Configured:
    def __init__(self) -> None:
        self.config: Any = None

    async def reconfigure(self, user_config: Any) -> None:
        await asyncio.sleep(0)
        if user_config == "bad":
            raise ValueError("no such model")
        self.config = user_config

    async def __call__(self, request: Any) -> Any:
        return self.config


class ConfiguredAtOnce(Configured):
    def reconfigure(self, user_config: Any) -> None:  # type: ignore[override]
        self.config = user_config


def reconfigure(token: int, *, changed: bool = True, **options: Any) -> Reconfigure:
    return Reconfigure(token, dumps(BackendConfig(**options), "config"), changed)


@pytest.mark.parametrize("target", [Configured, ConfiguredAtOnce])
def test_a_configuration_is_taken_on_the_loop(target: Any) -> None:
    @on_loop
    async def main() -> None:
        world = World(target)
        control = threading.Thread(
            target=world.replica.control, args=(reconfigure(1, user_config="new", max_concurrent_queries=3),)
        )
        control.start()
        await until(lambda: world.told)
        control.join()
        assert world.told == [Reconfigured(1, None)]
        assert world.held == "0/3"
        (answer,) = await world.ask(python_call(1))
        assert outcome(answer) == "new"

    main()


@on_loop
async def test_a_configuration_that_fails_changes_nothing() -> None:
    world = World(Configured)
    world.replica.control(reconfigure(1, user_config="bad", max_concurrent_queries=3))
    await until(lambda: world.told)
    assert isinstance(unpack_exception(world.told[0].error), ValueError)
    assert world.held == "0/1000000"


@on_loop
async def test_configurations_are_taken_one_after_the_other() -> None:
    """The last one rules, also if an earlier one takes longer."""
    began, leave = asyncio.Event(), asyncio.Event()
    taken = []

    class Slow(Configured):
        async def reconfigure(self, user_config: Any) -> None:
            if user_config == "first":
                began.set()
                await leave.wait()
            taken.append(user_config)

    world = World(Slow)
    world.replica.control(reconfigure(1, user_config="first", max_concurrent_queries=3))
    world.replica.control(reconfigure(2, user_config="second", max_concurrent_queries=4))
    await began.wait()
    world.replica.control(reconfigure(3, changed=False, max_concurrent_queries=5))
    assert world.told == [Reconfigured(3, None)]  # a limit waits for nobody
    assert taken == []
    leave.set()
    await until(lambda: len(world.told) == 3)
    assert taken == ["first", "second"]
    assert world.told[1:] == [Reconfigured(1, None), Reconfigured(2, None)]
    assert world.held == "0/5"


@on_loop
async def test_user_code_is_only_asked_when_its_configuration_changed() -> None:
    world = World(Methods)
    world.replica.control(reconfigure(1, changed=False, max_concurrent_queries=3))
    await until(lambda: world.told)
    assert world.told == [Reconfigured(1, None)]
    assert world.held == "0/3"


@on_loop
async def test_what_is_said_before_it_has_a_loop_is_kept() -> None:
    world = World(Configured, attach=False)
    world.replica.control(reconfigure(1, user_config="new"))
    world.replica.attach(world.loop)
    await until(lambda: world.told)
    assert world.told == [Reconfigured(1, None)]


# -- leaving ---------------------------------------------------------------------------------------------------------


@on_loop
async def test_a_draining_replica_finishes_what_it_holds_and_takes_no_more() -> None:
    latch = Latch()
    world = World(latch)
    world.caller.answer(python_call(1, "a"))
    await until(lambda: latch.began)
    world.replica.control(Drain(5.0))
    assert world.loop.wakes == 1
    (refused,) = await world.ask(python_call(2, "b"))
    assert refused == Failure(2, 1, FailureKind.DRAINING, b"", b"")
    assert not world.replica.finished()
    latch.opened.set()
    await world.ask()
    await until(lambda: world.loop.wakes >= 2)  # the last answer makes the host look again
    assert not world.replica.finished()  # the caller has not hung up yet
    world.loop.channels = 0
    world.caller.break_off()
    assert world.replica.finished()


@on_loop
async def test_the_host_is_woken_when_the_farewell_is_over() -> None:
    world = World(Latch())
    before = loop_replica_module.FAREWELL_S
    loop_replica_module.FAREWELL_S = 0.0  # type: ignore[misc]
    try:
        world.replica.control(Drain(5.0))
        await until(lambda: world.loop.wakes == 2)
    finally:
        loop_replica_module.FAREWELL_S = before  # type: ignore[misc]


def test_a_word_after_the_loop_has_ended_is_harmless() -> None:
    worlds: list[World] = []

    @on_loop
    async def main() -> None:
        worlds.append(World(Methods))

    main()
    worlds[0].replica.control(Drain(5.0))


# -- leaving ---------------------------------------------------------------------------------------------------------


def test_a_close_that_hangs_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    class Hangs(Methods):
        async def close(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("cut off")

    async def main() -> None:
        user = UserCallable("b", Hangs, (), {})
        closing = begin_close(user)
        assert closing is not None
        await finish_close(user, closing, 0.0)

    asyncio.run(main())
    assert ended == ["cut off"]
    assert "close() of backend 'b' is not done within its graceful_shutdown_timeout_s" in caplog.text


def test_an_end_that_cannot_be_logged_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    class Refusing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("not here")

    class Fails(Methods):
        def close(self) -> None:
            raise ValueError("not like this")

    handler = Refusing()
    logging.getLogger("engine.backend").addHandler(handler)
    try:
        assert begin_close(UserCallable("b", Fails, (), {})) is None
    finally:
        logging.getLogger("engine.backend").removeHandler(handler)
    assert "RuntimeError: not here" in capsys.readouterr().err
