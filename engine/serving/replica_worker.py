"""The entry of a replica's worker: builds the replica from its specification and serves until it is drained."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..calling.connectors import register_connector
from ..config import BackendConfig
from ..seam.control_messages import Drained, StartFailed
from ..seam.serialization import pack_exception
from ..seam.worker import WorkerHost
from .context import ReplicaContext, enter_replica
from .replica import awaited
from .replica_spec import ReplicaSpec
from .user_callable import UserCallable, runs_on_loop

if TYPE_CHECKING:
    from .blocking_replica import BlockingReplica
    from .loop_replica import LoopReplica

__all__ = ["main", "make_replica"]


def main(host: WorkerHost, payload: bytes) -> None:
    """Run one replica (`engine.seam.worker.WorkerSpec.entry`)."""
    try:
        spec: ReplicaSpec = pickle.loads(payload)
        if not spec.shares_process:
            register_connector(spec.engine_id, host.connector())
        definition = pickle.loads(spec.definition)
        on_loop = runs_on_loop(definition[0])
        context = ReplicaContext(
            spec.engine_id, spec.backend_tag, spec.replica_tag, spec.adapter_name, spec.control_address, on_loop
        )
        enter_replica(context, whole_process=not spec.shares_process)
        replica = make_replica(spec.backend_tag, definition, spec.config, host.tell, debug=spec.debug)
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
    definition: tuple[Any, tuple[Any, ...], dict[str, Any]],
    config: BackendConfig,
    tell: Callable[[Any], None],
    *,
    debug: bool,
) -> BlockingReplica | LoopReplica:
    """Construct the user's object and the replica around it; ``reconfigure`` has run when this returns."""
    user = UserCallable(tag, *definition)
    if config.user_config is not None:
        outcome = user.reconfigure(config.user_config)
        if inspect.isawaitable(outcome):
            import asyncio

            asyncio.run(awaited(outcome))
    if user.on_loop:
        from .loop_replica import LoopReplica

        return LoopReplica(tag, user, config, tell, debug=debug)
    from .blocking_replica import BlockingReplica

    return BlockingReplica(tag, user, config, tell, debug=debug)
