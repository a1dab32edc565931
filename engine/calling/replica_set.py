"""The replicas of one backend as one caller sees them, and the calls that wait for one of them.

Not thread-safe: the caller that owns it holds its lock. Nothing here does I/O or reads a clock; times are passed in.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

from ..errors import NoReplica, Overloaded
from ..seam.channel import Channel
from ..seam.snapshot import BackendEntry
from .slot import Slot

__all__ = ["ReplicaSet", "Target"]

_random = random.random
_FRESH_S = 0.1
"""How long a replica's word on its load is believed. It only speaks when called, so an idle one would look busy."""


class Target:
    """One replica as one caller sees it.

    ``in_flight`` is what this caller has there, ``elsewhere`` what all others had there when it last answered.
    """

    __slots__ = (
        "address",
        "blocked_until",
        "channel",
        "dead",
        "elsewhere",
        "elsewhere_at",
        "gone",
        "in_flight",
        "replica_set",
        "replica_tag",
    )

    def __init__(self, replica_tag: str, address: str, replica_set: ReplicaSet) -> None:
        self.replica_tag = replica_tag
        self.address = address
        self.replica_set = replica_set
        self.channel: Channel | None = None
        self.in_flight = 0
        self.elsewhere = 0
        self.elsewhere_at = 0.0
        self.blocked_until = 0.0  # it refused, or could not be reached: not before this time
        self.gone = False  # no longer in the snapshot: finish what is in flight, then close
        self.dead = False  # it left the snapshot because it died: what is in flight will not be answered

    def busyness(self, now: float) -> int:
        """How much it has to do, as far as known."""
        if self.elsewhere and now - self.elsewhere_at < _FRESH_S:
            return self.in_flight + self.elsewhere
        return self.in_flight

    def has_room(self, limit: int, now: float) -> bool:
        """Whether it may be given one more call."""
        return self.in_flight < limit and self.blocked_until <= now

    def __repr__(self) -> str:
        state = "dead" if self.dead else "gone" if self.gone else "blocked" if self.blocked_until else "open"
        return f"<Target {self.replica_tag} {state} in_flight={self.in_flight} elsewhere={self.elsewhere}>"


class ReplicaSet:
    """Places calls on replicas, or queues them while all are full."""

    def __init__(self, entry: BackendEntry) -> None:
        self.tag = entry.tag
        self.targets: dict[str, Target] = {}
        self.waiting: deque[Slot] = deque()
        self.dropped_copies = 0  # of shadowed calls that found no room
        self.retry_scheduled = False  # the caller's timer will look at `waiting` again
        self._open: list[Target] = []
        self.apply(entry)

    def __repr__(self) -> str:
        return f"<ReplicaSet {self.tag} targets={self._open} waiting={len(self.waiting)}>"

    def apply(self, entry: BackendEntry) -> list[Target]:
        """Take a newer picture of the backend; returns the targets that left it."""
        self.limit = entry.max_concurrent_queries
        self.max_queued = entry.max_queued_requests
        self.expecting = entry.expecting
        self.failures = entry.failures
        listed = {replica.replica_tag: replica for replica in entry.replicas}
        left = [
            target
            for key, target in self.targets.items()
            # Another address: the backend was deleted and created again, with the same names, in one step as seen here.
            if key not in listed or listed[key].address != target.address
        ]
        for target in left:
            target.gone = True
            target.dead = target.replica_tag in entry.dead
            del self.targets[target.replica_tag]
        for key, replica in listed.items():
            if key not in self.targets:
                self.targets[key] = Target(key, replica.address, self)
        self._open = list(self.targets.values())
        return left

    def place(self, slot: Slot, now: float) -> Target | None:
        """Give a call to a replica, or queue it (None).

        Raises:
            Overloaded: The queue is full.
            NoReplica: There is no replica and none is expected.
        """
        if not self.waiting:
            target = self.choose(now)
            if target is not None:
                target.in_flight += 1
                target.blocked_until = 0.0
                return target
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        self.waiting.append(slot)
        slot.wait_in(self.waiting)
        return None

    def put_back(self, slot: Slot) -> None:
        """Queue a call that its replica did not take, before all others."""
        self.waiting.appendleft(slot)
        slot.wait_in(self.waiting)

    @property
    def hopeless(self) -> bool:
        """There is no replica to wait for."""
        return not self._open and not self.expecting

    def refusal(self) -> NoReplica | Overloaded | None:
        """What a call is told that may not even wait: there is nothing to wait for, or the queue is full."""
        if self.hopeless:
            return NoReplica(
                f"backend {self.tag!r} has no replica: the last {self.failures} in a row died or did not start. "
                "The engine keeps trying, more and more slowly: retry later, and see the log (engine.controller) for "
                "the reasons"
            )
        if self.max_queued is None or len(self.waiting) < self.max_queued:
            return None
        return Overloaded(
            f"backend {self.tag!r}: all of its {len(self._open)} replicas are full and "
            f"{len(self.waiting)} calls of this caller wait already (max_queued_requests={self.max_queued}); "
            "retry later or raise num_replicas"
        )

    def give_up_waiting(self) -> list[Slot]:
        """Take everything from the queue."""
        waiting = list(self.waiting)
        self.waiting.clear()
        for slot in waiting:
            slot.leave_queue()
        return waiting

    def next_placements(self, now: float) -> Iterator[tuple[Slot, Target]]:
        """Take from the queue what can be placed now, in order."""
        while self.waiting:
            target = self.choose(now)
            if target is None:
                return
            target.in_flight += 1
            target.blocked_until = 0.0
            slot = self.waiting.popleft()
            slot.leave_queue()
            yield slot, target

    def some_blocked(self, now: float) -> bool:
        """Whether a replica is left alone for a while, after which calls that wait may find room."""
        return any(target.blocked_until > now for target in self.targets.values())

    def choose(self, now: float) -> Target | None:
        """The less busy of two replicas picked at random; any with room if neither has it.

        Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001).
        """
        targets = self._open
        limit = self.limit
        count = len(targets)
        if count == 1:
            return targets[0] if targets[0].has_room(limit, now) else None
        if count == 0:
            return None
        first = int(_random() * count)
        second = int(_random() * (count - 1))
        one, other = targets[first], targets[second + (second >= first)]
        if other.busyness(now) < one.busyness(now):
            one, other = other, one
        if one.has_room(limit, now):
            return one
        if other.has_room(limit, now):
            return other
        free = [target for target in targets if target.has_room(limit, now)]
        return min(free, key=lambda target: target.busyness(now)) if free else None
