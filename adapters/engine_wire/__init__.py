"""Channels over sockets, shared by the adapters whose workers are other processes."""

from .channel import Driver, SocketChannel
from .drivers import LoopDriver, Poller, Undriven
from .hosts import Acceptor, BlockingHost, LoopHost, connect, listen_unix, new_event_loop

__all__ = [
    "Acceptor",
    "BlockingHost",
    "Driver",
    "LoopDriver",
    "LoopHost",
    "Poller",
    "SocketChannel",
    "Undriven",
    "connect",
    "listen_unix",
    "new_event_loop",
]
