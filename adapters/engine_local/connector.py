"""What any process needs to open channels to workers on this machine, and nothing else."""

from __future__ import annotations

from engine_wire import WireConnector

__all__ = ["LocalConnector"]


class LocalConnector(WireConnector):
    """The `engine.seam.connector.Connector` of any process of this machine.

    Args:
        control_address: Where the controller listens.
    """

    name = "local"

    def __reduce__(self) -> tuple[type[LocalConnector], tuple[str]]:
        return (LocalConnector, (self.control_address,))
