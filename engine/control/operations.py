"""What an application can have its controller do: each operation as a value, so that it can travel.

A controller in this process performs it on its loop (`engine.control.runner`); one in another process gets it pickled
(`engine.control.remote_runner`, `engine.control.detached`). What an operation takes, gives and raises is that of the
controller's method, or of the runner's for `Stop`.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..config import BackendConfig, HTTPOptions
from ..seam.snapshot import EndpointEntry
from .backend_plan import BackendPlan

if TYPE_CHECKING:
    from .controller import Controller

__all__ = [
    "REPEATABLE",
    "CreateBackend",
    "CreateEndpoint",
    "DeleteBackend",
    "DeleteEndpoint",
    "GetBackendConfig",
    "GetOptions",
    "GetURL",
    "GiveUp",
    "Keyed",
    "ListBackends",
    "ListEndpoints",
    "Operation",
    "Runs",
    "SetTraffic",
    "ShadowTraffic",
    "Statistics",
    "Stop",
    "UpdateBackend",
    "UpdateBackendConfig",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Operation(Protocol[T_co]):
    """Something that a controller does; ``T_co`` is what comes of it."""

    def perform(self, controller: Controller) -> Coroutine[Any, Any, T_co]:
        """Do it, on the controller's loop."""
        ...


class CreateBackend:
    """See `Controller.create_backend`."""

    def __init__(self, plan: BackendPlan, *, replace: bool = False) -> None:
        self.plan = plan
        self.replace = replace

    async def perform(self, controller: Controller) -> None:
        """See `Operation.perform`."""
        await controller.create_backend(self.plan, replace=self.replace)


class UpdateBackend:
    """See `Controller.update_backend`."""

    def __init__(self, plan: BackendPlan, *, keep_resources: bool) -> None:
        self.plan = plan
        self.keep_resources = keep_resources

    async def perform(self, controller: Controller) -> None:
        """See `Operation.perform`."""
        await controller.update_backend(self.plan, keep_resources=self.keep_resources)


class UpdateBackendConfig:
    """See `Controller.update_backend_config`."""

    def __init__(self, tag: str, changes: BackendConfig | Mapping[str, Any]) -> None:
        self.tag = tag
        self.changes = changes

    async def perform(self, controller: Controller) -> None:
        """See `Operation.perform`."""
        await controller.update_backend_config(self.tag, self.changes)


class GetBackendConfig:
    """See `Controller.get_backend_config`."""

    def __init__(self, tag: str) -> None:
        self.tag = tag

    async def perform(self, controller: Controller) -> BackendConfig:
        """See `Operation.perform`."""
        return await controller.get_backend_config(self.tag)


class ListBackends:
    """See `Controller.list_backends`."""

    async def perform(self, controller: Controller) -> dict[str, BackendConfig]:
        """See `Operation.perform`."""
        return await controller.list_backends()


class DeleteBackend:
    """See `Controller.delete_backend`."""

    def __init__(self, tag: str, force: bool) -> None:
        self.tag = tag
        self.force = force

    async def perform(self, controller: Controller) -> None:
        """See `Operation.perform`."""
        await controller.delete_backend(self.tag, force=self.force)


class CreateEndpoint:
    """See `Controller.create_endpoint`."""

    def __init__(self, entry: EndpointEntry) -> None:
        self.entry = entry

    async def perform(self, controller: Controller) -> None:
        """See `Operation.perform`."""
        await controller.create_endpoint(self.entry)


class DeleteEndpoint:
    """See `Controller.delete_endpoint`."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def perform(self, controller: Controller) -> None:
        """See `Operation.perform`."""
        await controller.delete_endpoint(self.name)


class SetTraffic:
    """See `Controller.set_traffic`."""

    def __init__(self, name: str, weights: dict[str, float]) -> None:
        self.name = name
        self.weights = weights

    async def perform(self, controller: Controller) -> None:
        """See `Operation.perform`."""
        await controller.set_traffic(self.name, self.weights)


class ShadowTraffic:
    """See `Controller.shadow_traffic`."""

    def __init__(self, name: str, tag: str, proportion: float) -> None:
        self.name = name
        self.tag = tag
        self.proportion = proportion

    async def perform(self, controller: Controller) -> None:
        """See `Operation.perform`."""
        await controller.shadow_traffic(self.name, self.tag, self.proportion)


class ListEndpoints:
    """See `Controller.list_endpoints`."""

    async def perform(self, controller: Controller) -> dict[str, EndpointEntry]:
        """See `Operation.perform`."""
        return await controller.list_endpoints()


class Statistics:
    """See `Controller.statistics`."""

    def __init__(self, counts: list[dict[str, Any]]) -> None:
        self.counts = counts

    async def perform(self, controller: Controller) -> dict[str, Any]:
        """See `Operation.perform`."""
        return await controller.statistics(self.counts)


class GetURL:
    """See `Controller.http_url`."""

    async def perform(self, controller: Controller) -> str | None:
        """See `Operation.perform`."""
        return controller.http_url()


class GetOptions:
    """See `Controller.http_options`."""

    async def perform(self, controller: Controller) -> HTTPOptions:
        """See `Operation.perform`."""
        return controller.http_options


class Keyed:
    """An operation that whoever asked for it from another process can give up, by its key."""

    def __init__(self, key: str, operation: Operation[Any]) -> None:
        self.key = key
        self.operation = operation


class GiveUp:
    """Give an operation up: whoever waited for it was interrupted."""

    def __init__(self, key: str) -> None:
        self.key = key


class Stop:
    """Shut the engine down: works also where the controller could not start, so it is its runner that does it."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s


REPEATABLE = (
    GetBackendConfig,
    GetOptions,
    GetURL,
    ListBackends,
    ListEndpoints,
    SetTraffic,
    ShadowTraffic,
    Statistics,
    Stop,
)
"""Those that may be done again if the controller died and nobody knows whether it had done them."""


class Runs(Protocol):
    """Has a controller do something, from any thread, wherever the controller is."""

    def wait_started(self) -> None:
        """Wait for the controller; raises what kept it from starting."""

    def run(self, operation: Operation[T]) -> T:
        """Have the controller do something and wait for it; this process then sees what it changed.

        Whoever is interrupted while he waits has it given up: it is taken back or, where that is impossible, seen
        through, and whatever is asked next finds it so.

        Raises:
            errors.EngineClosed: The engine was shut down meanwhile.
            errors.WouldBlock: This is the thread that would have to do it.
            errors.RetryLater: The controller died meanwhile, and may or may not have done it.
            BaseException: What the operation raised.
        """
        ...

    def http_url(self) -> str | None:
        """The ingress's base URL, once it runs."""

    def stop(self, grace_s: float) -> None:
        """Shut the engine down; calls in flight get ``grace_s`` seconds (idempotent)."""

    def hurry(self) -> None:
        """Leave calls in flight no more time: another thread is stopping the engine, or about to. Does not block."""

    def leave(self, grace_s: float) -> None:
        """Be done with the engine: shut it down, or let go of it if it is to go on."""
