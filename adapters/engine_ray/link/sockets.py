"""The sockets that the parties of an engine listen on."""

from __future__ import annotations

import os
import socket
import sys

from engine_wire import listen_tcp, listen_unix, tcp_address

__all__ = ["listen_everywhere"]


def listen_everywhere(name: str) -> tuple[list[socket.socket], tuple[str, ...]]:
    """Open the sockets of a party: a Unix socket without a name on disk (Linux), and TCP on its node's address.

    Args:
        name: Distinguishes it from others on this node.

    Returns:
        The sockets, and their addresses for `engine_wire.connect`.
    """
    import ray

    listening = []
    addresses = []
    if sys.platform == "linux":
        path = f"@{name}-{os.urandom(4).hex()}"
        listening.append(listen_unix(path))
        addresses.append(f"unix:{path}")
    listening.append(listen_tcp(ray.util.get_node_ip_address()))
    addresses.append(tcp_address(listening[-1]))
    return listening, tuple(addresses)
