"""The ingress workers of one engine: how many there should be on each node, and the address they share."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import defaultdict
from typing import Any

from ..config import HTTPOptions
from ..errors import BackendStartError
from ..seam.adapter import Adapter, KeepsPorts, Node, WatchesNodes
from ..seam.ingress_server import load_server
from ..seam.log import Log
from ..seam.serialization import dumps_by_value
from ..seam.worker import Listen, WorkerSpec
from .backoff import backoff_s
from .checkpoint import KnownWorker
from .restarts import Restarts
from .workers import Life, Worker, Workers

__all__ = ["IngressFleet"]

_logger = Log("engine.controller")
_START_TIMEOUT_S = 60.0
STUCK_AFTER_S = 60.0
"""For so long a middleware may keep the event loop of an ingress from turning, as an async backend may by default."""
_ENTRY = "engine.http.ingress_worker:main"
_SERVER = "hypercorn"


class IngressFleet:
    """Starts, replaces and stops ingress workers; runs on the controller's loop.

    Args:
        engine_id: For the workers to attach to.
        adapter: Binds the address and runs the workers.
        workers: Keeps them.
        http: How many, and where.
    """

    def __init__(self, engine_id: str, adapter: Adapter, workers: Workers, http: HTTPOptions) -> None:
        self._engine_id = engine_id
        self._adapter = adapter
        self._workers = workers
        self._http = http
        self._listen = Listen(http.host or "", http.port, int(http.server_options.get("backlog", 1024)))
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by node
        self._running: dict[str, list[Worker]] = {}  # by node
        self._served: set[str] = set()  # nodes on which the address is bound, whether or not an ingress runs just now
        self._restarts = Restarts()
        self._wait_s = 0.0  # before those that died are replaced
        self._wanted = False
        self._count = 0

    async def ensure_started(self) -> bool:
        """Have every ingress running (idempotent); returns when all of them serve, as `refill` does.

        Raises:
            errors.InvalidArgument: The address cannot be bound, or an option of the server is wrong.
            errors.BackendStartError: An ingress did not become ready.
        """
        if self._http.serves:
            self._wanted = True
            self._watch_nodes()
            return await self.refill()
        return True

    async def refill(self) -> bool:
        """Start the ingresses that are missing; a node on which that takes long holds up no other.

        Returns:
            Whether all are there. On a node other than the first an ingress may fail to start because the node is about
            to leave: that is no error of whoever wants an ingress, but to be tried again.
        """
        nodes = [node.node_id for node in self._wanted_nodes()] if self._wanted else []
        outcomes = await asyncio.gather(*[self._refill_on(node_id) for node_id in nodes], return_exceptions=True)
        there = {node.node_id for node in self._wanted_nodes()}
        complete = True
        for node_id, outcome in zip(nodes, outcomes, strict=True):
            if outcome is None or node_id not in there:  # or the node left meanwhile
                continue
            if node_id == nodes[0] or not isinstance(outcome, BackendStartError):
                raise outcome
            _logger.warning("no ingress on node %s yet: %s", node_id, outcome)
            complete = False
        return complete

    async def complete(self) -> None:
        """Refill until all are there; the more tries fail, the more slowly.

        Those that died are replaced at once, unless they die all the time: what leaves whenever it is ready must not
        keep the machine busy.
        """
        wait_s, self._wait_s = self._wait_s, 0.0
        await asyncio.sleep(wait_s)
        for failures in itertools.count(1):
            try:
                if await self.refill():
                    return
            except Exception as error:
                _logger.error("an ingress could not be started: %r", error)
            await asyncio.sleep(backoff_s(failures))

    async def _refill_on(self, node_id: str) -> None:
        async with self._locks[node_id]:
            missing = self._http.workers - len(self._running.setdefault(node_id, [])) if self._wanted else 0
            outcomes = await asyncio.gather(*[self._start(node_id) for _ in range(missing)], return_exceptions=True)
        for outcome in outcomes:  # only now, when none is starting any more
            if outcome is not None:
                raise outcome

    def _watch_nodes(self) -> None:
        if self._http.location == "EveryNode" and isinstance(self._adapter, WatchesNodes):
            self._adapter.watch_nodes()

    def _wanted_nodes(self) -> tuple[Node, ...]:
        nodes = self._adapter.nodes()
        return nodes if self._http.location == "EveryNode" else nodes[:1]

    def describe(self) -> dict[str, dict[str, Any]]:
        """The ingresses that serve, by worker id: the address of the ``node``, the base ``url``, and its life."""
        nodes = {node.node_id: node for node in self._adapter.nodes()}
        return {
            worker.spec.worker_id: {
                "node": nodes[node_id].address,
                "url": self._url_on(nodes[node_id]),
                **worker.describe(),
            }
            for node_id, workers in self._running.items()
            for worker in workers
            if node_id in nodes
        }

    def worker_ids(self) -> list[str]:
        """Those that serve."""
        return [worker.spec.worker_id for workers in self._running.values() for worker in workers]

    def known(self) -> tuple[int, tuple[KnownWorker, ...]] | None:
        """For the checkpoint: see `engine.control.checkpoint.Picture.ingresses`."""
        if not self._wanted:
            return None
        running = [
            KnownWorker(worker.spec.worker_id, worker.spec.name, node_id)
            for node_id, workers in self._running.items()
            for worker in workers
        ]
        return self._count, tuple(running)

    async def restore(self, count: int, known: tuple[KnownWorker, ...]) -> None:
        """Take over the ingresses of a former controller."""
        self._wanted = True
        self._count = count
        self._watch_nodes()
        specs = [
            WorkerSpec(one.worker_id, one.name, _ENTRY, b"", node_id=one.node_id, listen=self._listen) for one in known
        ]
        for worker in await asyncio.gather(*[self._workers.adopt(spec) for spec in specs]):
            if worker.life is Life.READY:
                self._running.setdefault(str(worker.spec.node_id), []).append(worker)
                self._served.add(str(worker.spec.node_id))

    def forget(self, worker: Worker) -> bool:
        """A worker died; returns whether it was an ingress."""
        for running in self._running.values():
            if worker in running:
                running.remove(worker)
                self._wait_s = self._restarts.died(time.monotonic(), answered=False, replicas=self._http.workers)
                return True
        return False

    def patience_with(self, worker: Worker) -> float:
        """For how many seconds a worker may be silent: an ingress, no longer than its event loop may stand still."""
        return STUCK_AFTER_S if any(worker in running for running in self._running.values()) else math.inf

    async def stop(self, grace_s: float) -> None:
        """Let every ingress finish what it serves and leave."""
        self._wanted = False
        workers = [worker for running in self._running.values() for worker in running]
        self._running.clear()
        self._served.clear()
        await asyncio.gather(*[self._workers.drain(worker, grace_s) for worker in workers])
        if isinstance(self._adapter, KeepsPorts):  # there may have been none that could have closed them
            self._adapter.close_ports()

    def url(self) -> str | None:
        """The base URL on the node where the engine was created, once an ingress has run there."""
        head = self._adapter.nodes()[0]
        return self._url_on(head) if head.node_id in self._served else None

    def _url_on(self, node: Node) -> str:
        bound = self._adapter.bound(self._listen, node.node_id)
        host = bound.host
        if host in ("0.0.0.0", "::"):  # what to bind, but not what to connect to
            host = "::1" if host == "::" and node.address == "127.0.0.1" else node.address
        scheme = "https" if self._http.server_options.get("certfile") else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{bound.port}"

    async def _start(self, node_id: str) -> None:
        from ..http.ingress_worker import IngressSpec

        self._count += 1
        worker_id = f"ingress#{self._count}"
        spec = IngressSpec(
            engine_id=self._engine_id,
            adapter_name=self._adapter.name,
            control_address=self._adapter.control_address,
            options=self._http,
            worker_id=worker_id,
            server=_SERVER,
        )
        worker = await self._workers.start(
            WorkerSpec(
                worker_id=worker_id,
                name=f"ingress.{self._count}",
                entry=_ENTRY,
                payload=dumps_by_value(spec, "http_options"),
                preload=("engine.http.ingress_worker", *load_server(_SERVER).preload),
                node_id=node_id,
                listen=self._listen,
            ),
            _START_TIMEOUT_S,
        )
        self._running.setdefault(node_id, []).append(worker)  # at once: from now on its death is noticed
        self._served.add(node_id)
