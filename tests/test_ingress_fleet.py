"""Ingresses on the nodes of a cluster that come, go and hang, with an adapter that does what the test says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import until

from engine import HTTPOptions, errors
from engine.control.ingress_fleet import IngressFleet
from engine.control.workers import Workers
from engine.seam.adapter import Node
from engine.seam.control_messages import Ready
from engine.seam.worker import WorkerExit, WorkerSpec
from engine.testing.fakes import FakeAdapter

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Platform(FakeAdapter):
    """Starts what is to run on a sound node, never gets round to what is on a silent one, and fails on a bad one."""

    def __init__(self, *sound: str) -> None:
        super().__init__()
        self.there = {name: "sound" for name in sound}
        self.workers = Workers(self, lambda worker: None)
        self.on_kill = lambda worker_id: self.workers.worker_exited(WorkerExit(worker_id, "was killed"))

    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node(name, f"address of {name}") for name in self.there)

    async def start_worker(self, spec: WorkerSpec) -> None:
        await super().start_worker(spec)
        state = self.there.get(str(spec.node_id))
        if state == "bad":
            raise errors.InvalidArgument(f"{spec.node_id} is bad")
        if state == "dying":
            asyncio.get_running_loop().call_soon(self.workers.worker_exited, WorkerExit(spec.worker_id, "died"))
        if state == "sound":
            asyncio.get_running_loop().call_soon(self.workers.worker_said, spec.worker_id, Ready(""))

    def fleet(self, **options: Any) -> IngressFleet:
        http = HTTPOptions.of({"location": "EveryNode", "host": "0.0.0.0", "port": 80, **options})
        return IngressFleet("e", self, self.workers, http)


def served(fleet: IngressFleet) -> list[str]:
    return sorted(ingress["url"] for ingress in fleet.describe().values())


async def test_every_node_or_the_first() -> None:
    platform = Platform("a", "b")
    fleet = platform.fleet(workers=2)
    await fleet.ensure_started()
    assert served(fleet) == ["http://address of a:80"] * 2 + ["http://address of b:80"] * 2
    await fleet.ensure_started()
    assert len(platform.started) == 4
    alone = Platform("a", "b")
    await alone.fleet(location="HeadOnly").ensure_started()
    assert [spec.node_id for spec in alone.started] == ["a"]


async def test_the_url_stands_while_the_only_ingress_is_replaced() -> None:
    platform = Platform("a")
    fleet = platform.fleet()
    assert fleet.url() is None
    await fleet.ensure_started()
    worker = platform.workers.get(platform.started[0].worker_id)
    assert worker is not None
    platform.workers.worker_exited(WorkerExit(worker.spec.worker_id, "died"))
    assert fleet.forget(worker)
    assert served(fleet) == []
    assert fleet.url() == "http://address of a:80"
    await fleet.complete()
    assert fleet.url() == "http://address of a:80"
    await fleet.stop(0)
    assert fleet.url() is None


async def test_the_end_closes_the_ports_once_no_ingress_is_left() -> None:
    class Keeping(Platform):
        left: int | None = None

        def close_ports(self) -> None:
            self.left = len(self.workers)

    platform = Keeping("a")
    fleet = platform.fleet(workers=2)
    await fleet.ensure_started()
    await fleet.stop(0)
    assert platform.left == 0


async def test_a_node_that_hangs_holds_up_no_other() -> None:
    platform = Platform("a")
    fleet = platform.fleet()
    await fleet.ensure_started()
    platform.there["silent"] = "silent"
    hanging = asyncio.ensure_future(fleet.refill())
    await until(lambda: len(platform.started) == 2)
    platform.there["late"] = "sound"
    also = asyncio.ensure_future(fleet.refill())
    await until(lambda: len(served(fleet)) == 2)
    assert served(fleet) == ["http://address of a:80", "http://address of late:80"]
    assert not hanging.done()
    assert [spec.node_id for spec in platform.started].count("silent") == 1, "one at a time on each node"
    for task in (hanging, also):
        task.cancel()
    await asyncio.gather(hanging, also, return_exceptions=True)


async def test_a_node_that_fails_is_told_of_unless_it_has_left() -> None:
    platform = Platform("a")
    fleet = platform.fleet()
    platform.there["bad"] = "bad"
    with pytest.raises(errors.InvalidArgument, match="bad is bad"):
        await fleet.ensure_started()
    assert served(fleet) == ["http://address of a:80"], "the others serve all the same"

    class Leaving(Platform):
        async def start_worker(self, spec: WorkerSpec) -> None:
            if spec.node_id == "bad":
                del self.there["bad"]
                raise errors.InvalidArgument("it is gone")
            await super().start_worker(spec)

    leaving = Leaving("a", "bad")
    other = leaving.fleet()
    await other.ensure_started()
    assert served(other) == ["http://address of a:80"]


async def test_a_node_that_is_about_to_leave_is_tried_again_later() -> None:
    """Whoever creates an endpoint meanwhile has done nothing wrong."""
    platform = Platform("a", "b")
    platform.there["b"] = "dying"
    fleet = platform.fleet()
    assert await fleet.ensure_started() is False
    assert served(fleet) == ["http://address of a:80"]
    platform.there["b"] = "sound"
    assert await fleet.refill() is True
    assert served(fleet) == ["http://address of a:80", "http://address of b:80"]
    first = Platform("a")
    first.there["a"] = "dying"
    with pytest.raises(errors.BackendStartError):
        await first.fleet().ensure_started()


async def test_what_is_missing_is_tried_until_it_is_there() -> None:
    platform = Platform("a")
    fleet = platform.fleet()
    await fleet.ensure_started()
    platform.there.update(bad="bad", b="dying")
    completing = asyncio.ensure_future(fleet.complete())
    await until(lambda: [spec.node_id for spec in platform.started].count("b") == 1)
    assert not completing.done()
    platform.there.update(bad="sound", b="sound")
    await completing
    assert len(served(fleet)) == 3


async def test_one_that_dies_whenever_it_is_ready_does_not_keep_the_machine_busy() -> None:
    platform = Platform("a")
    fleet = platform.fleet()
    platform.workers = fleet._workers = Workers(platform, fleet.forget)
    await fleet.ensure_started()
    for deaths in range(10):  # at once
        platform.workers.worker_exited(WorkerExit(platform.started[-1].worker_id, "died"))
        await asyncio.wait_for(fleet.complete(), 20)
        assert len(platform.started) == deaths + 2
    platform.workers.worker_exited(WorkerExit(platform.started[-1].worker_id, "died"))
    completing = asyncio.ensure_future(fleet.complete())
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(platform.started) == 11, "it has to wait"
    completing.cancel()
    await asyncio.gather(completing, return_exceptions=True)
