"""Replicas as Ray actors on a cluster: `RayAdapter`. The only package that imports Ray.

Ray places, names and restarts the workers; calls travel on the engine's own channels. The names are imported when they
are first used: a worker that serves calls needs no adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine

if not hasattr(engine, "__path__"):  # else whatever is imported next fails, and does not say why
    raise ImportError(f"{engine.__file__!r} is imported in place of the package engine of engineroom: rename it")

if TYPE_CHECKING:
    from engine_wire.tls import TLS

    from .adapter import RayAdapter

__all__ = ["TLS", "RayAdapter"]


def __getattr__(name: str) -> Any:
    if name == "RayAdapter":
        from .adapter import RayAdapter

        return RayAdapter
    if name == "TLS":
        from engine_wire.tls import TLS

        return TLS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
