"""What any process needs to open channels to workers on this machine, and nothing else.

A connector is picklable; each process has its own thread for the channels that no loop reads (`engine_wire.Poller`),
started with the first of them.
"""

from __future__ import annotations

from typing import Any

from engine.adapter import AdapterEvents, Channel, ChannelListener, Listen, Node, PlatformRefs, WorkerSpec
from engine_wire import Poller, connect

__all__ = ["LocalConnector"]


class LocalConnector:
    """An `engine.adapter.Adapter` that only opens channels.

    Args:
        control_address: Where the controller listens.
    """

    name = "local"
    shares_process = False
    refs: PlatformRefs | None = None

    def __init__(self, control_address: str) -> None:
        self.control_address = control_address
        self._poller = Poller()

    def __reduce__(self) -> tuple[type[LocalConnector], tuple[str]]:
        return (LocalConnector, (self.control_address,))

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> Channel:
        """See `engine.adapter.Adapter.open_channel`."""
        return connect(address, listener, on_loop=on_loop, poller=self._poller)

    def close(self) -> None:
        """See `engine.adapter.Adapter.close`."""
        poller, self._poller = self._poller, Poller()
        poller.close()

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """Not possible here."""
        raise _not_here()

    async def start_worker(self, spec: WorkerSpec) -> None:
        """Not possible here."""
        raise _not_here()

    def tell(self, worker_id: str, body: Any) -> None:
        """Not possible here."""
        raise _not_here()

    def kill_worker(self, worker_id: str) -> None:
        """Not possible here."""
        raise _not_here()

    def unplaced(self, worker_id: str) -> str | None:
        """Not possible here."""
        raise _not_here()

    def bound(self, listen: Listen) -> Listen:
        """Not possible here."""
        raise _not_here()

    def nodes(self) -> tuple[Node, ...]:
        """Not possible here."""
        raise _not_here()

    def watch_nodes(self) -> None:
        """Not possible here."""
        raise _not_here()

    async def stop(self) -> None:
        """Not possible here."""
        raise _not_here()


def _not_here() -> RuntimeError:
    return RuntimeError("a connector only opens channels: workers are started by the process that created the engine")
