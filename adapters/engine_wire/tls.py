"""Who a process is to others by TLS: certificate, key, and the authority that vouches for all who belong together.

Nothing here talks to anybody: it reads certificates, makes them for an engine, and gives `engine_wire.secure` what it
needs.
Files are read when they are first needed, and again once they have changed, so that certificates can be renewed under
way: connections that stand keep theirs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import InvalidArgument
from engine.seam.log import Log

from .secret import SecretText

__all__ = ["TLS", "Identity", "identity_of", "make_tls"]

_log = Log("engine.wire")
_PEM = "-----BEGIN "
_CERTIFICATE = "-----BEGIN CERTIFICATE-----"
_FIELDS = ("certificate", "key", "authority")


@dataclass(frozen=True, repr=False)
class TLS:
    """Certificates for the connections between the processes of an engine.

    Each value is a path or the PEM text itself. A path is read by every process on its own machine: the files are there
    on each, may differ, and may be replaced while the engine runs. Text goes along with what workers are told.

    Args:
        certificate: Of this machine or of the whole engine; others that lead to the authority may follow it.
        key: That belongs to it, without a passphrase.
        authority: One certificate or more: whoever shows one that they have signed is let in, if it also knows the
            engine's secret. Give the engine an authority of its own.

    Raises:
        engine.errors.InvalidArgument: A value is no path and no text.
    """

    certificate: str
    key: str
    authority: str

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if not isinstance(value, str) or not value:
                raise InvalidArgument(f"TLS: {name} must be a path or PEM text, not {_kind(value)}")
            object.__setattr__(self, name, SecretText(value) if name == "key" and _PEM in value else value)

    def __repr__(self) -> str:
        shown = (f"{name}={_shown(getattr(self, name))}" for name in _FIELDS)
        return f"TLS({', '.join(shown)})"


class _Loaded(NamedTuple):
    client: ssl.SSLContext
    server: ssl.SSLContext
    fingerprint: bytes  # of the own certificate


class Identity:
    """What one process shows of itself and expects of others. May be used on any thread.

    Args:
        tls: Says which.

    Raises:
        engine.errors.InvalidArgument: A file cannot be read, or is not what it should be.
    """

    def __init__(self, tls: TLS) -> None:
        self._tls = tls
        self._stamp = _stamp(tls)
        self._loaded = _load(tls)

    def context(self, *, server_side: bool) -> tuple[ssl.SSLContext, bytes]:
        """What a connection is made with, and the fingerprint of the certificate that this side shows on it."""
        stamp = _stamp(self._tls)
        if stamp != self._stamp:
            try:
                self._loaded = _load(self._tls)
            except InvalidArgument as error:
                _log.warning("goes on with the certificate that was read before: %s", error)
            self._stamp = stamp
        loaded = self._loaded
        return loaded.server if server_side else loaded.client, loaded.fingerprint


@functools.lru_cache(maxsize=16)
def identity_of(tls: TLS) -> Identity:
    """The same one for the same values, so that what is read is read once.

    Raises:
        engine.errors.InvalidArgument: See `Identity`.
    """
    return Identity(tls)


def make_tls() -> TLS:
    """Make a key and a certificate for one engine, whose parties all show it, and accept no other.

    Raises:
        engine.errors.InvalidArgument: The package that can do so is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise InvalidArgument(
            "tls=True makes a certificate, for which the package cryptography is needed, which is not installed: "
            'pip install "engineroom[tls]", or pass certificates of your own: tls=TLS(certificate=..., key=..., '
            "authority=...)"
        ) from error
    import datetime

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "engine")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of different machines need not agree, and it is of no use once the engine is gone.
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    text = certificate.public_bytes(serialization.Encoding.PEM).decode()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return TLS(certificate=text, key=private.decode(), authority=text)


def _load(tls: TLS) -> _Loaded:
    certificate, key, authority = (_text(tls, name) for name in _FIELDS)
    try:
        own = ssl.PEM_cert_to_DER_cert(certificate[certificate.index(_CERTIFICATE) :].partition("-----END")[0] + _END)
    except ValueError as error:
        raise InvalidArgument(f"TLS: certificate={_shown(tls.certificate)} holds no certificate in PEM") from error
    client = _context(tls, certificate, key, authority, ssl.PROTOCOL_TLS_CLIENT)
    server = _context(tls, certificate, key, authority, ssl.PROTOCOL_TLS_SERVER)
    server.num_tickets = 0  # nobody resumes a session
    return _Loaded(client, server, hashlib.sha256(own).digest())


_END = "-----END CERTIFICATE-----"


def _context(tls: TLS, certificate: str, key: str, authority: str, kind: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # nothing is renegotiated there, and no cipher is weak
    context.check_hostname = False  # the authority and the engine's secret say who belongs to it, not the address
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        with _as_file(certificate) as certificate_file, _as_file(key) as key_file:
            context.load_cert_chain(certificate_file, key_file, _refuse_passphrase)
    except (ssl.SSLError, OSError) as error:
        raise InvalidArgument(
            f"TLS: certificate={_shown(tls.certificate)} and key={_shown(tls.key)} are not a certificate and its key "
            f"in PEM: {_reason(error)}"
        ) from None  # which would show where the key was for a moment
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(
            f"TLS: authority={_shown(tls.authority)} holds no certificate in PEM: {_reason(error)}"
        ) from error
    return context


def _refuse_passphrase() -> str:
    raise InvalidArgument("TLS: key needs a passphrase, which nobody could enter: give one without")


@contextlib.contextmanager
def _as_file(text: str) -> Iterator[str]:
    """The path of a file with this text for as long as it takes to read it: `ssl` takes keys by no other way."""
    if hasattr(os, "memfd_create"):  # never on a disk
        with open(os.memfd_create("engine-tls", os.MFD_CLOEXEC), "w") as file:
            file.write(text)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(text)
            file.flush()
            yield file.name


def _text(tls: TLS, name: str) -> str:
    value: str = getattr(tls, name)
    if _PEM in value:
        return value
    try:
        with open(value) as file:
            return SecretText(file.read()) if name == "key" else file.read()
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"TLS: {name}={value!r} cannot be read: {_reason(error)}") from error


def _stamp(tls: TLS) -> tuple[int | None, ...]:
    """Tells whether files have changed."""
    return tuple(_changed(value) for value in (tls.certificate, tls.key, tls.authority) if _PEM not in value)


def _changed(path: str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except (OSError, ValueError):
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shown(value: str) -> str:
    return "<PEM>" if _PEM in value else repr(value)


def _kind(value: object) -> str:
    return repr(value) if isinstance(value, str) else f"{type(value).__name__}"
