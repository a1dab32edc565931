"""The controller: what the application wants, and what is done to get there. Never on the path of a call.

All of it runs on one asyncio loop, in a thread of the engine's process; `engine.engine.Engine` brings calls there.
Changes are events: an API call, a worker's word, a worker's death. Operations on one backend exclude each other;
operations on different ones run side by side.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from .adapter import Adapter, Channel, ChannelListener, WorkerExit, WorkerSpec
from .backend_plan import BackendPlan
from .checkpoint import Checkpoint, KnownWorker, Picture
from .client import Client
from .config import BackendConfig, HTTPOptions
from .errors import InvalidArgument
from .ingress_fleet import IngressFleet
from .publisher import Publisher
from .replica_spec import ReplicaSpec
from .serialization import dumps
from .snapshot import BackendEntry, EndpointEntry, ReplicaEntry
from .workers import Life, Worker, Workers

__all__ = ["Controller"]

_logger = logging.getLogger("engine.controller")

_ENTRY = "engine.replica_worker:main"
_APPLIED_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 10.0
_STABLE_S = 10.0
"""A replica that lived this long died of bad luck: the next one starts at once. Others wait longer and longer."""
_KEPT_DEAD = 100
"""Deaths that callers are told of: far more than happen between two snapshots that a caller gets."""
_HOPELESS_AFTER = 3
"""Failed starts in a row after which callers are told that there is no replica, rather than left waiting for one."""


@dataclass
class _Backend:
    plan: BackendPlan
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    replicas: list[Worker] = field(default_factory=list)
    started: int = 0  # numbers the replicas
    failed_starts: int = 0  # in a row
    dead: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_DEAD))  # ids of replicas, the last ones
    live: bool = False  # created: replicas that die are replaced
    deleted: bool = False

    @property
    def config(self) -> BackendConfig:
        return self.plan.config


class Controller:
    """Holds the desired and the actual state of one engine.

    Args:
        engine_id: Names the engine towards adapters and handles.
        adapter: Runs the workers.
        client: Of this process.
        http: How the engine is reached over HTTP.
    """

    def __init__(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        self._engine_id = engine_id
        self._adapter = adapter
        self._client = client
        self._http = http
        self._backends: dict[str, _Backend] = {}
        self._endpoints: dict[str, EndpointEntry] = {}
        self._workers = Workers(adapter, self._replace_worker)
        self._publisher = Publisher(client, silent=adapter.store is not None)
        self._ingresses = IngressFleet(engine_id, adapter, self._workers, http)
        self._checkpoint = Checkpoint(adapter.store)
        self._background: set[asyncio.Task[None]] = set()
        self._restoring = False  # what is held is not yet all there is: nothing is published, kept or refilled
        self._closing = False

    # -- AdapterEvents -----------------------------------------------------------------------------------------------

    def worker_said(self, worker_id: str, body: Any) -> None:
        """See `engine.adapter.AdapterEvents.worker_said`."""
        self._workers.worker_said(worker_id, body)

    def worker_exited(self, exit: WorkerExit) -> None:
        """See `engine.adapter.AdapterEvents.worker_exited`."""
        self._workers.worker_exited(exit)

    def peer_connected(self, channel: Channel) -> ChannelListener:
        """See `engine.adapter.AdapterEvents.peer_connected`."""
        return self._publisher.connected(channel)

    def nodes_changed(self) -> None:
        """See `engine.adapter.AdapterEvents.nodes_changed`."""
        if not self._closing and not self._restoring:
            self._spawn(self._refill_ingresses())

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Get the adapter ready, and take over what a former controller left."""
        await self._adapter.start(self._engine_id, self)
        left = self._checkpoint.load()
        if left is not None:
            await self._restore(*left)
        elif self._adapter.store is not None:
            self._publish()  # now that it is known that there was no other

    async def _restore(self, picture: Picture, plans: dict[str, BackendPlan]) -> None:
        self._restoring = True
        self._publisher.resume(picture.version)
        self._endpoints = dict(picture.endpoints)
        restoring = []
        for tag, plan in plans.items():
            started, known = picture.replicas.get(tag, (0, ()))
            backend = self._backends[tag] = _Backend(plan, started=started, live=True)
            restoring.append(self._restore_replicas(backend, known))
        if picture.ingresses is not None:
            restoring.append(self._ingresses.restore(*picture.ingresses))
        await asyncio.gather(*restoring)
        self._publish()
        self._restoring = False
        for backend in self._backends.values():
            self._refill(backend)
        if picture.ingresses is not None:
            self._spawn(self._refill_ingresses())

    async def _restore_replicas(self, backend: _Backend, known: tuple[KnownWorker, ...]) -> None:
        specs = [WorkerSpec(one.worker_id, one.name, _ENTRY, b"", resources=backend.plan.resources) for one in known]
        workers = await asyncio.gather(*[self._workers.adopt(spec) for spec in specs])
        backend.replicas = [worker for worker in workers if worker.life is Life.READY]
        backend.dead += [worker.spec.worker_id for worker in workers if worker.life is not Life.READY]

    async def shutdown(self, grace_s: float) -> None:
        """Stop taking calls, give those in flight ``grace_s`` seconds, end every worker."""
        self._closing = True
        for task in self._background:
            task.cancel()
        await self._workers.close()
        await self._ingresses.stop(grace_s)
        self._client.begin_close()
        self._publisher.publish({}, {})
        await asyncio.gather(
            *[
                self._workers.drain(worker, min(grace_s, backend.config.graceful_shutdown_timeout_s))
                for backend in self._backends.values()
                for worker in backend.replicas
            ]
        )
        self._client.close()
        await self._adapter.stop()
        self._adapter.close()

    # -- backends ------------------------------------------------------------------------------------------------------

    async def create_backend(self, plan: BackendPlan) -> None:
        """Start a backend; it exists once all of its replicas are ready, or not at all.

        Raises:
            InvalidArgument: The tag is taken.
            BaseException: What a replica's constructor raised, or why it did not become ready.
        """
        if plan.tag in self._backends:
            raise InvalidArgument(f"backend {plan.tag!r} exists already: choose another tag or delete it first")
        backend = self._backends[plan.tag] = _Backend(plan)
        async with backend.lock:
            try:
                await self._add_replicas(backend, plan.config.num_replicas)
            except BaseException:
                backend.deleted = True
                del self._backends[plan.tag]
                raise
            backend.live = True
            self._checkpoint.keep_backend(plan)
            self._publish()
            self._refill(backend)

    async def update_backend_config(self, tag: str, changes: Any) -> None:
        """Change a backend's configuration; the change rules once this returns.

        Raises:
            InvalidArgument: The backend is unknown, or the change is not valid.
            BaseException: What ``reconfigure`` or a new replica's constructor raised.
        """
        backend = self._backend(tag)
        async with backend.lock:
            self._backend(tag)  # it may have been deleted meanwhile
            before = backend.config
            after = before.updated(changes)
            backend.plan.check(after)
            packed = dumps(after, f"config: user_config of backend {tag!r}")
            await self._reconfigure(backend, before, after, packed)
            backend.plan = replace(backend.plan, config=after)
            surplus = len(backend.replicas) - after.num_replicas
            if surplus > 0:
                await self._remove_replicas(backend, backend.replicas[-surplus:])
            elif surplus < 0:
                try:
                    await self._add_replicas(backend, -surplus)
                except BaseException:
                    backend.plan = replace(backend.plan, config=replace(after, num_replicas=before.num_replicas))
                    self._checkpoint.keep_backend(backend.plan)
                    self._publish()
                    raise
            self._checkpoint.keep_backend(backend.plan)
            self._publish()
            self._refill(backend)

    async def delete_backend(self, tag: str, *, force: bool) -> None:
        """End a backend that no endpoint uses.

        Raises:
            InvalidArgument: It is unknown, or in use.
        """
        backend = self._backend(tag)
        users = [
            name
            for name, endpoint in self._endpoints.items()
            if any(tag == used for used, _ in endpoint.traffic + endpoint.shadows)
        ]
        if users:
            raise InvalidArgument(
                f"backend {tag!r} is in use by endpoint {', '.join(map(repr, users))}: "
                "set_traffic (or shadow_traffic) to another backend, or delete the endpoint, first"
            )
        backend.deleted = True
        async with backend.lock:
            if self._backends.get(tag) is backend:
                del self._backends[tag]
                self._checkpoint.drop_backend(tag)
                await self._remove_replicas(backend, list(backend.replicas), force=force)

    async def get_backend_config(self, tag: str) -> BackendConfig:
        """A backend's configuration.

        Raises:
            InvalidArgument: It is unknown.
        """
        return self._backend(tag).config

    async def list_backends(self) -> dict[str, BackendConfig]:
        """Every backend's configuration by tag."""
        return {tag: backend.config for tag, backend in self._backends.items() if backend.live}

    # -- endpoints -----------------------------------------------------------------------------------------------------

    async def create_endpoint(self, entry: EndpointEntry) -> None:
        """Name a backend for callers; a route is served by every ingress when this returns.

        Raises:
            InvalidArgument: The name or the route is taken, or the backend is unknown.
        """
        if entry.name in self._endpoints:
            raise InvalidArgument(f"endpoint {entry.name!r} exists already: choose another name or delete it first")
        for tag, _ in entry.traffic:
            self._backend(tag)
        for other in self._endpoints.values():
            if entry.route is not None and entry.route == other.route:
                raise InvalidArgument(f"route {entry.route!r} is taken by endpoint {other.name!r}")
        self._endpoints[entry.name] = entry
        if entry.route is not None:
            try:
                if not await self._ingresses.ensure_started():
                    self._spawn(self._refill_ingresses())
            except BaseException:
                if self._endpoints.get(entry.name) is entry:
                    del self._endpoints[entry.name]
                    self._publish()  # somebody else may have published it meanwhile
                raise
        await self._publish_and_wait()

    async def delete_endpoint(self, name: str) -> None:
        """Remove a name; calls in flight finish.

        Raises:
            InvalidArgument: It is unknown.
        """
        self._endpoint(name)
        del self._endpoints[name]
        await self._publish_and_wait()

    async def set_traffic(self, name: str, weights: dict[str, float]) -> None:
        """Split an endpoint's calls over backends.

        Raises:
            InvalidArgument: The endpoint or a backend is unknown.
        """
        endpoint = self._endpoint(name)
        for tag in weights:
            self._backend(tag)
        self._endpoints[name] = replace(endpoint, traffic=tuple(sorted(weights.items())))
        await self._publish_and_wait()

    async def shadow_traffic(self, name: str, tag: str, proportion: float) -> None:
        """Copy a proportion of an endpoint's calls to a backend; 0 ends it.

        Raises:
            InvalidArgument: The endpoint or the backend is unknown.
        """
        endpoint = self._endpoint(name)
        self._backend(tag)
        shadows = {**dict(endpoint.shadows), tag: proportion}
        kept = tuple(sorted((known, share) for known, share in shadows.items() if share > 0))
        self._endpoints[name] = replace(endpoint, shadows=kept)
        await self._publish_and_wait()

    async def list_endpoints(self) -> dict[str, EndpointEntry]:
        """Every endpoint by name."""
        return dict(self._endpoints)

    # -- looking at it -------------------------------------------------------------------------------------------------

    def http_url(self) -> str | None:
        """The ingress's base URL, once it runs."""
        return self._ingresses.url()

    async def statistics(self, counts: list[dict[str, Any]]) -> dict[str, Any]:
        """Replicas by backend, and what the asking process's callers counted (`engine.client.Client.statistics`)."""
        backends = {
            tag: {
                "replicas": {worker.spec.worker_id: worker.life.value for worker in backend.replicas},
                "queued": 0,
                "in_flight": 0,
                "dropped_copies": 0,
            }
            for tag, backend in self._backends.items()
        }
        endpoints: dict[str, dict[str, Any]] = {name: {"calls": 0} for name in self._endpoints}
        for counted in counts:
            for tag, numbers in counted["backends"].items():
                for name, value in numbers.items():
                    if tag in backends:
                        backends[tag][name] += value
            for name, numbers in counted["endpoints"].items():
                if name in endpoints:
                    endpoints[name]["calls"] += numbers["calls"]
        return {"backends": backends, "endpoints": endpoints, "ingresses": self._ingresses.describe()}

    # -- inside --------------------------------------------------------------------------------------------------------

    def _backend(self, tag: str) -> _Backend:
        backend = self._backends.get(tag)
        if backend is None or not backend.live or backend.deleted:
            known = ", ".join(repr(other) for other, one in self._backends.items() if one.live) or "none"
            raise InvalidArgument(f"there is no backend {tag!r}; the backends are: {known}")
        return backend

    def _endpoint(self, name: str) -> EndpointEntry:
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            known = ", ".join(map(repr, self._endpoints)) or "none"
            raise InvalidArgument(f"there is no endpoint {name!r}; the endpoints are: {known}")
        return endpoint

    def _publish(self) -> int:
        """Keep the picture, then let it rule; returns its version.

        Raises:
            BaseException: Why the store did not keep it. Then it does not rule.
        """
        if not self._closing:
            self._checkpoint.keep(self._picture())
        return self._let_rule()

    def _publish_anyway(self) -> None:
        """As `_publish`, where nobody waits who could be told that the store is away: callers need the news."""
        self._keep_if_possible()
        self._let_rule()

    def _keep_if_possible(self) -> None:
        if self._closing:
            return
        try:
            self._checkpoint.keep(self._picture())
        except Exception as error:
            _logger.error(
                "the engine's state could not be kept, and goes on unkept until the next change: %r. "
                "Should the controller die before that, the next one finds an older state",
                error,
            )

    def _let_rule(self) -> int:
        backends = {}
        for tag, backend in self._backends.items():
            ready = [worker for worker in backend.replicas if worker.life is Life.READY]
            backends[tag] = BackendEntry(
                tag,
                tuple(ReplicaEntry(worker.spec.worker_id, worker.address) for worker in ready),
                backend.config.concurrency(blocking=backend.plan.blocking),
                backend.config.max_queued_requests,
                expecting=backend.failed_starts < _HOPELESS_AFTER,
                dead=tuple(backend.dead),
            )
        return self._publisher.publish(dict(self._endpoints), backends)

    def _picture(self) -> Picture:
        replicas = {
            tag: (
                backend.started,
                tuple(KnownWorker(worker.spec.worker_id, worker.spec.name, None) for worker in backend.replicas),
            )
            for tag, backend in self._backends.items()
            if backend.live
        }
        return Picture(self._publisher.version, dict(self._endpoints), replicas, self._ingresses.known())

    async def _publish_and_wait(self) -> None:
        version = self._publish()
        if not await self._publisher.applied(version, _APPLIED_TIMEOUT_S, ingress_only=True):
            _logger.warning("an ingress has not taken the newest routes within %g s", _APPLIED_TIMEOUT_S)

    # -- replicas ------------------------------------------------------------------------------------------------------

    async def _add_replicas(self, backend: _Backend, count: int) -> None:
        starts = [asyncio.ensure_future(self._start_replica(backend)) for _ in range(count)]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            done = await asyncio.gather(*starts, return_exceptions=True)
            started = [worker for worker in done if isinstance(worker, Worker)]
            await asyncio.gather(*[self._workers.kill(worker) for worker in started])
            raise
        for start in starts:
            worker = start.result()
            if worker.life is Life.READY:
                backend.replicas.append(worker)
            else:  # while the others were still starting
                backend.failed_starts += 1
                _logger.warning("%s %s as soon as it was ready", worker.spec.name, worker.exit_reason)

    async def _start_replica(self, backend: _Backend) -> Worker:
        backend.started += 1
        plan = backend.plan
        replica_tag = f"{plan.tag}#{backend.started}"
        spec = ReplicaSpec(
            engine_id=self._engine_id,
            adapter_name=self._adapter.name,
            control_address=self._adapter.control_address,
            backend_tag=plan.tag,
            replica_tag=replica_tag,
            target=plan.target,
            config=plan.config,
            debug=self._http.debug,
            shares_process=self._adapter.shares_process,
        )
        return await self._workers.start(
            WorkerSpec(
                worker_id=replica_tag,
                name=f"replica.{plan.tag}.{backend.started}",
                entry=_ENTRY,
                payload=dumps(spec, f"config: user_config of backend {plan.tag!r}"),
                resources=plan.resources,
            ),
            plan.config.start_timeout_s,
        )

    async def _remove_replicas(self, backend: _Backend, leaving: list[Worker], *, force: bool = False) -> None:
        backend.replicas = [worker for worker in backend.replicas if worker not in leaving]
        version = self._publish()
        if force:
            await asyncio.gather(*[self._workers.kill(worker) for worker in leaving])
            return
        await self._publisher.applied(version, 1.0, ingress_only=False)
        grace_s = backend.config.graceful_shutdown_timeout_s
        await asyncio.gather(*[self._workers.drain(worker, grace_s) for worker in leaving])

    async def _reconfigure(self, backend: _Backend, before: BackendConfig, after: BackendConfig, packed: bytes) -> None:
        changed = not _equal(after.user_config, before.user_config)
        if not changed and replace(after, num_replicas=before.num_replicas, user_config=before.user_config) == before:
            return
        replicas = [worker for worker in backend.replicas if worker.life is Life.READY]
        outcomes = await asyncio.gather(
            *[self._workers.reconfigure(worker, packed, user_config_changed=changed) for worker in replicas],
            return_exceptions=True,  # the next operation may only begin when all have answered
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _replace_worker(self, worker: Worker) -> None:
        """A ready worker died."""
        if self._closing:
            return
        for backend in self._backends.values():
            if worker in backend.replicas:
                backend.replicas.remove(worker)
                backend.dead.append(worker.spec.worker_id)
                lived = time.monotonic() - worker.ready_at
                _logger.warning("%s %s after %.1f s; replacing it", worker.spec.name, worker.exit_reason, lived)
                backend.failed_starts = 0 if lived > _STABLE_S else backend.failed_starts + 1
                if not self._restoring:
                    self._publish_anyway()
                    self._refill(backend)
                return
        if self._ingresses.forget(worker):
            _logger.warning("%s %s; replacing it", worker.spec.name, worker.exit_reason)
            if not self._restoring:
                self._spawn(self._refill_ingresses())

    def _refill(self, backend: _Backend) -> None:
        if len(backend.replicas) < backend.config.num_replicas:
            self._spawn(self._replace_replicas(backend))

    async def _refill_ingresses(self) -> None:
        delay = _FIRST_BACKOFF_S
        while True:
            try:
                if await self._ingresses.refill():
                    break
            except Exception as error:
                _logger.error("an ingress could not be started: %r", error)
            await asyncio.sleep(delay)
            delay = min(_LONGEST_BACKOFF_S, 2 * delay)
        self._keep_if_possible()

    async def _replace_replicas(self, backend: _Backend) -> None:
        while True:
            if backend.failed_starts > 1:
                delay = _FIRST_BACKOFF_S * 2 ** min(backend.failed_starts - 2, 16)
                await asyncio.sleep(min(_LONGEST_BACKOFF_S, delay))
            async with backend.lock:
                if backend.deleted or len(backend.replicas) >= backend.config.num_replicas:
                    return
                try:
                    await self._add_replicas(backend, 1)
                except Exception as error:
                    backend.failed_starts += 1
                    _logger.error("backend %r: a replica could not be replaced: %r", backend.plan.tag, error)
                self._publish_anyway()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None and not self._closing:
            _logger.error("replacing a worker failed", exc_info=task.exception())


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are known to be equal; arrays, for one, do not say so in one word."""
    try:
        return bool(one == other)
    except Exception:
        return False
