"""What a call has left goes with it into the calls that it makes, and what is late never reaches user code.

Budgets here are of an ample half minute, or surely over: nothing depends on how long anything takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import socket
import sys
import threading
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse
from starlette.routing import Mount

from engine import accept_batch, errors, remaining_s
from engine.testing.instruments import eventually

AMPLE_S = 30.0
LONG_S = 3000.0


def leaf(request):
    return remaining_s()


def result_of(ref):
    """What a ref stands for, one of Ray's included."""
    return ref.future().result(AMPLE_S)


def in_thread(function, *, context=None):
    """What a function returns in a thread of its own."""
    told = []
    run = function if context is None else lambda: context.run(function)
    thread = threading.Thread(target=lambda: told.append(run()))
    thread.start()
    thread.join(AMPLE_S)
    return told[0]


class SyncCaller:
    """Says what it has left, and then what the backend says that it calls, in every way there is."""

    def __init__(self, back):
        self.back = back

    def __call__(self, request):
        return self.call()

    def call(self):
        return remaining_s(), self.back.call()

    def remote(self):
        return remaining_s(), result_of(self.back.remote())

    def ref_as_argument(self):
        return remaining_s(), self.back.call(self.back.remote())

    def thread(self):
        return remaining_s(), in_thread(self.back.call, context=contextvars.copy_context())

    def thread_without_context(self):
        return in_thread(remaining_s, context=contextvars.Context()), in_thread(
            self.back.call, context=contextvars.Context()
        )

    def loop_of_its_own(self):
        async def call():
            return remaining_s(), await asyncio.to_thread(self.back.call)

        return asyncio.run(call())

    def shorter(self):
        return remaining_s(), self.back.options(timeout_s=5).call()

    def longer(self):
        return remaining_s(), self.back.options(timeout_s=LONG_S).call()

    def without_a_limit_of_its_own(self):
        return remaining_s(), self.back.options(timeout_s=None).call()

    def apart(self):
        return remaining_s(), self.back.options(inherit_deadline=False).call()

    def apart_and_limited(self):
        handle = self.back.options(inherit_deadline=False, timeout_s=LONG_S)
        return handle.call(), result_of(handle.remote())


class AsyncCaller:
    """As `SyncCaller`, on an event loop."""

    def __init__(self, back):
        self.back = back

    async def __call__(self, request):
        return await self.call()

    async def call(self):
        return remaining_s(), await self.back.call()

    async def remote(self):
        return remaining_s(), await (await self.back.remote())

    async def ref_as_argument(self):
        return remaining_s(), await self.back.call(await self.back.remote())

    async def thread(self):
        return remaining_s(), await asyncio.to_thread(lambda: asyncio.run(self.back.call()))

    async def thread_without_context(self):
        def call():
            return asyncio.run(self.back.call())

        return await asyncio.to_thread(in_thread, remaining_s, context=contextvars.Context()), await asyncio.to_thread(
            in_thread, call, context=contextvars.Context()
        )

    async def loop_of_its_own(self):
        task = asyncio.create_task(self.back.call())
        return remaining_s(), (await asyncio.gather(task))[0]

    async def shorter(self):
        return remaining_s(), await self.back.options(timeout_s=5).call()

    async def longer(self):
        return remaining_s(), await self.back.options(timeout_s=LONG_S).call()

    async def without_a_limit_of_its_own(self):
        return remaining_s(), await self.back.options(timeout_s=None).call()

    async def apart(self):
        return remaining_s(), await self.back.options(inherit_deadline=False).call()

    async def apart_and_limited(self):
        handle = self.back.options(inherit_deadline=False, timeout_s=LONG_S)
        return await handle.call(), await (await handle.remote())


INHERITING = ["call", "remote", "ref_as_argument", "thread", "loop_of_its_own", "longer", "without_a_limit_of_its_own"]


@pytest.mark.parametrize("caller", [SyncCaller, AsyncCaller])
def test_a_call_gives_what_it_has_left_to_the_calls_it_makes(serve, serve_once, caller):
    back = serve_once(leaf, route=None)
    served = serve(caller, back.handle if caller is SyncCaller else back.ahandle, route=None)
    for way in INHERITING:
        own, given = served.call(method_name=way, timeout_s=AMPLE_S)
        assert 0 < given <= own <= AMPLE_S, way
        assert served.call(method_name=way)[0] is None, way
        assert result_of(served.handle.options(method_name=way, timeout_s=AMPLE_S).remote())[1] <= AMPLE_S, way
    assert served.call(method_name="call") == (None, None)
    own, given = served.call(method_name="shorter", timeout_s=AMPLE_S)
    assert own > 5 >= given > 0
    own, given = served.call(method_name="apart", timeout_s=AMPLE_S)
    assert own <= AMPLE_S
    assert given is None
    for given in served.call(method_name="apart_and_limited", timeout_s=AMPLE_S):
        assert AMPLE_S < given <= LONG_S
    if not getattr(sys.flags, "thread_inherit_context", 0):
        assert served.call(method_name="thread_without_context", timeout_s=AMPLE_S) == (None, None)


def test_what_is_left_travels_however_deep(serve, serve_once):
    back = serve_once(leaf, route=None)
    middle = serve(SyncCaller, back.handle, route=None)
    front = serve(AsyncCaller, middle.ahandle, route=None)
    first, (second, third) = front.call(timeout_s=AMPLE_S)
    assert AMPLE_S >= first >= second >= third > 0
    assert front.call() == (None, (None, None))


def test_outside_of_a_call_there_is_no_deadline(serve):
    class Backend:
        def __init__(self):
            self.at_start = remaining_s()

        def __call__(self, request):
            return self.at_start

    assert remaining_s() is None
    served = serve(Backend, route=None)
    assert served.call(timeout_s=AMPLE_S) is None
    assert remaining_s() is None


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_call_whose_time_is_over_makes_none(serve, kind, journal):
    back = serve(lambda request: journal.add(request.data), route=None)
    handle, ahandle = back.handle, back.ahandle

    def sync(request):
        eventually(lambda: remaining_s() == 0)
        try:
            handle.call("late")
        except errors.DeadlineExceeded as error:
            journal.add(error)
        with contextlib.suppress(errors.DeadlineExceeded):
            result_of(handle.remote("late by ref"))
        handle.options(inherit_deadline=False).call("apart")

    async def asynchronous(request):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        eventually(lambda: remaining_s() == 0)  # after as long as the call took to come here
        try:
            await ahandle.call("late")
        except errors.DeadlineExceeded as error:
            journal.add(error)
        with contextlib.suppress(errors.DeadlineExceeded):
            await (await ahandle.remote("late by ref"))
        await ahandle.options(inherit_deadline=False).call("apart")

    front = serve(sync if kind == "sync" else asynchronous, route=None, config={"cancel_running": kind != "sync"})
    with pytest.raises(errors.DeadlineExceeded, match=r"timeout_s=0\.05"):
        front.call(timeout_s=0.05)
    first, *others = eventually(lambda: len(lines := journal.lines()) >= 2 and lines)
    assert "within the 0 s that were left to the call that made this one" in first
    assert others == ["apart"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_batch_has_as_long_as_the_most_patient_of_its_calls(serve, kind):
    @accept_batch
    def sync(requests):
        return [remaining_s()] * len(requests)

    @accept_batch
    async def asynchronous(requests):
        for _ in requests:
            yield remaining_s()

    config = {"max_batch_size": 2, "batch_wait_timeout": 50.0}
    handle = serve(sync if kind == "sync" else asynchronous, route=None, config=config).handle

    def together(*timeouts_s):
        return [result_of(ref) for ref in [handle.options(timeout_s=timeout_s).remote() for timeout_s in timeouts_s]]

    assert all(AMPLE_S < left <= LONG_S for left in together(AMPLE_S, LONG_S))
    assert all(AMPLE_S < left <= LONG_S for left in together(LONG_S, AMPLE_S))
    assert together(None, AMPLE_S) == [None, None]
    assert together(None, None) == [None, None]


def test_what_goes_on_after_the_answer_has_no_deadline(serve, serve_once, gate, journal):
    back = serve_once(leaf, route=None).ahandle
    tasks = []

    async def backend(request):
        async def later():
            await gate.apass_through()
            journal.add(f"{remaining_s()} {await back.call()}")

        tasks.append(asyncio.create_task(later()))
        return remaining_s()

    assert serve(backend, route=None).call(timeout_s=AMPLE_S) <= AMPLE_S
    gate.open()
    assert eventually(journal.lines) == ["None None"]


# -- queues ------------------------------------------------------------------------------------------------------------


def by_call(served):
    served.call("late", timeout_s=0.02)


def by_ref(served):
    served.engine.get(served.handle.options(timeout_s=0.02).remote("late"))


def by_call_on_a_loop(served):
    asyncio.run(served.ahandle.options(timeout_s=0.02).call("late"))


def by_ref_on_a_loop(served):
    async def call():
        await (await served.ahandle.options(timeout_s=0.02).remote("late"))

    asyncio.run(call())


def over_http(served):
    if served.http("POST", content=b"late", headers=limited(0.02)).status_code == 504:
        raise errors.DeadlineExceeded


@pytest.mark.parametrize("kind", ["sync", "async", "batched"])
def test_what_is_late_leaves_every_queue_at_once(serve, engine, kind, gate, journal):
    """The queue has one place: were it not free again, the next call would be refused."""

    def came(request):
        journal.add(getattr(request, "data", "late, over HTTP"))

    def sync(request):
        came(request)
        gate.pass_through()

    async def asynchronous(request):
        came(request)
        await gate.apass_through()

    @accept_batch
    async def batched(requests):
        for request in requests:
            came(request)
        await gate.apass_through()
        return [None] * len(requests)

    backend = {"sync": sync, "async": asynchronous, "batched": batched}[kind]
    served = serve(backend, methods=["POST"], config={"max_concurrent_queries": 1, "max_queued_requests": 1})
    first = served.handle.remote("first")
    gate.wait_for_arrivals(1)
    for way in (by_call, by_ref, by_call_on_a_loop, by_ref_on_a_loop, over_http):
        with pytest.raises(errors.DeadlineExceeded):
            way(served)
    assert engine.statistics()["backends"][served.tag]["queued"] == 0
    assert not gate.is_open(), "each was told at its deadline, rather than when its turn came"
    gate.open()
    engine.get(first)
    served.call("next")
    assert journal.lines() == ["first", "next"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_is_read_too_late_is_not_run(serve, adapter, kind, journal):
    """A replica that is stopped reads nothing. When it goes on, it finds calls that nobody waits for any more."""
    if not adapter.processes:
        pytest.skip("replicas are threads of this process")

    def sync(request):
        journal.add(len(request.data))
        return os.getpid()

    async def asynchronous(request):
        return sync(request)

    served = serve(sync if kind == "sync" else asynchronous, route=None)
    pid = served.call("")
    os.kill(pid, signal.SIGSTOP)
    try:
        for size in (10, 1 << 20, 3 << 20):  # what comes in several reads, and so before the news of its end
            with pytest.raises(errors.DeadlineExceeded):
                served.call(size * "x", timeout_s=0.02)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert served.call("next") == pid
    assert journal.lines() == ["0", "4"]


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def limited(timeout_s):
    return {"X-Request-Timeout-Ms": str(round(1000 * timeout_s))}


@pytest.mark.parametrize("caller", [SyncCaller, AsyncCaller])
def test_what_an_http_client_allows_travels_as_well(serve, serve_once, caller):
    class OverHTTP(caller):
        pass

    back = serve_once(leaf, route=None)
    served = serve(OverHTTP, back.handle if caller is SyncCaller else back.ahandle)
    own, given = served.http_json(headers=limited(AMPLE_S))
    assert AMPLE_S >= own >= given > 0
    assert served.http_json() == [None, None]
    assert served.http("POST", headers=limited(AMPLE_S), content=b"body").json()[1] <= AMPLE_S


@pytest.mark.anyio
async def test_a_mounted_ingress_keeps_to_it(serve_once, engine):
    served = serve_once(leaf)
    app = Starlette(routes=[Mount("/models", app=engine.asgi)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.get(f"/models{served.route}", headers=limited(AMPLE_S))
        assert 0 < answer.json() <= AMPLE_S
        answer = await client.get(f"/models{served.route}", headers={"x-request-timeout-ms": "soon"})
        assert answer.status_code == 400


@pytest.mark.anyio
async def test_a_request_that_is_passed_on_takes_what_is_left(serve, engine):
    """What counts is the budget of the call, not what the header says that goes along."""
    back = serve(lambda request: [remaining_s(), request.headers.get("x-request-timeout-ms")], route=None).ahandle

    async def front(request):
        return [await back.options(timeout_s=5).call(request), await back.call(request)]

    answer = serve(front).http_json(headers=limited(AMPLE_S))
    assert [header for _, header in answer] == ["30000", "30000"]
    assert answer[0][0] <= 5 < answer[1][0] <= AMPLE_S


def test_a_limit_that_is_none_is_told(serve_once):
    served = serve_once(leaf)
    for wrong in ("0", "-5", "1.5", "soon", ""):
        response = served.http(headers={"X-Request-Timeout-Ms": wrong})
        assert response.status_code == 400, wrong
        assert "X-REQUEST-TIMEOUT-MS must be a whole number of milliseconds" in response.text


def test_a_request_that_takes_longer_than_its_client_allows(serve, gate):
    async def backend(request):
        if request.query_params:
            await gate.apass_through()
        return "ok"

    served = serve(backend, config={"max_concurrent_queries": 1})
    assert served.http(suffix="?hold=1", headers=limited(0.05)).status_code == 504
    assert served.http_text() == "ok", "its place is free"
    assert not gate.is_open()


def test_a_body_that_takes_longer_makes_no_call(serve, journal):
    served = serve(lambda request: journal.add("called"))
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        head = "POST {} HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nX-Request-Timeout-Ms: 20\r\n\r\nbody"
        connection.sendall(head.format(address.path).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 504")
    served.http()
    assert journal.lines() == ["called"]


@pytest.mark.parametrize("kind", ["sync", "async", "response"])
def test_a_stream_that_has_begun_has_no_deadline(serve, kind, journal):
    def told():
        return f"{remaining_s() is None} "

    def sync(request):
        yield told()
        yield told()

    async def asynchronous(request):
        yield told()
        yield told()

    def response(request):
        return StreamingResponse(asynchronous(request), background=BackgroundTask(lambda: journal.add(told())))

    served = serve({"sync": sync, "async": asynchronous, "response": response}[kind])
    assert served.http_text(headers=limited(AMPLE_S)) == "False True "
    if kind == "response":
        assert eventually(journal.lines) == ["True "]
