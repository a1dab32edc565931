"""The entry of a replica's worker: builds the replica from its specification and serves until it is drained."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from .adapter import WorkerHost
from .client import register_connector
from .config import BackendConfig
from .context import ReplicaContext, enter_replica
from .control import Drained, StartFailed
from .replica import make_replica
from .serialization import pack_exception
from .user_callable import is_blocking

__all__ = ["ReplicaSpec", "main"]


@dataclass(frozen=True)
class ReplicaSpec:
    """Everything a replica is made of.

    Attributes:
        target: The pickled ``(function or class, init_args, init_kwargs)``.
        shares_process: Other replicas live in the same process.
    """

    engine_id: str
    adapter_name: str
    control_address: str
    backend_tag: str
    replica_tag: str
    target: bytes
    config: BackendConfig
    debug: bool
    shares_process: bool


def main(host: WorkerHost, payload: bytes) -> None:
    """Run one replica (`engine.adapter.WorkerSpec.entry`)."""
    try:
        spec: ReplicaSpec = pickle.loads(payload)
        if not spec.shares_process:
            register_connector(spec.engine_id, host.adapter())
        target = pickle.loads(spec.target)
        on_loop = not is_blocking(target[0])
        context = ReplicaContext(
            spec.engine_id, spec.backend_tag, spec.replica_tag, spec.adapter_name, spec.control_address, on_loop
        )
        enter_replica(context, whole_process=not spec.shares_process)
        replica = make_replica(spec.backend_tag, target, spec.config, host.tell, debug=spec.debug)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        host.tell(StartFailed(pack_exception(error)))
        return
    host.on_control(replica.control)
    try:
        host.serve(replica)
    finally:
        replica.close()
    host.tell(Drained())
