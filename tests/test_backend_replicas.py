"""The replicas of one backend, on an adapter that does what the test says."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fakes import until

from engine.config import BackendConfig
from engine.control.backend_plan import BackendPlan, pack_definition
from engine.control.backend_replicas import BackendReplicas
from engine.control.workers import Workers
from engine.seam.control_messages import StartFailed
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

    return BackendReplicas("e", adapter, workers, plan, debug=False, publish=lambda: 1, announce=lambda: None)
