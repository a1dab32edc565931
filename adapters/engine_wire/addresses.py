"""Addresses of channels, and the sockets behind them: ``unix:PATH``, ``unix:@NAME`` and ``tcp:HOST:PORT``.

``unix:@NAME`` is a name in Linux's abstract namespace: nothing of it is on disk, it is gone with its last socket, and
it has no permissions, so who listens there should ask for proof (`engine_wire.handshake`). ``HOST`` is a numeric
address, ``[...]`` around one of IPv6: looking a name up can take seconds, which a caller must not be made to wait.

When a TCP peer falls silent, because its machine or the network between is gone, the kernel breaks the connection after
`UNACKNOWLEDGED_S` seconds, whether bytes were under way or it was idle (there, Linux lets TCP_USER_TIMEOUT overrule the
count of keepalive's probes); after `SILENCE_S` if it was told to `notice_silence`. A shorter cut only delays bytes.
Linux takes a peer for silent, too, that is alive but reads nothing while more waits for it than its buffers hold.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

from engine.errors import InvalidArgument
from engine.seam.channel import ChannelClosed
from engine.seam.descriptors import is_shortage, shortage
from engine.seam.log import Log

__all__ = [
    "SILENCE_S",
    "UNACKNOWLEDGED_S",
    "accept_from",
    "close_listening",
    "is_foreign",
    "listen_tcp",
    "listen_unix",
    "notice_silence",
    "open_socket",
    "process_behind",
    "tcp_address",
    "unanswered",
]

_log = Log("engine.wire")

_BACKLOG = 512

SILENCE_S = 11
"""Long enough for a switch that restarts a link, short enough for a caller that waits."""
_IDLE_S = 5
_PROBE_S = 2
_PROBES = 3
assert _IDLE_S + _PROBES * _PROBE_S == SILENCE_S
UNACKNOWLEDGED_S = 30
"""The same where calls travel. Longer, because a peer whose code keeps it from reading looks no different."""
_SYN_RETRIES = 2
"""Of a connection that nobody answers, after 1 and 3 s: after 7 s it has failed."""


def listen_unix(path: str) -> socket.socket:
    """Bind and listen on a Unix socket.

    Args:
        path: Of the socket, or ``@NAME`` for a name in Linux's abstract namespace.

    Raises:
        OSError: It is taken, or cannot be.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(_unix_name(path))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def listen_tcp(host: str, port: int = 0) -> socket.socket:
    """Bind and listen on exactly this TCP address.

    Args:
        host: A numeric address of this machine. That of all networks must be asked for: ``0.0.0.0`` or ``::``.
        port: 0 picks a free one.

    Raises:
        engine.errors.InvalidArgument: ``host`` is not a numeric address.
        OSError: It is not one of this machine, or the port is taken.
    """
    try:
        family, address = _resolve(host, port)
    except OSError as error:
        raise InvalidArgument(f"host must be a numeric address, not {host!r}") from error
    sock = socket.socket(family)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # A port whose last connections still linger can be taken again, but not one that somebody listens on.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def tcp_address(listening: socket.socket) -> str:
    """The address of a listening TCP socket, for `engine_wire.connect`."""
    return f"tcp:{_host_and_port(listening.getsockname())}"


def open_socket(address: str) -> tuple[socket.socket, bool]:
    """Make a socket and connect it, or for TCP begin to.

    Returns:
        The socket, and whether it is still connecting.

    Raises:
        engine.seam.channel.ChannelClosed: The address is none, or nobody listens there.
        engine.errors.ResourcesUnavailable: There is no descriptor left for it.
    """
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        family, target = socket.AF_UNIX, _unix_name(rest)
    elif scheme == "tcp":
        family, target = _tcp_target(address, rest)
    else:
        raise ChannelClosed(f"cannot reach {address!r}: the scheme must be 'unix' or 'tcp'")
    sock: socket.socket | None = None
    try:
        sock = socket.socket(family)
        if scheme == "tcp":
            _tune(sock)
            sock.setblocking(False)
        sock.connect(target)
    except BlockingIOError:
        assert sock is not None
        return sock, True
    except OSError as error:
        if sock is not None:
            sock.close()
        if is_shortage(error):
            raise shortage(error) from error
        if is_foreign(error):
            raise
        raise ChannelClosed(unanswered(address, error.strerror)) from error
    return sock, False


def is_foreign(error: OSError) -> bool:
    """Whether this is no failure of the operating system, but what a signal handler raised, say a `TimeoutError`."""
    return error.errno is None


def notice_silence(sock: socket.socket) -> None:
    """Give a connection up after `SILENCE_S`: one whose peer always reads, and never has to read much."""
    if sock.family != socket.AF_UNIX and hasattr(socket, "TCP_USER_TIMEOUT"):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
        except OSError:
            pass  # it is gone already, as whoever reads will find


def unanswered(address: str, why: str | None) -> str:
    """What a caller is told whom nobody answers."""
    return f"nobody answers at {address.removeprefix('unix:')} ({why})"


def accept_from(listening: socket.socket, *, proves_itself: bool) -> tuple[socket.socket, str] | None:
    """Accept one connection that waits.

    Args:
        listening: Where.
        proves_itself: Whether the peer will have to show that it belongs here. If not, processes of other users are
            turned away from Unix sockets, where the system knows who they are; the superuser's are not.

    Returns:
        The connected socket and its peer, for people; or None when it went away again, or another process was faster,
        or it was turned away.

    Raises:
        OSError: There is no descriptor left for it now (`engine.seam.descriptors.is_shortage`).
    """
    try:
        sock, address = listening.accept()
    except OSError as error:
        if is_shortage(error):
            raise
        return None
    if sock.family == socket.AF_UNIX:
        pid, user = process_behind(sock), _user_behind(sock)
        peer = "a process of this machine" if pid is None else f"process {pid}"
        if proves_itself or user in (None, 0, os.geteuid()):
            return sock, peer
        _log.warning("dropped a connection from %s: it belongs to another user (%d)", peer, user)
        sock.close()
        return None
    try:
        _tune(sock)
    except OSError:
        pass  # it is gone already, as whoever reads will find
    return sock, _host_and_port(address)


def close_listening(sock: socket.socket) -> None:
    """Close a listening socket, for other processes that have it, too (idempotent).

    A process that the owner's was forked to has it without knowing, and would keep accepting in the kernel what nobody
    answers. Only Linux can end that.
    """
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed, or the system knows nothing to shut down in it
    sock.close()


def _unix_name(path: str) -> str | bytes:
    return b"\0" + os.fsencode(path[1:]) if path.startswith("@") else path


def _tcp_target(address: str, rest: str) -> tuple[socket.AddressFamily, Any]:
    host, _, port = rest.rpartition(":")
    if port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16:
        try:
            return _resolve(host.removeprefix("[").removesuffix("]"), int(port))
        except OSError:
            pass
    raise ChannelClosed(f"cannot reach {address!r}: it must be tcp:HOST:PORT with a numeric address")


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    if not host:
        raise OSError("an empty name would be every address of this machine")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[
            0
        ]
    except UnicodeError as error:
        raise OSError(str(error)) from error
    return family, address


def _host_and_port(address: Any) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def process_behind(sock: socket.socket) -> int | None:
    """The process of this machine that opened a connection by a Unix socket, where the system tells (Linux)."""
    return _credential(sock, 0) or None  # 0 is a process that this one cannot see


def _user_behind(sock: socket.socket) -> int | None:
    return _credential(sock, 1)


def _credential(sock: socket.socket, position: int) -> int | None:
    if sock.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return None
    try:
        found: int = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[position]
    except OSError:  # it is gone already
        return None
    return found


def _tune(sock: socket.socket) -> None:
    """Send small messages at once, and notice a peer that fell silent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE_S),
        ("TCP_KEEPALIVE", _IDLE_S),  # what macOS calls the former
        ("TCP_KEEPINTVL", _PROBE_S),
        ("TCP_KEEPCNT", _PROBES),
        # Keepalive says nothing while sent bytes wait for their receipt.
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_S * 1000),
        ("TCP_SYNCNT", _SYN_RETRIES),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
