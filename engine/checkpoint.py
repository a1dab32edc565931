"""What of a controller outlives it, where its adapter has a store: what was asked for, and which workers there are.

The picture is written whenever it changes and before anybody is told, so that whoever was told that something is done
finds it done after the controller's death, too. Backends have rows of their own: what they are made of may be large.
"""

from __future__ import annotations

from typing import NamedTuple

from .adapter import StateStore
from .backend_plan import BackendPlan
from .serialization import dumps, loads
from .snapshot import EndpointEntry

__all__ = ["Checkpoint", "KnownWorker", "Picture"]

_PICTURE = "picture"
_BACKEND = "backend:"
_VERSION_GAP = 1000
"""Versions that a controller may have published between its last word to the store and its death, and more."""


class KnownWorker(NamedTuple):
    """A worker that was started and had not exited."""

    worker_id: str
    name: str
    node_id: str | None


class Picture(NamedTuple):
    """All but the backends' plans.

    Attributes:
        version: Of the ruling snapshot.
        endpoints: By name.
        replicas: For each backend, how many were ever started, and those that run.
        ingresses: How many were ever started, and those that run; None where none was wanted.
    """

    version: int
    endpoints: dict[str, EndpointEntry]
    replicas: dict[str, tuple[int, tuple[KnownWorker, ...]]]
    ingresses: tuple[int, tuple[KnownWorker, ...]] | None


class Checkpoint:
    """Reads and writes one controller's state; does nothing without a store.

    Args:
        store: Keeps it. Only the controller's loop uses it.
    """

    def __init__(self, store: StateStore | None) -> None:
        self._store = store

    def keep_backend(self, plan: BackendPlan) -> None:
        """Write what a backend is made of."""
        if self._store is not None:
            self._store.save(_BACKEND + plan.tag, dumps(plan, "the backend"))

    def drop_backend(self, tag: str) -> None:
        """Forget a backend."""
        if self._store is not None:
            self._store.remove(_BACKEND + tag)

    def keep(self, picture: Picture) -> None:
        """Write the picture."""
        if self._store is not None:
            self._store.save(_PICTURE, dumps(picture, "the controller's state"))

    def load(self) -> tuple[Picture, dict[str, BackendPlan]] | None:
        """What a former controller left: the picture and the plans by tag, or None if there was none."""
        rows = self._store.load() if self._store is not None else {}
        if _PICTURE not in rows:
            return None
        picture: Picture = loads(rows[_PICTURE])
        plans = {name.removeprefix(_BACKEND): loads(row) for name, row in rows.items() if name.startswith(_BACKEND)}
        return picture._replace(version=picture.version + _VERSION_GAP), plans
