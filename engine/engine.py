"""The engine: what an application creates. It checks what it is asked for, and has it done by a controller."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, overload

from .calling.client import Client
from .calling.connectors import register_connector, unregister_connector
from .calling.handle import AsyncHandle, Handle, make_handle
from .calling.ref import Ref
from .calling.ref import get as get_results
from .calling.ref import wait as wait_for
from .calling.traffic import validate_proportion, validate_weights
from .config import BackendConfig, HTTPOptions
from .control.arguments import also_named, private_copy
from .control.checks import adapter_of, check_name, checked_call_methods, checked_methods, detachable, plan_of
from .control.operations import (
    CreateBackend,
    CreateEndpoint,
    DeleteBackend,
    DeleteEndpoint,
    GetBackendConfig,
    GetOptions,
    ListBackends,
    ListEndpoints,
    Operation,
    Runs,
    SetTraffic,
    ShadowTraffic,
    Statistics,
    UpdateBackend,
    UpdateBackendConfig,
)
from .control.runner import Runner
from .errors import EndpointNotFound, EngineClosed, InvalidArgument
from .seam.adapter import Adapter
from .seam.connector import PlatformRefs
from .seam.detached import RemoteController
from .seam.error_text import all_there_are
from .seam.importable import note_modules
from .seam.may_block import check_may_block, check_not_own_thread, running_asyncio_loop
from .seam.patched import check_unpatched
from .seam.serialization import dumps_by_value
from .seam.snapshot import EndpointEntry
from .seam.workplace import surrounding_engine, why_inert

if TYPE_CHECKING:
    from .control.inert_runner import InertRunner
    from .control.vigil import Vigil

T = TypeVar("T")

__all__ = ["Engine"]

_GRACE_S = 5.0
"""What calls in flight get when an engine shuts down."""
_SERVICE_GRACE_S = 20.0
"""The same where it has served until it was told to end: as long as backends grant by default."""


class Engine:
    """Runs functions and classes as replicas, and routes calls to them.

    Every method may be called from any thread, blocks until what it asks for is done, and raises otherwise. Use it as a
    context manager, or call `shutdown`; at interpreter exit it shuts down by itself, as `shutdown` does. A detached
    engine goes on when its creator leaves, in these ways or any other, and ends by `shutdown` alone.

    Whoever is interrupted in a method (by Ctrl-C, say) can repeat it at once: what was created is taken back, a change
    too, and what was to be deleted is.

    A module may create one where it is imported. The replicas of its backends import that module, too: there the engine
    is inert and stands for the one that runs them.

    Args:
        backend: Where replicas run: ``"local"`` (processes on this machine), ``"ray"`` (actors on a Ray cluster),
            ``"inline"`` (threads of this process, for tests and debugging), the name of an installed plug-in, or an
            adapter instance.
        http_options: A dict or `HTTPOptions`; see there.
        name: Names the engine in logs and reprs, and a detached one for `connect`.
        detached: Let the engine outlive this process. Needs a name, and an adapter that can: on Ray.

    Raises:
        errors.InvalidArgument: An option is wrong, there is no such adapter, or the name of a detached engine is taken.
    """

    _inert: InertRunner | None = None

    def __init__(
        self,
        backend: str | Adapter = "local",
        *,
        http_options: HTTPOptions | Mapping[str, Any] | None = None,
        name: str | None = None,
        detached: bool = False,
    ) -> None:
        if name is not None and not isinstance(name, str):
            raise InvalidArgument(f"name must be a str or None, not {name!r}")
        if not isinstance(detached, bool):
            raise InvalidArgument(f"detached must be True or False, not {detached!r}")
        if detached and not name:
            raise InvalidArgument(f"detached=True needs a name to connect to later, not name={name!r}")
        self._http = HTTPOptions.of(http_options)
        if why := why_inert():
            self._stand_in(name, why)
            return
        self._validate_server_options()
        check_unpatched()
        adapter = adapter_of(backend)
        if detached:
            assert name is not None
            self._attach(name, adapter, detachable(adapter, name).detach(name, self._http))
            return
        self._set_up(name, adapter, os.urandom(6).hex())
        self._client = Client(self._id, adapter)
        self._client.register()
        try:
            self._runner: Runs = Runner(self._id, adapter, self._client, self._http)
        except BaseException:  # there is no thread to be had
            self._client.close()
            self._unhook()
            raise

    @classmethod
    def connect(cls, name: str, *, backend: str | Adapter = "ray") -> Engine:
        """Take over a detached engine that is there, whoever created it.

        Args:
            name: What it was created with.
            backend: The adapter it was created with.

        Raises:
            errors.InvalidArgument: There is no detached engine of this name, or the adapter has none.
        """
        check_name(name, "name")
        engine = cls.__new__(cls)
        if why := why_inert():
            engine._http = HTTPOptions()
            engine._stand_in(name, why)
            return engine
        check_unpatched()
        adapter = adapter_of(backend)
        engine._attach(name, adapter, detachable(adapter, name).detach(name, None))
        try:
            engine._http = engine._runner.run(GetOptions())
        except BaseException:
            engine._leave(0.0)
            raise
        return engine

    def _attach(self, name: str, adapter: Adapter, controller: RemoteController) -> None:
        from .control.remote_runner import RemoteRunner

        self._set_up(name, adapter, controller.engine_id)
        try:
            self._client = Client.subscribe(self._id, adapter, controller.control_address)
        except BaseException:
            self._unhook()
            controller.leave(ended=False)
            raise
        self._runner = RemoteRunner(controller, self._client)

    def _set_up(self, name: str | None, adapter: Adapter, engine_id: str) -> None:
        self._name_it(name, engine_id)
        self._adapter: Adapter = adapter
        register_connector(self._id, adapter)
        atexit.register(self._at_exit)

    def _stand_in(self, name: str | None, why: str) -> None:
        """Run nothing: see `engine.seam.workplace`."""
        from .control.inert_runner import InertRunner

        self._name_it(name, "")
        self._runner = self._inert = InertRunner(why, self._http)

    def _name_it(self, name: str | None, engine_id: str) -> None:
        self.name = name
        self._id = engine_id
        self._pid = os.getpid()
        self._closed = False
        self._mounted: Any = None  # what `asgi` gives
        self._vigil: Vigil | None = None  # the main thread keeps it, in `serve_forever`
        self._shutdown_lock = threading.RLock()  # a signal handler may shut down what is shutting down

    def _unhook(self) -> None:
        """Take back what `_set_up` left with this process."""
        unregister_connector(self._id)
        atexit.unregister(self._at_exit)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an engine stays in the process that created it: in a backend, get a handle by "
            "engine.get_replica_context().get_handle(name), and to other processes pass a handle"
        )

    def __repr__(self) -> str:
        if self._inert is not None:
            return f"<Engine {self.name or 'of this worker'}, inert>"
        state = "closed" if self._closed else "open"
        return f"<Engine {self.name or self._id} on {self._adapter.name} {state}>"

    # -- backends ------------------------------------------------------------------------------------------------------

    @overload
    def create_backend(
        self,
        tag: str,
        func_or_class: Callable[..., Any],
        *init_args: Any,
        config: BackendConfig | Mapping[str, Any] | None = None,
        ray_actor_options: Mapping[str, Any] | None = None,
        replace: bool = False,
        **init_kwargs: Any,
    ) -> None: ...
    @overload
    def create_backend(
        self,
        *,
        backend_tag: str,
        func_or_class: Callable[..., Any],
        config: BackendConfig | Mapping[str, Any] | None = None,
        ray_actor_options: Mapping[str, Any] | None = None,
        replace: bool = False,
        **init_kwargs: Any,
    ) -> None: ...

    @also_named(tag="backend_tag")
    def create_backend(
        self,
        tag: str,
        func_or_class: Callable[..., Any],
        *init_args: Any,
        config: BackendConfig | Mapping[str, Any] | None = None,
        ray_actor_options: Mapping[str, Any] | None = None,
        replace: bool = False,
        **init_kwargs: Any,
    ) -> None:
        """Serve a function or a class under a tag; returns when its replicas are ready.

        Args:
            tag: Names the backend.
            func_or_class: Called with one request for each call. A class is constructed once in each replica; an object
                is pickled, and each replica gets a copy.
            init_args: For the class.
            config: A dict or `BackendConfig`; see there.
            ray_actor_options: What a replica needs: ``num_cpus``, ``num_gpus``, ``runtime_env={"env_vars": ...}``.
            replace: If there is a backend of this tag, put this one in its place, as `update_backend` does, but with
                all that is given here and nothing kept. Without one of this tag, it is created.
            init_kwargs: For the class.

        Raises:
            errors.InvalidArgument: An argument is wrong, or the tag is taken (until `delete_backend` has returned).
            errors.NotSerializable: The callable or an argument cannot be pickled; the message says which part.
            errors.Superseded: Somebody updated the backend that was to be replaced, before this was done.
            errors.BackendStartError: A replica died before it was ready, or took too long.
            errors.ResourcesUnavailable: The resources are not free.
            BaseException: What the constructor raised, with its traceback as cause.
        """
        self._check_open()
        if self._inert is not None:
            return self._inert.skip()
        check_name(tag, "tag")
        if not isinstance(replace, bool):
            raise InvalidArgument(f"replace must be True or False, not {replace!r}")
        plan = plan_of(tag, func_or_class, init_args, init_kwargs, config, ray_actor_options)
        plan.check(plan.config)
        self._control(CreateBackend(plan, replace=replace))

    def update_backend(
        self,
        tag: str,
        func_or_class: Callable[..., Any],
        *init_args: Any,
        config: BackendConfig | Mapping[str, Any] | None = None,
        ray_actor_options: Mapping[str, Any] | None = None,
        **init_kwargs: Any,
    ) -> None:
        """Serve something else under a tag, a new version; returns when no replica of the former one is left.

        No call fails of it, and callers need not know: new replicas are ready before old ones leave service, as far as
        ``max_surge`` and ``max_unavailable`` of the configuration let them, and old ones finish what they hold within
        ``graceful_shutdown_timeout_s``. Calls that are made after this has returned are answered by the new version.

        If it raises, the former version serves as before; what of it had made room for new replicas is started again.

        Args:
            tag: The backend.
            func_or_class: As for `create_backend`.
            init_args: For the class. None are kept from the former version.
            config: Fields of the configuration to change; those of a `BackendConfig` that were set in it.
            ray_actor_options: What a replica needs; None keeps what the former version was given.
            init_kwargs: For the class.

        Raises:
            errors.InvalidArgument: The backend is unknown, an argument is wrong, or the new version does not fit the
                configuration that is kept (a ``user_config`` and no ``reconfigure``, say).
            errors.NotSerializable: The callable or an argument cannot be pickled; the message says which part.
            errors.Superseded: Somebody updated the backend anew before this was done.
            errors.BackendStartError: A new replica died before it was ready, took too long, or several died soon after.
            errors.ResourcesUnavailable: The resources are not free.
            BaseException: What the constructor raised, with its traceback as cause.
        """
        self._check_open()
        if self._inert is not None:
            return self._inert.skip()
        check_name(tag, "tag")
        plan = plan_of(tag, func_or_class, init_args, init_kwargs, config, ray_actor_options)
        self._control(UpdateBackend(plan, keep_resources=ray_actor_options is None))

    @overload
    def update_backend_config(self, tag: str, config: BackendConfig | Mapping[str, Any]) -> None: ...
    @overload
    def update_backend_config(self, tag: str, *, config_options: BackendConfig | Mapping[str, Any]) -> None: ...
    @overload
    def update_backend_config(self, *, backend_tag: str, config_options: BackendConfig | Mapping[str, Any]) -> None: ...

    @also_named(tag="backend_tag", config="config_options")
    def update_backend_config(self, tag: str, config: BackendConfig | Mapping[str, Any]) -> None:
        """Change fields of a backend's configuration; returns when every replica has taken the change.

        A `BackendConfig` changes the fields that were set in it, and leaves the others as they are.

        If it raises, the former configuration rules; but if it was a new replica that did not start, all of the change
        does except the number of replicas. A replica that takes longer than ``reconfigure_timeout_s`` is replaced: it
        finishes what it holds within ``graceful_shutdown_timeout_s`` while another one takes its place.

        Raises:
            errors.InvalidArgument: The backend is unknown, or a field is wrong.
            BaseException: What ``reconfigure`` or a new replica's constructor raised.
        """
        self._check_open()
        check_name(tag, "tag")
        self._control(UpdateBackendConfig(tag, private_copy(tag, config)))

    @overload
    def get_backend_config(self, tag: str) -> BackendConfig: ...
    @overload
    def get_backend_config(self, *, backend_tag: str) -> BackendConfig: ...

    @also_named(tag="backend_tag")
    def get_backend_config(self, tag: str) -> BackendConfig:
        """A backend's configuration as it rules now.

        Raises:
            errors.InvalidArgument: The backend is unknown.
        """
        self._check_open()
        check_name(tag, "tag")
        return private_copy(tag, self._control(GetBackendConfig(tag)))

    def list_backends(self) -> dict[str, BackendConfig]:
        """The configurations of all backends by tag."""
        return {tag: private_copy(tag, config) for tag, config in self._control(ListBackends()).items()}

    @overload
    def delete_backend(self, tag: str, force: bool = False) -> None: ...
    @overload
    def delete_backend(self, *, backend_tag: str, force: bool = False) -> None: ...

    @also_named(tag="backend_tag")
    def delete_backend(self, tag: str, force: bool = False) -> None:
        """End a backend that no endpoint uses; its replicas finish what they hold first.

        If that is being done already, for another thread or for a call that was interrupted, this waits for it.

        Args:
            tag: The backend.
            force: End the replicas at once instead, and break off any other control call that waits for them.

        Raises:
            errors.InvalidArgument: The backend is unknown, an endpoint uses it, or ``force`` is wrong.
        """
        self._check_open()
        check_name(tag, "tag")
        if not isinstance(force, bool):
            raise InvalidArgument(f"force must be True or False, not {force!r}")
        self._control(DeleteBackend(tag, force))

    # -- endpoints -----------------------------------------------------------------------------------------------------

    @overload
    def create_endpoint(
        self,
        name: str,
        *,
        backend: str,
        route: str | None = None,
        methods: Sequence[str] = ("GET",),
        call_methods: Sequence[str] | None = None,
    ) -> None: ...
    @overload
    def create_endpoint(
        self,
        *,
        endpoint_name: str,
        backend: str,
        route: str | None = None,
        methods: Sequence[str] = ("GET",),
        call_methods: Sequence[str] | None = None,
    ) -> None: ...

    @also_named(name="endpoint_name")
    def create_endpoint(
        self,
        name: str,
        *,
        backend: str,
        route: str | None = None,
        methods: Sequence[str] = ("GET",),
        call_methods: Sequence[str] | None = None,
    ) -> None:
        """Name a backend for callers; a route is served by every ingress when this returns.

        Args:
            name: Names the endpoint.
            backend: The tag that gets all of its traffic for now.
            route: An HTTP path, literal or with ``{name}`` segments as Starlette has them, or None.
            methods: The HTTP verbs it answers to.
            call_methods: The methods beside ``__call__`` that HTTP clients may choose with ``X-SERVE-CALL-METHOD``;
                None for every public method, ``[]`` for none. Handles may call every public method in any case.

        Raises:
            errors.InvalidArgument: An argument is wrong, the name or route is taken, the backend is unknown, or the
                address of ``http_options`` cannot be bound.
        """
        self._check_open()
        check_name(name, "name")
        if not isinstance(backend, str):
            raise InvalidArgument(f"backend must be the tag of a backend, not {backend!r}")
        if route is not None:
            from .http.routes import validate_route

            validate_route(route)
        entry = EndpointEntry(
            name, route, checked_methods(methods), ((backend, 1.0),), call_methods=checked_call_methods(call_methods)
        )
        self._control(CreateEndpoint(entry))

    @overload
    def delete_endpoint(self, name: str) -> None: ...
    @overload
    def delete_endpoint(self, *, endpoint: str) -> None: ...

    @also_named(name="endpoint")
    def delete_endpoint(self, name: str) -> None:
        """Remove an endpoint and its route; calls in flight finish.

        Raises:
            errors.InvalidArgument: It is unknown.
        """
        self._check_open()
        check_name(name, "name")
        self._control(DeleteEndpoint(name))

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """Every endpoint by name: its ``route``, ``methods``, ``call_methods``, ``traffic`` and ``shadows``."""
        entries = self._control(ListEndpoints())
        return {
            name: {
                "route": entry.route,
                "methods": list(entry.methods),
                "call_methods": None if entry.call_methods is None else list(entry.call_methods),
                "traffic": dict(entry.traffic),
                "shadows": dict(entry.shadows),
            }
            for name, entry in entries.items()
        }

    @overload
    def set_traffic(self, name: str, weights: Mapping[str, float]) -> None: ...
    @overload
    def set_traffic(self, name: str, *, traffic_policy_dictionary: Mapping[str, float]) -> None: ...
    @overload
    def set_traffic(self, *, endpoint_name: str, traffic_policy_dictionary: Mapping[str, float]) -> None: ...

    @also_named(name="endpoint_name", weights="traffic_policy_dictionary")
    def set_traffic(self, name: str, weights: Mapping[str, float]) -> None:
        """Split an endpoint's calls over backends; every call made after this returns follows the new split.

        Args:
            name: The endpoint.
            weights: Backend tag to weight; each at least 0, together 1.

        Raises:
            errors.InvalidArgument: The endpoint or a backend is unknown, or a weight is wrong.
        """
        self._check_open()
        check_name(name, "name")
        self._control(SetTraffic(name, validate_weights(weights)))

    @overload
    def shadow_traffic(self, name: str, tag: str, proportion: float) -> None: ...
    @overload
    def shadow_traffic(self, name: str, *, backend_tag: str, proportion: float) -> None: ...
    @overload
    def shadow_traffic(self, *, endpoint_name: str, backend_tag: str, proportion: float) -> None: ...

    @also_named(name="endpoint_name", tag="backend_tag")
    def shadow_traffic(self, name: str, tag: str, proportion: float) -> None:
        """Send copies of an endpoint's calls to a backend, off the callers' path; 0 ends it.

        Args:
            name: The endpoint.
            tag: The backend that gets the copies. What it answers is dropped.
            proportion: The share of calls to copy, from 0 to 1.

        Raises:
            errors.InvalidArgument: The endpoint or the backend is unknown, or the proportion is wrong.
        """
        self._check_open()
        check_name(name, "name")
        check_name(tag, "tag")
        self._control(ShadowTraffic(name, tag, validate_proportion(proportion)))

    # -- calls ---------------------------------------------------------------------------------------------------------

    @overload
    def get_handle(self, name: str, sync: Literal[True] = True, *, missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, name: str, sync: Literal[False], *, missing_ok: bool = False) -> AsyncHandle: ...
    @overload
    def get_handle(self, name: str, sync: bool, *, missing_ok: bool = False) -> Handle | AsyncHandle: ...
    @overload
    def get_handle(self, *, endpoint_name: str, sync: Literal[True] = True, missing_ok: bool = False) -> Handle: ...
    @overload
    def get_handle(self, *, endpoint_name: str, sync: Literal[False], missing_ok: bool = False) -> AsyncHandle: ...

    @also_named(name="endpoint_name")
    def get_handle(self, name: str, sync: bool = True, *, missing_ok: bool = False) -> Handle | AsyncHandle:
        """A handle to an endpoint: for blocking code, or with ``sync=False`` for coroutines.

        Args:
            name: The endpoint.
            sync: Whether the handle is for blocking code.
            missing_ok: The endpoint need not be there yet. A call that is made before it is fails with
                `errors.EndpointNotFound`.

        Raises:
            errors.EndpointNotFound: There is no such endpoint.
        """
        self._check_open()
        check_name(name, "name")
        if self._inert is not None:
            return make_handle("", "", "", name, sync=sync)
        if not missing_ok and name not in self._client.snapshot.endpoints:
            known = all_there_are("endpoints", self._client.snapshot.endpoints)
            raise EndpointNotFound(f"there is no endpoint {name!r}; {known}")
        note_modules()
        handle = make_handle(self._id, self._adapter.name, self._adapter.control_address, name, sync=sync)
        return handle.bound_to(self._client)

    @overload
    def get(self, ref: Ref[T], timeout: float | None = None) -> T: ...
    @overload
    def get(self, ref: Sequence[Ref[T]], timeout: float | None = None) -> list[T]: ...
    @overload
    def get(self, ref: Any, timeout: float | None = None) -> Any: ...

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        """The result of a ref, or the list of the results of several.

        Args:
            ref: One ref or a list of them, as ``remote()`` gave them.
            timeout: Seconds for all of them together, or None.

        Raises:
            errors.DeadlineExceeded: They did not come in time.
            BaseException: Whatever a call raised.
        """
        return get_results(ref, timeout, self._refs())

    def wait(self, refs: Sequence[T], num_returns: int = 1, timeout: float | None = None) -> tuple[list[T], list[T]]:
        """Wait until some refs have settled: ``(ready, not_ready)``, at most ``num_returns`` of them in ``ready``."""
        return wait_for(refs, num_returns, timeout, self._refs())

    def _refs(self) -> PlatformRefs | None:
        if self._inert is None:
            return self._client.refs
        client = Client.find(surrounding_engine().engine_id)
        return client.refs if client is not None else None

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    @property
    def http_url(self) -> str | None:
        """The base URL of the ingress, or None until the first endpoint with a route (and where there is none)."""
        self._check_open()
        return self._runner.http_url()

    @property
    def asgi(self) -> Any:
        """The ingress as an ASGI application, to mount in another one (on an asyncio server). Always the same one."""
        self._check_open()
        if self._inert is not None:
            return self._inert.asgi
        if self._mounted is not None:
            return self._mounted
        from .http.guard import wrap_middlewares
        from .http.ingress import Ingress

        http = self._http
        ingress = Ingress(
            self._client,
            max_body_bytes=http.max_body_bytes,
            max_bodies_bytes=http.max_bodies_bytes,
            request_timeout_s=http.request_timeout_s,
            stall_timeout_s=http.stall_timeout_s,
            debug=http.debug,
            tells_details=bool(http.status_details),  # who can reach it is for the other application to say
            priority_header=http.priority_header,
        )
        self._mounted = wrap_middlewares(ingress, http.middlewares, debug=http.debug)
        return self._mounted

    # -- life ----------------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """What runs, and what this process's callers counted and hold.

        Returns:
            ``{"backends": {tag: {"state": its state, "version": what rules, "replicas": {replica_tag: stage of its
            life}, "details": {replica_tag: {"state": that stage, "since_s": seconds, "pid": process id or None,
            "version": what it runs}}, "failures": tries in a row, "notice": text or None, "last_error": text or None,
            "last_error_s": seconds ago, "queued": calls, "queued_bytes": of their arguments, "in_flight": calls,
            "queued_copies": calls, "dropped_copies": calls}},
            "endpoints": {name: {"calls": made so far}}, "ingresses": {id: {"node": address, "url": base URL, and what
            "details" have but "version"}}}``.

            The stages are ``starting``, ``ready`` and ``draining``. A backend is ``starting`` while it has fewer
            replicas than it should, ``failing`` if the last try to start one failed, ``unhealthy`` if it has none and
            the last tries all failed, so that calls get `errors.NoReplica`, ``ready``, or ``draining`` once it is being
            deleted. Calls over HTTP are those of the process that serves them, this one for `asgi` and inline.
        """
        return self._control(Statistics([] if self._inert is not None else self._client.statistics()))

    def shutdown(self, timeout_s: float = _GRACE_S) -> None:
        """Stop taking calls, let those in flight finish, end every worker and release everything (idempotent).

        Args:
            timeout_s: Seconds that calls in flight get; then their workers are killed and the calls fail. An interrupt
                (Ctrl-C) while this waits has the same effect.

        Raises:
            errors.WouldBlock: Called in the engine's own thread, in which some callbacks run.
            errors.EngineError: A worker cannot be ended, or the adapter does not stop: half a minute later it is left.
        """
        check_not_own_thread("shutdown()")
        self._close(lambda: self._runner.stop(timeout_s))

    def serve_forever(self, timeout_s: float = _SERVICE_GRACE_S) -> int | None:
        """Wait until the program is sent SIGTERM or SIGINT (Ctrl-C), then end the engine as leaving ``with`` does.

        For the main thread of a program that is there to serve. A second signal leaves calls in flight no more time.
        Meanwhile the engine handles these two signals; when this returns or raises, the former handlers are back.

        Args:
            timeout_s: As for `shutdown`.

        Returns:
            The number of the signal; None if another thread shut the engine down.

        Raises:
            errors.EngineError: Not called in the main thread; or see `shutdown`.
            errors.WouldBlock: An event loop runs in it.
            errors.EngineClosed: The engine was shut down before.
        """
        from .control.vigil import Vigil

        self._check_open()
        if self._inert is not None:
            return None
        vigil = Vigil(self._runner.hurry)
        self._runner.wait_started()
        with vigil:
            try:
                self._vigil = vigil
                number = None if self._closed else vigil.wait()
                self._leave(timeout_s)
            finally:
                self._vigil = None
        return number

    def _close(self, finish: Callable[[], None]) -> None:
        if self._pid != os.getpid():
            return  # a forked copy owns nothing
        with self._shutdown_lock:
            if self._closed:
                return
            self._closed = True
            if self._vigil is not None:
                self._vigil.end()
            loop = running_asyncio_loop()
            if loop is not None and self._inert is None:
                self._client.stands_still(loop)
            try:
                finish()
            finally:
                self._unhook()

    def _leave(self, timeout_s: float) -> None:
        """Shut down; or, if the engine is detached, let go of it."""
        self._close(lambda: self._runner.leave(timeout_s))

    def __enter__(self) -> Engine:
        """Start; errors of the adapter show here, and then nothing of the engine is left."""
        try:
            self._runner.wait_started()
        except BaseException:
            self.shutdown(0.0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Shut down; a detached engine is only let go.

        If an error is on its way, that is at once. What is no `Exception` (`SystemExit`, `KeyboardInterrupt`, the
        cancellation of a task) ends a program in an orderly manner, so calls in flight may finish; a second Ctrl-C ends
        them.
        """
        self._leave(_grace_s(kind))

    async def __aenter__(self) -> Engine:
        """Start without blocking the event loop."""
        from anyio import to_thread

        await to_thread.run_sync(self.__enter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """As `__exit__`, without blocking the event loop.

        A task that is cancelled while it waits here, by asyncio's own means, is one that was interrupted: that is how
        `asyncio.run` passes Ctrl-C on.
        """
        from anyio import CancelScope, get_cancelled_exc_class, to_thread

        with CancelScope(shield=True):
            try:
                await to_thread.run_sync(self._leave, _grace_s(kind))
            except get_cancelled_exc_class():
                self._runner.hurry()
                await to_thread.run_sync(self._leave, 0.0)  # waits for the thread that is at it, if it has begun
                raise

    def _at_exit(self) -> None:
        if self._closed and self._pid == os.getpid():
            self._runner.hurry()  # a thread that nobody waits for is at it
        self._leave(_GRACE_S)

    def _check_open(self) -> None:
        if self._pid != os.getpid() and self._inert is None:
            raise EngineClosed(
                "this engine belongs to the process that this one was forked from: create an engine here, "
                "or pass a handle on pickled"
            )
        if self._closed:
            if self._inert is None:
                self._client.check_open()  # which knows why
            raise EngineClosed("the engine is being shut down")

    def _control(self, operation: Operation[T]) -> T:
        """Have the controller do something, and wait for it."""
        self._check_open()
        check_may_block("a control call of the engine")
        self._runner.wait_started()
        return self._runner.run(operation)

    def _validate_server_options(self) -> None:
        if self._http.server_options:
            from .seam.ingress_server import load_server

            load_server("hypercorn").validate(self._http)
        if self._http.middlewares:
            dumps_by_value(list(self._http.middlewares), "http_options: middlewares")


def _grace_s(kind: type[BaseException] | None) -> float:
    """How long calls in flight may go on if this is how a ``with`` block was left."""
    return 0.0 if kind is not None and issubclass(kind, Exception) else _GRACE_S
