"""Addresses of parties on a cluster: which node they are on, and how they are reached from there and from elsewhere.

``ray:ENGINE:NODE:WAYS`` with one or more ways, separated by ``|``: addresses of `engine_wire`, and for controllers
``gcs:HOST:PORT``, the head of the cluster, for processes that are not connected to it. The controller of a detached
engine may move and so has a symbolic address, ``ray-engine:ENGINE:gcs:HOST:PORT``, to be looked up. Pure functions.
"""

from __future__ import annotations

from typing import NamedTuple

from engine.seam.channel import ChannelClosed

__all__ = ["Address", "cluster_of", "engine_of", "is_symbolic", "symbolic"]

_SCHEME = "ray"
_SYMBOLIC = "ray-engine:"
_CLUSTER = "gcs:"


def symbolic(engine_id: str, cluster: str) -> str:
    """The address of a controller that may move.

    Args:
        engine_id: The engine.
        cluster: ``"host:port"`` of the head.
    """
    return f"{_SYMBOLIC}{engine_id}:{_CLUSTER}{cluster}"


def is_symbolic(address: str) -> bool:
    """Whether an address is of that kind."""
    return address.startswith(_SYMBOLIC)


def engine_of(address: str) -> str:
    """The id of the engine that an address of either kind belongs to.

    Raises:
        engine.seam.channel.ChannelClosed: It is no address.
    """
    if is_symbolic(address):
        return address.removeprefix(_SYMBOLIC).partition(":")[0]
    return Address.parse(address).engine_id


def cluster_of(address: str) -> str | None:
    """Where the head of its cluster is, if an address of either kind says so."""
    ways = [address.partition(f":{_CLUSTER}")[2]] if is_symbolic(address) else Address.parse(address).ways
    found = [way.removeprefix(_CLUSTER) for way in ways if is_symbolic(address) or way.startswith(_CLUSTER)]
    return found[0] if found else None


class Address(NamedTuple):
    """Where a party listens.

    Attributes:
        engine_id: Whose secret it wants to see.
        node_id: Ray's id of its node.
        ways: Addresses for `engine_wire.connect`: a Unix socket for its own node, where there is one, and TCP. Perhaps
            also the head of the cluster.
    """

    engine_id: str
    node_id: str
    ways: tuple[str, ...]

    def __str__(self) -> str:
        return ":".join((_SCHEME, self.engine_id, self.node_id, "|".join(self.ways)))

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read what `str` wrote.

        Raises:
            engine.seam.channel.ChannelClosed: It is something else.
        """
        parts = text.split(":", 3)
        if len(parts) != 4 or parts[0] != _SCHEME or not parts[3]:
            raise ChannelClosed(f"{text!r} is not the address of a party on Ray")
        return cls(parts[1], parts[2], tuple(parts[3].split("|")))

    def seen_from(self, node_id: str) -> str:
        """The socket to connect to: the Unix socket on its own node, TCP from any other.

        Raises:
            engine.seam.channel.ChannelClosed: There is neither.
        """
        wanted = ("unix:", "tcp:") if node_id == self.node_id else ("tcp:",)
        for scheme in wanted:
            for way in self.ways:
                if way.startswith(scheme):
                    return way
        raise ChannelClosed(f"{str(self)!r} names no socket to connect to from here")
