"""Async handles on every event loop."""

from __future__ import annotations

import pickle

import anyio
import anyio.to_thread
import pytest

from engine import errors
from engine.testing.instruments import open_files

pytestmark = pytest.mark.anyio


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request):
    return request.param


@pytest.fixture
def awaitable_refs(adapter, anyio_backend):
    if not adapter.own_refs and anyio_backend[0] == "trio":
        pytest.skip("refs of this adapter are those of its platform, which are awaited on asyncio")


async def double(request):
    return request.data * 2


def divides_by_zero(request):
    return 1 / 0


def give_back(request):
    return request.data


@pytest.fixture
def doubled(serve_once):
    return serve_once(double, route=None).ahandle


@pytest.fixture
def held(serve, gate):
    async def backend(request):
        await gate.apass_through()
        return request.data

    return serve(backend, route=None).ahandle


async def test_remote_gives_a_ref_to_await(doubled, awaitable_refs):
    ref = await doubled.remote(4)
    assert await ref == 8
    assert await ref == 8, "a ref may be read again"


async def test_call(doubled):
    assert await doubled.call(4) == 8


async def test_named_method_and_query(serve):
    class Backend:
        def method(self, value, by):
            return value * by

    handle = serve(Backend, route=None).ahandle
    assert await handle.options(method_name="method").call(4, by=3) == 12


async def test_many_at_once(doubled):
    results = {}

    async def call(number):
        results[number] = await doubled.call(number)

    async with anyio.create_task_group() as tasks:
        for number in range(100):
            tasks.start_soon(call, number)
    assert results == {number: number * 2 for number in range(100)}


async def test_the_loop_runs_on_meanwhile(held, gate):
    """The gate is opened by another task of the same loop, which a blocked loop could never run."""
    results = []

    async def call():
        results.append(await held.call(5))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await anyio.to_thread.run_sync(gate.wait_for_arrivals, 1)
        assert results == []
        gate.open()
    assert results == [5]


async def test_errors(serve_once, adapter, awaitable_refs):
    handle = serve_once(divides_by_zero, route=None).ahandle
    with pytest.raises(ZeroDivisionError):
        await handle.call()
    ref = await handle.remote()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            await ref
    if adapter.own_refs:
        assert isinstance(caught.value.__cause__, errors.RemoteTraceback)


async def test_timeout_option(held, gate):
    with pytest.raises(errors.DeadlineExceeded):
        await held.options(timeout_s=0.1).call(1)
    gate.open()
    assert await held.call(2) == 2


@pytest.mark.parametrize("way", ["call", "remote"])
async def test_a_timeout_covers_the_arguments_that_are_on_their_way(serve_once, held, gate, awaitable_refs, way):
    late = await held.remote(1)
    waiting = serve_once(give_back, route=None)

    async def call(timeout_s):
        answer = await getattr(waiting.ahandle.options(timeout_s=timeout_s), way)(late)
        return answer if way == "call" else await answer

    with pytest.raises(errors.DeadlineExceeded, match=rf"{waiting.name}.*timeout_s=0\.1"):
        await call(0.1)
    assert not gate.is_open()
    gate.open()
    assert await call(20) == 1


async def test_cancelled_callers_leave_quietly(held, gate, awaitable_refs):
    with anyio.move_on_after(0.05) as scope:
        await held.call(1)
    assert scope.cancelled_caught
    with anyio.move_on_after(0.05) as scope:
        await (await held.remote(1))
    assert scope.cancelled_caught
    gate.open()
    assert await held.call(2) == 2


async def test_refs_as_arguments(doubled, awaitable_refs):
    first = await doubled.remote(1)
    assert await doubled.call(first) == 4
    assert await (await doubled.remote(await doubled.remote(first))) == 8


async def test_failing_dependency(serve_once, doubled):
    failed = await serve_once(divides_by_zero, route=None).ahandle.remote()
    with pytest.raises(ZeroDivisionError):
        await doubled.call(failed)


async def test_get_and_wait_take_refs_of_async_handles(engine, doubled):
    refs = [await doubled.remote(number) for number in range(3)]
    ready, not_ready = await anyio.to_thread.run_sync(lambda: engine.wait(refs, num_returns=3, timeout=20))
    assert (ready, not_ready) == (refs, [])
    assert await anyio.to_thread.run_sync(engine.get, refs) == [0, 2, 4]


async def test_ref_of_a_sync_handle(serve_once, awaitable_refs):
    assert await serve_once(double, route=None).handle.remote(4) == 8


async def test_pickled(doubled):
    assert await pickle.loads(pickle.dumps(doubled)).call(4) == 8


async def test_one_handle_on_loops_in_several_threads(doubled, anyio_backend):
    backend, options = anyio_backend

    def on_a_loop_of_its_own(number):
        return anyio.run(doubled.call, number, backend=backend, backend_options=options)

    assert await doubled.call(1) == 2
    assert await anyio.to_thread.run_sync(on_a_loop_of_its_own, 2) == 4
    assert await doubled.call(3) == 6


async def test_loops_that_have_ended_leave_nothing(serve_once, anyio_backend):
    """Programs that call ``asyncio.run`` again and again must not pile up connections."""
    handle = serve_once(double, route=None).ahandle
    backend, options = anyio_backend

    def run():
        assert anyio.run(handle.call, 2, backend=backend, backend_options=options) == 4

    await anyio.to_thread.run_sync(run)
    before = len(open_files())
    for _ in range(10):
        await anyio.to_thread.run_sync(run)
    assert len(open_files()) <= before


async def test_overload(serve, gate, awaitable_refs):
    async def backend(request):
        await gate.apass_through()

    handle = serve(backend, route=None, config={"max_concurrent_queries": 1, "max_queued_requests": 0}).ahandle
    ref = await handle.remote()
    await anyio.to_thread.run_sync(gate.wait_for_arrivals, 1)
    with pytest.raises(errors.Overloaded):
        await handle.call()
    gate.open()
    assert await ref is None


async def test_control_calls_from_a_thread_of_the_loop(engine, serve_once, doubled):
    """Control calls block, so they run in a thread; handles made there work on the loop."""
    served = await anyio.to_thread.run_sync(lambda: serve_once(double, route=None))
    assert await served.ahandle.call(5) == 10


@pytest.mark.anyio
async def test_waiting_for_a_ref_on_its_own_loop_is_refused(serve, engine, adapter, gate, anyio_backend):
    """It would wait for ever: the answer comes to the loop that is blocked. On trio it comes to a thread."""
    if not adapter.own_refs:
        pytest.skip("refs of this adapter are those of its platform")

    def backend(request):
        gate.pass_through()
        return request.data

    ref = await serve(backend, route=None).ahandle.remote(1)
    if anyio_backend[0] == "asyncio":
        with pytest.raises(errors.WouldBlock, match="await"):
            ref.result(20)
        with pytest.raises(errors.WouldBlock, match="await"):
            engine.wait([ref])
    gate.open()
    assert await ref == 1
