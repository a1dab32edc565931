"""The entry of a replica's worker: builds the replica from its specification and serves until it is drained."""

from __future__ import annotations

import contextvars
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from ..calling.connectors import register_connector
from ..seam.control_messages import Drained, Started, StartFailed
from ..seam.may_block import may_block_loop
from ..seam.rebuilding import in_main_module, in_origin
from ..seam.serialization import loads_during_imports, pack_exception_briefly
from ..seam.worker import WorkerHost
from ..seam.workplace import Surrounding, enter_engine, is_worker
from .context import ReplicaContext, enter_replica
from .replica_spec import ReplicaSpec
from .user_callable import UserCallable, runs_on_loop

if TYPE_CHECKING:
    from .blocking_replica import BlockingReplica
    from .loop_replica import LoopReplica

__all__ = ["main"]

_Definition: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A function or class, and what to construct the class with."""


def main(host: WorkerHost, payload: bytes) -> None:
    """Run one replica (`engine.seam.worker.WorkerSpec.entry`)."""
    host.tell(Started(os.getpid()))
    try:
        spec: ReplicaSpec = _loads(payload, own_process=is_worker())
        if not spec.shares_process:
            # Before the first import of the user's: it may create the engine that runs this replica.
            enter_engine(Surrounding(spec.engine_id, spec.adapter_name, spec.control_address))
            register_connector(spec.engine_id, host.connector())
        definition = _loads(spec.definition, own_process=not spec.shares_process)
        on_loop = runs_on_loop(definition[0])
        context = ReplicaContext(
            spec.engine_id, spec.backend_tag, spec.replica_tag, spec.adapter_name, spec.control_address, on_loop
        )
        enter_replica(context, whole_process=not spec.shares_process)
        construct = _construct_on_loop if on_loop else _construct
        replica, variables = construct(spec, definition, host.tell)
        del definition  # what is in it belongs to the user's object, whose end must be its end
        if spec.shares_process:
            replica.loads = loads_during_imports
    except BaseException as error:
        host.tell(StartFailed(pack_exception_briefly(error)))
        return
    variables.run(_live, host, replica)


def _loads(data: bytes, *, own_process: bool) -> Any:
    with in_main_module() if own_process else in_origin():
        return loads_during_imports(data)


def _live(host: WorkerHost, replica: BlockingReplica | LoopReplica) -> None:
    host.on_control(replica.control)
    try:
        host.serve(replica)
        host.tell(Drained())
        replica.leave()
    finally:
        replica.close()
        if replica.event_loop is not None:
            from ..seam.event_loop import close_event_loop

            close_event_loop(replica.event_loop)


def _construct(
    spec: ReplicaSpec, definition: _Definition, tell: Callable[[Any], None]
) -> tuple[BlockingReplica, contextvars.Context]:
    """Construct the user's object and the replica around it; it is configured and healthy when this returns.

    Returns:
        The replica, and the context variables that user code has set, for its calls to see.
    """
    from .blocking_replica import BlockingReplica

    user = UserCallable(spec.backend_tag, *definition)
    replica = BlockingReplica(
        spec.backend_tag,
        user,
        spec.config,
        tell,
        debug=spec.debug,
        replica_tag=spec.replica_tag,
        shares_process=spec.shares_process,
    )
    if not spec.shares_process:
        replica.interrupter.take_process()
    try:
        if spec.config.user_config is not None:
            replica.configure(spec.config.user_config)
        replica.first_check()
    except BaseException:
        replica.close()
        raise
    return replica, contextvars.copy_context()


def _construct_on_loop(
    spec: ReplicaSpec, definition: _Definition, tell: Callable[[Any], None]
) -> tuple[LoopReplica, contextvars.Context]:
    """As `_construct`, within the event loop that will run the replica: user code finds it running."""
    from ..seam.event_loop import close_event_loop, new_event_loop
    from .loop_replica import LoopReplica

    async def construct() -> tuple[UserCallable, contextvars.Context]:
        with may_block_loop():
            user = UserCallable(spec.backend_tag, *definition)
        if spec.config.user_config is not None:
            outcome = user.reconfigure(spec.config.user_config)
            if inspect.isawaitable(outcome):
                await outcome
        outcome = user.check_health()
        if inspect.isawaitable(outcome):
            await outcome
        return user, contextvars.copy_context()

    loop = new_event_loop(shares_process=spec.shares_process)
    try:
        user, variables = loop.run_until_complete(construct())
        replica = LoopReplica(
            spec.backend_tag,
            user,
            spec.config,
            tell,
            debug=spec.debug,
            replica_tag=spec.replica_tag,
            shares_process=spec.shares_process,
            event_loop=loop,
        )
    except BaseException:
        close_event_loop(loop)
        raise
    return replica, variables
