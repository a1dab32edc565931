"""What an engine leaves with the cluster's control plane, for its own parties only.

Rows of Ray's internal key-value store, in a namespace of their own: the engine's secret, for processes that were handed
a handle and must prove that they belong to it, and for a detached engine where its controller is and what it manages.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Entry", "Registry"]

_NAMESPACE = b"mpengine"


class Entry(NamedTuple):
    """An engine.

    Attributes:
        secret: Proves that a party belongs to it.
        job_id: The Ray job whose end is the engine's; empty for a detached engine.
        control_address: Where the controller is now.
    """

    secret: bytes
    job_id: str
    control_address: str


class Registry:
    """One engine's rows. Every method is a round trip to the cluster's head of a millisecond or so."""

    def __init__(self, engine_id: str) -> None:
        self._entry = f"engine/{engine_id}".encode()
        self._rows = f"state/{engine_id}/"

    def put(self, entry: Entry) -> None:
        """Write the engine's entry."""
        _put(self._entry, pickle.dumps(tuple(entry)))

    def get(self) -> Entry | None:
        """The engine's entry, or None when it is gone."""
        data = _get(self._entry)
        return None if data is None else Entry(*pickle.loads(data))

    def clear(self) -> None:
        """Remove everything of the engine (idempotent)."""
        _del(self._entry)
        for name in self.load():
            self.remove(name)

    # -- engine.adapter.StateStore -----------------------------------------------------------------------------------

    def save(self, name: str, state: bytes) -> None:
        """See `engine.adapter.StateStore.save`."""
        _put((self._rows + name).encode(), state)

    def remove(self, name: str) -> None:
        """See `engine.adapter.StateStore.remove`."""
        _del((self._rows + name).encode())

    def load(self) -> dict[str, bytes]:
        """See `engine.adapter.StateStore.load`."""
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


def _kv() -> Any:
    from ray.experimental import internal_kv

    return internal_kv


def _put(key: bytes, value: bytes) -> None:
    _kv()._internal_kv_put(key, value, overwrite=True, namespace=_NAMESPACE)


def _get(key: bytes) -> bytes | None:
    value: bytes | None = _kv()._internal_kv_get(key, namespace=_NAMESPACE)
    return value


def _del(key: bytes) -> None:
    _kv()._internal_kv_del(key, namespace=_NAMESPACE)


def _list(prefix: bytes) -> list[bytes]:
    return [bytes(key) for key in _kv()._internal_kv_list(prefix, namespace=_NAMESPACE)]
