"""The controller's thread: what happens when it cannot start, and when more than one party stops it."""

from __future__ import annotations

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from engine import Engine, errors
from engine.calling import client, connectors
from engine.calling.client import Client
from engine.config import HTTPOptions
from engine.control import runner as runner_module
from engine.control.operations import ListBackends
from engine.control.runner import Runner
from engine.testing.fakes import FakeAdapter
from engine.testing.instruments import Gate, interrupting


def test_without_a_loop_there_is_an_error_and_an_end(monkeypatch, leaves_nothing):
    def lacking():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(asyncio, "new_event_loop", lacking)
    engine = Engine(backend="inline")
    with pytest.raises(errors.ResourcesUnavailable, match="no file descriptors left"):
        engine.create_backend("b", len)
    engine.shutdown()
    with pytest.raises(errors.EngineClosed):
        engine.create_backend("b", len)


def test_without_a_thread_there_is_no_engine(monkeypatch, leaves_nothing):
    """Nor anything of it: at exit, a hook would shut down what never was."""

    def lacking(thread):
        raise RuntimeError("can't start new thread")

    hooks = []
    monkeypatch.setattr("engine.engine.atexit", SimpleNamespace(register=hooks.append, unregister=hooks.remove))
    monkeypatch.setattr(threading.Thread, "start", lacking)
    known = dict(connectors._connectors), dict(client._clients)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Engine(backend=FakeAdapter())
    assert hooks == []
    assert (connectors._connectors, client._clients) == known


@pytest.fixture
def held():
    """A runner whose adapter, when it is stopped, says so and waits for leave: ``(runner, stopping, leave, stops)``."""
    stopping, leave, stops = threading.Event(), threading.Event(), []
    adapter = FakeAdapter()

    async def stop():
        stops.append(adapter)
        stopping.set()
        await asyncio.to_thread(leave.wait, 20)

    adapter.stop = stop
    runner = Runner("e", adapter, Client("e", adapter), HTTPOptions.of(None))
    runner.wait_started()
    yield runner, stopping, leave, stops
    leave.set()
    runner.stop(0.0)


def test_two_that_stop_at_once_both_wait_for_the_end(held, monkeypatch):
    runner, stopping, leave, stops = held
    second_is_at_it = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(runner.stop, 0.0)
        assert stopping.wait(20)
        lock = runner._stop_lock

        @contextmanager
        def telling():
            second_is_at_it.set()
            with lock:
                yield

        monkeypatch.setattr(runner, "_stop_lock", telling())
        second = pool.submit(runner.stop, 0.0)
        assert second_is_at_it.wait(20)
        assert not second.done()
        leave.set()
        assert first.result(20) is second.result(20) is None
    assert len(stops) == 1
    assert not runner._thread.is_alive()


def test_a_signal_handler_may_stop_what_its_thread_is_stopping(held):
    runner, stopping, leave, stops = held
    main = threading.get_ident()
    handled = []

    def handler(*_):
        runner.stop(0.0)
        handled.append(True)
        leave.set()

    def interrupt():
        stopping.wait(20)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    interrupting = threading.Thread(target=interrupt)
    try:
        interrupting.start()
        runner.stop(0.0)
        interrupting.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == [True]
    assert len(stops) == 1
    with pytest.raises(errors.EngineClosed):
        runner.run(ListBackends())


@pytest.mark.parametrize("early", [False, True])
def test_a_second_interrupt_leaves_calls_no_more_time(leaves_nothing, tmp_path, early):
    """As Ctrl-C that is pressed once more while the engine shuts down, perhaps before the controller hears of that."""
    gate = Gate(tmp_path / "gate")

    def held(request):
        gate.pass_through()

    engine = Engine(backend="local", http_options={"location": None})
    engine.create_backend("held", held, config={"graceful_shutdown_timeout_s": 1000})
    engine.create_endpoint("held", backend="held")
    ref = engine.get_handle("held").remote()
    gate.wait_for_arrivals(1)
    if early:
        engine._runner.hurry()
        engine.shutdown(1000)
    else:
        with interrupting(lambda: "closed" in repr(engine)), pytest.raises(KeyboardInterrupt):
            engine.shutdown(1000)
    with pytest.raises(errors.EngineError):
        ref.result(20)
    assert not gate.is_open()


def test_a_start_that_hangs_can_be_shut_down(monkeypatch, leaves_nothing):
    monkeypatch.setattr(runner_module, "_SHUTDOWN_MARGIN_S", 0.05)
    adapter = FakeAdapter()

    async def start(engine_id, events):
        await asyncio.Event().wait()

    adapter.start = start
    runner = Runner("e", adapter, Client("e", adapter), HTTPOptions.of(None))
    runner.stop(0.0)
    with pytest.raises(errors.EngineClosed):
        runner.wait_started()


def test_an_end_that_hangs_is_told(monkeypatch, leaves_nothing):
    """Also to whoever waits for a call that was in flight."""
    monkeypatch.setattr(runner_module, "_SHUTDOWN_MARGIN_S", 0.05)

    async def hang(grace_s):
        await asyncio.Event().wait()

    adapter = FakeAdapter()
    own = Client("e", adapter)
    runner = Runner("e", adapter, own, HTTPOptions.of(None))
    runner.wait_started()
    runner.controller.shutdown = hang
    with pytest.raises(errors.EngineError, match=r"has not ended within 0\.05 s, .* the fake adapter does not stop"):
        runner.stop(0.0)
    assert own.closed
    runner.stop(0.0)


class Exits:
    """An operation that raises what would end any loop, as user code does that is pickled for it."""

    def __init__(self, error):
        self.error = error

    async def perform(self, controller):
        raise self.error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_what_an_operation_raises_is_its_callers(error):
    adapter = FakeAdapter()
    runner = Runner("e", adapter, Client("e", adapter), HTTPOptions.of(None))
    runner.wait_started()
    with pytest.raises(type(error)):
        runner.run(Exits(error))
    assert runner.run(ListBackends()) == {}
    runner.stop(0.0)


def test_an_adapter_that_is_another_engines_is_left_alone(leaves_nothing):
    """Else a mistaken second use of an adapter ended the first engine."""
    adapter = FakeAdapter()
    ended = []

    async def start(engine_id, events):
        raise errors.InvalidArgument("this adapter already serves an engine")

    async def stop():
        ended.append(adapter)

    adapter.start, adapter.stop, adapter.close = start, stop, lambda: ended.append(adapter)
    runner = Runner("e", adapter, Client("e", adapter), HTTPOptions.of(None))
    with pytest.raises(errors.InvalidArgument):
        runner.wait_started()
    runner.stop(0.0)
    assert ended == []
