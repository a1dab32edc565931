"""The actors that belong to engines: the namespace they are found in by name, and how they are ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from .connection import check_connected

__all__ = ["NAMESPACE", "actor_names", "kill_actor", "kill_named"]

NAMESPACE = "engineroom"
"""Of the actors that belong to engines: found by name, whatever the namespace of the process that looks for them.

Also of the names of detached engines whose adapter names no other.
"""


def actor_names(prefix: str, namespace: str = NAMESPACE) -> list[str]:
    """The names of all actors of a namespace that begin like this."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in actors if one["namespace"] == namespace and one["name"].startswith(prefix)]


def kill_actor(actor: Any) -> None:
    """End an actor; does nothing when it is gone, or when this process has left Ray."""
    import ray

    with contextlib.suppress(Exception):
        check_connected()
        ray.kill(actor)


def kill_named(names: Iterable[str]) -> None:
    """End the actors of these names in `NAMESPACE`; does nothing where `kill_actor` does nothing."""
    import ray

    for name in names:
        with contextlib.suppress(Exception):
            check_connected()
            kill_actor(ray.get_actor(name, namespace=NAMESPACE))
