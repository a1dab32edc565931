"""The control channel to a worker that inherits what it needs from the engine's process, and both its ends.

It is a socketpair, so the socket itself is proof of the peer. The engine's end (`ControlChannel`) belongs to the
controller's loop. The worker's end is read by the control thread of its `ChildHost`. When the worker dies, however that
happens, the engine's end is lost, after the worker's last word. When the engine dies, the control thread reads
end-of-file and ends the process at once, whatever its main thread is doing.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.seam.channel import Channel, ChannelClosed
from engine.seam.connector import Connector
from engine.seam.messages import Control, Message
from engine.seam.service import Service

from .addresses import listen_unix
from .channel import SocketChannel
from .drivers import LoopDriver, Undriven
from .worker_host import WireWorkerHost

if TYPE_CHECKING:
    import asyncio

__all__ = ["ChildHost", "ControlChannel"]


class ControlChannel:
    """The engine's end.

    Args:
        sock: This end of the socketpair; owned from now on.
        said: Gets each `Control` body that the worker sends.
        lost: Told once, after the worker's last word, that its end is closed, and why in a phrase for people.
        loop: Reads it.
    """

    def __init__(
        self,
        sock: socket.socket,
        said: Callable[[Any], None],
        lost: Callable[[str], object],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._said = said
        self._lost = lost
        self._channel = SocketChannel(sock, self, LoopDriver(loop), greet=False)
        self._channel.watch()

    def __repr__(self) -> str:
        return f"<ControlChannel {self._channel}>"

    def tell(self, body: Any) -> None:
        """Send a `Control` body; does nothing when the worker is gone."""
        with contextlib.suppress(ChannelClosed):
            self._channel.send(Control(body))

    def read_rest(self) -> None:
        """Deliver all that has arrived, and the end if that has, too; waits for nothing."""
        self._channel.read_rest()

    def close(self) -> None:
        """Close it without a word to ``lost`` (idempotent)."""
        self._channel.close()

    # -- engine.seam.channel.ChannelListener -------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
        if isinstance(message, Control):
            self._said(message.body)

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`."""
        self._lost(reason)


class ChildHost(WireWorkerHost):
    """What the entry function of such a worker gets: an `engine.seam.worker.WorkerHost`.

    Args:
        worker_id: Of this worker.
        control: Descriptor of its end of the socketpair.
        listening: Descriptors of the bound sockets of `engine.seam.worker.WorkerSpec.listen`.
        path: Where `serve` opens the worker's Unix socket.
        connector: Makes calls from here.
    """

    def __init__(self, worker_id: str, control: int, listening: Sequence[int], path: str, connector: Connector) -> None:
        super().__init__(
            worker_id, lambda host: SocketChannel(socket.socket(fileno=control), host, Undriven(), greet=False)
        )
        self._sockets = [socket.socket(fileno=descriptor) for descriptor in listening]
        self._path = path
        self._connector = connector

    def control_lost(self, reason: str) -> None:
        """End the process: its engine is gone. See `engine_wire.WireWorkerHost.control_lost`."""
        os._exit(1)

    # -- engine.seam.worker.WorkerHost -------------------------------------------------------------------------------

    def connector(self) -> Connector:
        """See `engine.seam.worker.WorkerHost.connector`."""
        return self._connector

    def listen_sockets(self) -> list[Any]:
        """See `engine.seam.worker.WorkerHost.listen_sockets`."""
        return list(self._sockets)

    def serve(self, service: Service) -> None:
        """See `engine.seam.worker.WorkerHost.serve`."""
        self.serve_on([listen_unix(self._path)], f"unix:{self._path}", service)
