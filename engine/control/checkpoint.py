"""What of a controller outlives it, where its adapter has a store: what was asked for, and which workers there are.

The picture is written whenever it changes and before anybody is told, so that whoever was told that something is done
finds it done after the controller's death, too. What backends are made of may be large, so their plans have rows of
their own. Such a row is written once and never changed; those count that the picture names. So writing the picture
makes a change, all of it or nothing.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ..seam.detached import StateStore
from ..seam.serialization import dumps, loads
from ..seam.snapshot import EndpointEntry
from .backend_plan import BackendPlan

__all__ = ["Checkpoint", "KnownBackend", "KnownWorker", "Picture"]

_PICTURE = "picture"
_BACKEND = "backend:"
_VERSION_GAP = 1000
"""Versions that a controller may have published between its last word to the store and its death, and more."""


class KnownWorker(NamedTuple):
    """A worker that was started and had not exited; ``version`` is that of what it runs, if it is a replica."""

    worker_id: str
    name: str
    node_id: str | None
    version: int = 1


class KnownBackend(NamedTuple):
    """A backend: what it runs, how many replicas were ever started, and those that run."""

    plan: BackendPlan
    started: int
    running: tuple[KnownWorker, ...]


class Picture(NamedTuple):
    """All that a controller must know to go on where another one stopped.

    Attributes:
        version: Of the ruling snapshot.
        endpoints: By name.
        backends: By tag.
        ingresses: How many were ever started, and those that run; None where none was wanted.
    """

    version: int
    endpoints: dict[str, EndpointEntry]
    backends: dict[str, KnownBackend]
    ingresses: tuple[int, tuple[KnownWorker, ...]] | None


class Checkpoint:
    """Reads and writes one controller's state; does nothing without a store.

    Args:
        store: Keeps it. Only the controller's loop uses it.
    """

    def __init__(self, store: StateStore | None) -> None:
        self._store = store
        self._plans: dict[
            str, tuple[str, BackendPlan]
        ] = {}  # by tag: the row that the kept picture names, and its plan
        self._stray: set[str] = set()  # rows that it does not name

    def keep(self, picture: Picture) -> None:
        """Write the picture, and the plans that are new in it.

        Raises:
            BaseException: What the store raised. Then the former picture is kept, or this one if the store took it but
                could not say so; nothing in between.
        """
        if self._store is None:
            return
        plans = {}
        for tag, backend in picture.backends.items():
            row, plan = self._plans.get(tag, ("", None))
            if plan is not backend.plan:
                row = f"{_BACKEND}{tag}:{os.urandom(8).hex()}"
                self._stray.add(row)  # until the picture names it
                self._store.save(row, dumps(backend.plan, "the backend"))
            plans[tag] = (row, backend.plan)
        named = {tag: (row, *picture.backends[tag][1:]) for tag, (row, _) in plans.items()}
        self._store.save(_PICTURE, dumps((picture._replace(backends={}), named), "the controller's state"))
        self._stray |= {row for row, _ in self._plans.values()}
        self._stray -= {row for row, _ in plans.values()}
        self._plans = plans
        self._sweep(self._store)

    def _sweep(self, store: StateStore) -> None:
        for row in list(self._stray):
            try:
                store.remove(row)
            except Exception:
                return  # it only takes up room, until the next time
            self._stray.discard(row)

    def load(self) -> Picture | None:
        """What a former controller left, or None if there was none."""
        rows = self._store.load() if self._store is not None else {}
        self._stray = {row for row in rows if row.startswith(_BACKEND)}
        if _PICTURE not in rows:
            return None
        picture, named = loads(rows[_PICTURE])
        for tag, (row, started, running) in named.items():
            plan = loads(rows[row])
            picture.backends[tag] = KnownBackend(plan, started, running)
            self._plans[tag] = (row, plan)
            self._stray.discard(row)
        restored: Picture = picture._replace(version=picture.version + _VERSION_GAP)
        return restored
