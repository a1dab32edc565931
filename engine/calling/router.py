"""Endpoint to backend to replica: every decision, and nothing else.

Synchronous and pure but for its own tables. The `Caller` that owns a router holds a lock around every
method and performs what the router decides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import EndpointNotFound, EngineClosed
from ..seam.error_text import all_there_are
from ..seam.snapshot import EndpointEntry, RoutingSnapshot
from .replica_set import ReplicaSet, Target
from .retries import RetryBudget
from .slot import Slot
from .traffic import TrafficPolicy, hash_fraction

__all__ = ["Endpoint", "Router"]


@dataclass
class Endpoint:
    """An endpoint as one caller sees it, with what it counted."""

    entry: EndpointEntry
    policy: TrafficPolicy
    only: ReplicaSet | None  # the backend that gets everything, if there is one
    calls: int = 0
    budget: RetryBudget | None = None  # of its calls that may have begun and are repeated, once one was


class Router:
    """One caller's picture of the engine."""

    def __init__(self) -> None:
        self.snapshot = RoutingSnapshot(version=-1)
        self.endpoints: dict[str, Endpoint] = {}
        self.replica_sets: dict[str, ReplicaSet] = {}

    def __repr__(self) -> str:
        return f"<Router version={self.snapshot.version} {list(self.replica_sets.values())}>"

    def apply(
        self, snapshot: RoutingSnapshot, left: list[Target] | None = None, homeless: list[Slot] | None = None
    ) -> tuple[list[Target], list[Slot]]:
        """Replace the picture by a newer one. Should a signal handler raise in its midst, it can be done again.

        Args:
            snapshot: The newer one.
            left: Filled with the targets that left the picture.
            homeless: Filled with the queued calls whose backend left it or has no replica to wait for (to be routed
                again).

        Returns:
            ``left`` and ``homeless``.
        """
        left = [] if left is None else left
        homeless = [] if homeless is None else homeless
        if snapshot.version <= self.snapshot.version:
            return left, homeless
        for tag in [tag for tag in self.replica_sets if tag not in snapshot.backends]:
            removed = self.replica_sets[tag]
            homeless += (*removed.waiting, *removed.pausing)
            removed.give_up_waiting()
            left += removed.targets.values()
            for target in removed.targets.values():
                removed.leave(target)
            del self.replica_sets[tag]
        for tag, entry in snapshot.backends.items():
            replica_set = self.replica_sets.get(tag)
            if replica_set is None:
                self.replica_sets[tag] = ReplicaSet(entry)
            else:
                left += replica_set.apply(entry)
                if replica_set.hopeless:
                    homeless += (*replica_set.waiting, *replica_set.pausing)
                    replica_set.give_up_waiting()
        self.endpoints = {name: self._endpoint(entry) for name, entry in snapshot.endpoints.items()}
        self.snapshot = snapshot
        return left, homeless

    def route(self, name: str, shard_key: str | None) -> tuple[ReplicaSet, Endpoint]:
        """The replica set that serves this call.

        Raises:
            EndpointNotFound: There is no such endpoint.
            EngineClosed: There is none any more.
        """
        endpoint = self.endpoints.get(name)
        if endpoint is None and self.snapshot.closing:
            raise EngineClosed("the engine is shutting down")
        if endpoint is None:
            raise EndpointNotFound(
                f"there is no endpoint {name!r}; {all_there_are('endpoints', sorted(self.endpoints))}"
            )
        if endpoint.only is not None:
            return endpoint.only, endpoint
        fraction = random.random() if shard_key is None else hash_fraction(shard_key)
        return self.replica_sets[endpoint.policy.pick(fraction)], endpoint

    def shadows(self, endpoint: Endpoint) -> Iterator[ReplicaSet]:
        """The replica sets that get a copy of this call."""
        for tag, proportion in endpoint.entry.shadows:
            if random.random() < proportion:
                yield self.replica_sets[tag]

    def _endpoint(self, entry: EndpointEntry) -> Endpoint:
        policy = TrafficPolicy(entry.traffic)
        single = policy.single
        before = self.endpoints.get(entry.name)
        calls, budget = (before.calls, before.budget) if before else (0, None)
        return Endpoint(entry, policy, self.replica_sets[single] if single else None, calls, budget)
