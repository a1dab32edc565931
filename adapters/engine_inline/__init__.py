"""Replicas inside the calling process: `InlineAdapter`."""

import engine

if not hasattr(engine, "__path__"):  # else whatever is imported next fails, and does not say why
    raise ImportError(f"{engine.__file__!r} is imported in place of the package engine of engineroom: rename it")

from .adapter import InlineAdapter

__all__ = ["InlineAdapter"]
