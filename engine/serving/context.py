"""Where user code runs: in which replica, if any.

A worker process runs one replica, so a process-wide context is right there for every thread user code starts. Replicas
of the inline adapter share a process; each has a context variable in its own thread.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from ..errors import EngineError
from ..seam.workplace import enter_engine_here

if TYPE_CHECKING:
    from ..calling.handle import AsyncHandle, Handle

__all__ = ["ReplicaContext", "enter_replica", "get_replica_context"]

_CONTROL_CALLS = (
    "create_backend",
    "create_endpoint",
    "delete_backend",
    "delete_endpoint",
    "get_backend_config",
    "list_backends",
    "list_endpoints",
    "set_traffic",
    "shadow_traffic",
    "shutdown",
    "statistics",
    "update_backend_config",
)


@dataclass(frozen=True)
class ReplicaContext:
    """What a backend can know of where it runs.

    Attributes:
        engine_id: The engine that runs it.
        backend_tag: The backend it is a copy of.
        replica_tag: The copy, e.g. ``"model#3"``.
    """

    engine_id: str
    backend_tag: str
    replica_tag: str
    _adapter_name: str
    _control_address: str
    _on_loop: bool

    def __getattr__(self, name: str) -> Any:
        if name in _CONTROL_CALLS:
            raise AttributeError(
                f"a backend cannot make control calls such as {name}(), which may have to wait for the very replica "
                "that makes them: make them in the program that has the engine (or has taken it over by Engine.connect)"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @overload
    def get_handle(self, endpoint: str, sync: Literal[True]) -> Handle: ...
    @overload
    def get_handle(self, endpoint: str, sync: Literal[False]) -> AsyncHandle: ...
    @overload
    def get_handle(self, endpoint: str, sync: None = None) -> Any: ...

    def get_handle(self, endpoint: str, sync: bool | None = None) -> Handle | AsyncHandle:
        """A handle to another endpoint of the same engine.

        Args:
            endpoint: Its name; checked when the handle is first used.
            sync: The kind of handle; by default the kind that suits this backend: sync for a plain callable, async
                for one with ``async def`` methods.
        """
        from ..calling.handle import make_handle

        wants_sync = not self._on_loop if sync is None else sync
        return make_handle(self.engine_id, self._adapter_name, self._control_address, endpoint, sync=wants_sync)


_context: ContextVar[ReplicaContext | None] = ContextVar("engine_replica", default=None)
_process_context: ReplicaContext | None = None


def enter_replica(context: ReplicaContext, *, whole_process: bool) -> None:
    """Declare that this thread (or the whole process) belongs to a replica from now on."""
    global _process_context
    _context.set(context)
    if whole_process:
        _process_context = context
    else:
        enter_engine_here(context.engine_id)


def get_replica_context() -> ReplicaContext:
    """The context of the replica this code runs in.

    Raises:
        errors.EngineError: Called outside a replica.
    """
    context = _context.get() or _process_context
    if context is None:
        raise EngineError("get_replica_context() was called outside a backend: only a replica has a context")
    return context
