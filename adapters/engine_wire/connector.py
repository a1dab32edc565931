"""What any process needs to open channels to an engine's parties over sockets, and nothing else.

Each process has its own thread for the channels that no loop reads (`engine_wire.drivers.Poller`), started with the
first of them.
"""

from __future__ import annotations

from typing import Any, NoReturn

from engine.config import HTTPOptions
from engine.seam.adapter import AdapterEvents, Listen, Node, RemoteController, StateStore, WorkerSpec

from .drivers import Poller

__all__ = ["WireConnector"]


class WireConnector:
    """An `engine.seam.adapter.Adapter` that only opens channels, for adapters to build on.

    Args:
        control_address: Where the controller listens, if known.
    """

    shares_process = False
    store: StateStore | None = None

    def __init__(self, control_address: str) -> None:
        self.control_address = control_address
        self._poller = Poller()

    def close(self) -> None:
        """See `engine.seam.adapter.Adapter.close`."""
        poller, self._poller = self._poller, Poller()
        poller.close()

    def returns(self, control_address: str) -> bool:
        """See `engine.seam.adapter.Adapter.returns`: by default the controller is its engine."""
        return False

    def detach(self, name: str, http: HTTPOptions | None) -> RemoteController:
        """Not possible here."""
        _not_here()

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """Not possible here."""
        _not_here()

    async def start_worker(self, spec: WorkerSpec) -> None:
        """Not possible here."""
        _not_here()

    async def adopt_worker(self, spec: WorkerSpec) -> None:
        """Not possible here."""
        _not_here()

    def tell(self, worker_id: str, body: Any) -> None:
        """Not possible here."""
        _not_here()

    def kill_worker(self, worker_id: str) -> None:
        """Not possible here."""
        _not_here()

    def unplaced(self, worker_id: str) -> str | None:
        """Not possible here."""
        _not_here()

    def bound(self, listen: Listen, node_id: str) -> Listen:
        """Not possible here."""
        _not_here()

    def nodes(self) -> tuple[Node, ...]:
        """Not possible here."""
        _not_here()

    def watch_nodes(self) -> None:
        """Not possible here."""
        _not_here()

    async def stop(self) -> None:
        """Not possible here."""
        _not_here()


def _not_here() -> NoReturn:
    raise RuntimeError("a connector only opens channels: workers are started by the process that has the controller")
