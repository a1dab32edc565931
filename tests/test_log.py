"""Logging from threads that must go on, whatever the application's handlers and filters do."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

import engine.control.runner
import engine.seam.scribe
from engine import Engine, errors
from engine.seam.log import Log
from engine.seam.may_block import awaited_thread
from engine.seam.scribe import scribe
from engine.testing.instruments import PATIENCE_S, Footprint, eventually

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


def test_a_handler_may_call_the_engine_back(handle_with: Any) -> None:
    """It runs in none of the engine's threads."""
    calls: list[Callable[[], Any]] = []

    def call_back(record: logging.LogRecord) -> list[BaseException | None]:
        now, calls[:] = calls[:], []
        return [_raised_by(call) for call in now]

    handler = handle_with(call_back)
    with Engine(backend="local", http_options=HTTP) as engine:
        engine.create_backend("talkative", talkative)
        engine.create_endpoint("talkative", backend="talkative")
        handle = engine.get_handle("talkative")
        ref = handle.remote()
        calls += [lambda: engine.create_backend("other", talkative), engine.statistics, lambda: engine.http_url]
        calls += [handle.call, ref.result, engine.shutdown]
        handle.call()
        assert eventually(lambda: [outcome for outcome in handler.outcomes if outcome][:1]) == [[None] * 6]
        with pytest.raises(errors.EngineClosed):
            handle.call()


def verbose(request: Any) -> str:
    for number in range(request.data):
        sys.stderr.write(f"line {number}\n")
        logging.getLogger("mine").warning("record %d", number)
    return "ok"


class Hanging:
    """A handler that hangs until it is released, and notes what it gets."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.texts: list[str] = []
        self.threads: set[str] = set()

    def __call__(self, record: logging.LogRecord) -> None:
        assert self.released.wait(PATIENCE_S)
        self.texts.append(record.getMessage())
        self.threads.add(str(record.threadName))


@pytest.fixture
def hanging(handle_with: Any) -> Iterator[Hanging]:
    hanging = Hanging()
    handle_with(hanging)
    yield hanging
    hanging.released.set()


def dropped(texts: list[str]) -> int:
    found = [re.fullmatch(r"(\d+) log records were dropped here: .*", text) for text in texts]
    return sum(int(match[1]) for match in found if match)


def test_a_handler_that_hangs_holds_up_nothing(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch, leaves_nothing: Footprint
) -> None:
    monkeypatch.setattr(engine.seam.scribe, "_MOST_RECORDS", 100)
    lines = 1000
    with Engine(backend="local", http_options=HTTP) as one:
        one.create_backend("mortal", die)
        one.create_endpoint("mortal", backend="mortal")
        one.create_backend("verbose", verbose)
        one.create_endpoint("verbose", backend="verbose")
        handle = one.get_handle("verbose")
        assert handle.call(lines) == "ok"
        with pytest.raises(errors.ReplicaDied):
            one.get_handle("mortal").call()
        eventually(lambda: one.statistics()["backends"]["mortal"]["replicas"] == {"mortal#2": "ready"})
        one.update_backend_config("verbose", {"num_replicas": 2})
        one.delete_endpoint("mortal")
        one.delete_backend("mortal")
        assert handle.call(0) == "ok"
        assert hanging.texts == []
        hanging.released.set()
        eventually(lambda: dropped(hanging.texts))
    told = [text for text in hanging.texts if text.startswith(("line", "record"))]
    assert len(told) < 100
    assert any("replacing it" in text for text in hanging.texts), "lines leave room for what the engine says"
    assert dropped(hanging.texts) + len(told) == 2 * lines
    assert all(thread.startswith("engine-") for thread in hanging.threads)


def test_a_handler_that_hangs_for_ever_does_not_keep_the_engine(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.control.runner, "_LAST_WORDS_S", 0.1)
    with Engine(backend="local", http_options=HTTP) as one:
        one.create_backend("talkative", talkative)
        one.create_endpoint("talkative", backend="talkative")
        assert one.get_handle("talkative").call() == "ok"
    assert hanging.texts == []
    hanging.released.set()
    eventually(lambda: hanging.texts == ["hear, hear"])


def test_what_a_replica_prints_does_not_wait_for_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    """Its process may be busy with something that does not let go of Python's lock, or be stopped."""
    lines = 20_000
    stuck, free = threading.Event(), threading.Event()
    with Engine(backend="local", http_options=HTTP) as one:
        one.create_backend("verbose", verbose)
        one.create_endpoint("verbose", backend="verbose")
        handle = one.get_handle("verbose")
        one._runner._loop.call_soon_threadsafe(lambda: (stuck.set(), free.wait(PATIENCE_S)))  # type: ignore
        assert stuck.wait(PATIENCE_S)
        try:
            assert handle.call(lines) == "ok"
            assert not free.is_set()
        finally:
            free.set()
        eventually(lambda: handle.call(1) and caplog.text.count("were dropped here") >= 2)
    assert "line 0" in caplog.text
    assert "record 0" in caplog.text


def test_records_keep_what_they_had_when_they_were_made(caplog: pytest.LogCaptureFixture) -> None:
    class Special(logging.Logger):
        def makeRecord(self, *args: Any, **options: Any) -> logging.LogRecord:
            record = super().makeRecord(*args, **options)
            record.special = True
            return record

    logging.setLoggerClass(Special)
    try:
        log = Log("engine.special")
    finally:
        logging.setLoggerClass(logging.Logger)

    def awaited() -> None:
        with awaited_thread():
            try:
                raise ValueError("mine")
            except ValueError:
                log.exception("made %s", "here")
            log.log(logging.DEBUG, "nobody wants this")

    thread = threading.Thread(target=awaited, name="somebody")
    thread.start()
    thread.join()
    scribe().flush(PATIENCE_S)
    (record,) = caplog.records
    assert (record.funcName, record.threadName, record.getMessage()) == ("awaited", "somebody", "made here")
    assert record.special  # type: ignore[attr-defined]
    assert record.exc_info
    assert "ValueError: mine" in caplog.text


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


def test_a_flush_that_is_interrupted_keeps_no_thread_for_good() -> None:
    class Struck(SimpleQueue[Any]):
        armed = True

        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            if self.armed and isinstance(item, SimpleQueue):
                self.armed = False
                raise KeyboardInterrupt
            super().put(item)

    own = engine.seam.scribe.Scribe()
    own._queue = Struck()
    own.put(logging.makeLogRecord({"name": "engine.test", "msg": "a line"}))
    with pytest.raises(KeyboardInterrupt):
        own.flush(PATIENCE_S)
    own.flush(PATIENCE_S)
    assert own._thread is None
