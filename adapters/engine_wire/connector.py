"""What any process needs to open channels to an engine's parties over sockets, and nothing else.

Each process has its own thread for the channels that no loop reads (`engine_wire.drivers.Poller`), started with the
first of them.
"""

from __future__ import annotations

from .drivers import Poller

__all__ = ["WireConnector"]


class WireConnector:
    """The part of an `engine.seam.connector.Connector` that all socket-based adapters share.

    Args:
        control_address: Where the controller listens, if known.
    """

    def __init__(self, control_address: str) -> None:
        self.control_address = control_address
        self._poller = Poller()

    def close(self) -> None:
        """See `engine.seam.connector.Connector.close`."""
        poller, self._poller = self._poller, Poller()
        poller.close()
