"""What the suite knows of an adapter: how to make engines on it, and which of the suite's tests concern it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ... import Engine
from ...seam.adapter import SeesProcesses, lacking
from ...seam.connector import refs_of

__all__ = ["HTTP", "AdapterFactory", "NoAdapter", "describe"]

HTTP = {"host": "127.0.0.1", "port": 0}


class NoAdapter(Exception):
    """Something that was to be an adapter is none."""


@dataclass(frozen=True)
class AdapterFactory:
    """Makes engines on one adapter.

    Attributes:
        name: For the ids of tests.
        backend: Gives what ``Engine(backend=...)`` takes: the name of an adapter, or one of its own for each engine.
        processes: Replicas are processes of their own: they can die alone, and other processes can reach them.
        own_refs: Refs are the engine's own, with `result`; otherwise they are what the platform calls a ref.
        sees_processes: Workers that are stopped are found (`engine.seam.adapter.SeesProcesses`).
        shared: As ``backend``, for the engine that most tests share; the same if None.
    """

    name: str
    backend: Callable[[], Any]
    processes: bool
    own_refs: bool
    sees_processes: bool = False
    shared: Callable[[], Any] | None = None

    def engine(self, **http_options: Any) -> Engine:
        """An engine on an adapter of its own. The caller shuts it down.

        Args:
            http_options: Laid over `HTTP`.
        """
        return Engine(backend=self.backend(), http_options={**HTTP, **http_options})

    def shared_engine(self) -> Engine:
        """The engine that most tests share. The caller shuts it down."""
        return Engine(backend=(self.shared or self.backend)(), http_options=HTTP)


def describe(name: str, make: Callable[[], Any]) -> AdapterFactory:
    """Look at an adapter that was just made, and say of it what the suite must know.

    Args:
        name: For the ids of tests.
        make: Returns an adapter at each call.

    Raises:
        NoAdapter: What it returns is none; the message says what it lacks.
    """
    adapter = make()
    if missing := lacking(adapter):
        raise NoAdapter(f"it returned {adapter!r}, which is no adapter: it lacks {', '.join(missing)}")
    return AdapterFactory(
        name,
        make,
        processes=not adapter.shares_process,
        own_refs=refs_of(adapter) is None,
        sees_processes=isinstance(adapter, SeesProcesses),
    )
