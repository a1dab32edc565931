"""What the workers of this adapter tell it beyond `engine.seam.control_messages`: bodies of `Control` messages."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Bound", "Hello", "Leaving"]


class Hello(NamedTuple):
    """Worker: this channel is my control channel. I am the process ``pid`` of the node ``node_id``."""

    worker_id: str
    node_id: str = ""
    pid: int = 0


class Bound(NamedTuple):
    """Worker: I listen on the public address that I was to serve, at this port."""

    port: int


class Leaving(NamedTuple):
    """Worker: I am about to exit with this code."""

    code: int
