"""A plain callable that runs stops when nobody wants its call any more, and its replica serves on.

A replica here holds one call at a time, so that the next call is served only once the one before has really ended.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import threading
import time

import httpx
import pytest

from engine import accept_batch, errors
from engine.testing.instruments import eventually

ALONE = {"max_concurrent_queries": 1}


def spin():
    while True:
        pass


def sleep():
    time.sleep(3600)


def wait():
    threading.Event().wait()


def lock():
    held = threading.Lock()
    with held:
        held.acquire()


def receive():
    here, there = socket.socketpair()
    with here, there:
        here.recv(1)


def run_loop():
    asyncio.run(asyncio.sleep(3600))


def run_program():
    subprocess.run(["sleep", "3600"])


def swallow():
    try:
        time.sleep(3600)
    except errors.CallCancelled:
        pass


WAYS = {function.__name__: function for function in (spin, sleep, wait, lock, receive, run_loop, run_program, swallow)}


class Stuck:
    """Gets stuck as it is told, until it is struck."""

    def __init__(self, journal):
        self.journal = journal

    def __call__(self, request):
        way = request.query_params.get("way") or getattr(request, "data", None)
        if way is None:
            return os.getpid()
        self.journal.add("begins")
        try:
            WAYS[way]()
        except Exception:
            self.journal.add("took it for an error")
        except BaseException as error:
            self.journal.add(type(error).__name__)
            raise
        finally:
            time.sleep(0.001)  # a place to be struck again
            self.journal.add("ends")

    def streamed(self, request):
        try:
            yield "first"
            self.journal.add("begins")
            time.sleep(3600)
        except BaseException as error:
            self.journal.add(type(error).__name__)
            raise
        finally:
            self.journal.add("ends")

    def returned(self, request):
        async def waiting():
            self.journal.add("begins")
            try:
                await asyncio.sleep(3600)
            except BaseException as error:
                self.journal.add(type(error).__name__)
                raise
            finally:
                self.journal.add("ends")

        return waiting()


STRUCK = ["begins", "CallCancelled", "ends"]
CANCELLED = ["begins", "CancelledError", "ends"]


@pytest.fixture
def stuck(serve, adapter, journal):
    if not adapter.processes:
        pytest.skip("what runs in a thread of the application is left alone")
    return serve(Stuck, journal, config=ALONE)


def give_up(call, begun):
    """Run a coroutine until something has begun, and cancel it then."""

    async def main():
        task = asyncio.ensure_future(call())
        await asyncio.to_thread(eventually, begun)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())


@pytest.mark.parametrize("way", WAYS)
def test_what_runs_is_stopped(stuck, journal, way):
    pid = stuck.call()
    give_up(lambda: stuck.ahandle.call(way), journal.lines)
    assert stuck.call(timeout_s=20) == pid
    # An event loop that is not asyncio's own, but the adapter's choice, has its tasks cancelled.
    ends = {"swallow": [["begins", "ends"]], "run_loop": [STRUCK, CANCELLED]}
    assert journal.lines() in ends.get(way, [STRUCK])


def test_by_cancelling_a_ref(stuck, journal, adapter):
    if not adapter.own_refs:
        pytest.skip("refs are the platform's own")
    ref = stuck.handle.remote("sleep")
    eventually(journal.lines)
    assert ref.cancel()
    assert isinstance(stuck.call(timeout_s=20), int)
    assert journal.lines() == STRUCK


def test_by_a_timeout(stuck, journal):
    while not journal.lines():  # the first ones may have expired before they could begin
        with pytest.raises(errors.DeadlineExceeded):
            stuck.call("sleep", timeout_s=0.1)
    assert isinstance(stuck.call(timeout_s=20), int)
    assert journal.lines() == STRUCK


@pytest.mark.parametrize("how", ["waits", "reads a stream"])
@pytest.mark.parametrize("version", ["1.1", "2"])
def test_by_a_client_that_leaves(stuck, journal, version, how):
    method = {"X-SERVE-CALL-METHOD": "streamed"} if how == "reads a stream" else {}

    async def get():
        async with httpx.AsyncClient(http1=version == "1.1", http2=version == "2", timeout=30) as client:
            await client.get(stuck.url, params={"way": "sleep"}, headers=method)

    give_up(get, journal.lines)
    assert stuck.http_text(timeout=20).isdigit()
    assert journal.lines() == STRUCK


def test_a_coroutine_that_it_returned_is_cancelled(stuck, journal):
    handle = stuck.ahandle.options(method_name="returned")
    give_up(lambda: handle.call(), journal.lines)
    assert isinstance(stuck.call(timeout_s=20), int)
    assert journal.lines() == CANCELLED


def test_calls_that_it_makes_are_given_up(stuck, serve, journal):
    handle = stuck.handle

    def outer(request):
        return handle.call(request.data)

    calling = serve(outer, route=None, config=ALONE)
    give_up(lambda: calling.ahandle.call("sleep"), journal.lines)
    assert calling.call(None, timeout_s=20) == stuck.call(timeout_s=20)
    assert journal.lines() == STRUCK


def test_a_batch_is_stopped_once_nobody_wants_any_of_it(serve, adapter, journal):
    if not adapter.processes:
        pytest.skip("what runs in a thread of the application is left alone")

    @accept_batch
    def batched(requests):
        if requests[0].data is None:
            return [os.getpid()] * len(requests)
        journal.add(len(requests))
        try:
            time.sleep(3600)
        finally:
            journal.add("ends")

    config = {"max_batch_size": 2, "batch_wait_timeout": 20.0, "max_concurrent_queries": 2}
    served = serve(batched, route=None, config=config)

    async def main():
        first, second = (asyncio.ensure_future(served.ahandle.call(1)) for _ in range(2))
        await asyncio.to_thread(eventually, journal.lines)
        first.cancel()
        await asyncio.wait([first])
        await asyncio.wait([second], timeout=0.05)
        assert journal.lines() == ["2"], "the other one still waits for it"
        second.cancel()
        await asyncio.wait([second])
        assert len(set(await asyncio.gather(*(served.ahandle.call(None) for _ in range(2))))) == 1

    asyncio.run(main())
    assert journal.lines() == ["2", "ends"]


def test_an_async_batch_is_cancelled_once_nobody_wants_any_of_it(serve, journal):
    @accept_batch
    async def batched(requests):
        journal.add(len(requests))
        try:
            await asyncio.Event().wait()
        finally:
            journal.add("ends")

    config = {"max_batch_size": 2, "batch_wait_timeout": 20.0, "max_concurrent_queries": 2}
    served = serve(batched, route=None, config=config)

    async def main():
        first, second = (asyncio.ensure_future(served.ahandle.call(1)) for _ in range(2))
        await asyncio.to_thread(eventually, journal.lines)
        first.cancel()
        await asyncio.wait([first])
        await asyncio.wait([second], timeout=0.05)
        assert journal.lines() == ["2"], "the other one still waits for it"
        second.cancel()
        await asyncio.to_thread(eventually, lambda: journal.lines() == ["2", "ends"])
        limited = served.ahandle.options(timeout_s=0.05)
        late = await asyncio.gather(*(limited.call(2) for _ in range(2)), return_exceptions=True)
        assert [type(error) for error in late] == [errors.DeadlineExceeded] * 2

    asyncio.run(main())


def test_what_has_not_begun_never_begins(serve, journal, gate):
    def backend(request):
        journal.add(request.data)
        if request.data == "first":
            gate.pass_through()

    served = serve(backend, route=None, config={"max_concurrent_queries": 2})

    async def main():
        first, second = (asyncio.ensure_future(served.ahandle.call(number)) for number in ("first", "second"))
        await asyncio.to_thread(gate.wait_for_arrivals, 1)
        second.cancel()
        await asyncio.wait([second])
        gate.open()
        await first
        await served.ahandle.call("third")

    asyncio.run(main())
    assert journal.lines() == ["first", "third"]


def test_its_slot_is_taken_until_it_has_ended(serve, engine, adapter, journal, gate):
    if not adapter.processes:
        pytest.skip("what runs in a thread of the application is left alone")

    def backend(request):
        if request.data:
            try:
                journal.add("begins")
                time.sleep(3600)
            finally:
                gate.pass_through()
        journal.add("another")

    served = serve(backend, route=None, config=ALONE)

    def counted():
        return engine.statistics()["backends"][served.tag]["in_flight"]

    async def main():
        call = asyncio.ensure_future(served.ahandle.call(1))
        await asyncio.to_thread(eventually, journal.lines)
        call.cancel()
        await asyncio.to_thread(gate.wait_for_arrivals, 1)
        another = asyncio.ensure_future(served.ahandle.call(0))
        await asyncio.wait([another], timeout=0.05)
        assert counted() == 1
        assert journal.lines() == ["begins"]
        gate.open()
        await another
        await asyncio.to_thread(eventually, lambda: not counted())

    asyncio.run(main())
    assert journal.lines() == ["begins", "another"]


def test_a_backend_may_be_left_running(serve, adapter, engine, journal, gate):
    def backend(request):
        if request.data == "long":
            journal.add("long")
            time.sleep(3600)
        if request.data:
            try:
                journal.add("begins")
                gate.pass_through()
            finally:
                journal.add("ends")
        return os.getpid()

    served = serve(backend, route=None, config={**ALONE, "cancel_running": False})
    pid = served.call()
    give_up(lambda: served.ahandle.call(1), journal.lines)
    ref = served.handle.remote(0)
    assert engine.wait([ref], timeout=0.05) == ([], [ref])
    assert journal.lines() == ["begins"]
    gate.open()
    assert engine.get(ref, timeout=20) == pid
    assert journal.lines() == ["begins", "ends"]
    if adapter.processes:
        engine.update_backend_config(served.tag, {"cancel_running": True})
        give_up(lambda: served.ahandle.call("long"), lambda: len(journal.lines()) == 3)
        assert served.call(timeout_s=20) == pid


class Obstinate:
    """Does not end when it is struck."""

    def __init__(self, journal):
        journal.add("starts")
        self.journal = journal

    def __call__(self, request):
        if request.data:
            while True:
                try:
                    self.journal.add("begins")
                    time.sleep(3600)
                except errors.CallCancelled:
                    pass
        return os.getpid()


def test_a_replica_that_does_not_stop_is_replaced(serve, adapter, journal):
    if not adapter.processes:
        pytest.skip("what runs in a thread of the application is left alone")
    served = serve(Obstinate, journal, route=None, config={**ALONE, "cancel_grace_s": 0.1})
    pid = served.call()
    give_up(lambda: served.ahandle.call(1), lambda: "begins" in journal.lines())
    assert served.call(timeout_s=20) != pid
    assert journal.lines() == ["starts", "begins", "begins", "starts"]
