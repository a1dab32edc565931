"""What an engine leaves with the cluster's control plane, for its own parties only.

Rows of Ray's internal key-value store, in a namespace of their own: the engine's secret, for processes that were handed
a handle and must prove that they belong to it, and for a detached engine where its controller is and what it manages.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import EngineClosed, RetryLater
from engine_wire.secret import Secret

from .connection import where

if TYPE_CHECKING:
    from engine_wire.tls import TLS

__all__ = ["Entry", "Registry"]

_NAMESPACE = b"engineroom"
_ANSWER_WITHIN_S = 5.0
"""For one row; an answer takes a millisecond. Ray by itself waits as long as the head is silent or away, and with it
would whoever asks, be it the loop of a controller or a caller that has lost its controller."""


class Entry(NamedTuple):
    """An engine.

    Attributes:
        secret: Proves that a party belongs to it.
        job_id: The Ray job whose end is the engine's; empty for a detached engine.
        control_address: Where the controller is now.
        tls: Who its parties are to each other between nodes, if they use TLS there.
    """

    secret: bytes
    job_id: str
    control_address: str
    tls: TLS | None = None


class Registry:
    """One engine's rows. Every method blocks for a round trip to the cluster's head, of a millisecond or so, a row.

    Raises:
        engine.errors.RetryLater: By every method: the head does not answer. What was to be written may be, or not.
        engine.errors.EngineClosed: By every method: this process is not connected to Ray.
    """

    def __init__(self, engine_id: str) -> None:
        self._entry = f"engine/{engine_id}".encode()
        self._rows = f"state/{engine_id}/"

    def put(self, entry: Entry) -> None:
        """Write the engine's entry."""
        _put(self._entry, pickle.dumps((bytes(entry.secret), *entry[1:])))

    def get(self) -> Entry | None:
        """The engine's entry, or None when it is gone."""
        data = _get(self._entry)
        if data is None:
            return None
        secret, *rest = pickle.loads(data)
        return Entry(Secret(secret), *rest)

    def clear(self) -> None:
        """Remove everything of the engine (idempotent)."""
        _del(self._entry)
        for name in self.load():
            self.remove(name)

    # -- engine.seam.detached.StateStore ------------------------------------------------------------------------------

    def save(self, name: str, state: bytes) -> None:
        """See `engine.seam.detached.StateStore.save`."""
        _put((self._rows + name).encode(), state)

    def remove(self, name: str) -> None:
        """See `engine.seam.detached.StateStore.remove`."""
        _del((self._rows + name).encode())

    def load(self) -> dict[str, bytes]:
        """See `engine.seam.detached.StateStore.load`."""
        keys = _list(self._rows.encode())
        rows = {key.decode().removeprefix(self._rows): _get(key) for key in keys}
        return {name: row for name, row in rows.items() if row is not None}

    @staticmethod
    def sweep(is_over: Callable[[Entry], bool]) -> None:
        """Remove what engines left that ended without a word."""
        for key in _list(b"engine/"):
            registry = Registry(key.decode().partition("/")[2])
            entry = registry.get()
            if entry is not None and is_over(entry):
                registry.clear()


def _put(key: bytes, value: bytes) -> None:
    with _asking() as control_plane:
        control_plane.internal_kv_put(key, value, overwrite=True, namespace=_NAMESPACE, timeout=_ANSWER_WITHIN_S)


def _get(key: bytes) -> bytes | None:
    with _asking() as control_plane:
        value: bytes | None = control_plane.internal_kv_get(key, namespace=_NAMESPACE, timeout=_ANSWER_WITHIN_S)
        return value


def _del(key: bytes) -> None:
    with _asking() as control_plane:
        control_plane.internal_kv_del(key, del_by_prefix=False, namespace=_NAMESPACE, timeout=_ANSWER_WITHIN_S)


def _list(prefix: bytes) -> list[bytes]:
    with _asking() as control_plane:
        keys = control_plane.internal_kv_keys(prefix, namespace=_NAMESPACE, timeout=_ANSWER_WITHIN_S)
        return [bytes(key) for key in keys]


@contextlib.contextmanager
def _asking() -> Iterator[Any]:
    """Gives Ray's client of the control plane, and says in the engine's words that there was no answer."""
    from ray.exceptions import RayError

    control_plane = _control_plane()
    if control_plane is None:
        raise EngineClosed(f"this process is not connected to {where()}: nobody can be asked for the engine")
    try:
        yield control_plane
    except RayError as error:
        raise RetryLater(
            f"the control plane of {where()} does not answer ({error}): is its head alive, and can it be reached from "
            "this node?"
        ) from error


def _control_plane() -> Any:
    # Not by Ray's own functions for the store, which have no way to say how long to wait.
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    return internal_kv_get_gcs_client()
