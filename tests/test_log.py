"""Logging from threads that must go on, whatever the application's handlers and filters do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine import Engine, errors
from engine.seam.log import Log
from engine.testing.instruments import eventually

HTTP = {"location": None}


class Handler(logging.Handler):
    """Does what a test says with each record of the engine's own."""

    def __init__(self, do: Callable[[logging.LogRecord], Any]) -> None:
        super().__init__()
        self.do = do
        self.outcomes: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.outcomes.append(self.do(record))
        except BaseException as error:
            self.outcomes.append(error)
            raise


@pytest.fixture
def handle_with() -> Iterator[Callable[[Callable[[logging.LogRecord], Any]], Handler]]:
    handlers: list[Handler] = []
    logger = logging.getLogger("engine")

    def add(do: Callable[[logging.LogRecord], Any]) -> Handler:
        handlers.append(Handler(do))
        logger.addHandler(handlers[-1])
        return handlers[-1]

    yield add
    for handler in handlers:
        logger.removeHandler(handler)


def talkative(request: Any) -> str:
    logging.getLogger("mine").warning("hear, hear")
    return "ok"


def die(request: Any) -> None:
    import os

    os._exit(3)


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_a_handler_that_raises_stops_no_engine(
    handle_with: Any, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def fail(record: logging.LogRecord) -> None:
        raise error

    handler = handle_with(fail)
    with Engine(backend="local", http_options=HTTP) as engine:
        for tag, backend in (("talkative", talkative), ("mortal", die)):
            engine.create_backend(tag, backend)
            engine.create_endpoint(tag, backend=tag)
        engine.get_handle("talkative").call()
        with pytest.raises(errors.ReplicaDied):
            engine.get_handle("mortal").call()
        eventually(lambda: len(handler.outcomes) >= 2)
        assert engine.get_handle("talkative").call() == "ok"
        assert sorted(engine.list_backends()) == ["mortal", "talkative"]
    assert capsys.readouterr().err.count("--- Logging error ---") == len(handler.outcomes)


def test_a_handler_that_calls_the_engine_back_is_told_not_to(handle_with: Any) -> None:
    """It would wait for the thread that it runs in."""
    calls: list[Callable[[], Any]] = []
    handler = handle_with(lambda record: [_raised_by(call) for call in calls])
    with Engine(backend="local", http_options=HTTP) as engine:
        engine.create_backend("talkative", talkative)
        engine.create_endpoint("talkative", backend="talkative")
        handle = engine.get_handle("talkative")
        ref = handle.remote()
        calls += [engine.statistics, lambda: engine.http_url, engine.shutdown, handle.call, ref.result]
        calls.append(lambda: engine.create_backend("other", talkative))
        handle.call()
        (outcomes,) = eventually(lambda: [outcome for outcome in handler.outcomes if outcome][:1])
        calls.clear()
        for name, error in zip(("statistics", "url", "shutdown", "call", "result", "create"), outcomes, strict=True):
            if name not in ("url", "result"):  # those need not wait, perhaps
                assert isinstance(error, errors.WouldBlock), (name, error)
                assert "QueueHandler" in str(error)
        assert handle.call() == "ok"  # this thread may block, and the engine goes on


def _raised_by(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


def test_the_main_thread_hears_of_its_signals(handle_with: Any) -> None:
    def exit(record: logging.LogRecord) -> None:
        raise SystemExit(0)  # as a handler of SIGTERM does that strikes here

    handle_with(exit)
    with pytest.raises(SystemExit):
        Log("engine.test").warning("in the main thread")
    thread = threading.Thread(target=Log("engine.test").warning, args=("in another one",))
    thread.start()
    thread.join()


def test_records_name_who_logged(caplog: pytest.LogCaptureFixture) -> None:
    Log("engine.test").warning("%s", "here")
    try:
        raise ValueError("mine")
    except ValueError:
        Log("engine.test").exception("there")
    assert [(record.funcName, record.getMessage()) for record in caplog.records] == [
        ("test_records_name_who_logged", "here"),
        ("test_records_name_who_logged", "there"),
    ]
    assert caplog.records[1].exc_info
