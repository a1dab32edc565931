"""Signal handlers of the application that raise, at every place where Python runs them and at any time.

`test_wire_channel.py` and `test_caller.py` look closer at what they can tear.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from harness import run_python

from engine import AsyncHandle, Engine, Handle
from engine.calling.answers import open_answer
from engine.calling.client import Client
from engine.seam.messages import Reply
from engine.seam.serialization import dumps, dumps_arguments, loads
from engine.testing.fakes import FakeAdapter
from engine.testing.instruments import PATIENCE_S, Footprint, eventually
from engine.testing.strikes import struck


def double(request: object) -> int:
    return request.data * 2  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(params=["inline", "local"])
def engine(request: pytest.FixtureRequest, leaves_nothing: Footprint) -> Iterator[Engine]:
    with Engine(backend=request.param) as engine:
        engine.create_backend("double", double)
        engine.create_endpoint("double", backend="double")
        yield engine


@pytest.mark.parametrize("how", ["call", "remote"])
def test_no_strike_in_a_call_harms_another(engine: Engine, how: str) -> None:
    handle: Handle[int] = engine.get_handle("double")
    replicas = engine.statistics()["backends"]["double"]["replicas"]

    def call() -> None:
        if how == "call":
            handle.call(1)
        else:
            handle.remote(1).result(20)

    call()
    for place in range(2000):
        other = handle.remote(2)
        where = struck(call, place, TimeoutError("struck") if place % 2 else KeyboardInterrupt("struck"))
        assert other.result(20) == 4, where
        assert handle.call(3) == 6, where
        if not where:
            break
    assert 20 < place < 1999
    eventually(lambda: engine.statistics()["backends"]["double"]["in_flight"] == 0)
    assert engine.statistics()["backends"]["double"]["replicas"] == replicas


_ASYNCIO = tuple(f"asyncio/{name}.py" for name in ("base_events", "events", "selector_events", "futures", "tasks"))


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # what is struck before it begins
def test_what_strikes_on_an_event_loop_is_raised_or_told_to_the_loop(engine: Engine) -> None:
    """As with all callbacks of a loop: their exceptions go to its handler."""
    handle: AsyncHandle[int] = engine.get_handle("double", sync=False)
    told: list[object] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: told.append(context.get("exception")))
    assert loop.run_until_complete(handle.call(1)) == 2
    raised: list[object] = []

    def call() -> None:
        try:
            loop.run_until_complete(handle.call(1))
        except Alarm as error:
            raised.append(error)
            raise

    ways = set()
    for place in range(2000):
        told.clear()
        raised.clear()
        alarm = Alarm("struck")
        where = struck(call, place, alarm, spare=(*_ASYNCIO, "selectors.py", __file__))
        assert loop.run_until_complete(handle.call(2)) == 4, where
        if not where:
            break
        assert [*raised, *told] == [alarm], where
        ways.add("raised" if raised else "told")
    assert ways == {"raised", "told"}
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    eventually(lambda: engine.statistics()["backends"]["double"]["in_flight"] == 0)


def test_no_strike_on_the_way_to_an_engine_keeps_others_from_it() -> None:
    """The first call of a process subscribes, in a thread that everybody waits for."""
    places = range(400)
    for place in places:
        client = Client("somewhere", FakeAdapter())

        def subscribe(client: Client = client) -> Client:
            client.register()
            return client

        def attach(subscribe: Callable[[], Client] = subscribe) -> None:
            Client.attach("somewhere", subscribe)

        where = struck(attach, place, KeyboardInterrupt(), spare=("threading.py",))
        try:
            assert Client.attach("somewhere", subscribe, PATIENCE_S) is client, where
        finally:
            client.close()
        if not where:
            break
    assert 5 < place < places[-1]


class Alarm(Exception):
    """What the handler of an application raises."""


class Plain:
    """A value with methods of its own, in which a handler can strike."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return Plain, (int(str(self.number)),)


@pytest.mark.parametrize("value", [1, Plain(1), [lambda: 1]], ids=["number", "object", "lambda"])
@pytest.mark.parametrize("error", [Alarm, SystemExit, TimeoutError])
@pytest.mark.parametrize("way", ["arguments", "result"])
def test_what_strikes_while_values_are_pickled_or_rebuilt_is_not_taken_for_their_fault(
    way: str, error: type[BaseException], value: Any
) -> None:
    answer = Reply(1, 0, b"", dumps(value, "the result"))
    heard: list[BaseException] = []

    def make_or_open() -> None:
        try:
            if way == "arguments":
                dumps_arguments((value,), {}, "the argument")
            else:
                open_answer(answer)
        except BaseException as raised:
            heard.append(raised)
            raise

    for place in range(1, 2000):  # 0 is before the try
        heard.clear()
        alarm = error("struck")
        where = struck(make_or_open, place, alarm)
        assert heard == [alarm] * bool(where), where
        if not where:
            break
    assert 2 < place < 1999


def test_what_only_the_plain_pickler_cannot_do_goes_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for an object without a module in all modules, some of which raise when they are looked at."""
    lazy = ModuleType("lazy")
    lazy.__getattr__ = {}.__getitem__  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy", lazy)

    def function() -> int:
        return 1

    function.__module__ = None  # type: ignore[assignment]
    function.__qualname__ = "function"
    assert loads(dumps_arguments((function,), {}, "the argument"))[0][0]() == 1


def test_calls_import_nothing() -> None:
    """A handler that raises in the middle of an import would leave it locked for all threads."""
    done = run_python("-c", _WHAT_CALLS_IMPORT)
    assert done == "[]\n"


_WHAT_CALLS_IMPORT = """
import sys
from engine import Engine

def echo(request):
    return request.data

with Engine() as engine:
    engine.create_backend("echo", echo)
    engine.create_endpoint("echo", backend="echo")
    handle = engine.get_handle("echo").options(shard_key="key")
    before = set(sys.modules)
    handle.call(1)
    handle.remote(1).result()
    engine.get(engine.wait([handle.remote([1], a=2)])[0])
    handle.options(timeout_s=10, http_method="POST", http_headers={"a": "b"}).call("text")
    handle.call(handle.remote(b"1"))
    print(sorted(set(sys.modules) - before))
"""


_ALARMS = """
import random, signal, sys, threading
from engine import Engine

def double(request):
    return request.data * 2

class Alarm(Exception):
    pass

def on_alarm(*_):
    raise Alarm

with Engine(backend="local") as engine:
    engine.create_backend("double", double, config={"num_replicas": 2})
    engine.create_endpoint("double", backend="double")
    handle = engine.get_handle("double")
    handle.call(0)
    replicas = engine.statistics()["backends"]["double"]["replicas"]
    stop, wrong = threading.Event(), []

    def others():
        number = 0
        while not stop.is_set():
            number += 1
            try:
                if handle.call(number) != 2 * number or handle.remote(number).result(20) != 2 * number:
                    wrong.append(number)
            except BaseException as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=others) for _ in range(3)]
    for thread in threads:
        thread.start()
    signal.signal(signal.SIGALRM, on_alarm)
    struck = 0
    for number in range(int(sys.argv[1])):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 4e-4))
                answer = handle.call(number) if number % 2 else handle.remote(number).result(20)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert answer == 2 * number, answer
        except Alarm:
            struck += 1
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    assert not wrong, wrong[:3]
    assert [handle.call(number) for number in range(50)] == [2 * number for number in range(50)]
    backend = engine.statistics()["backends"]["double"]
    assert backend["replicas"] == replicas and not backend["in_flight"] and not backend["queued"], backend
    assert struck, "no alarm ever went off in a call"
"""


def test_alarms_at_any_time_leave_every_call_answered() -> None:
    """Real signals, at random, in a program whose other threads call as well."""
    done = subprocess.run([sys.executable, "-c", _ALARMS, "500"], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
