"""Replicas inside the calling process: `InlineAdapter`."""

from .adapter import InlineAdapter

__all__ = ["InlineAdapter"]
