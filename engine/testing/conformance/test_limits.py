"""How many calls a replica holds, how many wait, and what scaling does to them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter

import httpx
import pytest

from engine import accept_batch, errors, get_replica_context
from engine.seam.scribe import scribe
from engine.testing.conformance.load import Load
from engine.testing.instruments import PATIENCE_S, eventually


class Counting:
    """Returns the most calls that ran at once, after all of them were held at the gate."""

    def __init__(self, gate):
        self.gate = gate
        self.running = 0
        self.most = 0

    async def __call__(self, request):
        self.running += 1
        self.most = max(self.most, self.running)
        await self.gate.apass_through()
        await asyncio.sleep(0)
        self.running -= 1
        return self.most


def replica_tag(request):
    return get_replica_context().replica_tag


def test_max_concurrent_queries(serve, engine, gate):
    served = serve(Counting, gate, config={"max_concurrent_queries": 3})
    refs = [served.handle.remote() for _ in range(6)]
    by_http = []
    threads = [threading.Thread(target=lambda: by_http.append(served.http().text)) for _ in range(3)]
    for thread in threads:
        thread.start()
    gate.wait_for_arrivals(3)
    assert engine.wait(refs, timeout=0.1)[0] == []
    assert gate.arrivals() == 3, "whoever calls, the replica holds no more"
    gate.open()
    assert max(engine.get(refs, timeout=20)) == 3
    for thread in threads:
        thread.join()
    assert set(by_http) <= {"3"}
    assert len(by_http) == 3
    assert gate.arrivals() == 9


def test_async_backends_run_many_calls_at_once_by_default(serve, engine, gate):
    handle = serve(Counting, gate, route=None).handle
    refs = [handle.remote() for _ in range(100)]
    gate.wait_for_arrivals(100)
    gate.open()
    assert max(engine.get(refs, timeout=20)) == 100


def test_sync_backends_run_one_call_at_a_time(serve, engine, gate):
    class Backend:
        running = 0

        def __call__(self, request):
            assert not self.running
            self.running += 1
            gate.pass_through()
            self.running -= 1

    handle = serve(Backend, route=None).handle
    refs = [handle.remote() for _ in range(20)]
    gate.wait_for_arrivals(1)
    assert engine.wait(refs, timeout=0.1)[0] == []
    assert gate.arrivals() == 1
    gate.open()
    assert engine.get(refs, timeout=20) == [None] * 20


def test_overload(serve, engine, gate):
    async def backend(request):
        await gate.apass_through()
        return request.data

    handle = serve(backend, route=None, config={"max_concurrent_queries": 1, "max_queued_requests": 2}).handle
    refs = [handle.remote(0)]
    gate.wait_for_arrivals(1)
    refs += [handle.remote(1), handle.remote(2)]
    for _ in range(3):
        with pytest.raises(errors.Overloaded, match="max_queued_requests"):
            engine.get(handle.remote("too many"), timeout=20)
    gate.open()
    assert engine.get(refs, timeout=20) == [0, 1, 2], "those that were accepted are served"
    assert handle.call("again") == "again"


def test_calls_that_would_wait_too_long_are_refused_at_once(serve, engine, gate):
    """As judged by how fast others were served: one after the other, each in a tenth of a second."""

    def backend(request):
        if request.data < 5:
            time.sleep(0.1)
        else:
            gate.pass_through()
        return request.data

    served = serve(backend, route=None, config={"max_concurrent_queries": 1})
    refs = [served.handle.remote(number) for number in range(100)]
    gate.wait_for_arrivals(1)
    with pytest.raises(errors.Overloaded, match="its deadline is in"):
        engine.get(served.handle.options(timeout_s=3).remote("too late"), timeout=20)
    engine.update_backend_config(served.tag, {"max_queue_wait_s": 1})
    with pytest.raises(errors.Overloaded, match="max_queue_wait_s=1"):
        engine.get(served.handle.remote("would wait"), timeout=20)
    gate.open()
    assert engine.get(refs, timeout=40) == list(range(100))


def test_what_waits_is_bounded_in_bytes(serve, engine, gate):
    """One that is alone may be as large as it likes: who has to send it could not send it otherwise."""

    async def backend(request):
        await gate.apass_through()
        return len(request.data)

    served = serve(backend, route=None, config={"max_concurrent_queries": 1, "max_queued_bytes": 5000})

    def queued_bytes():
        return engine.statistics()["backends"][served.tag]["queued_bytes"]

    refs = [served.handle.remote(bytes(10_000))]
    gate.wait_for_arrivals(1)
    assert queued_bytes() == 0
    refs.append(served.handle.remote(bytes(10_000)))
    eventually(lambda: queued_bytes() > 10_000)
    with pytest.raises(errors.Overloaded, match="max_queued_bytes=5000"):
        engine.get(served.handle.remote(b""), timeout=20)
    engine.update_backend_config(served.tag, {"max_queued_bytes": 15_000})
    refs += [served.handle.remote(bytes(4000)), served.handle.options(timeout_s=0.1).remote(b"late")]
    with pytest.raises(errors.Overloaded, match="max_queued_bytes=15000"):
        engine.get(served.handle.remote(bytes(2000)), timeout=20)
    with pytest.raises((errors.DeadlineExceeded, errors.Overloaded)):  # at once, if others have waited for so long
        engine.get(refs.pop(), timeout=20)
    gate.open()
    assert engine.get(refs, timeout=20) == [10_000, 10_000, 4000]
    assert queued_bytes() == 0


def test_no_queue_limit(serve, engine, gate):
    async def backend(request):
        await gate.apass_through()
        return request.data

    handle = serve(backend, route=None, config={"max_concurrent_queries": 1, "max_queued_requests": None}).handle
    refs = [handle.remote(number) for number in range(1500)]
    gate.open()
    assert engine.get(refs, timeout=40) == list(range(1500))


def test_the_default_queue_is_bounded(serve, engine, gate):
    async def backend(request):
        await gate.apass_through()

    handle = serve(backend, route=None, config={"max_concurrent_queries": 1}).handle
    refs = [handle.remote() for _ in range(1200)]
    overloaded = sum(isinstance(ref.future().exception(), errors.Overloaded) for ref in refs[1001:])
    assert overloaded == 199
    gate.open()
    assert engine.get(refs[:1001], timeout=40) == [None] * 1001


def test_the_free_replica_gets_the_calls(serve, engine, gate):
    """A replica that is stuck at one call must not delay those that the other one could take."""

    async def backend(request):
        if request.data == "hold":
            await gate.apass_through()
        return get_replica_context().replica_tag

    config = {"num_replicas": 2, "max_concurrent_queries": 1}
    handle = serve(backend, route=None, config=config).handle
    held = handle.remote("hold")
    gate.wait_for_arrivals(1)
    free = {handle.call("pass") for _ in range(20)}
    assert len(free) == 1
    gate.open()
    assert engine.get(held, timeout=20) not in free


def test_the_free_replica_gets_the_calls_of_those_who_do_not_know_of_the_other_ones(serve, engine, gate):
    """Each caller knows only its own calls. One that chooses a replica which is stuck gets its call back."""

    def backend(request):
        if request.query_params:
            gate.pass_through()
        return get_replica_context().replica_tag

    served = serve(backend, config={"num_replicas": 2})
    held = served.handle.remote(hold=1)
    gate.wait_for_arrivals(1)
    async_handle = engine.get_handle(served.name, sync=False)

    async def calls():
        return [await async_handle.call() for _ in range(5)]

    free = {served.http_text() for _ in range(5)} | set(asyncio.run(calls())) | {served.handle.call() for _ in range(5)}
    assert len(free) == 1
    gate.open()
    assert engine.get(held, timeout=20) not in free


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("way", ["handle", "http"])
def test_a_caller_with_many_calls_leaves_its_turns_to_others(serve, engine, gate, journal, kind, way):
    """A replica takes calls of those who wait for it in turn, whoever has how many of them."""

    async def asynchronous(request):
        journal.add("many" if getattr(request, "data", None) == "many" else "other")
        await asyncio.sleep(0 if gate.is_open() else 0.01)

    def sync(request):
        journal.add("many" if getattr(request, "data", None) == "many" else "other")
        time.sleep(0 if gate.is_open() else 0.01)

    served = serve(sync if kind == "sync" else asynchronous, config={"max_concurrent_queries": 1})
    refs = [served.handle.remote("many") for _ in range(100)]
    eventually(journal.lines)
    ahandle = engine.get_handle(served.name, sync=False)

    async def others():
        for _ in range(5):
            await ahandle.call()

    if way == "handle":
        asyncio.run(others())
    else:
        for _ in range(5):
            served.http()
    lines = journal.lines()
    gate.open()
    engine.get(refs, timeout=20)
    assert lines.count("other") == 5
    assert lines.count("many") < 30, "each other one waited for one or two of the many, or for a little more"


def test_calls_spread_over_replicas(serve):
    handle = serve(replica_tag, route=None, config={"num_replicas": 3}).handle
    counted = Counter(handle.call() for _ in range(300))
    assert len(counted) == 3
    assert min(counted.values()) > 30


def test_scaling_up_serves_what_waits(serve, engine, gate):
    def backend(request):
        gate.pass_through()
        return get_replica_context().replica_tag

    served = serve(backend, route=None, config={"max_concurrent_queries": 1})
    refs = [served.handle.remote() for _ in range(3)]
    gate.wait_for_arrivals(1)
    assert gate.arrivals() == 1
    engine.update_backend_config(served.tag, {"num_replicas": 3})
    gate.wait_for_arrivals(3)
    gate.open()
    assert len(set(engine.get(refs, timeout=20))) == 3


def test_scaling_down_finishes_what_runs(serve, engine, gate):
    def backend(request):
        if request.data == "hold":
            gate.pass_through()
        return get_replica_context().replica_tag

    served = serve(backend, route=None, config={"num_replicas": 3, "max_concurrent_queries": 1})
    refs = [served.handle.remote("hold") for _ in range(3)]
    gate.wait_for_arrivals(3)
    scaling = threading.Thread(target=engine.update_backend_config, args=(served.tag, {"num_replicas": 1}))
    scaling.start()
    waiting = [served.handle.remote("pass") for _ in range(5)]
    gate.open()
    assert len(set(engine.get(refs, timeout=20))) == 3
    engine.get(waiting, timeout=20)
    scaling.join(20)
    assert not scaling.is_alive()
    assert len({served.call() for _ in range(20)}) == 1


@pytest.mark.parametrize("way", ["handle", "http"])
def test_scaling_under_load_loses_nothing(serve, engine, way):
    served = serve(replica_tag)
    with Load(served.call if way == "handle" else served.http_text) as load:
        for replicas in (3, 1, 2, 1):
            engine.update_backend_config(served.tag, {"num_replicas": replicas})
            seen = len(load.answers)
            eventually(lambda seen=seen: len(set(load.answers[seen:])) >= replicas or load.failures)  # noqa: B023
    assert load.failures == []


@pytest.mark.parametrize("kind", ["sync", "async", "batched", "batched async"])
@pytest.mark.parametrize("timeout_s", [0, 0.0002, 0.002])
def test_calls_that_were_given_up_free_their_slots(serve, kind, timeout_s):
    """Whenever it is that the caller leaves: before, while or after the replica takes the call."""

    def sync(request):
        return "ok"

    async def asynchronous(request):
        await asyncio.sleep(0)
        return "ok"

    @accept_batch
    def batched(requests):
        return ["ok"] * len(requests)

    @accept_batch
    async def batched_asynchronous(requests):
        await asyncio.sleep(0)
        return ["ok"] * len(requests)

    backends = {"sync": sync, "async": asynchronous, "batched": batched, "batched async": batched_asynchronous}
    batching = {"max_batch_size": 2, "batch_wait_timeout": 0.0005} if kind.startswith("batched") else {}
    served = serve(backends[kind], config={"max_concurrent_queries": 2, **batching})
    impatient = served.handle.options(timeout_s=timeout_s)
    for _ in range(200):
        with contextlib.suppress(errors.DeadlineExceeded):
            assert impatient.call() == "ok"
    assert [served.call(timeout_s=20) for _ in range(5)] == ["ok"] * 5
    assert served.http_text() == "ok"


def test_http_clients_that_leave_free_their_slots(serve, client, gate, caplog):
    async def backend(request):
        if request.query_params:
            await gate.apass_through()
        return "ok"

    served = serve(backend, config={"max_concurrent_queries": 1})
    for number in range(3):
        with pytest.raises(httpx.ReadTimeout):
            client.get(served.url, params={"hold": 1}, timeout=0.2)
        assert gate.arrivals() == number + 1
        assert served.http_text(timeout=10) == "ok", "the place of a client that left is free, although its gate is not"
    assert not gate.is_open()
    scribe().flush(PATIENCE_S)
    assert "CancelledError" not in caplog.text, "a client that leaves is no failure of the backend"


def test_limits_can_be_updated(serve, engine, gate):
    served = serve(Counting, gate, route=None, config={"max_concurrent_queries": 1})
    refs = [served.handle.remote() for _ in range(4)]
    gate.wait_for_arrivals(1)
    engine.update_backend_config(served.tag, {"max_concurrent_queries": 4})
    gate.wait_for_arrivals(4)
    gate.open()
    assert max(engine.get(refs, timeout=20)) == 4
