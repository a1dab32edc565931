"""Engines that outlive their creator: the controller as a named actor, which Ray starts again when it dies.

The actor holds the core's `DetachedController` with an adapter of its own (`DetachedAdapter`), whose
workers are detached, too. What the controller manages is kept in the cluster's control plane before anybody is told
that it is done; a controller that was started again reads it, waits for its workers to come back to it, and replaces
those that don't. Meanwhile calls go on: callers keep the last picture and their own channels to the replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import time
from collections.abc import Mapping
from typing import Any

from engine.config import HTTPOptions
from engine.control.detached import DetachedController
from engine.errors import EngineClosed, EngineError, InvalidArgument, RetryLater
from engine.seam.adapter import AdapterEvents
from engine.seam.detached import RemoteController, StateStore
from engine.seam.log import Log
from engine.seam.worker import WorkerSpec
from engine.seam.workplace import enter_worker
from engine_wire.secret import Secret
from engine_wire.tls import TLS

from ..calling.addresses import symbolic
from ..calling.courier import end_courier
from ..link import connection
from ..link.actors import NAMESPACE, actor_names, kill_actor, kill_named
from ..link.connection import check_connected, where
from ..link.registry import Entry, Registry
from ..link.surroundings import Surroundings
from .cluster import SECRET_BYTES, ClusterAdapter
from .places import trifle

__all__ = ["ControllerActor", "RayController", "create_controller", "find_controller"]

_log = Log("engine.ray")

_INCARNATION = "~"
"""Between the id of a worker and that of the controller that started it, in the name of its actor."""
_UNHEARD_S = 30.0
"""After the start of a controller: who was alive then and has not said a word never will."""
_TRY_AGAIN_S = 1.0
_RETURN_PATIENCE_S = 15.0
"""Workers look for a new controller several times a second, once they have noticed that the former one is gone. If its
machine lost its power, that takes `engine_wire.addresses.SILENCE_S`."""
_THREADS = 100
"""Operations at a time; most of them wait for something."""


class DetachedAdapter(ClusterAdapter):
    """The adapter of a controller that is an actor.

    Args:
        engine_id: The engine.
        runtime_env: Of every worker.
        surroundings: Of the process that created the engine.
        tls: See `ClusterAdapter`.
    """

    _outlives_process = True

    def __init__(
        self,
        engine_id: str,
        runtime_env: Mapping[str, Any],
        surroundings: Surroundings,
        tls: TLS | None = None,
    ) -> None:
        super().__init__(None, runtime_env, {}, tls)
        self._registry = Registry(engine_id)
        self._incarnation = os.urandom(4).hex()  # a repeated start must not meet the name of one that was cut short
        self._adopted: set[str] = set()  # names of actors
        self._surroundings = surroundings
        self.store: StateStore = self._registry

    def _make_secret(self) -> bytes:
        left = self._registry.get()
        return Secret(os.urandom(SECRET_BYTES)) if left is None else left.secret

    def _announce(self, registry: Registry, control_address: str) -> str:
        registry.put(Entry(self.secret(), "", control_address, self._tls))
        return symbolic(self.engine_id, connection.cluster())

    def _surroundings_now(self) -> Surroundings:
        return self._surroundings

    def _lasting(self, spec: WorkerSpec) -> dict[str, Any]:
        name = f"{_worker_prefix(self.engine_id)}{spec.worker_id}{_INCARNATION}{self._incarnation}"
        return {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}

    async def adopt_worker(self, spec: WorkerSpec) -> None:
        """See `engine.seam.detached.KeepsState.adopt_worker`."""
        running = self._running
        assert running is not None
        actor = await asyncio.to_thread(self._former, spec)
        worker = self._watch(running, spec, actor)
        stranger = self._strangers.hand_over(spec.worker_id)
        if stranger is not None:
            self._introduce(worker, stranger.channel, stranger.process)
            for message in stranger.heard:
                worker.received(stranger.channel, message)
        elif actor is None:
            running.loop.call_soon(self._finish, worker, "died while the engine had no controller")
        else:
            worker.expect_within(_RETURN_PATIENCE_S, "did not come back to the controller")

    def _former(self, spec: WorkerSpec) -> Any:
        """The actor of a worker that a former controller started, or None."""
        import ray

        for name in _worker_names(self.engine_id):
            if _worker_id(self.engine_id, name) == spec.worker_id:
                self._adopted.add(name)
                with contextlib.suppress(ValueError):  # it has died
                    return ray.get_actor(name, namespace=NAMESPACE)
        return None

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """See `engine.seam.adapter.Adapter.start`."""
        await super().start(engine_id, events)
        found = await asyncio.to_thread(_worker_names, engine_id)
        if found:
            asyncio.get_running_loop().call_later(_UNHEARD_S, self._end_unheard, found)

    def _end_unheard(self, found: list[str]) -> None:
        """End actors of a former controller that it had started and never told what to do.

        They said nothing, so they are neither adopted nor sent home, and would hold their resources for ever.
        """
        unheard = [
            name
            for name in found
            if name not in self._adopted and _worker_id(self.engine_id, name) not in self.heard_of
        ]
        if unheard:
            asyncio.get_running_loop().run_in_executor(None, kill_named, unheard)

    def _end_leftovers(self) -> None:
        kill_named(_worker_names(self.engine_id))


class ControllerActor:
    """The actor. Any number of its methods run at a time, each on a thread.

    Args:
        engine_id: The engine.
        http: Pickled `engine.config.HTTPOptions`.
        runtime_env: Of every worker.
        surroundings: Of the process that created the engine.
        tls: See `ClusterAdapter`.
    """

    def __init__(
        self,
        engine_id: str,
        http: bytes,
        runtime_env: dict[str, Any],
        surroundings: tuple[Any, ...],
        tls: TLS | None = None,
    ) -> None:
        import ray

        enter_worker()
        adapter = DetachedAdapter(engine_id, runtime_env, Surroundings(*surroundings), tls)
        self._engine_id = engine_id
        self._controller = DetachedController(engine_id, adapter, pickle.loads(http))
        if ray.get_runtime_context().was_current_actor_reconstructed:
            try:
                self._controller.wait_started()
            except BaseException:
                _log.exception("the controller could not take its engine over, and is started again")
                time.sleep(_TRY_AGAIN_S)
                os._exit(1)

    def identify(self) -> str:
        """The engine's id, once the controller is ready.

        Raises:
            BaseException: What kept it from becoming ready.
        """
        self._controller.wait_started()
        return self._engine_id

    def run(self, operation: bytes) -> bytes:
        """See `engine.control.detached.DetachedController.run`."""
        return self._controller.run(operation)


class RayController:
    """See `engine.seam.detached.RemoteController`.

    Args:
        actor: Ray's handle of the controller.
        engine_id: The engine.
        adapter: Of this process, to be closed in the end.
    """

    def __init__(self, actor: Any, engine_id: str, adapter: ClusterAdapter) -> None:
        self._actor = actor
        self._adapter = adapter
        self.engine_id = engine_id
        self.control_address = symbolic(engine_id, connection.cluster())

    def run(self, name: str, operation: bytes) -> bytes:
        """See `engine.seam.detached.RemoteController.run`."""
        import ray
        from ray import exceptions

        check_connected()
        try:
            outcome: bytes = ray.get(self._actor.run.remote(operation))
        except exceptions.RayActorError as error:
            if not self._adapter.returns(self.control_address):
                raise EngineClosed("the engine was shut down") from error
            if isinstance(error, exceptions.ActorDiedError):
                raise EngineClosed(
                    f"the controller of this engine on {where()} was killed for good, by ray.kill or the like; "
                    "shutdown() ends what is left of the engine"
                ) from error
            raise RetryLater(
                f"the controller of the engine on {where()} died while it was at {name!r}, and may have done it: "
                "see what there is (list_backends, list_endpoints), then repeat it if need be"
            ) from error
        return outcome

    def leave(self, *, ended: bool) -> None:
        """See `engine.seam.detached.RemoteController.leave`."""
        import ray

        if ended and ray.is_initialized():
            kill_actor(self._actor)
            # What a controller that was killed could not end itself; as much of it as can be.
            for step in (
                Registry(self.engine_id).clear,
                lambda: end_courier(self.engine_id),
                lambda: kill_named(_worker_names(self.engine_id)),
            ):
                with contextlib.suppress(Exception):
                    step()
        self._adapter.close()


def create_controller(
    name: str, namespace: str | None, http: HTTPOptions, runtime_env: dict[str, Any], adapter: ClusterAdapter
) -> RemoteController:
    """Start the controller of a new detached engine; returns when it is ready.

    Raises:
        engine.errors.InvalidArgument: The name is taken.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from engine.seam.serialization import dumps_by_value

    engine_id = os.urandom(6).hex()
    options: dict[str, Any] = {"runtime_env": runtime_env} if runtime_env else {}
    try:
        actor = (
            ray.remote(ControllerActor)
            .options(
                name=_actor_name(name),
                namespace=namespace or NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=_THREADS,
                num_cpus=0,
                resources=trifle(),  # else the next line is not heeded
                # Here as long as there is a here: "HeadOnly" means this node, also after the controller's death.
                scheduling_strategy=NodeAffinitySchedulingStrategy(adapter.node_id(), soft=True),
                **options,
            )
            .remote(
                engine_id,
                dumps_by_value(http, "http_options"),
                runtime_env,
                tuple(Surroundings.here()),
                adapter.tls(),
            )
        )
    except ValueError as error:
        raise InvalidArgument(
            f"name={name!r}: there is a detached engine of this name already on {where()}; take it over with "
            f"Engine.connect({name!r}), or shut it down first"
        ) from error
    try:
        ray.get(actor.identify.remote())
    except BaseException:
        kill_actor(actor)
        with contextlib.suppress(EngineError):  # what is raised already says more
            Registry(engine_id).clear()
        raise
    return RayController(actor, engine_id, adapter)


def find_controller(name: str, namespace: str | None, adapter: ClusterAdapter) -> RemoteController:
    """Reach the controller of a detached engine.

    Raises:
        engine.errors.InvalidArgument: There is none of this name, or it does not use TLS though the adapter asks for
            that.
    """
    import ray

    try:
        actor = ray.get_actor(_actor_name(name), namespace=namespace or NAMESPACE)
    except ValueError as error:
        known = ", ".join(repr(other) for other in _names(namespace or NAMESPACE))
        space = f"in namespace {namespace!r} of" if namespace else "on"
        there = f"there are: {known}" if known else "there are none"
        raise InvalidArgument(f"there is no detached engine {name!r} {space} {where()}; {there}") from error
    engine_id = ray.get(actor.identify.remote())
    if adapter.tls() is not None:
        entry = Registry(engine_id).get()
        if entry is not None and entry.tls is None:
            raise InvalidArgument(
                f"tls: the detached engine {name!r} was created without, so its connections are not encrypted: connect "
                "without tls, or create it anew with"
            )
    return RayController(actor, engine_id, adapter)


def _worker_prefix(engine_id: str) -> str:
    return f"engine-{engine_id}-worker-"


def _worker_id(engine_id: str, name: str) -> str:
    """Which worker an actor of this name is."""
    return name.removeprefix(_worker_prefix(engine_id)).rpartition(_INCARNATION)[0]


def _worker_names(engine_id: str) -> list[str]:
    """The names of all actors that are workers of a detached engine."""
    return actor_names(_worker_prefix(engine_id))


_PREFIX = "engine-controller-"


def _actor_name(name: str) -> str:
    return f"{_PREFIX}{name}"


def _names(namespace: str) -> list[str]:
    return sorted(name.removeprefix(_PREFIX) for name in actor_names(_PREFIX, namespace))
