"""A backend's object: where it is constructed, and what it hears before it goes."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse

from engine import errors, get_replica_context
from engine.seam.scribe import scribe
from engine.testing.instruments import PATIENCE_S, eventually, is_running

variable = contextvars.ContextVar("variable", default="unset")


def leave(served, engine, *, force=False):
    """Have a backend's replicas go, in order or at once."""
    engine.delete_endpoint(served.name)
    engine.delete_backend(served.tag, force=force)


# -- the constructor -------------------------------------------------------------------------------------------------


class Async:
    """Does in its constructor what asks for a running loop."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.started = asyncio.Event()
        self.ticker = asyncio.create_task(self.tick())
        self.context = variable.set("set by the constructor")
        self.configured_on = None

    async def tick(self):
        self.started.set()
        await asyncio.Event().wait()

    async def reconfigure(self, user_config):
        await asyncio.sleep(0)
        self.configured_on = asyncio.get_running_loop()

    async def __call__(self, request):
        await self.started.wait()
        loop = asyncio.get_running_loop()
        return [loop is self.loop, loop is self.configured_on, self.ticker.done(), variable.get()]


def test_an_async_backend_is_constructed_on_its_loop(serve):
    served = serve(Async, route=None, config={"user_config": 1})
    assert served.call() == [True, True, False, "set by the constructor"]


def test_a_constructor_on_a_loop_may_call_and_block(serve):
    inner = serve(lambda request: "inner", route=None)

    class Backend:
        def __init__(self, name):
            context = get_replica_context()
            self.found = context.get_handle(name, sync=True).call()
            self.found += " " + context.get_handle(name, sync=True).remote().future().result(20)

        async def __call__(self, request):
            return self.found

    assert serve(Backend, inner.name, route=None).call() == "inner inner"


@pytest.mark.parametrize("kind", [ValueError, SystemExit], ids=lambda kind: kind.__name__)
def test_a_constructor_on_a_loop_that_fails(engine, kind):
    class Backend:
        def __init__(self):
            asyncio.get_running_loop()
            raise kind("failed")

        async def __call__(self, request):
            pass

    with pytest.raises((ValueError, errors.RemoteError), match="failed"):
        engine.create_backend("never", Backend)
    assert "never" not in engine.list_backends()


def test_no_replica_runs_the_programs_main_module(adapter, monkeypatch, tmp_path):
    """As multiprocessing's `spawn` does: then every script would need a guard."""
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\n")
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [str(script)])
    with adapter.engine() as engine:
        engine.create_backend("b", lambda request: "ok")
        engine.create_endpoint("b", backend="b")
        assert engine.get_handle("b").call() == "ok"
    assert not (tmp_path / "was-run").exists()


# -- the end ---------------------------------------------------------------------------------------------------------


class Plain:
    def __init__(self, journal):
        self.journal = journal
        self.itself = self  # a cycle

    def __call__(self, request):
        return "ok"

    def close(self):
        self.journal.add("close")

    def __del__(self):
        self.journal.add("del")


class PlainWithCoroutine(Plain):
    async def close(self):
        await asyncio.sleep(0)
        self.journal.add("close")


class OnLoop(PlainWithCoroutine):
    def __init__(self, journal):
        super().__init__(journal)
        self.loop = asyncio.get_running_loop()

    async def __call__(self, request):
        return "ok"

    async def close(self):
        assert asyncio.get_running_loop() is self.loop
        await super().close()


@pytest.mark.parametrize("backend", [Plain, PlainWithCoroutine, OnLoop])
def test_close_is_called_once_and_then_the_object_goes(serve, engine, journal, backend):
    served = serve(backend, journal, config={"num_replicas": 2})
    assert served.call() == "ok"
    engine.update_backend_config(served.tag, {"num_replicas": 1})
    assert journal.lines() == ["close", "del"]
    leave(served, engine)
    assert journal.lines() == ["close", "del"] * 2


def test_close_is_called_when_the_engine_shuts_down(adapter, journal):
    with adapter.engine() as engine:
        engine.create_backend("b", Plain, journal)
        engine.create_backend("a", OnLoop, journal)
    assert sorted(journal.lines()) == ["close", "close", "del", "del"]


class CallsInClose:
    def __init__(self, journal):
        self.journal = journal
        self.other = get_replica_context().get_handle("other")

    def __call__(self, request):
        return self.other.call()

    def close(self):
        try:
            while self.other.call() == "ok":  # until that has heard, too
                pass
        except errors.EngineError as error:
            self.journal.add(f"{type(error).__name__}: {error}")


def test_a_close_that_calls_learns_that_the_engine_shuts_down(adapter, journal):
    with adapter.engine() as engine:
        engine.create_backend("other", lambda request: "ok")
        engine.create_endpoint("other", backend="other")
        engine.create_backend("calls", CallsInClose, journal)
        engine.create_endpoint("calls", backend="calls")
        assert engine.get_handle("calls").call() == "ok"
    (line,) = journal.lines()
    assert line.startswith("EngineClosed: the engine")


def test_close_comes_after_what_runs(serve, engine, journal, gate):
    class Backend(Plain):
        def __call__(self, request):
            gate.pass_through()
            self.journal.add("called")
            return "ok"

    served = serve(Backend, journal, route=None)
    ref = served.handle.remote()
    gate.wait_for_arrivals(1)
    leaving = threading.Thread(target=leave, args=(served, engine))
    leaving.start()
    eventually(lambda: served.name not in engine.list_endpoints())
    gate.open()
    assert engine.get(ref, timeout=20) == "ok"
    leaving.join()
    assert journal.lines() == ["called", "close", "del"]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_background_tasks_come_before_close(serve, engine, journal, gate, kind):
    class Backend(Plain):
        def __call__(self, request):
            return PlainTextResponse("ok", background=BackgroundTask(self.after))

        async def after(self):
            await gate.apass_through()
            self.journal.add("background")

    class AsyncBackend(Backend):
        async def __call__(self, request):
            return super().__call__(request)

    served = serve({"plain": Backend, "async": AsyncBackend}[kind], journal)
    assert served.http_text() == "ok"
    gate.wait_for_arrivals(1)
    leaving = threading.Thread(target=leave, args=(served, engine))
    leaving.start()
    eventually(lambda: served.name not in engine.list_endpoints())
    gate.open()
    leaving.join()
    assert journal.lines() == ["background", "close", "del"]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_work_in_a_thread_pool_is_finished(serve, engine, journal, gate, kind):
    class Backend:
        def __init__(self):
            self.pool = ThreadPoolExecutor(1)

        def __call__(self, request):
            self.pool.submit(gate.pass_through)
            self.pool.submit(journal.add, "worked")

        def close(self):
            gate.open()

    class AsyncBackend(Backend):
        async def __call__(self, request):
            super().__call__(request)

    served = serve({"plain": Backend, "async": AsyncBackend}[kind], route=None)
    served.call()
    leave(served, engine)
    eventually(lambda: journal.lines() == ["worked"])


class Pooled:
    """Has processes of its own."""

    def __init__(self):
        self.pool = ProcessPoolExecutor(2)
        self.subprocess = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])

    def __call__(self, request):
        return [self.pool.submit(os.getpid).result(), self.subprocess.pid]


@pytest.mark.parametrize("how", ["in order", "by force"])
def test_a_replica_takes_its_processes_along(serve, engine, adapter, caplog, how):
    if not adapter.processes:
        pytest.skip("the application's process is the one that ends its children")
    served = serve(Pooled, route=None)
    pids = served.call()
    assert all(map(is_running, pids))
    leave(served, engine, force=how == "by force")
    scribe().flush(PATIENCE_S)
    assert "is killed" not in caplog.text, "it did not leave by itself"
    eventually(lambda: not any(map(is_running, pids)))


def test_a_replica_that_is_killed_is_not_closed(serve, engine, journal):
    served = serve(Plain, journal, route=None)
    assert served.call() == "ok"
    leave(served, engine, force=True)
    assert "close" not in journal.lines()


class FailsToClose:
    def __init__(self, journal, error):
        self.journal = journal
        self.error = error

    def __call__(self, request):
        return "ok"

    def close(self):
        self.journal.add("close")
        raise self.error


class FailsToCloseOnLoop(FailsToClose):
    async def __call__(self, request):
        return "ok"

    async def close(self):
        super().close()


@pytest.mark.parametrize("backend", [FailsToClose, FailsToCloseOnLoop])
@pytest.mark.parametrize("error", [ValueError("stuck"), SystemExit("stuck"), KeyboardInterrupt("stuck")], ids=repr)
def test_a_close_that_fails_is_logged(serve, engine, journal, caplog, backend, error):
    served = serve(backend, journal, error, route=None)
    leave(served, engine)
    assert journal.lines() == ["close"]
    eventually(lambda: "stuck" in caplog.text)
    scribe().flush(PATIENCE_S)
    assert f"close() of backend {served.tag!r} failed" in caplog.text
    assert "is killed" not in caplog.text


class Stays:
    """Does not leave."""

    def __init__(self, what, gate):
        self.what = what
        self.gate = gate
        if what == "atexit":
            atexit.register(gate.pass_through)
        if what == "thread":
            threading.Thread(target=gate.pass_through, name="lasting").start()

    def __call__(self, request):
        return "ok"

    def close(self):
        if self.what == "close":
            self.gate.pass_through()


def test_a_replica_that_does_not_leave_is_killed(serve, engine, adapter, gate, caplog):
    reasons = ["close", "atexit", "thread"] if adapter.processes else ["close"]
    config = {"graceful_shutdown_timeout_s": 0.3}
    stay = [serve(Stays, reason, gate, route=None, config=config) for reason in reasons]
    threads = [threading.Thread(target=leave, args=(served, engine)) for served in stay]
    before = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - before < 10, "less than the gate would have kept them"
    scribe().flush(PATIENCE_S)
    assert caplog.text.count("is killed; its close(), exit functions or threads keep it") == len(stay)


def hooked(**attributes):
    return type("Hooked", (), {"__call__": lambda self, request: "ok", **attributes})


async def awaits(self):
    pass


def yields(self, *args):
    yield


async def yields_on_loop(self, *args):
    yield


def takes_one(self, how):
    pass


@pytest.mark.parametrize(
    ("name", "hook", "message"),
    [
        ("close", yields, "close of Hooked, .* must not have a yield"),
        ("close", yields_on_loop, "close of Hooked, .* must not have a yield"),
        ("reconfigure", yields_on_loop, "reconfigure of Hooked, .* must not have a yield"),
        ("close", 3, "close of Hooked, .* must be a method, not 3"),
        ("check_health", 3, "check_health of Hooked, .* must be a method, not 3"),
        ("check_health", takes_one, "check_health of Hooked, .* must need no arguments: .*'how'"),
        ("check_health", yields_on_loop, "check_health of Hooked, .* must not have a yield"),
        ("close", takes_one, "close of Hooked, .* must need no arguments: .*'how'"),
        ("close", staticmethod(takes_one), "close of Hooked, .* must need no arguments: .*'self'"),
        ("__init__", awaits, "__init__ of Hooked, .* must be a plain def"),
        ("__init__", yields, "__init__ of Hooked, .* must be a plain def"),
    ],
)
def test_a_hook_that_cannot_be_called_is_refused(engine, name, hook, message):
    with pytest.raises(errors.InvalidArgument, match=message):
        engine.create_backend("hooked", hooked(**{name: hook}))
    if name != "__init__":
        with pytest.raises(errors.InvalidArgument, match=message):
            engine.create_backend("hooked", hooked(**{name: hook})())


@pytest.mark.parametrize(
    "hook",
    [None, property(takes_one), staticmethod(lambda: None), classmethod(lambda cls, how=1: None), awaits],
    ids=["none", "property", "static", "class", "async"],
)
def test_a_hook_that_can_be_called_is_not(serve, hook):
    assert serve(hooked(close=hook), route=None).call() == "ok"


@pytest.mark.parametrize("way", ["handle", "http"])
def test_clients_cannot_call_what_the_engine_calls(serve, journal, way):
    class Backend(Plain):
        def reconfigure(self, user_config):
            self.journal.add("reconfigured")

    served = serve(Backend, journal)
    for name in ("close", "reconfigure"):
        if way == "handle":
            with pytest.raises(errors.MethodNotFound, match=name):
                served.call(method_name=name)
        else:
            assert served.http(headers={"X-SERVE-CALL-METHOD": name}).status_code == 400
    assert journal.lines() == []


class Parent:
    def __init__(self):
        sleep = ["sleep", "1000"]
        self.children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]

    def __call__(self, request):
        return os.getpid(), *[child.pid for child in self.children]


def test_what_a_replica_has_started_ends_with_it(serve, engine, adapter):
    """However it ends; but what was started to outlive it does so, at least if it crashes."""
    if not adapter.processes:
        pytest.skip("its children are those of the calling process")
    served = serve(Parent, route=None)
    replica, child, other = served.call()
    os.kill(replica, signal.SIGKILL)
    eventually(lambda: not is_running(child))
    assert is_running(other)
    os.kill(other, signal.SIGKILL)
    eventually(lambda: engine.statistics()["backends"][served.tag]["replicas"] == {f"{served.tag}#2": "ready"})
    _, child, other = served.call()
    engine.delete_endpoint(served.name)
    engine.delete_backend(served.tag)
    eventually(lambda: not is_running(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(other, signal.SIGKILL)
