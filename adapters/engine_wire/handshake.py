"""How the two ends of a connection prove to each other that they belong to one engine, without any I/O.

Both know a secret, which never travels. Each sends a fresh random number (nonce) and proves that it knows the secret by
an HMAC-SHA256 over both numbers, the protocol's version and a label of its own direction::

    client                                            server
      | greeting (magic, version), nonce                 |
      |------------------------------------------------->|
      |          greeting (magic, version), nonce, proof |
      |<-------------------------------------------------|
      | proof, and whatever it has to say                |
      |------------------------------------------------->|

A proof answers one nonce only, so one that was overheard is worth nothing later; and it holds for one direction only,
so that nobody can be made to prove something to itself. Everything has a fixed length: a side asks for exactly the
bytes that it still wants (`Handshake.wanted`), never holds more of a stranger's, and gives up at the first one that
cannot be right.

It keeps strangers out. It does not encrypt what follows, and who can alter packets under way can still do so; TLS
around it keeps them from that (`engine_wire.secure`). Proofs then also hold for that one connection only, by its
`Binding`: else somebody in the middle, whom the same authority vouches for, could pass them on.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable

from .protocol import GREETING, PROTOCOL_VERSION

__all__ = [
    "Binding",
    "CertificateError",
    "ClientHandshake",
    "Handshake",
    "HandshakeError",
    "ServerHandshake",
    "check_secret",
]

_NONCE_BYTES = 32
_PROOF_BYTES = 32
_MIN_SECRET_BYTES = 16
_VERSION = PROTOCOL_VERSION.to_bytes(2, "little")
_CLIENT_MAGIC = b"engine/join\0"
_SERVER_MAGIC = b"engine/host\0"
_GREETING_BYTES = len(_CLIENT_MAGIC) + len(_VERSION)
assert len(_CLIENT_MAGIC) == len(_SERVER_MAGIC)


class HandshakeError(Exception):
    """The peer is not who it should be. The message is a clause about it: "its secret is another one"."""


class CertificateError(HandshakeError):
    """The same, seen by its certificate. Who runs the machines can cure it, which the message says how."""


def check_secret(secret: bytes) -> None:
    """See that a secret can be one.

    Raises:
        ValueError: It is shorter than 16 bytes: who overhears a handshake could guess it.
    """
    if len(secret) < _MIN_SECRET_BYTES:
        raise ValueError(f"the secret must have at least {_MIN_SECRET_BYTES} random bytes, not {len(secret)}")


Binding = Callable[[], bytes]
"""Gives what both ends, and nobody else, know of the connection below, once that stands."""


def _unbound() -> bytes:
    return b""


class Handshake:
    """One side of one handshake; subclasses say which.

    Args:
        secret: What both know.
        binding: Of the connection below, if that proves something itself.

    Attributes:
        wanted: How many more bytes of the peer's it takes now; 0 once the peer has proved who it is, or failed to.
        complete: Whether the peer has proved who it is.

    Raises:
        ValueError: See `check_secret`.
    """

    _peer_magic: bytes
    _step_bytes: int
    """Of the peer's first message."""

    def __init__(self, secret: bytes, binding: Binding = _unbound) -> None:
        check_secret(secret)
        self._secret = secret
        self._binding = binding
        self._nonce = os.urandom(_NONCE_BYTES)
        self._got = bytearray()
        self.wanted = self._step_bytes
        self.complete = False

    def feed(self, data: bytes) -> bytes:
        """Take at most `wanted` bytes of the peer's; returns what to send it then.

        Raises:
            HandshakeError: The peer is not who it should be; the connection is to be closed.
            ValueError: These are more than `wanted`.
        """
        if len(data) > self.wanted:
            raise ValueError(f"{len(data)} bytes, of which it wants {self.wanted}")
        self._got += data
        self.wanted -= len(data)
        try:
            return self._advance()
        except HandshakeError:
            self.wanted = 0
            raise

    def _advance(self) -> bytes:
        raise NotImplementedError

    def _check_greeting(self) -> None:
        got = bytes(self._got[:_GREETING_BYTES])
        if not (self._peer_magic + _VERSION).startswith(got):
            magic, version = got[: len(self._peer_magic)], got[len(self._peer_magic) :]
            if GREETING.startswith(got):
                raise HandshakeError("it speaks without a secret")
            if got.startswith(b"\x16\3"):
                raise HandshakeError("it speaks TLS, which this side does not")
            if magic != self._peer_magic:
                raise HandshakeError("it speaks another protocol")
            if len(version) < len(_VERSION):
                raise HandshakeError("it speaks another version of the protocol")
            raise HandshakeError(f"it speaks version {int.from_bytes(version, 'little')}, this side {PROTOCOL_VERSION}")

    def _check_proof(self, proof: bytes, expected: bytes) -> None:
        if not hmac.compare_digest(proof, expected):
            raise HandshakeError("its secret is another one")
        self.complete = True

    def _proof(self, magic: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
        said = b"".join((magic, _VERSION, client_nonce, server_nonce, self._binding()))
        return hmac.digest(self._secret, said, "sha256")


class ClientHandshake(Handshake):
    """The side that connected, and speaks first.

    Attributes:
        hello: What it says first.
    """

    _peer_magic = _SERVER_MAGIC
    _step_bytes = _GREETING_BYTES + _NONCE_BYTES + _PROOF_BYTES

    def __init__(self, secret: bytes, binding: Binding = _unbound) -> None:
        super().__init__(secret, binding)
        self.hello = _CLIENT_MAGIC + _VERSION + self._nonce

    def _advance(self) -> bytes:
        self._check_greeting()
        if self.wanted:
            return b""
        got = bytes(self._got)
        server_nonce, proof = got[_GREETING_BYTES:-_PROOF_BYTES], got[-_PROOF_BYTES:]
        self._check_proof(proof, self._proof(_SERVER_MAGIC, self._nonce, server_nonce))
        return self._proof(_CLIENT_MAGIC, self._nonce, server_nonce)


class ServerHandshake(Handshake):
    """The side that accepted."""

    _peer_magic = _CLIENT_MAGIC
    _step_bytes = _GREETING_BYTES + _NONCE_BYTES

    def __init__(self, secret: bytes, binding: Binding = _unbound) -> None:
        super().__init__(secret, binding)
        self._expected: bytes | None = None  # the client's proof, once its nonce is known

    def _advance(self) -> bytes:
        if self._expected is not None:
            if not self.wanted:
                self._check_proof(bytes(self._got), self._expected)
            return b""
        self._check_greeting()
        if self.wanted:
            return b""
        client_nonce = bytes(self._got[_GREETING_BYTES:])
        self._expected = self._proof(_CLIENT_MAGIC, client_nonce, self._nonce)
        self._got.clear()
        self.wanted = _PROOF_BYTES
        return _SERVER_MAGIC + _VERSION + self._nonce + self._proof(_SERVER_MAGIC, client_nonce, self._nonce)
