"""Replicas as operating-system processes on this machine: `LocalAdapter`.

The names are imported when they are first used, because the fork server imports this package before it is safe from
outliving its engine and must not lose time here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine

if not hasattr(engine, "__path__"):  # else whatever is imported next fails, and does not say why
    raise ImportError(f"{engine.__file__!r} is imported in place of the package engine of engineroom: rename it")

if TYPE_CHECKING:
    from .adapter import LocalAdapter
    from .connector import LocalConnector

__all__ = ["LocalAdapter", "LocalConnector"]


def __getattr__(name: str) -> Any:
    if name == "LocalAdapter":
        from .adapter import LocalAdapter

        return LocalAdapter
    if name == "LocalConnector":
        from .connector import LocalConnector

        return LocalConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
