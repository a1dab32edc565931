"""The timers of a caller, among threads and on a loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from engine.calling import home as home_module
from engine.calling.home import LoopHome, ThreadHome
from engine.seam.scribe import scribe
from engine.testing.instruments import PATIENCE_S, Footprint, eventually

LONG_S = 1000.0


@pytest.fixture
def home(leaves_nothing: Footprint) -> Iterator[ThreadHome]:
    home = ThreadHome("test-timers")
    yield home
    home.close()


def timer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "test-timers"]


def test_nothing_runs_before_the_first_timer(home: ThreadHome) -> None:
    assert not timer_threads()
    home.call_later(LONG_S, lambda: None)
    home.call_later(LONG_S, lambda: None)
    assert len(timer_threads()) == 1


def test_a_timer_goes_off_with_its_arguments(home: ThreadHome) -> None:
    heard: list[tuple[object, ...]] = []
    done = threading.Event()
    home.call_later(0.0, lambda *args: (heard.append((*args, threading.current_thread().name)), done.set()), 1, "two")
    assert done.wait(PATIENCE_S)
    assert heard == [(1, "two", "test-timers")]


def test_timers_go_off_in_the_order_of_their_times(home: ThreadHome) -> None:
    heard: list[str] = []
    started, begin, done = threading.Event(), threading.Event(), threading.Event()
    home.call_later(0.0, lambda: (started.set(), begin.wait(PATIENCE_S)))
    assert started.wait(PATIENCE_S)  # the thread is busy: what comes now is sorted, not raced
    home.call_later(0.003, lambda: (heard.append("last"), done.set()))
    home.call_later(0.001, heard.append, "first")
    home.call_later(0.002, heard.append, "second")
    begin.set()
    assert done.wait(PATIENCE_S)
    assert heard == ["first", "second", "last"]


def test_timers_for_the_same_moment_keep_their_order(home: ThreadHome, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    done = threading.Event()
    for number in range(20):
        home.call_later(0.0, heard.append, number)
    home.call_later(0.0, done.set)
    assert done.wait(PATIENCE_S)
    assert heard == list(range(20))


def test_an_earlier_timer_need_not_wait_for_a_later_one(home: ThreadHome) -> None:
    done = threading.Event()
    home.call_later(LONG_S, lambda: None)
    home.call_later(0.0, done.set)
    assert done.wait(PATIENCE_S)


def test_a_cancelled_timer_does_not_go_off(home: ThreadHome) -> None:
    heard: list[str] = []
    started, begin, done = threading.Event(), threading.Event(), threading.Event()
    home.call_later(0.0, lambda: (started.set(), begin.wait(PATIENCE_S)))
    assert started.wait(PATIENCE_S)
    timer = home.call_later(0.0, heard.append, "never")
    timer.cancel()
    timer.cancel()
    home.call_later(0.0, done.set)
    begin.set()
    assert done.wait(PATIENCE_S)
    assert heard == []


def test_closing_drops_the_timers_and_ends_the_thread(leaves_nothing: Footprint) -> None:
    heard: list[str] = []
    home = ThreadHome("test-timers")
    home.call_later(LONG_S, heard.append, "never")
    home.close()
    assert not timer_threads()
    home.close()
    home.call_later(0.0, heard.append, "never").cancel()
    home.call_later(0.0, heard.append, "never")
    assert not timer_threads()
    assert heard == []


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3), KeyboardInterrupt()])
def test_a_timer_that_raises_stops_no_other(
    home: ThreadHome, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    done = threading.Event()
    home.call_later(0.0, fail)
    home.call_later(0.0, done.set)
    assert done.wait(PATIENCE_S)
    scribe().flush(PATIENCE_S)
    assert "a timer failed" in caplog.text


def test_a_timer_that_hangs_keeps_nobody_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home_module, "_JOIN_S", 0.0)
    home, hangs, leave = ThreadHome("test-timers"), threading.Event(), threading.Event()
    home.call_later(0.0, lambda: (hangs.set(), leave.wait(PATIENCE_S)))
    assert hangs.wait(PATIENCE_S)
    home.close()
    leave.set()
    eventually(lambda: not timer_threads())


def test_closing_before_the_first_timer() -> None:
    ThreadHome().close()


def test_a_timer_may_close_its_home(leaves_nothing: Footprint) -> None:
    home = ThreadHome("test-timers")
    home.call_later(0.0, home.close)
    eventually(lambda: not timer_threads())


def test_on_a_loop_the_timers_are_the_loops() -> None:
    async def main() -> list[str]:
        heard: list[str] = []
        done = asyncio.Event()
        home = LoopHome(asyncio.get_running_loop())
        home.call_later(0.0, heard.append, "never").cancel()
        home.call_later(0.0, heard.append, "once")
        home.call_later(0.0, done.set)
        await asyncio.wait_for(done.wait(), PATIENCE_S)
        home.close()
        assert home.on_loop
        return heard

    assert asyncio.run(main()) == ["once"]
    assert not ThreadHome.on_loop


def test_cancelled_timers_are_not_kept_until_they_are_due(home: ThreadHome) -> None:
    home.call_later(LONG_S, lambda: None)
    for _ in range(10_000):
        home.call_later(LONG_S, lambda: None).cancel()
    assert len(home._heap) < 200
