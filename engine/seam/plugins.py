"""Finds adapters and ingress servers by their entry points, so that third parties can add some."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidArgument
from .descriptors import telling_shortages

__all__ = ["load_adapter", "load_plugin"]

_GROUP = "engine.adapters"


def load_adapter(name: str) -> Any:
    """Make the adapter that is installed under a name.

    Raises:
        errors.InvalidArgument: There is none; the message lists those there are.
        errors.ResourcesUnavailable: There are no descriptors left to import it with.
    """
    with telling_shortages():
        return load_plugin(_GROUP, name, "backend")()


def load_plugin(group: str, name: str, field: str) -> Any:
    """Import what is installed under a name in an entry-point group.

    Raises:
        errors.InvalidArgument: Nothing is, or it cannot be imported; the message says from which package it is.
    """
    from importlib.metadata import entry_points

    found = entry_points(group=group)
    for entry in found:
        if entry.name == name:
            try:
                return entry.load()
            except (ImportError, AttributeError) as error:  # no such module, or nothing of that name in it
                package = entry.dist.name if entry.dist is not None else "an unknown package"
                raise InvalidArgument(
                    f"{field}={name!r} is installed, by {package}, but {entry.value!r} cannot be imported: {error}"
                ) from error
    known = ", ".join(sorted(repr(entry.name) for entry in found))
    there = f"there are: {known}" if known else "there are none"
    raise InvalidArgument(f"{field}={name!r} is not the name of an installed plug-in; {there}")
