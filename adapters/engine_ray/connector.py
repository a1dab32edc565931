"""What any process of the cluster needs to open channels to an engine's parties, and to start calls as object refs.

A process that was handed the engine's secret uses it; any other one, say a Ray task that was passed a handle, looks it
up in the cluster's control plane, for which it must be connected to Ray or is connected by the first channel.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from engine.adapter import AdapterEvents, Channel, ChannelClosed, ChannelListener, Listen, Node, WorkerSpec
from engine_wire import Poller, connect

from . import connection
from .addresses import Address
from .registry import Registry

if TYPE_CHECKING:
    from .refs import RayRefs

__all__ = ["RayConnector"]


class RayConnector:
    """An `engine.adapter.Adapter` that only opens channels.

    Args:
        control_address: Where the controller listens, if known.
        secret: The engine's, if known.
    """

    name = "ray"
    shares_process = False

    def __init__(self, control_address: str = "", secret: bytes | None = None) -> None:
        self.control_address = control_address
        self._secret = secret
        self._poller = Poller()
        self._node_id = ""
        self._joined = False  # whether this connector holds the process's connection to Ray
        self._lock = threading.Lock()  # guards the refs while they are made
        self._refs: RayRefs | None = None

    @property
    def refs(self) -> RayRefs:
        """See `engine.adapter.Adapter.refs`."""
        with self._lock:
            if self._refs is None:
                from .refs import RayRefs

                self._refs = RayRefs(self)
            return self._refs

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> Channel:
        """See `engine.adapter.Adapter.open_channel`."""
        party = Address.parse(address)
        if self._secret is None:
            self._find_secret(party)
        return connect(
            party.seen_from(self.node_id()), listener, on_loop=on_loop, poller=self._poller, secret=self._secret
        )

    def close(self) -> None:
        """See `engine.adapter.Adapter.close`."""
        poller, self._poller = self._poller, Poller()
        poller.close()
        if self._joined:
            self._joined = False
            connection.leave()

    def node_id(self) -> str:
        """Ray's id of the node that this process runs on."""
        if not self._node_id:
            import ray

            self._node_id = ray.get_runtime_context().get_node_id()
        return self._node_id

    def secret(self) -> bytes:
        """The engine's secret; known once a channel was opened."""
        assert self._secret is not None
        return self._secret

    def _find_secret(self, party: Address) -> None:
        self._joined = connection.join(None, {}) or self._joined
        entry = Registry(party.engine_id).get()
        if entry is None:
            raise ChannelClosed("the cluster that this process is connected to knows of no such engine")
        self._secret = entry.secret

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
