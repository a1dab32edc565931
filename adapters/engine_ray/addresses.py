"""Addresses of parties on a cluster: which node they are on, and how they are reached from there and from elsewhere.

``ray:ENGINE:NODE:SOCKETS`` with one or more addresses of `engine_wire` in SOCKETS, separated by ``|``. The controller
of a detached engine may move and so has a symbolic address: ``ray-engine:ENGINE``, to be looked up. Pure functions.
"""

from __future__ import annotations

from typing import NamedTuple

from engine.adapter import ChannelClosed

__all__ = ["Address", "engine_of", "is_symbolic", "symbolic"]

_SCHEME = "ray"
_SYMBOLIC = "ray-engine:"


def symbolic(engine_id: str) -> str:
    """The address of a controller that may move."""
    return f"{_SYMBOLIC}{engine_id}"


def is_symbolic(address: str) -> bool:
    """Whether an address is of that kind."""
    return address.startswith(_SYMBOLIC)


def engine_of(address: str) -> str:
    """The id of the engine that an address of either kind belongs to."""
    return address.removeprefix(_SYMBOLIC) if is_symbolic(address) else Address.parse(address).engine_id


class Address(NamedTuple):
    """Where a party listens.

    Attributes:
        engine_id: Whose secret it wants to see.
        node_id: Ray's id of its node.
        sockets: Addresses for `engine_wire.connect`: a Unix socket for its own node, where there is one, and TCP.
    """

    engine_id: str
    node_id: str
    sockets: tuple[str, ...]

    def __str__(self) -> str:
        return ":".join((_SCHEME, self.engine_id, self.node_id, "|".join(self.sockets)))

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read what `str` wrote.

        Raises:
            engine.adapter.ChannelClosed: It is something else.
        """
        parts = text.split(":", 3)
        if len(parts) != 4 or parts[0] != _SCHEME or not parts[3]:
            raise ChannelClosed(f"{text!r} is not the address of a party on Ray")
        return cls(parts[1], parts[2], tuple(parts[3].split("|")))

    def seen_from(self, node_id: str) -> str:
        """The socket to connect to: the Unix socket on its own node, TCP from any other."""
        wanted = "unix:" if node_id == self.node_id else "tcp:"
        for socket in self.sockets:
            if socket.startswith(wanted):
                return socket
        return self.sockets[-1]
