"""Channels over sockets, shared by the adapters whose workers are other processes."""

from .acceptor import Acceptor
from .addresses import listen_tcp, listen_unix, notice_silence, process_behind, tcp_address
from .channel import Driver, SocketChannel
from .child import ChildHost, ControlChannel
from .connecting import connect
from .connector import WireConnector
from .drivers import LoopDriver, Poller, Undriven
from .service_loops import AsyncServiceLoop, BlockingServiceLoop
from .vitals import StopWatch, look_at
from .worker_host import WireWorkerHost

__all__ = [
    "Acceptor",
    "AsyncServiceLoop",
    "BlockingServiceLoop",
    "ChildHost",
    "ControlChannel",
    "Driver",
    "LoopDriver",
    "Poller",
    "SocketChannel",
    "StopWatch",
    "Undriven",
    "WireConnector",
    "WireWorkerHost",
    "connect",
    "listen_tcp",
    "listen_unix",
    "look_at",
    "notice_silence",
    "process_behind",
    "tcp_address",
]
