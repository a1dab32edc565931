"""What ``Engine(backend="ray")`` selects: the adapter of an application's process."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from engine.config import HTTPOptions
from engine.errors import InvalidArgument
from engine.seam.detached import RemoteController
from engine_wire.tls import TLS, identity_of, make_tls

from .controlling.cluster import ClusterAdapter
from .controlling.detached import create_controller, find_controller
from .link import connection

__all__ = ["RayAdapter"]


class RayAdapter(ClusterAdapter):
    """Runs replicas as actors on a Ray cluster: ``Engine(backend="ray")``.

    Args:
        address: The cluster to connect to, as ``"host:port"``. By default the one this process is connected to; or else
            the one that runs on this machine or that ``RAY_ADDRESS`` names; or else a new one on this machine, which is
            stopped when the last engine of this process shuts down. Other clusters are left as they are.
        namespace: Ray's namespace of this process, if it is the engine that connects it; and of the names of detached
            engines, which are found only by adapters with the same one.
        runtime_env: Of every worker; that of ``ray_actor_options`` is laid over it key by key.
        tls: Encrypt what the engine's own processes send each other between nodes. True makes a certificate for this
            engine, which its processes show each other; for that the package ``cryptography`` is needed here. Or
            `engine_ray.TLS` names certificates of your own. What Ray itself sends is for Ray to encrypt.
        init_kwargs: Further arguments of ``ray.init``, if it is the engine that connects.

    Raises:
        engine.errors.InvalidArgument: Ray is not installed, an argument has a wrong type, or a certificate cannot be
            read, or made.
    """

    def __init__(
        self,
        address: str | None = None,
        namespace: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        tls: bool | TLS = False,
        **init_kwargs: Any,
    ) -> None:
        if find_spec("ray") is None:
            raise InvalidArgument('backend="ray" needs Ray, which is not installed: pip install "engineroom[ray]"')
        # At the end of the interpreter, what was registered last runs first. Ray's import registers Ray's way out,
        # which must come after that of the engine: and the engine is only about to be made.
        importlib.import_module("ray")
        for name, value in (("address", address), ("namespace", namespace)):
            if value is not None and (not isinstance(value, str) or not value):
                raise InvalidArgument(f"RayAdapter: {name} must be a str or None, not {value!r}")
        if address is not None and address.startswith("ray://"):
            raise InvalidArgument(
                f"RayAdapter: address={address!r} is that of a Ray client server, which channels cannot pass: run the "
                "application on a node of the cluster and give the address of its head, as in '10.0.0.5:6379'"
            )
        if runtime_env is not None and not isinstance(runtime_env, Mapping):
            raise InvalidArgument(f"RayAdapter: runtime_env must be a dict or None, not {runtime_env!r}")
        names = {"namespace": namespace} if namespace is not None else {}
        super().__init__(address, runtime_env or {}, {**init_kwargs, **names}, _checked(tls))
        self._namespace = namespace

    def detach(self, name: str, http: HTTPOptions | None) -> RemoteController:
        """See `engine.seam.detached.Detachable.detach`."""
        if self._process:
            raise InvalidArgument("this adapter already serves an engine: give each engine one of its own")
        if self._address == "local":
            raise InvalidArgument(f"RayAdapter: address='local' is for engines that end with this program. {_LASTING}")
        self._joined = connection.join(self._address, self._init_kwargs, start=False)
        try:
            if connection.started_here():
                raise InvalidArgument(f"the Ray of this program was started for another engine. {_LASTING}")
            if http is None:
                controller = find_controller(name, self._namespace, self)
            else:
                controller = create_controller(name, self._namespace, http, self._runtime_env, self)
        except BaseException:
            if self._joined:
                self._joined = False
                connection.leave()
            raise
        self._process = os.getpid()
        connection.announce(repr(name))
        return controller


def _checked(tls: object) -> TLS | None:
    if isinstance(tls, TLS):
        identity_of(tls)
        return tls
    if not isinstance(tls, bool):
        raise InvalidArgument(f"RayAdapter: tls must be True, False or an engine_ray.TLS, not {type(tls).__name__}")
    return make_tls() if tls else None


_LASTING = "A detached engine needs a Ray cluster that outlives the program: start one with `ray start --head`"
