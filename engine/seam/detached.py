"""Engines that outlive their creator: what an adapter offers that can run one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ..config import HTTPOptions
from .worker import WorkerSpec

__all__ = ["Detachable", "KeepsState", "RemoteController", "StateStore", "store_of"]


class StateStore(Protocol):
    """Where the state of a controller outlives the controller: rows of bytes under names."""

    def save(self, name: str, state: bytes) -> None:
        """Keep a row, in the place of the one of this name."""

    def remove(self, name: str) -> None:
        """Drop a row (idempotent)."""

    def load(self) -> dict[str, bytes]:
        """Every row."""


class RemoteController(Protocol):
    """The controller of a detached engine, as another process reaches it."""

    engine_id: str
    control_address: str

    def run(self, name: str, operation: bytes) -> bytes:
        """Pass an operation on to `engine.control.detached.DetachedController.run`, and wait.

        Args:
            name: The operation's, for people.
            operation: Pickled.

        Raises:
            engine.errors.EngineClosed: The engine was shut down.
            engine.errors.RetryLater: The controller died meanwhile.
        """

    def leave(self, *, ended: bool) -> None:
        """Release what reaching it took; remove the controller's process if the engine has ended."""


@runtime_checkable
class Detachable(Protocol):
    """An adapter on which an engine can outlive the program that created it."""

    def detach(self, name: str, http: HTTPOptions | None) -> RemoteController:
        """Reach the controller of a detached engine.

        Args:
            name: The engine's.
            http: How a new engine is reached over HTTP; None to find one that is there.

        Raises:
            engine.errors.InvalidArgument: The name is taken, or unknown.
        """


@runtime_checkable
class KeepsState(Protocol):
    """An adapter whose controller may be started again, and then goes on where the former one stopped."""

    store: StateStore
    """Where the controller in this process keeps its state. There from the constructor on."""

    async def adopt_worker(self, spec: WorkerSpec) -> None:
        """Watch a worker that a former controller of the engine started.

        It says again what it said when it was ready; or its exit is reported. ``spec.payload`` is not needed.
        """


def store_of(adapter: object) -> StateStore | None:
    """Where the controller in this process is to keep its state; None if its engine ends with the process."""
    return getattr(adapter, "store", None) if isinstance(adapter, KeepsState) else None
