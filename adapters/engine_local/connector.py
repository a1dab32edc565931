"""What any process needs to open channels to workers on this machine, and nothing else."""

from __future__ import annotations

from engine.seam.adapter import Channel, ChannelListener, PlatformRefs
from engine_wire import WireConnector, connect

__all__ = ["LocalConnector"]


class LocalConnector(WireConnector):
    """An `engine.seam.adapter.Adapter` that only opens channels.

    Args:
        control_address: Where the controller listens.
    """

    name = "local"
    refs: PlatformRefs | None = None

    def __reduce__(self) -> tuple[type[LocalConnector], tuple[str]]:
        return (LocalConnector, (self.control_address,))

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> Channel:
        """See `engine.seam.adapter.Adapter.open_channel`."""
        return connect(address, listener, on_loop=on_loop, poller=self._poller)
