"""What any process needs to open channels to workers on this machine, and nothing else."""

from __future__ import annotations

from engine.seam.channel import Channel, ChannelListener
from engine_wire import WireConnector, connect

__all__ = ["LocalConnector"]


class LocalConnector(WireConnector):
    """The `engine.seam.connector.Connector` of any process of this machine.

    Args:
        control_address: Where the controller listens.
    """

    name = "local"

    def __reduce__(self) -> tuple[type[LocalConnector], tuple[str]]:
        return (LocalConnector, (self.control_address,))

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> Channel:
        """See `engine.seam.connector.Connector.open_channel`."""
        return connect(address, listener, on_loop=on_loop, poller=self._poller)
