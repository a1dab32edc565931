"""The public addresses of an engine.

They are bound once in its process and inherited by every worker that shares them; or, where workers inherit nothing,
bound by each worker.
"""

from __future__ import annotations

import dataclasses
import errno
import socket
import threading
import weakref
from typing import Any

from engine.errors import InvalidArgument
from engine.seam.worker import Listen

from .addresses import close_listening

__all__ = ["ListeningSockets", "bind_shared"]


_lock = threading.Lock()
_all: weakref.WeakSet[ListeningSockets] = weakref.WeakSet()  # of this process, to tell a user who holds a port


class ListeningSockets:
    """Binds addresses on first use and keeps them until `close`.

    Only the controller's loop touches it. A worker that binds for itself uses `bind_shared`.
    """

    def __init__(self) -> None:
        self._sockets: dict[Listen, socket.socket] = {}
        with _lock:
            _all.add(self)

    def holds(self, port: int) -> bool:
        """Whether one of them is bound to this port. May be asked on any thread."""
        return any(sock.fileno() >= 0 and sock.getsockname()[1] == port for sock in list(self._sockets.values()))

    def get(self, listen: Listen) -> socket.socket:
        """The socket bound to this address, which stays owned here.

        Raises:
            engine.errors.InvalidArgument: It cannot be bound.
        """
        if listen not in self._sockets:
            self._sockets[listen] = _bind(listen)
        return self._sockets[listen]

    def bound(self, listen: Listen) -> Listen:
        """The address with its real port.

        Raises:
            KeyError: It was never bound.
        """
        return dataclasses.replace(listen, port=self._sockets[listen].getsockname()[1])

    def close(self) -> None:
        """Close all sockets, for forks of this process as well (idempotent)."""
        while self._sockets:
            close_listening(self._sockets.popitem()[1])


def bind_shared(listen: Listen, *, alone: bool) -> socket.socket:
    """Bind an address that other workers of the same engine bind, too; the kernel spreads connections over them.

    Args:
        listen: The address.
        alone: Whether this worker is the first one there, so that nobody else may listen on the address.

    Raises:
        engine.errors.InvalidArgument: It cannot be bound.
    """
    if not alone:
        return _bind(listen, shared=True)
    with _bind(listen) as probe:
        port = probe.getsockname()[1]
    return _bind(dataclasses.replace(listen, port=port), shared=True)


def _bind(listen: Listen, *, shared: bool = False) -> socket.socket:
    try:
        candidates = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InvalidArgument(
            f"host {listen.host!r} is not an address of this machine ({error}); "
            "'127.0.0.1' serves this machine only, '0.0.0.0' every network it is in"
        ) from error
    failures: list[OSError] = []
    for family, kind, protocol, _, address in candidates:
        try:
            return _listen(family, kind, protocol, address, listen.backlog, shared=shared)
        except OSError as error:
            failures.append(error)
    why = failures[0].strerror
    if failures[0].errno == errno.EADDRINUSE:
        with _lock:
            if any(known.holds(listen.port) for known in _all):
                why = "another engine of this process serves there: shut that one down first, or share it"
    raise InvalidArgument(
        f"cannot listen on host {listen.host!r}, port {listen.port} ({why}); "
        "choose another one in http_options, e.g. {'port': 0} for any that is free"
    ) from failures[0]


def _listen(family: int, kind: int, protocol: int, address: Any, backlog: int, *, shared: bool) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        # A port whose last connections still linger can be taken again, but not one that somebody listens on.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock
