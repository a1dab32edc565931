"""The controller: what the application wants, and what is done to get there. Never on the path of a call.

All of it runs on one asyncio loop, in a thread of the engine's process or, if the engine is detached, of an actor's;
`engine.control.runner.Runner` brings operations there.
Changes are events: an API call, a worker's word, a worker's death. Operations on one backend exclude each other;
operations on different ones run side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any

from ..calling.client import Client
from ..config import LONGEST_S, BackendConfig, HTTPOptions
from ..errors import EngineClosed, EngineError, InvalidArgument
from ..seam.adapter import Adapter, done_by
from ..seam.channel import Channel, ChannelListener
from ..seam.control_messages import Unhealthy
from ..seam.detached import store_of
from ..seam.error_text import all_there_are
from ..seam.log import Log
from ..seam.snapshot import EndpointEntry
from ..seam.worker import WorkerExit
from .ages import Age, Ages
from .backend_plan import BackendPlan
from .backend_replicas import BackendReplicas
from .checkpoint import Checkpoint, Picture
from .endpoint_table import EndpointTable
from .ingress_fleet import IngressFleet
from .keeper import Keeper
from .publisher import Publisher
from .replica_pool import Departures, Means
from .workers import Worker, Workers

__all__ = ["Controller"]

_logger = Log("engine.controller")

_APPLIED_TIMEOUT_S = 5.0
_OTHERS_TIMEOUT_S = 1.0
"""For callers in other processes to learn of splits and limits. One that hangs makes no call that could go wrong."""
_LEFT_ALONE_TIMEOUT_S = 1.0
"""For callers to learn that a replica leaves. What comes later is refused there, and placed elsewhere."""

_LEAST_GRACE_S = 1.5
"""For replicas to leave by themselves at a shutdown, when ingresses and callers have used up what calls get."""
_LOOK_S = 0.005
"""Between two looks at what this process's callers hold. They tell nobody: that would cost each call something."""


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
        self._backends: dict[str, BackendReplicas] = {}
        self._leaving: dict[str, BackendReplicas] = {}  # deleted, by tag, with replicas that have yet to end
        self._endpoints = EndpointTable({})
        self._workers = Workers(adapter, self._replace_worker, self._replace_unhealthy, self._patience_with)
        self._means = Means(
            engine_id,
            adapter,
            self._workers,
            http.debug,
            publish=self._publish,
            announce=self._publish_anyway,
            told=self._callers_told,
        )
        self._ages = Ages(self._aging, self._recycle)
        self._publisher = Publisher(client, silent=store_of(adapter) is not None)
        self._ingresses = IngressFleet(engine_id, adapter, self._workers, http)
        self._checkpoint = Checkpoint(store_of(adapter))
        self._keeper = Keeper(self._checkpoint, self._picture)
        self._background: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._restoring = False  # what is held is not yet all there is: nothing is published, kept or refilled
        self._closing = False
        self._hurried = False

    # -- AdapterEvents -----------------------------------------------------------------------------------------------

    def worker_said(self, worker_id: str, body: Any) -> None:
        """See `engine.seam.adapter.AdapterEvents.worker_said`."""
        self._workers.worker_said(worker_id, body)

    def worker_exited(self, exit: WorkerExit) -> None:
        """See `engine.seam.adapter.AdapterEvents.worker_exited`."""
        self._workers.worker_exited(exit)

    def peer_connected(self, channel: Channel) -> ChannelListener:
        """See `engine.seam.adapter.AdapterEvents.peer_connected`."""
        return self._publisher.connected(channel)

    def nodes_changed(self) -> None:
        """See `engine.seam.adapter.AdapterEvents.nodes_changed`."""
        if not self._closing and not self._restoring:
            self._spawn(self._refill_ingresses())

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Get the adapter ready, and take over what a former controller left."""
        await done_by(self._adapter, "start", self._engine_id, self)
        try:
            left = self._checkpoint.load()
            if left is not None:
                await self._restore(left)
            elif store_of(self._adapter) is not None:
                self._publish()  # now that it is known that there was no other
        except BaseException:
            self._keeper.close()
            raise

    async def _restore(self, picture: Picture) -> None:
        self._restoring = True
        self._publisher.resume(picture.version)
        self._endpoints = EndpointTable(picture.endpoints)
        restoring = []
        for tag, left in picture.backends.items():
            backend = self._backends[tag] = self._new_backend(left.plan)
            restoring.append(backend.restore(left))
        if picture.ingresses is not None:
            restoring.append(self._ingresses.restore(*picture.ingresses))
        await asyncio.gather(*restoring)
        self._publisher.expect(self._ingresses.worker_ids())
        self._publish()
        self._restoring = False
        for backend in self._backends.values():
            self._refill(backend)
        if picture.ingresses is not None:
            self._spawn(self._refill_ingresses())

    async def shutdown(self, grace_s: float) -> None:
        """Stop taking calls, give those that were taken ``grace_s`` seconds, end every worker.

        First callers of this process and ingresses come to rest. Until then all stays as it is for the replicas, as the
        calls may need others; and what waits for a replica, or is handed back by one, goes on.
        """
        self._closing = True
        grace_s = 0.0 if self._hurried else grace_s
        clock = asyncio.get_running_loop().time
        began = clock()
        self._keeper.close()
        self._ages.close()
        for task in self._background:
            task.cancel()
        await self._workers.close()
        for backend in self._backends.values():
            backend.ending = True
        version = self._publisher.publish_drain()
        ingresses = asyncio.ensure_future(self._ingresses.stop(grace_s))
        if grace_s:  # whoever does not take it at once holds nobody up
            await self._publisher.applied(version, min(grace_s, _OTHERS_TIMEOUT_S), ingress_only=False)
        await self._until_at_rest(grace_s, self._backends, elsewhere=lambda: self._publisher.at_rest(version))
        await ingresses
        self._client.begin_close()
        self._publisher.publish_end()
        backends = [*self._backends.values(), *self._leaving.values()]
        took_s = clock() - began
        ends = []
        for one in backends:
            granted_s = min(grace_s, one.config.graceful_shutdown_timeout_s)
            # Whatever was taken of it: who is idle gets the time to leave by himself.
            ends.append(one.end(one.all_ready(), grace_s=max(granted_s - took_s, min(granted_s, _LEAST_GRACE_S))))
        await asyncio.gather(*ends)
        self._client.close()
        self._workers.release()
        await done_by(self._adapter, "stop")
        self._adapter.close()

    def hurry(self) -> None:
        """Give calls in flight no more time: it is being shut down, or will be in a moment."""
        self._hurried = True
        if self._closing:
            self._workers.hurry()

    # -- backends ------------------------------------------------------------------------------------------------------

    async def create_backend(self, plan: BackendPlan, *, replace: bool = False) -> None:
        """Start a backend; it exists once all of its replicas are ready, or not at all.

        To ``replace`` one of this tag, its replicas go on until the new ones are ready. If those do not become ready,
        it stays as it is.

        If it is given up, nothing is left of it, and who creates a backend of this tag meanwhile waits for that.

        Raises:
            InvalidArgument: The tag is taken, also by a backend whose deletion goes on.
            BaseException: What a replica's constructor raised, why it did not become ready, or why the store does not
                keep it.
        """
        while (there := self._backends.get(plan.tag)) is not None and not there.live:
            async with there.turns.turn():  # it is being created, or that is taken back for whoever was interrupted
                pass
        if self._being_deleted(plan.tag):  # the new replicas would be taken for the old ones, whose names they have
            raise InvalidArgument(
                f"backend {plan.tag!r} is still being deleted: wait until delete_backend returns, or call it again to "
                "wait for that"
            )
        if there is not None and replace:
            return await self._change(there, there.replace(plan), instead=True)
        if there is not None:
            raise InvalidArgument(
                f"backend {plan.tag!r} exists already: choose another tag, pass replace=True, or delete it first"
            )
        backend = self._backends[plan.tag] = self._new_backend(plan)
        async with backend.turns.turn():
            try:
                await backend.create()
            except BaseException:
                del self._backends[plan.tag]  # only now: the next one's replicas have the same names
                raise
            self._refill(backend)

    async def update_backend(self, plan: BackendPlan, *, keep_resources: bool) -> None:
        """Have a backend run something else; see `engine.control.backend_replicas.BackendReplicas.replace`.

        One of these that goes on already gives way.

        Raises:
            InvalidArgument: The backend is unknown, or its configuration does not fit.
            BaseException: Why a replica did not become ready, or why the store does not keep it. Then all is as before.
        """
        backend = self._backend(plan.tag)
        backend.amended(plan, keep_resources=keep_resources)  # before anything gives way to it

        async def replace() -> Departures:
            return await backend.replace(backend.amended(plan, keep_resources=keep_resources))

        await self._change(backend, replace(), instead=True)

    async def update_backend_config(self, tag: str, changes: Any) -> None:
        """Change a backend's configuration; the change rules once this returns.

        Raises:
            InvalidArgument: The backend is unknown, or the change is not valid.
            BaseException: See `engine.control.backend_replicas.BackendReplicas.update`, also for what rules then.
        """
        backend = self._backend(tag)
        await self._change(backend, backend.update(changes))
        await self._publisher.applied(self._publisher.version, _OTHERS_TIMEOUT_S, ingress_only=False)

    async def delete_backend(self, tag: str, *, force: bool) -> None:
        """End a backend that no endpoint uses; if that goes on already, wait for it, or end it at once by ``force``.

        Raises:
            InvalidArgument: It is unknown, or in use.
            BaseException: Why the store does not keep that. Then the backend goes on.
        """
        backend = self._being_deleted(tag)
        if backend is None:
            backend = self._backend(tag)
            self._endpoints.check_unused(tag)
            backend.deleted = True  # nobody begins anything with it any more
        try:
            if not force:  # else it is not waited for whoever's turn it is: he may wait for a replica that is stuck
                async with backend.turns.turn(instead=True):
                    if not backend.deleted:  # somebody else who wanted that gave it up, and kept the backend
                        self._endpoints.check_unused(tag)
                        backend.deleted = True
        except BaseException:
            self._keep_after_all(backend)
            raise
        await self._see_through(self._delete(backend, at_once=force))

    async def get_backend_config(self, tag: str) -> BackendConfig:
        """A backend's configuration.

        Raises:
            InvalidArgument: It is unknown.
        """
        return self._backend(tag).config

    async def list_backends(self) -> dict[str, BackendConfig]:
        """Every backend's configuration by tag."""
        return {tag: backend.config for tag, backend in self._existing().items()}

    # -- endpoints -----------------------------------------------------------------------------------------------------

    async def create_endpoint(self, entry: EndpointEntry) -> None:
        """Name a backend for callers; a route is served by every ingress when this returns.

        Ingresses that were started for it stay if it fails afterwards, and serve what routes there are.

        Raises:
            InvalidArgument: The name or the route is taken, or the backend is unknown.
            BaseException: Why an ingress did not become ready, or why the store does not keep the endpoint.
        """
        self._with_new(entry)  # before anything is started for it
        if entry.route is not None and not await self._ingresses.ensure_started():
            self._spawn(self._refill_ingresses())
        try:
            await self._change_endpoints(self._with_new(entry))  # and afterwards: others change endpoints, too
        except asyncio.CancelledError:  # while an ingress took its time: whoever asked for it was interrupted
            if self._endpoints.entries().get(entry.name) is entry:
                self._endpoints = self._endpoints.without(entry.name)
                self._publish_anyway()
            raise

    async def delete_endpoint(self, name: str) -> None:
        """Remove a name; calls in flight finish.

        Raises:
            InvalidArgument: It is unknown.
            BaseException: Why the store does not keep that. Then the endpoint goes on.
        """
        await self._change_endpoints(self._endpoints.without(name))

    async def set_traffic(self, name: str, weights: dict[str, float]) -> None:
        """Split an endpoint's calls over backends.

        Raises:
            InvalidArgument: The endpoint or a backend is unknown.
            BaseException: Why the store does not keep that. Then calls are split as before.
        """
        endpoints = self._endpoints.with_traffic(name, weights)
        for tag in weights:
            self._backend(tag)
        await self._change_endpoints(endpoints)

    async def shadow_traffic(self, name: str, tag: str, proportion: float) -> None:
        """Copy a proportion of an endpoint's calls to a backend; 0 ends it.

        Raises:
            InvalidArgument: The endpoint or the backend is unknown.
            BaseException: Why the store does not keep that. Then copies are made as before.
        """
        endpoints = self._endpoints.with_shadow(name, tag, proportion)
        self._backend(tag)
        await self._change_endpoints(endpoints)

    async def list_endpoints(self) -> dict[str, EndpointEntry]:
        """Every endpoint by name."""
        return self._endpoints.entries()

    # -- looking at it -------------------------------------------------------------------------------------------------

    @property
    def http_options(self) -> HTTPOptions:
        """How the engine was created to be reached over HTTP."""
        return self._http

    def http_url(self) -> str | None:
        """The ingress's base URL, once it runs."""
        return self._ingresses.url()

    async def statistics(self, counts: list[dict[str, Any]]) -> dict[str, Any]:
        """Replicas by backend, and what the asking process's callers counted (`Client.statistics`)."""
        backends = {
            tag: {
                **backend.describe(),
                **dict.fromkeys(("queued", "queued_bytes", "in_flight", "queued_copies", "dropped_copies"), 0),
            }
            for tag, backend in {**self._leaving, **self._backends}.items()
        }
        endpoints: dict[str, dict[str, Any]] = {name: {"calls": 0} for name in self._endpoints.entries()}
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

    def _new_backend(self, plan: BackendPlan) -> BackendReplicas:
        return BackendReplicas(self._means, plan)

    def _backend(self, tag: str) -> BackendReplicas:
        backend = self._existing().get(tag)
        if backend is None:
            raise InvalidArgument(f"there is no backend {tag!r}; {all_there_are('backends', self._existing())}")
        return backend

    def _being_deleted(self, tag: str) -> BackendReplicas | None:
        backend = self._leaving.get(tag) or self._backends.get(tag)
        return backend if backend is not None and backend.live and backend.deleted else None

    def _remove(self, backend: BackendReplicas) -> None:
        """Take a backend out of what there is, unless somebody else was faster."""
        tag = backend.plan.tag
        if self._backends.get(tag) is not backend:
            return
        backend.deleted = True
        del self._backends[tag]
        try:
            self._publish()
        except BaseException:
            self._backends[tag] = backend
            raise
        self._leaving[tag] = backend

    def _existing(self) -> dict[str, BackendReplicas]:
        return {tag: backend for tag, backend in self._backends.items() if backend.live and not backend.deleted}

    def _with_new(self, entry: EndpointEntry) -> EndpointTable:
        endpoints = self._endpoints.with_new(entry)
        for tag, _ in entry.traffic:
            self._backend(tag)
        return endpoints

    async def _change(
        self, backend: BackendReplicas, change: Coroutine[Any, Any, Departures], *, instead: bool = False
    ) -> None:
        """Change a backend, unless it is deleted; returns when those have ended that leave for that.

        Nobody waits for these who wants to change it next.
        """
        tag = backend.plan.tag
        with closing(change):  # it may never begin
            async with backend.turns.turn(instead=instead):
                if self._backend(tag) is not backend:  # it may have been deleted meanwhile
                    raise InvalidArgument(f"backend {tag!r} was deleted meanwhile")
                try:
                    departures = await change
                except EngineError as error:
                    if self._backends.get(tag) is not backend:
                        raise InvalidArgument(f"backend {tag!r} was deleted meanwhile") from error
                    raise
                finally:
                    self._refill(backend)
        await asyncio.shield(asyncio.gather(*departures))

    # -- changes -------------------------------------------------------------------------------------------------------

    def _publish(self) -> int:
        """Keep the picture, then let it rule; returns its version.

        Raises:
            BaseException: Why the store did not keep it. Then it does not rule, and whoever changed it takes that back
                before anybody else can look.
        """
        self._keeper.keep()
        return self._let_rule()

    def _publish_anyway(self) -> None:
        """As `_publish`, for what has happened and cannot be taken back: callers need the news."""
        self._keeper.keep_or_log()
        self._let_rule()

    def _let_rule(self) -> int:
        backends = {tag: backend.entry() for tag, backend in self._backends.items() if backend.live}
        version = self._publisher.publish(self._endpoints.entries(), backends)
        if not self._closing:
            self._ages.look()
            self._heed_complaints()
        return version

    def _picture(self) -> Picture:
        backends = {tag: backend.known() for tag, backend in self._backends.items() if backend.live}
        return Picture(self._publisher.version, self._endpoints.entries(), backends, self._ingresses.known())

    async def _change_endpoints(self, endpoints: EndpointTable) -> None:
        before, self._endpoints = self._endpoints, endpoints
        try:
            version = self._publish()
        except BaseException:
            self._endpoints = before
            raise
        if not await self._publisher.applied(version, _APPLIED_TIMEOUT_S, ingress_only=True):
            _logger.warning("an ingress has not taken the newest routes within %g s", _APPLIED_TIMEOUT_S)
        await self._publisher.applied(version, _OTHERS_TIMEOUT_S, ingress_only=False)

    async def _delete(self, backend: BackendReplicas, *, at_once: bool) -> None:
        tag = backend.plan.tag
        try:
            if not at_once:
                await self._until_at_rest(LONGEST_S, {tag: backend}, nameless=True)
                if self._closing:
                    raise EngineClosed("the engine was shut down")
            self._remove(backend)
        except BaseException:
            self._keep_after_all(backend)
            raise
        await self._end_backend(backend, at_once=at_once)

    def _keep_after_all(self, backend: BackendReplicas) -> None:
        if self._backends.get(backend.plan.tag) is backend:
            backend.deleted = False
            self._refill(backend)

    async def _until_at_rest(
        self,
        grace_s: float,
        backends: dict[str, BackendReplicas],
        *,
        nameless: bool = False,
        elsewhere: Callable[[], bool] = lambda: True,
    ) -> None:
        """Wait until this process's callers hold no call to these backends that a replica could still answer.

        Args:
            grace_s: Seconds that each backend gets, if its configuration does not grant less.
            backends: By tag. One that leaves the engine is not waited for any longer.
            nameless: See `Client.held`.
            elsewhere: Whether callers of other processes are at rest, too.
        """
        clock = asyncio.get_running_loop().time
        began, closing = clock(), self._closing
        while not self._hurried and self._closing == closing:
            took_s = clock() - began
            due = {
                tag
                for tag, one in backends.items()
                if self._backends.get(tag) is one
                and one.serves
                and took_s < min(grace_s, one.config.graceful_shutdown_timeout_s)
            }
            if not due or (due.isdisjoint(self._client.held(nameless=nameless)) and elsewhere()):
                return
            await asyncio.sleep(_LOOK_S)

    async def _end_backend(self, backend: BackendReplicas, *, at_once: bool) -> None:
        tag = backend.plan.tag
        if at_once:
            await backend.kill_all()
        async with backend.turns.turn(instead=True):  # whose turn it was has ended what he had started
            replicas = self._end_replicas(backend, backend.all_ready(), at_once=at_once)
            await asyncio.gather(backend.end_fills(), replicas)
        if self._leaving.get(tag) is backend:
            del self._leaving[tag]

    async def _end_replicas(self, backend: BackendReplicas, leaving: list[Worker], *, at_once: bool = False) -> None:
        """End replicas that were published to be out of service."""
        if leaving and not at_once:
            await self._callers_told()
        await backend.end(leaving, at_once=at_once)

    async def _callers_told(self) -> None:
        await self._publisher.applied(self._publisher.version, _LEFT_ALONE_TIMEOUT_S, ingress_only=False)

    async def _see_through(self, ending: Coroutine[Any, Any, None]) -> None:
        """Wait for what goes on also when whoever waits is interrupted: nobody else would end those replicas."""
        task = asyncio.get_running_loop().create_task(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        await asyncio.shield(task)

    # -- workers -------------------------------------------------------------------------------------------------------

    def _replace_worker(self, worker: Worker) -> None:
        """A ready worker died. During a shutdown, calls that wait for it hear so; nobody takes its place."""
        for backend in self._backends.values():
            if backend.lost(worker):
                if not self._restoring:
                    self._publish_anyway()
                    self._refill(backend)
                return
        if not self._closing and self._ingresses.forget(worker):
            self._publisher.give_up(worker.spec.worker_id)
            told = worker.last_words.told()
            _logger.warning("%s %s; replacing it%s", worker.spec.name, worker.exit_reason, told)
            if not self._restoring:
                self._spawn(self._refill_ingresses())

    def _replace_unhealthy(self, worker: Worker, told: Unhealthy) -> bool:
        """A worker asks to be replaced; returns whether it is in service."""
        if self._closing:
            return True
        for backend in self._backends.values():
            if worker in backend.running:
                if told.worn:
                    self._recycle(worker, told.reason, from_start=told.from_start)
                else:
                    self._spawn(backend.replace_one(worker, told.reason, at_once=told.hung))
                return True
        return False

    def _heed_complaints(self) -> None:
        """Replace those that asked for it before they were in service."""
        for worker in [one for backend in self._backends.values() for one in backend.running if one.complaint]:
            told, worker.complaint = worker.complaint, None
            assert told is not None
            self._replace_unhealthy(worker, told)

    def _aging(self) -> list[Age]:
        """The replicas that may become too old."""
        return [
            Age(worker, backend.config.max_age_s)
            for backend in self._backends.values()
            if backend.config.max_age_s is not None
            for worker in backend.running
        ]

    def _recycle(self, worker: Worker, reason: str, *, from_start: bool = False) -> None:
        """A replica has done its share."""
        for backend in self._backends.values():
            in_service = worker in backend.running and not self._closing
            if in_service and backend.mark_worn(worker, reason, from_start=from_start):
                self._spawn(backend.renew())

    def _patience_with(self, worker: Worker) -> float:
        """For how many seconds a worker may run no Python code."""
        limits_s = [one.patience_s for one in self._backends.values() if worker in one.running]
        return min(limits_s, default=self._ingresses.patience_with(worker))

    def _refill(self, backend: BackendReplicas) -> None:
        if self._closing:
            return
        if backend.missing > 0:
            self._spawn(backend.refill())
        if backend.due:
            self._spawn(backend.renew())

    async def _refill_ingresses(self) -> None:
        await self._ingresses.complete()
        self._keeper.keep_or_log()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None and not self._closing:
            _logger.error("replacing a worker failed", exc_info=task.exception())
