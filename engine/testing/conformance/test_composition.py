"""Backends that call backends."""

from __future__ import annotations

import threading

import pytest

from engine import errors, get_replica_context


def double(request):
    return request.data * 2


async def triple(request):
    return request.data * 3


class SyncFront:
    def __init__(self, back):
        self.back = back

    def __call__(self, request):
        return ["front", self.back.call(request.data)]

    def by_ref(self, value):
        refs = [self.back.remote(value), self.back.remote(value + 1)]
        return [ref.future().result(20) for ref in refs]


class AsyncFront:
    def __init__(self, back):
        self.back = back

    async def __call__(self, request):
        return ["front", await self.back.call(request.data)]

    async def by_ref(self, value):
        refs = [await self.back.remote(value), await self.back.remote(value + 1)]
        return [await ref for ref in refs]


@pytest.mark.parametrize("back", [double, triple])
@pytest.mark.parametrize("front", [SyncFront, AsyncFront])
def test_a_handle_as_constructor_argument(serve, front, back):
    factor = 2 if back is double else 3
    back = serve(back, route=None)
    served = serve(front, back.handle if front is SyncFront else back.ahandle)
    assert served.call(5) == ["front", 5 * factor]
    assert served.call(5, method_name="by_ref") == [5 * factor, 6 * factor]


def test_over_http(serve):
    back = serve(lambda request: request.data.upper(), route=None).ahandle

    async def front(request):
        return await back.call(await request.body())

    assert serve(front).http("POST", content=b"text").content == b"TEXT"


def test_a_handle_in_a_closure_and_in_an_argument(serve, serve_once):
    back = serve_once(double, route=None).handle

    def closure(request):
        return back.call(request.data)

    def argument(request):
        return request.data.call(7)

    assert serve(closure, route=None).call(5) == 10
    assert serve(argument, route=None).call(back) == 14


def test_options_travel_with_a_handle(serve):
    back = serve(lambda request: request.method, route=None).handle.options(http_method="PATCH")
    assert serve(lambda request: back.call(), route=None).call() == "PATCH"


def test_a_chain(serve, serve_once, engine):
    handle = serve_once(double, route=None).handle
    for _ in range(3):
        handle = serve(SyncFront, handle, route=None).handle
    assert handle.call(1) == ["front", ["front", ["front", 2]]]


def test_a_ref_of_one_backend_as_argument_of_another(serve, serve_once):
    first, second = serve_once(double, route=None).handle, serve_once(triple, route=None).handle

    def both(request):
        return second.remote(first.remote(request.data)).future().result(20)

    assert serve(both, route=None).call(1) == 6


def test_replica_context(serve):
    def backend(request):
        context = get_replica_context()
        return context.backend_tag, context.replica_tag

    served = serve(backend, route=None, config={"num_replicas": 2})
    answers = {served.call() for _ in range(50)}
    assert {tag for tag, _ in answers} == {served.tag}
    assert len({replica for _, replica in answers}) == 2


def test_replica_context_in_the_constructor(serve):
    class Backend:
        def __init__(self):
            self.tag = get_replica_context().backend_tag

        def __call__(self, request):
            return self.tag

    served = serve(Backend, route=None)
    assert served.call() == served.tag


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_handles_from_the_context(serve, serve_once, kind):
    name = serve_once(double, route=None).name

    class SyncUser:
        def __init__(self):
            self.handle = get_replica_context().get_handle(name)

        def __call__(self, request):
            return self.handle.call(request.data)

    class AsyncUser:
        def __init__(self):
            self.handle = get_replica_context().get_handle(name, sync=False)

        async def __call__(self, request):
            return await self.handle.call(request.data)

    assert serve(SyncUser if kind == "sync" else AsyncUser, route=None).call(5) == 10


def test_no_replica_context_outside(serve):
    with pytest.raises(errors.EngineError, match="replica"):
        get_replica_context()


def test_errors_pass_through_the_chain(serve):
    def fails(request):
        raise KeyError("deep down")  # the line that raises

    handle = serve(fails, route=None).handle
    with pytest.raises(KeyError, match="deep down") as caught:
        serve(SyncFront, handle, route=None).call(1)
    assert "# the line that raises" in str(caught.value.__cause__)


def test_traffic_changes_reach_backends_that_call(serve, engine):
    first, second = serve(lambda request: "first", route=None), serve(lambda request: "second", route=None)
    front = serve(SyncFront, first.handle, route=None)
    assert front.call() == ["front", "first"]
    engine.set_traffic(first.name, {second.tag: 1.0})
    assert front.call() == ["front", "second"]


def test_a_sync_front_calls_from_its_own_threads(serve, serve_once):
    back = serve_once(double, route=None).handle

    def front(request):
        results = []
        threads = [threading.Thread(target=lambda n=n: results.append(back.call(n))) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(results)

    assert serve(front, route=None).call() == [0, 2, 4, 6]


BLOCKING = {
    "call": lambda handle: handle.call(5),
    "result": lambda handle: handle.remote(5).result(20),
}


@pytest.mark.parametrize("way", BLOCKING)
def test_a_sync_handle_would_block_an_async_backend(serve, adapter, gate, way):
    if way == "result" and not adapter.own_refs:
        pytest.skip("refs of this adapter are those of its platform")
    block = BLOCKING[way]

    def held(request):
        gate.pass_through()
        return "late"

    back = serve(held, route=None).handle

    async def front(request):
        return block(back)

    async def awaiting_front(request):
        return await back.remote(5)

    served = serve(front, route=None)
    for _ in range(2):
        with pytest.raises(errors.WouldBlock, match="sync=False"):
            served.call()
    gate.open()
    assert serve(awaiting_front, route=None).call() == "late", "awaiting the ref does not block"


def test_an_async_backend_blocks_in_a_thread_if_it_must(serve, serve_once):
    import asyncio

    back = serve_once(double, route=None).handle

    async def front(request):
        return await asyncio.to_thread(back.call, 5)

    assert serve(front, route=None).call() == 10
