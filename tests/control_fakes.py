"""What the unit tests of the controller share: a backend as it is asked for, and its replicas on a fake adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from engine.calling.client import Client
from engine.config import BackendConfig, HTTPOptions
from engine.control.backend_plan import BackendPlan, pack_definition
from engine.control.backend_replicas import BackendReplicas
from engine.control.controller import Controller
from engine.control.replica_pool import Means
from engine.control.workers import Workers
from engine.seam.adapter import Node
from engine.seam.control_messages import Applied, Drain, Drained, Publish, Ready, Reconfigure, Reconfigured, Subscribe
from engine.seam.messages import Control
from engine.seam.resources import Resources
from engine.seam.serialization import loads
from engine.seam.snapshot import EndpointEntry
from engine.seam.worker import WorkerExit, WorkerSpec
from engine.testing.fakes import FakeAdapter, FakeChannel, FakeStore

HTTP = HTTPOptions.of({"port": 0, "workers": 2})


def plan(tag: str, **config: Any) -> BackendPlan:
    """A backend."""
    return BackendPlan(
        tag=tag,
        definition=pack_definition(tag, len, (), {}),
        config=BackendConfig.of(config),
        resources=Resources(num_cpus=1.5, env_vars={"TAG": tag}),
        on_loop=False,
        batches=False,
        reconfigurable=False,
    )


def endpoint(name: str, tag: str, route: str | None = None) -> EndpointEntry:
    """Its endpoint."""
    return EndpointEntry(name, route, ("GET",), ((tag, 1.0),))


def plan_of(count: int, **config: Any) -> BackendPlan:
    """Backend ``b`` with so many replicas."""
    return plan("b", num_replicas=count, **config)


def replicas_of(
    adapter: FakeAdapter, workers: Workers, *, count: int, publish: Callable[[], int] = lambda: 1, **config: Any
) -> BackendReplicas:
    """Its replicas. What ``publish`` raises as `ConnectionError` keeps nothing from being announced."""

    def announce() -> None:
        with suppress(ConnectionError):
            publish()

    async def told() -> None:
        """Nobody needs to be."""

    means = Means("e", adapter, workers, debug=False, publish=publish, announce=announce, told=told)
    return BackendReplicas(means, plan_of(count, **config))


class Platform:
    """Runs workers for as many controllers of one engine as the test likes."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.alive: dict[str, str] = {}  # addresses by worker id
        self.silent: set[str] = set()  # workers that do not come back, yet are not known to be dead
        self.lagging: set[str] = set()  # ingresses that come back, but do not ask for snapshots yet
        self.nodes = (Node("here", "127.0.0.1"),)

    def controller(self) -> Incarnation:
        return Incarnation(self)


class Incarnation:
    """One controller, its adapter and its process's client."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.adapter = FakeAdapter(
            store=platform.store,
            on_start=self._start,
            on_adopt=self._adopt,
            on_tell=self._tell,
            on_kill=self.die,
        )
        self.adapter.nodes = lambda: platform.nodes  # type: ignore[method-assign]
        self.refusal: Callable[[BackendConfig], bytes | None] = lambda config: None  # what replicas say to it
        self.client = Client("e", self.adapter)
        self.controller = Controller("e", self.adapter, self.client, HTTP)

    async def started(self) -> Incarnation:
        await self.controller.start()
        return self

    @property
    def version(self) -> int:
        return self.client.snapshot.version

    def replicas(self, tag: str) -> list[str]:
        """Those that calls go to."""
        return [replica.replica_tag for replica in self.client.snapshot.backends[tag].replicas]

    def ids(self, specs: list[WorkerSpec]) -> list[str]:
        return sorted(spec.worker_id for spec in specs)

    def die(self, worker_id: str, reason: str = "was killed by the engine") -> None:
        """Let a worker end."""
        self.platform.alive.pop(worker_id, None)
        exit = WorkerExit(worker_id, reason)
        asyncio.get_running_loop().call_soon(self.controller.worker_exited, exit)

    def _start(self, spec: WorkerSpec) -> None:
        self.platform.alive[spec.worker_id] = f"fake:{spec.worker_id}"
        self.controller.worker_said(spec.worker_id, Ready(f"fake:{spec.worker_id}"))

    def _adopt(self, spec: WorkerSpec) -> None:
        address = self.platform.alive.get(spec.worker_id)
        if address is None:
            self.die(spec.worker_id, "died while the engine had no controller")
        elif spec.worker_id not in self.platform.silent:
            asyncio.get_running_loop().call_soon(self.controller.worker_said, spec.worker_id, Ready(address))
            if spec.worker_id.startswith("ingress") and spec.worker_id not in self.platform.lagging:
                asyncio.get_running_loop().call_soon(self.come_back, spec.worker_id)

    def _tell(self, worker_id: str, body: Any) -> None:
        if isinstance(body, Drain):
            self.controller.worker_said(worker_id, Drained())
            self.die(worker_id, "left")
        elif isinstance(body, Reconfigure):
            reply = Reconfigured(body.token, self.refusal(loads(body.config)))
            asyncio.get_running_loop().call_soon(self.controller.worker_said, worker_id, reply)

    def come_back(self, ingress: str) -> FakeChannel:
        """An ingress of the former controller asks for snapshots, and takes each."""
        channel = FakeChannel(ingress)

        def take(message: Any) -> None:
            version = message.body.snapshot.version
            asyncio.get_running_loop().call_soon(channel.answer, Control(Applied(version)))

        channel.on_send = take
        channel.listener = self.controller.peer_connected(channel)
        channel.answer(Control(Subscribe(True, ingress)))
        return channel

    def subscribe(self, *, ingress: bool = False) -> FakeChannel:
        """A caller elsewhere."""
        channel = FakeChannel("caller")
        channel.listener = self.controller.peer_connected(channel)
        channel.answer(Control(Subscribe(ingress)))
        return channel


def published(channel: FakeChannel) -> list[Any]:
    return [message.body.snapshot for message in channel.sent if isinstance(message.body, Publish)]
