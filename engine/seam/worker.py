"""Workers: what an adapter is told to start, what it says of their ends, and what it gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .connector import Connector
from .resources import Resources
from .service import Service

__all__ = ["Listen", "WorkerExit", "WorkerHost", "WorkerSpec"]


@dataclass(frozen=True)
class Listen:
    """A public address that a group of workers shares.

    Attributes:
        host: A name or address of this machine.
        port: 0 picks a free port.
        backlog: Connections the kernel holds until a worker accepts them.
    """

    host: str
    port: int
    backlog: int = 1024


@dataclass(frozen=True)
class WorkerSpec:
    """Everything an adapter must know to start a worker.

    Attributes:
        worker_id: Unique within the engine.
        name: For people: log records, process titles.
        entry: ``"module:function"``, called in the worker as ``function(host, payload)`` with a `WorkerHost`.
        payload: Opaque to the adapter.
        preload: Modules worth importing before the worker exists, where the adapter can share them between workers.
        resources: What the worker needs.
        node_id: The node to start on, or None for any.
        listen: The public address the worker serves, if it does. Equal values share one bound address.
    """

    worker_id: str
    name: str
    entry: str
    payload: bytes
    preload: tuple[str, ...] = ()
    resources: Resources = field(default_factory=Resources)
    node_id: str | None = None
    listen: Listen | None = None


@dataclass(frozen=True)
class WorkerExit:
    """The death of a worker. ``reason`` is a phrase for people, e.g. "was killed by SIGKILL"."""

    worker_id: str
    reason: str


class WorkerHost(Protocol):
    """What a worker's entry function gets: its side of the adapter."""

    worker_id: str

    def tell(self, body: Any) -> None:
        """Send a `Control` body to the controller, from any thread."""

    def connector(self) -> Connector:
        """What makes calls from here; one and the same for each asking."""

    def listen_sockets(self) -> list[Any]:
        """The bound sockets of `WorkerSpec.listen`."""

    def on_control(self, handler: Callable[[Any], None]) -> None:
        """Pass every `Control` body from the controller to ``handler``, on the worker's control thread.

        Bodies that came before are kept for it.
        """

    def serve(self, service: Service) -> None:
        """Open the worker's address, tell the controller `Ready`, and run the service on the calling thread.

        Returns when the service is done (`Service.finished`).
        """
