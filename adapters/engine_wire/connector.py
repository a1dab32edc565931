"""What any process needs to open channels to an engine's parties over sockets, and nothing else.

Each process has its own thread for the channels that no loop reads (`engine_wire.drivers.Poller`), started with the
first of them.
"""

from __future__ import annotations

from engine.seam.channel import Channel, ChannelListener

from .connecting import connect
from .drivers import Poller

__all__ = ["WireConnector"]


class WireConnector:
    """An `engine.seam.connector.Connector` of socket-based adapters: each gives it a name of its own.

    Args:
        control_address: Where the controller listens, if known.
    """

    name: str

    def __init__(self, control_address: str = "") -> None:
        self.control_address = control_address
        self._poller = Poller()

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> Channel:
        """See `engine.seam.connector.Connector.open_channel`; asks for no proof of who is there."""
        calls = address != self.control_address
        return connect(address, listener, on_loop=on_loop, poller=self._poller, calls=calls)

    def close(self) -> None:
        """See `engine.seam.connector.Connector.close`."""
        poller, self._poller = self._poller, Poller()
        poller.close()
