"""Interrupting what this thread runs: what is struck, what is not, and that nothing else ever is."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeServiceLoop, http_call, outcome, python_call

from engine import Engine, accept_batch
from engine.config import BackendConfig
from engine.errors import CallCancelled
from engine.seam.messages import Cancel, End, Failure
from engine.serving.blocking_replica import BlockingReplica
from engine.serving.interruption import Interrupter, _Strike
from engine.serving.user_callable import UserCallable
from engine.testing.fakes import FakeChannel
from engine.testing.instruments import PATIENCE_S, Footprint, eventually
from engine.testing.strikes import struck

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGURG"), reason="this system has no SIGURG")


@pytest.fixture(autouse=True)
def handler_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGURG)
    yield
    signal.signal(signal.SIGURG, before)


class Work:
    """What is to be stopped, until the test says that it has ended."""

    def __init__(self, interrupter: Interrupter) -> None:
        self.interrupter = interrupter
        self.lasts = True
        self.outlasted = threading.Event()

    def interrupt(self, grace_s: float | None = None) -> None:
        self.interrupter.interrupt(
            self, "struck", lasts=lambda: self.lasts, grace_s=grace_s, outlasted=self.outlasted.set
        )


@pytest.fixture
def work() -> Iterator[Work]:
    interrupter = Interrupter()
    interrupter.take_process()
    work = Work(interrupter)
    yield work
    work.lasts = False
    interrupter.open = None
    eventually(lambda: not any(thread.name == "engine-interrupt" for thread in threading.enumerate()))


def run_long() -> None:
    time.sleep(20)
    raise AssertionError("it was not interrupted")


def test_what_is_open_is_struck_once(work: Work) -> None:
    work.interrupter.open = work
    with pytest.raises(CallCancelled, match="struck"):
        work.interrupt()
        run_long()
    work.interrupt()
    time.sleep(0.02)


def test_what_opens_later_is_struck_then(work: Work) -> None:
    work.interrupt()
    work.interrupter.open = "another"
    time.sleep(0.02)
    with pytest.raises(CallCancelled):
        work.interrupter.open = work
        run_long()


def test_a_loop_that_swallows_exceptions_has_its_tasks_cancelled(work: Work) -> None:
    uvloop = pytest.importorskip("uvloop")
    loop = uvloop.new_event_loop()
    loop.set_exception_handler(lambda loop, context: pytest.fail(str(context)))
    work.interrupt()
    work.interrupter.open = work
    try:
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(asyncio.sleep(20))
    finally:
        work.interrupter.open = None
        loop.close()


class Finalized:
    def __init__(self, within: Callable[[], None]) -> None:
        self.within = within

    def __del__(self) -> None:
        self.within()


class Logging(logging.Handler):
    def __init__(self, within: Callable[[], None]) -> None:
        super().__init__()
        self.within = within

    def emit(self, record: logging.LogRecord) -> None:
        self.within()


def test_what_user_code_locks_is_not_left_locked(work: Work) -> None:
    """A queue that calls share has to work for the next one."""
    interrupter = work.interrupter
    condition = threading.Condition(threading.Lock())
    place, hits = 0, 0

    def use() -> None:
        try:
            interrupter.open = work
            with condition:
                pass
        finally:
            interrupter.open = None

    def strike() -> None:
        interrupter._strike = _Strike(work, "struck")
        signal.raise_signal(signal.SIGURG)

    while True:
        hit = False
        try:
            where = struck(use, place, strike)
        except CallCancelled:
            hit, where = True, "in user code"
        assert condition.acquire(blocking=False), where
        condition.release()
        hits += hit
        place += 1
        if not where:
            break
    assert hits


@pytest.mark.parametrize("place", ["a finalizer", "logging", "an import"])
def test_where_it_would_be_lost_or_break_something(
    work: Work, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def within() -> None:
        time.sleep(0.02)
        seen.append("whole")

    def run() -> None:
        if place == "a finalizer":
            Finalized(within)
        elif place == "logging":
            Logging(within).handle(logging.makeLogRecord({}))
        else:
            importlib.import_module("engine_imports_this")
            seen.append("whole")

    (tmp_path / "engine_imports_this.py").write_text("import time\ntime.sleep(0.02)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "engine_imports_this", raising=False)
    work.interrupt()
    work.interrupter.open = work
    with pytest.raises(CallCancelled):
        run()
        run_long()
    assert seen == ["whole"]


def test_what_outlasts_its_grace_is_told(work: Work) -> None:
    work.interrupt(0.0)
    assert work.outlasted.wait(20)


def test_a_handler_of_the_users_stays(work: Work) -> None:
    def theirs(number: int, frame: Any) -> None:
        raise AssertionError("it was not for them")

    signal.signal(signal.SIGURG, theirs)
    another = Interrupter()
    another.take_process()
    assert signal.getsignal(signal.SIGURG) is theirs
    work.interrupter.open = work
    work.interrupt(0.02)
    assert work.outlasted.wait(20)


# -- a replica among many cancellations --------------------------------------------------------------------------------


class TakingTurns(FakeServiceLoop):
    """As the real one, gives the turn to others while user code runs."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = threading.Lock()
        self.turn.acquire()

    def step_out(self) -> None:
        self.turn.release()

    def step_in(self) -> None:
        self.turn.acquire()


@pytest.mark.parametrize("kind", ["call", "batch", "stream"])
def test_wherever_the_signal_comes_it_strikes_user_code_alone(kind: str) -> None:
    """At each place where Python runs signal handlers, one after the other, while a call is received, run, answered."""
    hit = 0

    class Backend:
        def call(self) -> int:
            total = 0
            for number in range(10):
                total += abs(number)
            return total

        @accept_batch
        def batch(self, items: list[Any]) -> Any:
            yield from items

        def stream(self, request: Any) -> Iterator[str]:
            yield "one"
            yield "two"

    loop = FakeServiceLoop()
    loop.channels = 1
    replica = BlockingReplica("b", UserCallable("b", Backend, (), {}), BackendConfig(), lambda body: None, debug=False)
    replica.interrupter.take_process()
    replica.attach(loop)

    def ask(number: int) -> FakeChannel:
        caller = FakeChannel("caller", replica)
        arguments = [number] if kind == "batch" else []
        asked = http_call(number, method=kind) if kind == "stream" else python_call(number, *arguments, method=kind)
        caller.answer(asked)
        return caller

    def check(caller: FakeChannel, *, whole: bool) -> None:
        nonlocal hit
        *items, last = caller.sent
        failed = last.failed if isinstance(last, End) else isinstance(last, Failure)
        assert not (whole and failed), last
        assert failed or len(items) == (2 if kind == "stream" else 0)
        hit += failed
        assert loop.steps == ["out", "in"] * (len(loop.steps) // 2)
        assert replica.interrupter.open is None
        assert "held=0" in repr(replica)

    def strike() -> None:
        job = next(iter(replica._jobs.values()), None)
        if job is not None:
            work = replica._batch if replica._batch is not None and job in replica._batch else job
            replica.interrupter._strike = _Strike(work, "struck")
        signal.raise_signal(signal.SIGURG)

    try:
        caller = ask(0)  # imports, and what is made once
        replica.run_next()
        check(caller, whole=True)
        for place in range(5000):
            caller = ask(place)
            where = struck(replica.run_next, place, strike)
            check(caller, whole=False)
            caller = ask(place)
            replica.run_next()
            check(caller, whole=True)
            if not where:
                break
        assert hit
        assert place < 4999
    finally:
        replica.close()


def test_cancellations_at_any_moment_hurt_nobody_else() -> None:
    struck: set[int] = set()

    def backend(request: Any) -> Any:
        try:
            for _ in range(request.data % 7):
                time.sleep(0)
            return request.data
        except CallCancelled:
            struck.add(request.data)
            raise

    loop = TakingTurns()
    replica = BlockingReplica("b", UserCallable("b", backend, (), {}), BackendConfig(), lambda body: None, debug=False)
    replica.interrupter.take_process()
    replica.attach(loop)
    caller = FakeChannel("caller", replica)
    cancelled: set[int] = set()
    over = False

    def cancel() -> None:
        chance = random.Random(1)
        while not over:
            with loop.turn:
                for job in list(replica._jobs.values()):
                    if chance.random() < 0.5:
                        cancelled.add(job.call.id)
                        caller.answer(Cancel(job.call.id))
            for _ in range(chance.randrange(300)):
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        asked = 0
        deadline = time.monotonic() + PATIENCE_S
        while len(struck) < 50 and time.monotonic() < deadline:
            caller.answer(python_call(asked, asked))
            asked += 1
            while replica.run_next() == 0.0:
                pass
    finally:
        over = True
        sys.setswitchinterval(interval)
        loop.turn.release()
        thread.join()
        replica.close()
    assert [answer.id for answer in caller.sent] == list(range(asked))
    for answer in caller.sent:
        result = outcome(answer)
        assert result == answer.id or (answer.id in cancelled and "CallCancelled" in str(result)), answer
    assert struck <= cancelled
    assert len(struck) >= 50


class Watched:
    """Its replica hears cancellations while a call runs that takes much less than one that others would hear of."""

    def __init__(self) -> None:
        from engine_wire import service_loops

        service_loops._TICK_S = 0.0003
        self.struck = 0

    def __call__(self, request: Any) -> Any:
        number, spins = request.data
        try:
            for _ in range(spins):
                time.sleep(0)
        except CallCancelled:
            self.struck += 1
            raise
        return number

    def count(self) -> tuple[int, int]:
        return os.getpid(), self.struck


def test_many_cancellations_in_a_process(leaves_nothing: Footprint) -> None:
    """Three callers give calls up at random moments; what a fourth one asks for is answered, by the same process."""
    chance = random.Random(2)
    given_up = 0

    async def impatient(handle: Any) -> None:
        nonlocal given_up
        for number in range(50):
            call = asyncio.ensure_future(handle.call((number, chance.randrange(1000))))
            await asyncio.wait([call], timeout=chance.random() * 0.006)
            if call.done():
                assert call.result() == number
            else:
                given_up += 1
                call.cancel()
                await asyncio.wait([call])

    async def patient(handle: Any) -> None:
        for number in range(50):
            assert await handle.call((number, number)) == number

    async def main(engine: Engine) -> None:
        handle = engine.get_handle("watched", sync=False)
        count = handle.options(method_name="count")
        pid, _ = await count.call()
        struck = 0
        deadline = time.monotonic() + PATIENCE_S
        while struck < 20 and time.monotonic() < deadline:
            await asyncio.gather(*(impatient(handle) for _ in range(3)), patient(handle))
            same, struck = await count.call()
            assert same == pid
        assert 20 <= struck <= given_up

    with Engine(backend="local", http_options={"location": None}) as engine:
        engine.create_backend("watched", Watched)
        engine.create_endpoint("watched", backend="watched")
        asyncio.run(main(engine))
        eventually(lambda: engine.statistics()["backends"]["watched"]["in_flight"] == 0)
