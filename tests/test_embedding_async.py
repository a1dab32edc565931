"""`async with Engine(...)`: the caller's loop runs on while the engine starts and stops."""

from __future__ import annotations

import asyncio
import threading

import anyio
import anyio.to_thread
import pytest

from engine import Engine, errors
from engine import engine as engine_module
from engine.testing.instruments import eventually
from engine_inline import InlineAdapter
from engine_local import LocalAdapter

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


def held_back(adapter_class):
    """An adapter that starts and stops only after a task of the caller's loop has run meanwhile."""

    class HeldBack(adapter_class):
        def __init__(self):
            super().__init__()
            self.reached = {"start": threading.Event(), "stop": threading.Event()}
            self.released = {"start": threading.Event(), "stop": threading.Event()}

        async def _hold(self, step):
            self.reached[step].set()
            assert await asyncio.to_thread(self.released[step].wait, 20), "the caller's loop was blocked"

        async def start(self, *arguments):
            await self._hold("start")
            await super().start(*arguments)

        async def stop(self):
            await self._hold("stop")
            await super().stop()

    return HeldBack()


@pytest.mark.parametrize("adapter_class", [InlineAdapter, LocalAdapter])
async def test_the_loop_runs_on(adapter_class, leaves_nothing):
    adapter = held_back(adapter_class)
    steps = []

    async def other_task():
        for step in ("start", "stop"):
            assert await anyio.to_thread.run_sync(adapter.reached[step].wait, 20)
            steps.append(step)
            adapter.released[step].set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other_task)
        async with Engine(backend=adapter, http_options={"location": None}) as engine:
            assert steps == ["start"]
            assert engine.list_backends() == {}
    assert steps == ["start", "stop"]


async def test_calls_and_control_from_one_task(leaves_nothing):
    async with Engine(backend="local", http_options={"location": None}) as engine:
        await anyio.to_thread.run_sync(engine.create_backend, "double", lambda request: request.data * 2)
        await anyio.to_thread.run_sync(lambda: engine.create_endpoint("double", backend="double"))
        handle = engine.get_handle("double", sync=False)
        assert [await handle.call(number) for number in range(3)] == [0, 2, 4]


async def test_an_exception_in_async_with(leaves_nothing):
    with pytest.raises(KeyError, match="mine"):
        async with Engine(backend="local", http_options={"location": None}):
            raise KeyError("mine")


def test_cancelled_again_while_calls_finish(monkeypatch, gate, leaves_nothing):
    """As by the second Ctrl-C under `asyncio.run`."""
    monkeypatch.setattr(engine_module, "_GRACE_S", 1000.0)

    async def held(request):
        await gate.apass_through()

    async def serving(engine, up):
        async with engine:
            await asyncio.to_thread(engine.create_backend, "held", held, config={"graceful_shutdown_timeout_s": 1000})
            await asyncio.to_thread(lambda: engine.create_endpoint("held", backend="held"))
            up.set_result(engine.get_handle("held").remote())
            await asyncio.Event().wait()

    async def main():
        engine, up = (
            Engine(backend="local", http_options={"location": None}),
            asyncio.get_running_loop().create_future(),
        )
        task = asyncio.create_task(serving(engine, up))
        ref = await up
        await asyncio.to_thread(gate.wait_for_arrivals, 1)
        task.cancel()
        await asyncio.to_thread(eventually, lambda: "closed" in repr(engine))
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(errors.EngineError):
            ref.future().result(0)  # it was ended before
        assert not gate.is_open()

    asyncio.run(asyncio.wait_for(main(), 30))


async def test_cancelled_in_async_with(leaves_nothing):
    with anyio.move_on_after(0.1) as scope:
        async with Engine(backend="local", http_options={"location": None}):
            await anyio.sleep_forever()
    assert scope.cancelled_caught
