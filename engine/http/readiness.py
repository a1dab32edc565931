"""Which backends can take calls, as far as an ingress knows: what `/-/readyz` answers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..seam.snapshot import BackendEntry, RoutingSnapshot

__all__ = ["readiness"]


def readiness(snapshot: RoutingSnapshot, tags: Sequence[str] = ()) -> tuple[int, dict[str, Any]]:
    """Say whether backends can take calls.

    One is ready with its first replica. A replica that is stuck in user code counts: it looks like one that is busy.

    Args:
        snapshot: The routing snapshot that rules.
        tags: Those asked for; by default all to which an endpoint sends calls, so that one that is still being created
            makes nobody look elsewhere.

    Returns:
        The HTTP status (200; 503 if one is not ready; 404 if there is none of that name yet), and what to say as JSON.
    """
    if snapshot.version < 0:
        return 503, {"ready": False, "reason": "starting", "backends": {}}
    unknown = [tag for tag in tags if tag not in snapshot.backends]
    if unknown:
        # The snapshot need not have one whose first replicas are starting.
        reason = f"there is no backend {unknown[0]!r}, or it is still being created"
        return 404, {"ready": False, "reason": reason, "backends": {}}
    entries = [snapshot.backends[tag] for tag in tags or sorted(_in_use(snapshot))]
    backends = {entry.tag: _state(entry) for entry in entries}
    ready = all(state["ready"] for state in backends.values())
    return (200 if ready else 503), {"ready": ready, "backends": backends}


def _in_use(snapshot: RoutingSnapshot) -> set[str]:
    used = {tag for endpoint in snapshot.endpoints.values() for tag, weight in endpoint.traffic if weight > 0}
    return used & snapshot.backends.keys()


def _state(entry: BackendEntry) -> dict[str, Any]:
    """Nothing of what it failed with: that may be a secret, and whoever asks a stranger."""
    state: dict[str, Any] = {"ready": bool(entry.replicas), "replicas": len(entry.replicas)}
    if not entry.replicas:
        state["reason"] = _reason(entry)
    return state


def _reason(entry: BackendEntry) -> str:
    if not entry.failures:
        return "no replica yet"
    last = "the last try" if entry.failures == 1 else f"the last {entry.failures} tries"
    return f"{'no replica yet' if entry.expecting else 'unhealthy'}: {last} to start one failed"
