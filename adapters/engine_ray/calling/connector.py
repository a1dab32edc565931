"""What any process of the cluster needs to open channels to an engine's parties.

A process that was handed the engine's secret uses it; any other one, say a Ray task that was passed a handle, looks it
up in the cluster's control plane, for which it must be connected to Ray or is connected by the first channel. There it
also finds where the controller of a detached engine is now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.seam.channel import Channel, ChannelClosed, ChannelListener
from engine_wire import WireConnector, connect, notice_silence

from ..link import connection
from ..link.registry import Entry, Registry
from .addresses import Address, cluster_of, engine_of, is_symbolic

if TYPE_CHECKING:
    from engine_wire.tls import TLS

__all__ = ["RayConnector"]


class RayConnector(WireConnector):
    """What opens channels.

    Args:
        control_address: Where the controller listens, if known.
        secret: The engine's, if known.
        tls: Who this process is to other nodes, if the engine uses TLS between them. Known with the secret.
    """

    name = "ray"

    def __init__(self, control_address: str = "", secret: bytes | None = None, tls: TLS | None = None) -> None:
        super().__init__(control_address)
        self._secret = secret
        self._tls = tls
        self._node_id = ""
        self._joined = False  # whether this connector holds the process's connection to Ray
        self._closed = False

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> Channel:
        """See `engine.seam.connector.Connector.open_channel`."""
        poller = self._poller  # of now: looking an address up takes a while, and `close` may come in between
        party = self.locate(address)
        to_controller = address == self.control_address or is_symbolic(address)
        channel = connect(
            party.seen_from(self.node_id()),
            listener,
            on_loop=on_loop,
            poller=poller,
            secret=self.secret(),
            calls=not to_controller,
            tls=self._tls,
        )
        if to_controller:
            notice_silence(channel.sock)
        return channel

    def locate(self, address: str) -> Address:
        """Where a party is now.

        Raises:
            engine.seam.channel.ChannelClosed: Nobody is, as far as the cluster knows.
        """
        if is_symbolic(address):
            entry = self._look_up(address)
            self.control_address = self.control_address or address
            self._secret, self._tls = entry.secret, entry.tls
            return Address.parse(entry.control_address)
        party = Address.parse(address)
        if self._secret is None:
            entry = self._look_up(address)
            self._secret, self._tls = entry.secret, entry.tls
            self.control_address = self.control_address or address
        return party

    def returns(self, control_address: str) -> bool:
        """See `engine.seam.connector.MayReturn.returns`: true of a detached engine until it is shut down."""
        if not is_symbolic(control_address):
            return False
        import ray

        try:
            return Registry(engine_of(control_address)).get() is not None
        except Exception:  # this process has left the cluster; or its control plane is away, or silent, for a while
            return bool(ray.is_initialized())

    def close(self) -> None:
        """See `engine.seam.connector.Connector.close`."""
        super().close()
        self._closed = True
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

    def tls(self) -> TLS | None:
        """Who this process is to other nodes, if the engine uses TLS between them; known with the secret."""
        return self._tls

    def _look_up(self, address: str) -> Entry:
        if self._closed:  # nobody would take a connection to Ray back
            raise ChannelClosed("this process has let go of the engine")
        try:
            if not self._joined:
                self._joined = connection.join(cluster_of(address), {}, start=False)
            entry = Registry(engine_of(address)).get()
        except Exception as error:  # the cluster is gone, or cannot be reached now
            raise ChannelClosed(f"cannot ask the cluster for the engine: {error}") from error
        if entry is None:
            raise ChannelClosed("its cluster knows of no such engine any more")
        return entry
