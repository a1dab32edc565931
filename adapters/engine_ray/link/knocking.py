"""Whether anybody listens at an address of TCP, before something is asked of them that would wait for minutes."""

from __future__ import annotations

import socket

__all__ = ["knock"]


def knock(address: str, timeout_s: float) -> Exception | None:
    """Why nobody can be reached at ``host:port``; None also of what is no such address, which others may know."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
        except (OSError, OverflowError) as error:
            return error
    return None
