"""A channel's socket whose bytes travel by TLS, in the place of the plain one.

`SecureSocket` is used as any other socket is here: without waiting, by one reader and one writer at a time. Before
anything else both ends show their certificates (`SecureSocket.shake`), which takes a round trip more.

What a channel promises about signal handlers holds here, too (`engine_wire.channel`): what the kernel or the TLS
library gave or took is noted before a handler can run, and whoever is struck does the rest again. Two things follow.
The library runs handlers itself once it has decrypted a record, and then tells nobody how much that was; so records are
handed to it one by one, and the length of their content is known from outside. And bytes count as sent only when all
that was made of them is with the kernel: until then the channel keeps them, waits until it can write, and comes again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from itertools import repeat
from operator import getitem
from typing import Any

from engine.seam.log import Log

from .addresses import is_foreign
from .channel import SocketChannel
from .handshake import CertificateError, ClientHandshake, HandshakeError
from .opening import UNPROVED, Opening
from .tls import TLS, identity_of

__all__ = ["SecureChannel", "SecureOpening", "SecureSocket"]

_log = Log("engine.wire")

_NOWAIT = socket.MSG_DONTWAIT
_HEAD_BYTES = 5  # of a record: its type, the version of old, the length of what follows
_CONTENT_BYTES = 1 << 14
"""What a record holds at most."""
_MOST_BYTES = _CONTENT_BYTES + 256
"""And what follows its head."""
_TAG_BYTES = 17  # behind the content of a record of TLS 1.3: its type, and the cipher's proof
_PIECE_BYTES = 1 << 17
"""What is encrypted at a time: enough to keep a kernel busy, and little enough to be held twice."""
_READ_BYTES = 1 << 16
_CURE = (
    "all machines need certificates that the authority of the others has signed, and clocks by which these are valid: "
    "see docs/security.md"
)


class SecureSocket(socket.socket):
    """A connected or connecting TCP socket, wrapped.

    Args:
        sock: Taken over: its descriptor is that of this one from now on.
        tls: Who this side is.
        server_side: Whether it accepted the connection.

    Attributes:
        shaken: Whether both ends have shown their certificates. That the peer accepts this side's is certain only once
            it has said something.
    """

    def __init__(self, sock: socket.socket, tls: TLS, *, server_side: bool) -> None:
        context, self._fingerprint = identity_of(tls).context(server_side=server_side)
        self._server_side = server_side
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._lock = threading.Lock()  # of `_tls` and `_outgoing`: one thread may read while another one writes
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.shaken = False
        # The reader's. Each item of `_receives` is what the kernel gave.
        self._receives: Iterator[bytes] = map(super().recv, repeat(_READ_BYTES), repeat(_NOWAIT))
        self._arrived: bytes | None = None  # and not put to the others yet
        self._records = b""  # from `_at` on, those that are not decrypted
        self._at = 0
        self._handed = 0  # how much of the first one the library has: nothing or all
        self._asked = False  # whether the library was asked for its content, which it may have told nobody
        self._content = bytearray(_CONTENT_BYTES)
        self._view = memoryview(self._content)
        self._size: int | None = None  # of the content; 0 at the peer's farewell, less if the record has none
        self._plain: list[bytes] = []  # decrypted, and not taken yet
        self._heard = False  # anything that the peer said itself
        self._ended = False
        # The writer's. Each item of `_sends` is how much of the first of `_sealed` the kernel took.
        self._taken = 0  # how many bytes that is made of
        self._before = 0  # what waited in `_outgoing` when they were encrypted
        self._sealed: list[bytes] = []  # for the kernel; none or one
        first: Iterator[Any] = map(getitem, repeat(self._sealed), repeat(0))
        self._sends: Iterator[int] = map(super().send, first, repeat(_NOWAIT))

    def __repr__(self) -> str:
        return f"<SecureSocket fd={self.fileno()} shaken={self.shaken}>"

    # -- certificates ------------------------------------------------------------------------------------------------

    @property
    def wants_write(self) -> bool:
        """Whether it has a certificate to send, rather than one to wait for."""
        return not self.shaken and bool(self._sealed)

    def shake(self) -> bool:
        """Go on with showing certificates; returns whether that is done, false if the peer has left meanwhile.

        Raises:
            BlockingIOError: It is for the peer to move, or for the kernel to take something.
            HandshakeError: The peer's certificate is not accepted, or it speaks no TLS.
            OSError: The connection broke.
        """
        while not self.shaken:
            done = self._say_what_is_due()
            self._push()
            if done:
                self.shaken = True
            elif not self._take_one_record():
                return False
        return True

    def _say_what_is_due(self) -> bool:
        try:
            with self._lock:
                self._tls.do_handshake()
            return True
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            self._explain()
            raise _refusal(error) from error

    def _push(self) -> None:
        if self._outgoing.pending:
            with self._lock:
                self._sealed[:] = [b"".join((*self._sealed, self._outgoing.read()))]
        while self._sealed and self._sealed[0]:
            self._sealed[0] = self._sealed[0][next(self._sends) :]
        self._sealed.clear()

    def _explain(self) -> None:
        """Let the peer know why it is refused, if that can be done at once."""
        try:
            self._push()
        except OSError as error:
            if is_foreign(error):
                raise

    def _take_one_record(self) -> bool:
        """Hand the next record to the library, and nothing beyond: what follows stays where a poll shows it."""
        while not (end := self._end_of_first()):
            data = super().recv(self._missing(), _NOWAIT)
            if not data:
                return False
            self._records += data
            head = self._records
            if not (20 <= head[0] <= 23 and head[1:2] in (b"", b"\3") and _length(head, 0) <= _MOST_BYTES):
                raise HandshakeError("it does not speak TLS, as all processes of this engine do")
        self._incoming.write(self._records[:end])
        self._records = b""
        return True

    def binding(self) -> bytes:
        """Tells this connection from those that somebody in the middle would have with the two ends."""
        theirs = self._tls.getpeercert(binary_form=True)
        assert theirs is not None  # as it is required
        client, server = self._fingerprint, hashlib.sha256(theirs).digest()
        return server + client if not self._server_side else client + server

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def holds_more(self) -> bool:
        """Whether it can give something that a poll does not show."""
        return bool(self._plain) or self._arrived is not None or self._ended or self._end_of_first() > 0

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """As that of `socket.socket`, without waiting. If little is wanted, no more than one record is received."""
        data, rest = self._next(bufsize)
        # No signal handler runs from here on, until the caller has it: there is no call.
        self._plain = rest
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0, /) -> int:
        """As that of `socket.socket`, without waiting; takes a memoryview, and fills what it can of it."""
        data, rest = self._next(len(buffer))
        size = len(data)
        # As above.
        buffer[:size] = data
        self._plain = rest
        return size

    def _next(self, most: int) -> tuple[bytes, list[bytes]]:
        """What is to be given now, which is nothing if the peer has left; and what is left then."""
        if not (self.shaken or self.shake()):
            return b"", []
        while not self._plain:
            if self._ended:
                return b"", []
            if not self._end_of_first():
                self._receive(most)
            while end := self._end_of_first():
                self._decrypt(end)
        data = b"".join(self._plain)
        return (data, []) if len(data) <= most else (data[:most], [data[most:]])

    def _receive(self, most: int) -> None:
        if self._arrived is None:
            receives = self._receives
            if most < _CONTENT_BYTES:
                receives = map(super().recv, (self._missing(),), (_NOWAIT,))
            for self._arrived in receives:
                break
        arrived = self._arrived or b""
        records = self._records[self._at :] + arrived
        # No signal handler runs from here on: there is no call.
        self._ended, self._records, self._at, self._arrived = not arrived, records, 0, None

    def _end_of_first(self) -> int:
        """Where the first record ends, if all of it is there; otherwise 0."""
        records, at = self._records, self._at
        if len(records) - at < _HEAD_BYTES:
            return 0
        end = at + _HEAD_BYTES + _length(records, at)
        return end if end <= len(records) else 0

    def _missing(self) -> int:
        """How many bytes it takes until there is more to know."""
        records, at = self._records, self._at
        there = len(records) - at
        return (_HEAD_BYTES if there < _HEAD_BYTES else _HEAD_BYTES + _length(records, at)) - there

    def _decrypt(self, end: int) -> None:
        """Take the first record, which ends there. Whoever is struck in its midst does it again."""
        if not self._handed:
            handing = map(self._incoming.write, (self._records[self._at : end],))
            for self._handed in handing:
                break
        if self._size is None:
            struck, self._asked = self._asked, True
            asking: Iterator[Any] = map(self._tls.read, (_CONTENT_BYTES,), (self._content,))
            try:
                with self._lock:
                    for self._size in asking:
                        break
            except ssl.SSLWantReadError:
                # There is nothing in it but for the library itself; or nothing any more, because a handler raised
                # when the library had filled `_content`.
                self._size = end - self._at - _HEAD_BYTES - _TAG_BYTES if struck else -1
            except ssl.SSLError as error:
                if self._heard:  # `shutdown` tells the peer: a writer may be at what is to be sent
                    raise ConnectionError(errno.EPROTO, f"TLS: {_words(error)}") from error
                self._explain()
                raise _refusal(error) from error  # the peer is first heard of when it has seen the certificate
        size = self._size
        assert size is not None
        content = (bytes(self._view[:size]),) if size > 0 else ()
        heard, ended = self._heard or size > 0, size == 0
        # No signal handler runs from here on: there is no call.
        self._plain += content
        self._heard, self._ended, self._at, self._handed, self._asked, self._size = heard, ended, end, 0, False, None

    # -- writing -----------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0, /) -> int:
        """As that of `socket.socket`, without waiting; but whoever cannot send all of it comes again with it.

        Args:
            data: After a `BlockingIOError` or an exception of a signal handler, it begins with the same bytes.
            flags: Of no account.
        """
        if not data:
            return 0
        sealed = self._sealed
        if not sealed:
            self._encrypt(data)
        while sealed[0]:
            for sent in self._sends:
                sealed[0] = sealed[0][sent:]
                break
        # No signal handler runs from here on, until the caller knows: there is no call.
        taken = self._taken
        self._taken = 0
        del sealed[0]
        return taken

    def _encrypt(self, data: Any) -> None:
        if not self._taken or self._outgoing.pending == self._before:  # else it was done by who was struck
            piece = data[:_PIECE_BYTES]
            self._before, self._taken = self._outgoing.pending, len(piece)
            try:
                with self._lock:
                    self._tls.write(piece)
            except ssl.SSLError as error:
                raise ConnectionError(errno.EPROTO, f"TLS: {_words(error)}") from error
        with self._lock:  # a reader for whom the library has something to say puts it there, too
            for sealed in map(self._outgoing.read, (-1,)):
                self._sealed += (sealed,)
                break

    def close(self) -> None:
        """As that of `socket.socket`; its memory goes with the last who has it."""
        super().close()
        self._receives, self._sends = iter(()), iter(())  # the former have it, too

    def shutdown(self, how: int, /) -> None:
        """As that of `socket.socket`; says farewell before, if that can be done at once."""
        if how != socket.SHUT_RD and self.shaken and not self._sealed:
            try:
                with self._lock:
                    self._tls.unwrap()
            except (ssl.SSLError, ValueError):
                pass  # it does not wait for the peer's; or it has been said already
            self._explain()
        super().shutdown(how)


class SecureOpening(Opening):
    """The opening of a channel over a `SecureSocket`: certificates first, then the handshake inside."""

    _sock: SecureSocket

    def __init__(self, sock: SecureSocket, address: str, connecting: bool, handshake: ClientHandshake) -> None:
        super().__init__(sock, address, connecting, handshake)

    @property
    def wants_write(self) -> bool:
        """See `Opening`."""
        return super().wants_write and (self.connecting or self._sock.shaken or self._sock.wants_write)

    def _advance(self) -> bytes | None:
        try:
            if self.connecting and not self._is_connected():
                return None
            if self._sock.shake():
                return self._go_on()
            self._fail("the peer closed the connection before it showed its certificate")
        except HandshakeError as error:
            self._fail(f"{UNPROVED} ({error})")
            if isinstance(error, CertificateError):
                _complain(self.failure)
        return None

    def _go_on(self) -> bytes | None:
        try:
            proof = super()._advance()
            if proof is None:
                return None
            self._send_alone(proof)
            return b""
        except ConnectionError as error:
            if not is_foreign(error):
                self._sock.recv(1)  # raises what the peer said before it left, if it did
            raise

    def _send_alone(self, proof: bytes) -> None:
        """In a record of its own, which the peer takes alone."""
        try:
            sent = self._sock.send(proof)
        except BlockingIOError:
            sent = 0
        if sent < len(proof):  # cannot be: nothing else was sent since the hello was read
            raise ConnectionError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


class SecureChannel(SocketChannel):
    """A channel over a `SecureSocket`, of which a poll does not show all that it holds."""

    sock: SecureSocket

    def _read(self, *, waits: bool = False) -> None:
        if waits:
            self._await_input(None)
        super()._read()
        self._read_held()

    def _read_held(self) -> None:
        while self._opening is None and not self._closed and self.sock.holds_more:
            super()._read()

    def _finish(self) -> None:
        super()._finish()
        try:
            self._read_held()
        except BaseException:
            self.lose("reading from it was interrupted")


_complained: set[str] = set()


def _complain(reason: str | None) -> None:
    """Tell the log once: whoever cannot connect tries again and again."""
    if reason is not None and reason not in _complained:
        _complained.add(reason)
        _log.warning("a connection to another process of the engine failed: %s", reason)


def _refusal(error: ssl.SSLError) -> HandshakeError:
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return CertificateError(f"its certificate is not accepted: {error.verify_message}; {_CURE}")
    if "NOT_RETURN_A_CERTIFICATE" in reason:
        return CertificateError(f"it has no certificate; {_CURE}")
    if "ALERT" in reason:
        return CertificateError(f"it does not accept the certificate of this side: {_words(error)}; {_CURE}")
    return HandshakeError(f"TLS: {_words(error)}")


def _words(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


def _length(records: bytes, at: int) -> int:
    """Of what follows the head of a record; 0 if that is not there yet."""
    return int.from_bytes(records[at + 3 : at + 5], "big")
