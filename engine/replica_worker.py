"""The entry of a replica's worker: builds the replica from its specification and serves until it is drained."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import Callable
from typing import Any

from .adapter import WorkerHost
from .blocking_replica import BlockingReplica
from .client import register_connector
from .config import BackendConfig
from .context import ReplicaContext, enter_replica
from .control import Drained, StartFailed
from .loop_replica import LoopReplica
from .replica import awaited
from .replica_spec import ReplicaSpec
from .serialization import pack_exception
from .user_callable import UserCallable, is_blocking

__all__ = ["main", "make_replica"]


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


def make_replica(
    tag: str,
    target: tuple[Any, tuple[Any, ...], dict[str, Any]],
    config: BackendConfig,
    tell: Callable[[Any], None],
    *,
    debug: bool,
) -> BlockingReplica | LoopReplica:
    """Construct the user's object and the replica around it; ``reconfigure`` has run when this returns."""
    user = UserCallable(tag, *target)
    if config.user_config is not None:
        outcome = user.reconfigure(config.user_config)
        if inspect.isawaitable(outcome):
            asyncio.run(awaited(outcome))
    kind = LoopReplica if user.on_loop else BlockingReplica
    return kind(tag, user, config, tell, debug=debug)
