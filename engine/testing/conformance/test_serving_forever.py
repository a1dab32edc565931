"""`Engine.serve_forever`: the end of a program that is there to serve. The signals are real ones."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine import errors
from engine.testing.instruments import eventually

HANDLED = (signal.SIGTERM, signal.SIGINT)


class Mine(BaseException):
    """What a handler of the application's raises."""


def handlers():
    return [signal.getsignal(number) for number in HANDLED]


@pytest.fixture(autouse=True)
def others():
    """Handlers of the application's, which must be back in the end."""
    before = handlers()
    for number in HANDLED:
        signal.signal(number, lambda *_: None)
    installed = handlers()
    yield installed
    assert handlers() == installed
    for number, handler in zip(HANDLED, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(20) as pool:
        yield pool


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except BaseException as error:
        return error


def held_calls(engine, gate, pool):
    """One that is in flight, and two that wait."""

    async def held(request):
        await gate.apass_through()
        return "finished"

    engine.create_backend("held", held, config={"max_concurrent_queries": 1})
    engine.create_endpoint("held", backend="held")
    calls = [pool.submit(outcome, engine.get_handle("held").call) for _ in range(3)]
    gate.wait_for_arrivals(1)
    eventually(lambda: engine.statistics()["backends"]["held"]["queued"] == 2)
    return calls


def serving(others):
    return all(handler is not other for handler, other in zip(handlers(), others, strict=True))


def test_a_signal_lets_calls_finish(adapter, gate, pool, others):
    engine = adapter.engine()
    calls = held_calls(engine, gate, pool)

    def signal_and_open():
        eventually(lambda: serving(others))
        os.kill(os.getpid(), signal.SIGTERM)
        eventually(lambda: "closed" in repr(engine))
        gate.open()

    signalling = pool.submit(signal_and_open)
    assert engine.serve_forever() == signal.SIGTERM
    assert [call.result(20) for call in calls] == ["finished"] * 3
    signalling.result(20)
    with pytest.raises(errors.EngineClosed, match="shut down"):
        engine.serve_forever()


def test_a_second_signal_ends_it_at_once(adapter, gate, pool, others):
    engine = adapter.engine()
    calls = held_calls(engine, gate, pool)

    def signal_twice():
        eventually(lambda: serving(others))
        os.kill(os.getpid(), signal.SIGINT)
        eventually(lambda: "closed" in repr(engine))
        os.kill(os.getpid(), signal.SIGTERM)

    signalling = pool.submit(signal_twice)
    assert engine.serve_forever(timeout_s=3600) == signal.SIGINT
    assert not gate.is_open()
    assert all(isinstance(call.result(20), errors.EngineError) for call in calls)
    signalling.result(20)


def test_it_ends_with_the_engine(adapter, pool, others):
    engine = adapter.engine()
    ending = pool.submit(lambda: (eventually(lambda: serving(others)), engine.shutdown()))
    assert engine.serve_forever() is None
    ending.result(20)


def test_what_another_handler_raises_goes_through(adapter, pool, others):
    def fail(*_):
        raise Mine

    before = signal.signal(signal.SIGUSR1, fail)
    try:
        with adapter.engine() as engine:
            signalling = pool.submit(
                lambda: (eventually(lambda: serving(others)), os.kill(os.getpid(), signal.SIGUSR1))
            )
            with pytest.raises(Mine):
                engine.serve_forever()
            signalling.result(20)
            assert handlers() == others
            assert engine.list_backends() == {}  # it goes on
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_where_it_cannot_be_called(engine, others):
    results = []
    thread = threading.Thread(target=lambda: results.append(outcome(engine.serve_forever)))
    thread.start()
    thread.join()
    assert isinstance(results[0], errors.EngineError)
    assert "main thread" in str(results[0])

    async def main():
        engine.serve_forever()

    with pytest.raises(errors.WouldBlock, match="event loop"):
        asyncio.run(main())


def test_a_program_in_the_background_is_not_ended_by_ctrl_c(adapter, pool, others):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = adapter.engine()

        def signal_twice():
            eventually(lambda: signal.getsignal(signal.SIGTERM) is not others[0])
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)

        signalling = pool.submit(signal_twice)
        assert engine.serve_forever() == signal.SIGTERM
        signalling.result(20)
    finally:
        signal.signal(signal.SIGINT, others[1])
