"""Where accepted connections wait until their peers have proved that they belong to this engine.

Nothing of them is seen outside: a connection either proves itself within `PATIENCE_S` and is admitted, or it is
dropped, which the log mentions once. At most `MAX_WAITING` wait at a time, and of each no more is read than the
handshake wants. Of what came while the whole process was busy, nothing is held against the peer. With TLS, who comes
over TCP shows its certificate first, in the same time.

Only the acceptor or service loop whose lobby it is touches it, on the thread that reads its sockets. It says when there
is something to read (`Watcher`) and looks after the time: by `remaining_s` and `expire`.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from engine.seam.log import Log

from .handshake import CertificateError, HandshakeError, ServerHandshake, check_secret

if TYPE_CHECKING:
    from .tls import TLS

__all__ = ["MAX_WAITING", "PATIENCE_S", "Lobby", "Watcher"]

MAX_WAITING = 64
"""Enough for a burst of callers, since each waits for one round trip; few enough to leave descriptors for them."""
PATIENCE_S = 5.0
"""For the whole handshake. One round trip between machines takes milliseconds."""

_log = Log("engine.wire")
_NOWAIT = socket.MSG_DONTWAIT


class Watcher(Protocol):
    """What tells a lobby that there is something to read."""

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Call back whenever there is."""

    def unwatch(self, descriptor: int) -> None:
        """Stop doing so."""


class Lobby:
    """Holds connections until they are admitted or dropped.

    Args:
        secret: What the peers must know.
        admit: Takes a connected socket whose peer has proved itself, and owns it from then on.
        watcher: Says when there is something to read.
        tls: Who this side is towards other machines, if what travels between them is to be encrypted.

    Raises:
        ValueError: The secret is too short.
        engine.errors.InvalidArgument: A certificate cannot be read.
    """

    def __init__(
        self, secret: bytes, admit: Callable[[socket.socket], None], watcher: Watcher, tls: TLS | None = None
    ) -> None:
        check_secret(secret)
        if tls is not None:
            from .tls import identity_of

            identity_of(tls)
        self._secret = secret
        self._tls = tls
        self._complained: set[str] = set()  # of certificates
        self._admit = admit
        self._watcher = watcher
        self._waiting: dict[int, _Waiting] = {}  # by descriptor, the oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, sock: socket.socket, peer: str) -> None:
        """Take a connection in. ``peer`` is what the log calls it."""
        if len(self._waiting) >= MAX_WAITING:
            oldest = next(iter(self._waiting.values()))
            self._drop(oldest, f"others came while it and {MAX_WAITING - 1} more had not proved who they are")
        if self._tls is None or sock.family == socket.AF_UNIX:
            entry = _Waiting(sock, peer, ServerHandshake(self._secret))
        else:
            from .secure import SecureSocket

            secured = SecureSocket(sock, self._tls, server_side=True)
            entry = _Waiting(secured, peer, ServerHandshake(self._secret, secured.binding))
        self._waiting[entry.descriptor] = entry
        self._watcher.watch(entry.descriptor, lambda: self._read(entry))

    def remaining_s(self) -> float | None:
        """Seconds until `expire` has something to do, or None if nobody waits."""
        if not self._waiting:
            return None
        return max(0.0, min(entry.deadline for entry in self._waiting.values()) - time.monotonic())

    def expire(self) -> None:
        """Drop whoever took too long."""
        now = time.monotonic()
        for entry in [entry for entry in self._waiting.values() if entry.deadline <= now]:
            self._read(entry)  # what it said in time while this process was busy counts
            if self._waiting.get(entry.descriptor) is entry and entry.deadline <= now:
                self._drop(entry, f"it did not prove within {PATIENCE_S:g} s that it belongs to this engine")

    def close(self) -> None:
        """Close all connections (idempotent)."""
        while self._waiting:
            self._remove(next(iter(self._waiting.values()))).close()

    def _read(self, entry: _Waiting) -> None:
        # To the end of what there is: uvloop calls only once for the last words and the error that follows them.
        while self._waiting.get(entry.descriptor) is entry:  # it may have been dropped with its readiness noted
            try:
                data = entry.sock.recv(entry.handshake.wanted, _NOWAIT)
                if data:
                    self._answer(entry, data)
                else:
                    self._drop_lost(entry, "it left")
            except BlockingIOError:
                return
            except HandshakeError as error:
                self._drop(entry, f"it could not prove that it belongs to this engine ({error})", self._level(error))
            except OSError as error:
                self._drop_lost(entry, f"the connection broke ({error.strerror})")
            if entry.handshake.complete:
                self._admit(self._remove(entry))

    def _answer(self, entry: _Waiting, data: bytes) -> None:
        entry.has_spoken = True
        answer = entry.handshake.feed(data)
        if not answer:
            return
        if entry.sock.send(answer, _NOWAIT) < len(answer):  # cannot be: nothing else was sent
            raise HandshakeError("it takes no answer")
        if time.monotonic() >= entry.deadline:
            # It had greeted, and this process was too busy to answer: it could not know what to prove.
            entry.deadline = time.monotonic() + PATIENCE_S

    def _level(self, error: HandshakeError) -> int:
        """Of the line in the log: a wrong certificate comes again and again, and is mentioned once."""
        if not isinstance(error, CertificateError):
            return logging.WARNING
        level = logging.DEBUG if str(error) in self._complained else logging.WARNING
        self._complained.add(str(error))
        return level

    def _drop_lost(self, entry: _Waiting, how: str) -> None:
        # A connection that goes without a word is a health check or a port scan, and everyday life.
        level = logging.WARNING if entry.has_spoken else logging.DEBUG
        self._drop(entry, f"{how} before it had proved that it belongs to this engine", level)

    def _drop(self, entry: _Waiting, why: str, level: int = logging.WARNING) -> None:
        _log.log(level, "dropped a connection from %s: %s", entry.peer, why)
        self._remove(entry).close()

    def _remove(self, entry: _Waiting) -> socket.socket:
        del self._waiting[entry.descriptor]
        self._watcher.unwatch(entry.descriptor)
        return entry.sock


class _Waiting:
    """One connection in the lobby."""

    def __init__(self, sock: socket.socket, peer: str, handshake: ServerHandshake) -> None:
        self.sock = sock
        self.descriptor = sock.fileno()
        self.peer = peer
        self.handshake = handshake
        self.deadline = time.monotonic() + PATIENCE_S
        self.has_spoken = False
