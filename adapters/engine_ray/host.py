"""A worker's side of the adapter: the `engine.adapter.WorkerHost` of an actor's process.

Opens the worker's channel to the controller, read by a thread of its own, and the sockets on which it is called: a Unix
socket for callers on its node and TCP on the node's address for all others. When the controller is lost, the engine is
gone, and the process ends at once.
"""

from __future__ import annotations

import os
from typing import Any

from engine.adapter import Adapter, ChannelClosed, ChannelListener, Service
from engine.errors import EngineClosed
from engine_wire import SocketChannel, Undriven, WireWorkerHost, connect
from engine_wire.listening import bind_shared

from .addresses import Address
from .bodies import Bound, Hello, Leaving
from .connector import RayConnector
from .order import Order
from .places import listen_everywhere

__all__ = ["RayHost"]


class RayHost(WireWorkerHost):
    """What a worker's entry function gets.

    Args:
        order: What the worker is to be.

    Raises:
        engine.errors.EngineClosed: The controller is gone.
    """

    log_name = "engine.ray"

    def __init__(self, order: Order) -> None:
        self._order = order
        self._connector = RayConnector(order.control_address, order.secret)
        super().__init__(order.worker_id, self._reach_controller)
        self.tell(Hello(order.worker_id))

    def _reach_controller(self, listener: ChannelListener) -> SocketChannel:
        address = Address.parse(self._order.control_address).seen_from(self._connector.node_id())
        try:
            return connect(address, listener, on_loop=False, poller=Undriven(), secret=self._order.secret)
        except ChannelClosed as error:
            raise EngineClosed(f"the engine that started this worker is gone: {error}") from error

    # -- engine.adapter.WorkerHost -----------------------------------------------------------------------------------

    def adapter(self) -> Adapter:
        """See `engine.adapter.WorkerHost.adapter`."""
        return self._connector

    def listen_sockets(self) -> list[Any]:
        """See `engine.adapter.WorkerHost.listen_sockets`.

        Raises:
            engine.errors.InvalidArgument: The address cannot be bound.
        """
        if self._order.listen is None:
            return []
        sock = bind_shared(self._order.listen, alone=not self._order.shared)
        self.tell(Bound(sock.getsockname()[1]))
        return [sock]

    def serve(self, service: Service) -> None:
        """See `engine.adapter.WorkerHost.serve`."""
        order = self._order
        listening, sockets = listen_everywhere(f"engine-{order.engine_id}-{order.name}")
        address = str(Address(order.engine_id, self._connector.node_id(), sockets))
        self.serve_on(listening, address, service, secret=order.secret)

    # -- the end -------------------------------------------------------------------------------------------------------

    def leave(self, code: int) -> None:
        """Say that the process is about to exit."""
        self.tell(Leaving(code))

    def control_lost(self, reason: str) -> None:
        """The engine is gone."""
        os._exit(1)
