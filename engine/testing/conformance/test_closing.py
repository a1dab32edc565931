"""An engine that was shut down: nothing is left, and everybody is told."""

from __future__ import annotations

import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx
import pytest

from engine import errors, get_replica_context
from engine.testing.instruments import PATIENCE_S, eventually


def ok(request):
    return "ok"


def used(engine, client):
    """Make an engine do a bit of everything."""
    engine.create_backend("ok", ok, config={"num_replicas": 2})
    engine.create_endpoint("ok", backend="ok", route="/ok")
    assert engine.get_handle("ok").call() == "ok"
    assert engine.get(engine.get_handle("ok").remote()) == "ok"
    assert client.get(f"{engine.http_url}/ok").text == "ok"
    return engine


def test_nothing_is_left(adapter, client, leaves_nothing):
    with adapter.engine() as engine:
        used(engine, client)
        url = engine.http_url
    with pytest.raises(httpx.ConnectError):
        client.get(f"{url}/ok")


def test_shutdown_may_be_repeated(adapter, client, leaves_nothing):
    engine = used(adapter.engine(), client)
    engine.shutdown()
    engine.shutdown()
    with engine:
        pass


def test_shutdown_from_several_threads(adapter, client, leaves_nothing):
    engine = used(adapter.engine(), client)
    threads = [threading.Thread(target=engine.shutdown) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_an_unused_engine(adapter, leaves_nothing):
    adapter.engine().shutdown()


def test_an_exception_in_with(adapter, client, leaves_nothing):
    with pytest.raises(KeyError, match="mine"), adapter.engine() as engine:
        used(engine, client)
        raise KeyError("mine")


@pytest.mark.anyio
async def test_async_with(adapter, leaves_nothing):
    async with adapter.engine() as engine:
        await anyio.to_thread.run_sync(engine.create_backend, "ok", ok)
        await anyio.to_thread.run_sync(lambda: engine.create_endpoint("ok", backend="ok"))
        assert await engine.get_handle("ok", sync=False).call() == "ok"


def test_a_constructor_that_raises_leaves_nothing(adapter, leaves_nothing):
    class Broken:
        def __init__(self):
            raise KeyError("broken")

    with adapter.engine() as engine:
        with pytest.raises(KeyError, match="broken"):
            engine.create_backend("broken", Broken)
        assert engine.list_backends() == {}


AFTERWARDS = {
    "create_backend": lambda engine: engine.create_backend("new", ok),
    "update_backend_config": lambda engine: engine.update_backend_config("ok", {"num_replicas": 1}),
    "get_backend_config": lambda engine: engine.get_backend_config("ok"),
    "list_backends": lambda engine: engine.list_backends(),
    "delete_backend": lambda engine: engine.delete_backend("ok"),
    "create_endpoint": lambda engine: engine.create_endpoint("new", backend="ok"),
    "list_endpoints": lambda engine: engine.list_endpoints(),
    "delete_endpoint": lambda engine: engine.delete_endpoint("ok"),
    "set_traffic": lambda engine: engine.set_traffic("ok", {"ok": 1}),
    "shadow_traffic": lambda engine: engine.shadow_traffic("ok", "ok", 1),
    "get_handle": lambda engine: engine.get_handle("ok"),
}


@pytest.fixture(scope="module")
def closed(adapter):
    with adapter.engine() as engine:
        engine.create_backend("ok", ok)
        engine.create_endpoint("ok", backend="ok")
        engine.handle = engine.get_handle("ok")
        engine.unused_handle = engine.get_handle("ok")
        engine.ref = engine.handle.remote()
        engine.get(engine.ref)
    return engine


@pytest.mark.parametrize("name", AFTERWARDS)
def test_every_call_says_that_it_is_closed(closed, name):
    with pytest.raises(errors.EngineClosed, match="shut down"):
        AFTERWARDS[name](closed)


def test_handles_say_that_it_is_closed(closed):
    with pytest.raises(errors.EngineClosed, match="shut down"):
        closed.handle.call()
    with pytest.raises(errors.EngineClosed, match="shut down"):
        closed.handle.remote()
    with pytest.raises(errors.EngineClosed):
        closed.unused_handle.call()


@pytest.mark.anyio
async def test_async_handles_say_that_it_is_closed(adapter):
    async with adapter.engine() as engine:
        await anyio.to_thread.run_sync(engine.create_backend, "ok", ok)
        await anyio.to_thread.run_sync(lambda: engine.create_endpoint("ok", backend="ok"))
        handle = engine.get_handle("ok", sync=False)
        unused = engine.get_handle("ok", sync=False)
        assert await handle.call() == "ok"
    with pytest.raises(errors.EngineClosed, match="shut down"):
        await handle.call()
    with pytest.raises(errors.EngineClosed, match="shut down"):
        await handle.remote()
    with pytest.raises(errors.EngineClosed):
        await unused.call()


def test_results_that_came_before_can_still_be_read(closed):
    assert closed.get(closed.ref) == "ok"


def test_calls_in_flight_are_told(adapter, gate):
    """Shutting down ends what runs too long, and nobody waits for ever."""

    async def held(request):
        await gate.apass_through()

    engine = adapter.engine()
    engine.create_backend("held", held, config={"graceful_shutdown_timeout_s": 0.1, "max_concurrent_queries": 1})
    engine.create_endpoint("held", backend="held")
    refs = [engine.get_handle("held").remote() for _ in range(3)]
    gate.wait_for_arrivals(1)
    engine.shutdown(timeout_s=0.1)
    assert not gate.is_open()
    for ref in refs:
        with pytest.raises(errors.EngineError):
            ref.future().result(20)


def test_shutdown_lets_calls_finish(adapter, gate):
    def held(request):
        gate.pass_through()
        return "finished"

    engine = adapter.engine()
    engine.create_backend("held", held)
    engine.create_endpoint("held", backend="held")
    ref = engine.get_handle("held").remote()
    gate.wait_for_arrivals(1)
    closing = threading.Thread(target=engine.shutdown)
    closing.start()
    gate.open()
    assert ref.future().result(20) == "finished"
    closing.join(20)
    assert not closing.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="the port closes with the processes that have it")
def test_who_connects_during_the_end_is_refused(adapter, client, gate):
    """And not kept waiting for the last call, to be hung up on."""

    async def held(request):
        await gate.apass_through()
        return "finished"

    def refused(port):
        try:
            socket.create_connection(("127.0.0.1", port), 20).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    engine = adapter.engine(workers=2)
    engine.create_backend("held", held, config={"max_concurrent_queries": 2, "graceful_shutdown_timeout_s": PATIENCE_S})
    engine.create_endpoint("held", backend="held", route="/held")
    url = httpx.URL(f"{engine.http_url}/held")
    with ThreadPoolExecutor(3) as pool:
        call = pool.submit(engine.get_handle("held").call)
        request = pool.submit(lambda: client.get(url).text)
        gate.wait_for_arrivals(2)
        closing = pool.submit(engine.shutdown, timeout_s=PATIENCE_S)
        try:
            eventually(lambda: refused(url.port))
            assert not closing.done()
        finally:
            gate.open()
        assert [call.result(20), request.result(20)] == ["finished"] * 2
        closing.result(20)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()], ids=repr)
def test_an_orderly_end_lets_calls_finish(adapter, gate, error):
    """A handler of SIGTERM that exits, and Ctrl-C, leave ``with`` like this."""

    def held(request):
        gate.pass_through()
        return "finished"

    with pytest.raises(type(error)), adapter.engine() as engine:
        engine.create_backend("held", held)
        engine.create_endpoint("held", backend="held")
        ref = engine.get_handle("held").remote()
        gate.wait_for_arrivals(1)
        future = ref.future()
        opening = threading.Thread(target=lambda: (eventually(lambda: "closed" in repr(engine)), gate.open()))
        opening.start()
        raise error
    opening.join()
    assert future.result(20) == "finished"


class Plain:
    """Answers once the gate is open; if it is given a name, with the answer of that endpoint."""

    def __init__(self, gate, calls=None):
        self.gate, self.calls = gate, calls

    def __call__(self, request):
        self.gate.pass_through()
        return get_replica_context().get_handle(self.calls).call() if self.calls else "finished"


class Async(Plain):
    async def __call__(self, request):
        await self.gate.apass_through()
        return await get_replica_context().get_handle(self.calls).call() if self.calls else "finished"


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except BaseException as error:
        return error


@pytest.mark.parametrize(("kind", "error"), [(Plain, SystemExit(0)), (Async, None)])
def test_what_waits_is_served_before_the_end(adapter, client, gate, journal, kind, error):
    """Also what has been handed back, calls of replicas, and requests that wait at a server."""
    config = {"max_concurrent_queries": 1}

    def noting(app):
        async def note(scope, receive, send):
            if scope["type"] == "http":
                journal.add("a request")
            await app(scope, receive, send)

        return note

    with ThreadPoolExecutor(20) as pool:
        try:
            with adapter.engine(middlewares=[noting]) as engine:
                engine.create_backend("last", lambda request: "finished")
                engine.create_endpoint("last", backend="last")
                engine.create_backend("held", kind, gate, config=config)
                engine.create_endpoint("held", backend="held", route="/held")
                engine.create_backend("calls", kind, gate, "last", config=config)
                engine.create_endpoint("calls", backend="calls")
                url, handles = f"{engine.http_url}/held", [engine.get_handle("held"), engine.get_handle("calls")]
                calls = [pool.submit(outcome, handle.call) for handle in handles for _ in range(4)]
                calls += [pool.submit(outcome, engine.get, ref) for ref in [handles[0].remote() for _ in range(3)]]
                requests = [pool.submit(lambda: client.get(url).text) for _ in range(3)]
                gate.wait_for_arrivals(2)
                eventually(lambda: sum(one["queued"] for one in engine.statistics()["backends"].values()) >= 9)
                eventually(lambda: len(journal.lines()) == 3)

                def open_at_the_end():
                    eventually(lambda: "shut down" in repr(outcome(handles[0].options(timeout_s=0.01).call)))
                    gate.open()

                pool.submit(open_at_the_end)
                if error is not None:
                    raise error
        except SystemExit:
            pass
        assert [call.result(20) for call in calls + requests] == ["finished"] * 14


def test_what_does_not_end_is_broken_off(adapter, gate):
    """By a backend's own time, however much more the others get."""
    config = {"graceful_shutdown_timeout_s": 0.1, "max_concurrent_queries": 1}
    with ThreadPoolExecutor(20) as pool, adapter.engine() as engine:
        engine.create_backend("held", Async, gate, config=config)
        engine.create_endpoint("held", backend="held")
        calls = [pool.submit(outcome, engine.get_handle("held").call) for _ in range(3)]
        eventually(lambda: engine.statistics()["backends"]["held"]["queued"] == 2)
        engine.shutdown(timeout_s=3600)
        assert not gate.is_open()
        assert all(isinstance(call.result(20), errors.EngineError) for call in calls)


@pytest.mark.parametrize("kind", [Plain, Async])
def test_what_waits_for_a_backend_is_served_before_it_is_deleted(engine, serve, gate, kind):
    served = serve(kind, gate, route=None, config={"max_concurrent_queries": 1})
    with ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(outcome, served.call) for _ in range(4)]
        gate.wait_for_arrivals(1)
        eventually(lambda: engine.statistics()["backends"][served.tag]["queued"] == 3)
        engine.delete_endpoint(served.name)
        deleting = pool.submit(engine.delete_backend, served.tag)
        eventually(lambda: served.tag not in engine.list_backends())
        gate.open()
        assert [call.result(20) for call in calls] == ["finished"] * 4
        assert deleting.result(20) is None


def test_two_engines_do_not_notice_each_other(adapter, client):
    with adapter.engine() as one, adapter.engine() as other:
        for engine, answer in ((one, "one"), (other, "other")):
            engine.create_backend("same", lambda request, answer=answer: answer)
            engine.create_endpoint("same", backend="same", route="/same")
        assert one.http_url != other.http_url
        handles = [one.get_handle("same"), other.get_handle("same")]
        assert [handle.call() for handle in handles] == ["one", "other"]
        assert [client.get(f"{engine.http_url}/same").text for engine in (one, other)] == ["one", "other"]
        one.shutdown()
        assert handles[1].call() == "other"
        assert client.get(f"{other.http_url}/same").text == "other"
        with pytest.raises(errors.EngineClosed):
            handles[0].call()


def test_names(adapter):
    from engine import Engine

    with Engine(backend=adapter.backend(), name="mine") as engine:
        assert "mine" in repr(engine)
