"""The replicas of one backend, on an adapter that does what the test says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fakes import until

from engine.config import BackendConfig
from engine.control.backend_plan import BackendPlan, pack_definition
from engine.control.backend_replicas import BackendReplicas
from engine.control.workers import Workers
from engine.seam.control_messages import Drain, Ready, StartFailed, Unhealthy
from engine.seam.resources import Resources
from engine.seam.serialization import pack_exception
from engine.seam.worker import WorkerExit, WorkerSpec
from engine.testing.fakes import FakeAdapter


def ok(request: object) -> str:
    return "ok"


@pytest.mark.parametrize("ends", ["they fail", "it is given up"])
def test_what_does_not_start_is_gone_when_that_is_told(ends: str) -> None:
    """However many of them fail or are killed at a time: the next ones may have the same names."""

    async def main() -> None:
        adapter = FakeAdapter()
        workers = Workers(adapter, lambda worker: None)
        backend = replicas_of(adapter, workers, count=3)

        def fail(spec: WorkerSpec) -> None:
            told = StartFailed(pack_exception(ValueError("not today")))
            asyncio.get_running_loop().call_soon(workers.worker_said, spec.worker_id, told)

        adapter.on_start = fail if ends == "they fail" else None
        creating = asyncio.ensure_future(backend.create())
        await until(lambda: len(adapter.started) == 3)
        if ends != "they fail":
            creating.cancel()
        await until(lambda: len(set(adapter.killed)) == 3)
        for number in (1, 2, 3):
            for _ in range(20):
                await asyncio.sleep(0)
            assert not creating.done(), f"{len(workers)} of them are left"
            workers.worker_exited(WorkerExit(f"b#{number}", "was killed"))
        with pytest.raises(ValueError if ends == "they fail" else asyncio.CancelledError):
            await creating

    asyncio.run(asyncio.wait_for(main(), 20))


def test_the_log_has_the_traceback_of_what_keeps_a_replica_from_starting(caplog: pytest.LogCaptureFixture) -> None:
    """Once for each reason, not each time."""

    def of_the_model(reason: str) -> bytes:
        try:
            raise RuntimeError(reason)  # the line that raises
        except RuntimeError as error:
            return pack_exception(error)

    reasons = ["model file is gone", "model file is gone", "no disk"]

    async def main() -> None:
        adapter = FakeAdapter()
        workers = Workers(adapter, lambda worker: None)
        backend = replicas_of(adapter, workers, count=1)

        def fail(spec: WorkerSpec) -> None:
            told = StartFailed(of_the_model(reasons[min(len(adapter.started), len(reasons)) - 1]))
            loop = asyncio.get_running_loop()
            loop.call_soon(workers.worker_said, spec.worker_id, told)
            loop.call_soon(workers.worker_exited, WorkerExit(spec.worker_id, "ended"))

        adapter.on_start = fail
        refilling = asyncio.ensure_future(backend.refill())
        await until(lambda: len(caplog.records) >= len(reasons))
        backend.deleted = True
        await refilling

    asyncio.run(asyncio.wait_for(main(), 20))
    texts = [logging.Formatter().format(record) for record in caplog.records[: len(reasons)]]
    assert [text.splitlines()[0] for text in texts] == [
        f"backend 'b': a replica could not be replaced: RuntimeError: {reason}" for reason in reasons
    ]
    assert ["# the line that raises" in text for text in texts] == [True, False, True]


# -- replacing one -------------------------------------------------------------------------------------------------


class Replacing:
    """Two replicas in service, on an adapter where new ones are ready at once and killed ones gone at once."""

    def __init__(self) -> None:
        self.adapter = FakeAdapter(on_kill=lambda worker_id: self._soon_gone(worker_id, "was killed"))
        self.adapter.on_start = lambda spec: self._soon(self.workers.worker_said, spec.worker_id, Ready("fake"))
        self.adapter.on_tell = self._told
        self.asked: list[Unhealthy] = []
        self.workers = Workers(self.adapter, lambda worker: None, lambda worker, told: self.asked.append(told))
        self.backend = replicas_of(self.adapter, self.workers, count=2)

    @staticmethod
    def _soon(function: Callable[..., object], *args: object) -> None:
        asyncio.get_running_loop().call_soon(function, *args)

    def _soon_gone(self, worker_id: str, reason: str) -> None:
        self._soon(self.workers.worker_exited, WorkerExit(worker_id, reason))

    def _told(self, worker_id: str, body: object) -> None:
        if isinstance(body, Drain):
            self._soon_gone(worker_id, "left")

    @property
    def in_service(self) -> list[str]:
        return [worker.spec.worker_id for worker in self.backend.running]


def replacing(test: Callable[[Replacing], Coroutine[Any, Any, None]]) -> Any:
    def run() -> None:
        async def main() -> None:
            world = Replacing()
            await world.backend.create()
            assert world.in_service == ["b#1", "b#2"]
            await asyncio.wait_for(test(world), 20)

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


@replacing
async def test_one_that_serves_is_replaced_before_it_leaves(world: Replacing) -> None:
    first = world.backend.running[0]
    at_start: list[list[str]] = []
    become_ready = world.adapter.on_start
    assert become_ready is not None
    world.adapter.on_start = lambda spec: (at_start.append(world.in_service), become_ready(spec))  # type: ignore[func-returns-value]
    asking = [world.backend.replace_one(first, "is old") for _ in range(3)]  # it may say so more than once
    await asyncio.gather(*asking)
    assert at_start == [["b#1", "b#2"]]
    assert world.in_service == ["b#2", "b#3"]
    await until(first.gone.is_set)
    assert world.adapter.killed == []
    assert world.backend.describe()["last_error"] == "replica.b.1 is old"
    await world.backend.replace_one(first, "is old")
    assert len(world.adapter.started) == 3


@replacing
async def test_one_that_hangs_is_out_of_service_at_once(world: Replacing) -> None:
    first = world.backend.running[0]
    async with world.backend.lock:  # somebody else's change takes long
        task = asyncio.ensure_future(world.backend.replace_one(first, "hangs", at_once=True))
        await until(lambda: world.in_service == ["b#2"])
        await until(first.gone.is_set)
        assert world.adapter.killed == ["b#1"]
        assert world.backend.entry().dead == ("b#1",)
    await task
    assert world.in_service == ["b#2", "b#3"]


@replacing
async def test_one_that_serves_goes_on_if_no_other_starts(world: Replacing) -> None:
    world.adapter.refuses = ValueError("not today")
    await world.backend.replace_one(world.backend.running[0], "is old")
    assert world.in_service == ["b#1", "b#2"]
    world.adapter.refuses = None
    await world.backend.replace_one(world.backend.running[0], "is old")
    assert world.in_service == ["b#2", "b#4"]


@replacing
async def test_one_that_dies_meanwhile_leaves_its_place_to_the_other(world: Replacing) -> None:
    first, second = world.backend.running
    become_ready = world.adapter.on_start
    assert become_ready is not None
    world.adapter.on_start = lambda spec: (world.backend.lost(first), become_ready(spec))  # type: ignore[func-returns-value]
    await world.backend.replace_one(first, "is old")
    assert world.in_service == ["b#2", "b#3"]
    assert second in world.backend.running


@replacing
async def test_what_a_replica_says_of_itself_is_passed_on_while_it_serves(world: Replacing) -> None:
    world.workers.worker_said("b#1", Unhealthy("hangs", hung=True))
    assert world.asked == [Unhealthy("hangs", hung=True)]
    await world.workers.kill(world.backend.running[0])
    world.workers.worker_said("b#1", Unhealthy("hangs", hung=True))
    assert len(world.asked) == 1


async def _told() -> None:
    """Nobody needs to be."""


def replicas_of(adapter: FakeAdapter, workers: Workers, *, count: int) -> BackendReplicas:
    plan = BackendPlan(
        tag="b",
        definition=pack_definition("b", ok, (), {}),
        config=BackendConfig(num_replicas=count),
        resources=Resources(),
        on_loop=False,
        batches=False,
        reconfigurable=False,
    )

    return BackendReplicas(
        "e", adapter, workers, plan, debug=False, publish=lambda: 1, announce=lambda: None, told=_told
    )
