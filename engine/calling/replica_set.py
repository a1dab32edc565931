"""The replicas of one backend as one caller sees them, and the calls that wait for one of them.

Not thread-safe: the caller that owns it holds its lock. Nothing here does I/O or reads a clock; times are passed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

from ..errors import EngineClosed, NoReplica, Overloaded
from ..seam.channel import Channel
from ..seam.messages import Call
from ..seam.snapshot import BackendEntry
from .line import Line, bytes_of, share_of_low
from .pace import Pace
from .slot import Slot

__all__ = ["RETRY_S", "UNREACHABLE_S", "ReplicaSet", "Target"]

_random = random.random
RETRY_S = 0.005
"""How long a replica that refused is left alone. Other callers' calls end without our hearing of it, so look again."""
_RESENDING_S = 1e-8
"""So much longer for each byte of a call that was refused: sending it in vain takes time on both sides."""
UNREACHABLE_S = 0.05
"""How long one is left alone that cannot be reached."""
_MAX_COPIES = 1000
_MAX_COPY_BYTES = 64 << 20
"""How many copies of shadowed calls wait, and how large they may be together: nobody asked for their results."""
_COPY_PATIENCE_S = 30.0
_QUICK_AGAIN = 64
"""So many calls must a replica answer without handing another one back before calls wait there for each other."""
_SILENT_S = 0.25
"""So long a replica that has something to do may always take to answer anything, whatever the others take."""
_MUCH_LONGER = 4.0
"""So many times as long as replicas of this backend usually take: a longer silence is not theirs."""
_QUICKLY, _SLOWLY = 0.5, 0.99
"""Of an answer that takes longer, half the difference is added to what is usual; any other shortens that a little. So
almost all of them take less."""
_ASIDE_S = 1.0
"""How long one that is silent gets nothing; then one call, to see, and if it does not answer that, nothing for as long
again as it was silent. Not so before: it may merely be at calls, or streams, that take as long as that."""
_FRESH_S = 0.1
"""How long a replica's word on its load is believed. It only speaks when called, so an idle one would look busy."""


class Target:
    """One replica as one caller sees it.

    ``in_flight`` is what this caller has there, ``elsewhere`` what all others had there when it last answered.
    Only its `ReplicaSet` changes what is counted.
    """

    __slots__ = (
        "address",
        "aside_at",
        "blocked_until",
        "channel",
        "dead",
        "doubted",
        "elsewhere",
        "elsewhere_at",
        "gone",
        "heard_at",
        "holds",
        "in_flight",
        "in_turn",
        "limit",
        "pool",
        "position",
        "replica_set",
        "replica_tag",
        "slow_for",
        "tried_at",
        "try_at",
        "unreachable_until",
    )

    def __init__(self, replica_tag: str, address: str, replica_set: ReplicaSet) -> None:
        self.replica_tag = replica_tag
        self.address = address
        self.replica_set = replica_set
        self.channel: Channel | None = None
        self.holds: dict[Slot, None] = {}  # what is in flight
        self.in_flight = 0  # how many that are
        self.limit = 0  # how many it may hold
        self.elsewhere = 0
        self.elsewhere_at = 0.0
        self.slow_for = 0  # its calls are long: it gets one at a time, until it has answered so many
        self.blocked_until = 0.0  # it refused, or could not be reached: not before this time
        self.doubted = False  # the same, lately: one call shows whether it can be now, before others follow
        self.unreachable_until = 0.0  # the same of the latter alone, which no answer of its ends: it may be its last
        self.in_turn = False  # it refused, says by itself when it takes a call, and did so just now
        self.heard_at = 0.0  # it answered last, or got something to do when it had nothing
        self.aside_at = -1.0  # the same when it was found silent: others come first until it is heard again
        self.try_at = 0.0  # or until then: it gets a call, to see
        self.tried_at = 0.0  # when it got one last
        self.gone = False  # no longer in the snapshot: finish what is in flight, then close
        self.dead = False  # it left the snapshot because it died: what is in flight will not be answered
        self.pool: list[Target] | None = None  # the one of the replica set's lists that it is in
        self.position = 0  # there

    def busyness(self, now: float) -> int:
        """How much it has to do, as far as known."""
        if self.elsewhere and now - self.elsewhere_at < _FRESH_S:
            return self.in_flight + self.elsewhere
        return self.in_flight

    def __repr__(self) -> str:
        state = "dead" if self.dead else "gone" if self.gone else "blocked" if self.blocked_until else "open"
        return f"<Target {self.replica_tag} {state} in_flight={self.in_flight} elsewhere={self.elsewhere}>"


class ReplicaSet:
    """Places calls on replicas, or queues them while all are full."""

    def __init__(self, entry: BackendEntry) -> None:
        self.tag = entry.tag
        self.targets: dict[str, Target] = {}
        self.waiting = Line()
        self.pausing: dict[Slot, None] = {}  # calls that wait a moment before they are repeated
        self.copies = Line(ranked=False)  # of shadowed calls, which wait behind all others
        self.dropped_copies = 0  # those that found no room there, or waited too long
        self.retry_scheduled = False  # the caller's timer will look at `waiting` again
        self.copies_watched = False  # the same for `copies`
        self._pace = Pace()
        # Every target that may get a call is in one of three lists, so that choosing one takes the same time for any
        # number of them. Those that time alone makes better are noted as well.
        self._idle: list[Target] = []  # has nothing to do, as far as is known, and its calls are short
        self._roomy: list[Target] = []  # has something to do, and room for more
        self._aside: list[Target] = []  # the same, but is silent: for the time when there is no other
        self._usual_s = 0.0  # what replicas take to answer something
        self._resting: dict[Target, float] = {}  # until when it is blocked, or believed to be at the calls of others
        self._rested_at = math.inf  # when the first of them is to be looked at
        self.apply(entry)

    def __repr__(self) -> str:
        return f"<ReplicaSet {self.tag} targets={list(self.targets.values())} waiting={len(self.waiting)}>"

    def apply(self, entry: BackendEntry) -> list[Target]:
        """Take a newer picture of the backend; returns the targets that left it."""
        self.limit = entry.max_concurrent_queries
        self.max_queued = entry.max_queued_requests
        self.max_queued_bytes = entry.max_queued_bytes
        self.max_queue_wait_s = entry.max_queue_wait_s
        self.expecting = entry.expecting
        self.failures = entry.failures
        self.max_retries = entry.max_retries
        self.retry_deaths = entry.retry_deaths
        self.retry_posts = entry.retry_posts
        self.last_error = entry.last_error
        listed = {replica.replica_tag: replica for replica in entry.replicas}
        left = [
            target
            for key, target in self.targets.items()
            # Another address: the backend was deleted and created again, with the same names, in one step as seen here.
            if key not in listed or listed[key].address != target.address
        ]
        for target in left:
            self.leave(target)
            target.dead = target.replica_tag in entry.dead
            del self.targets[target.replica_tag]
        if listed and not self.targets and self.waiting:
            self._pace.stand_still()
        for key, replica in listed.items():
            if key not in self.targets:
                self.targets[key] = Target(key, replica.address, self)
            self.targets[key].limit = self.limit if replica.limit is None else replica.limit
        for target in self.targets.values():
            self._file(target)  # it is new, or the limit is
        return left

    def leave(self, target: Target) -> None:
        """A target is no longer in the snapshot."""
        target.gone = True
        self._resting.pop(target, None)
        self._file(target)

    def place(self, slot: Slot, now: float) -> Target | None:
        """Give a call to a replica, or queue it (None).

        Raises:
            Overloaded: The queue is full.
            NoReplica: There is no replica and none is expected.
        """
        slot.since = slot.since or now
        line = self.waiting
        if not (line.normal or line.low):
            target = self.take(now)
            if target is not None:
                return target
            self._pace.come(now)
        refusal = self.refusal(slot) or self._too_late(slot, now)
        if refusal is not None:
            raise refusal
        line.add(slot)  # at its end, unless the call comes from a backend that is gone
        return None

    def put_back(self, slot: Slot, now: float) -> None:
        """Queue a call that its replica did not take: before those that came later, after those that came before it."""
        if not self.waiting:
            self._pace.come(now)
        self.waiting.add(slot)

    @property
    def hopeless(self) -> bool:
        """There is no replica to wait for."""
        return not self.targets and not self.expecting

    def refusal(self, slot: Slot) -> NoReplica | EngineClosed | Overloaded | None:
        """What a call is told that may not even wait: there is nothing to wait for, or the queue is full."""
        if self.hopeless:
            return self.absence()
        return self._too_many(slot.call) or self._too_large(slot.call)

    def _too_many(self, call: Call) -> Overloaded | None:
        if self.max_queued is None:
            return None
        most = share_of_low(self.max_queued) if call.priority else self.max_queued
        if len(self.waiting) < most:
            return None
        # Those that slow replicas could hold, but better do not, are not among the calls for which there is no place.
        queued = len(self.waiting) - sum(
            target.limit - target.in_flight
            for target in self.targets.values()
            if target.slow_for and not target.blocked_until
        )
        if queued < most:
            return None
        return Overloaded(
            f"backend {self.tag!r}: all of its {len(self.targets)} replicas are full and "
            f"{queued} calls of this caller wait already (max_queued_requests={self.max_queued}{_half(call)}); "
            "retry later or raise num_replicas"
        )

    def _too_large(self, call: Call) -> Overloaded | None:
        waiting = self.waiting
        if self.max_queued_bytes is None or not waiting:  # one that is alone may be as large as it likes
            return None
        most = share_of_low(self.max_queued_bytes) if call.priority else self.max_queued_bytes
        size = bytes_of(call)
        if waiting.bytes + size <= most:
            return None
        return Overloaded(
            f"backend {self.tag!r}: the arguments of the {len(waiting)} calls of this caller that wait already have "
            f"{waiting.bytes} bytes, and those of this one {size} (max_queued_bytes={self.max_queued_bytes}"
            f"{_half(call)}); retry later, raise num_replicas or max_queued_bytes, or pass large data by reference"
        )

    def _too_late(self, slot: Slot, now: float) -> Overloaded | None:
        """What a call is told that would wait too long, or for nothing, judged by how others left the queue."""
        if not self.waiting:
            return None
        call = slot.call
        burst_s, deadline = self.max_queue_wait_s, call.deadline
        if burst_s is None and deadline is None:
            return None
        share = 0.5 if call.priority else 1.0
        pace, before = self._pace, self.waiting.before(low=bool(call.priority))
        in_flight = sum(target.in_flight for target in self.targets.values())
        wait_s = pace.expect(now, before, in_flight)
        told = f"backend {self.tag!r}: {len(self.waiting)} calls of this caller wait already"
        lasts = burst_s is not None and now - pace.crowded_since > burst_s
        if lasts and in_flight and before + 1 > share * (most := pace.most_waiting(in_flight)):
            half = f"{_half(call)}," if call.priority else ""
            return Overloaded(
                f"{told}, and {most:.0f} are enough{half} to keep the replicas busy while {pace.load:.2g} come for "
                "each that is served (max_queue_wait_s is for bursts); retry later or raise num_replicas"
            )
        if burst_s is not None and wait_s > share * burst_s:
            bound = f"max_queue_wait_s={burst_s:g}{_half(call)}"
        elif deadline is not None and wait_s + in_flight * pace.interval_s > deadline - now:
            bound = f"its deadline is in {max(0.0, deadline - now):.3g} s"
        else:
            return None
        return Overloaded(
            f"{told}, so that this one would wait for about {wait_s:.2g} s ({bound}); retry later or raise num_replicas"
        )

    def absence(self) -> NoReplica | EngineClosed | None:
        """What a call is told if there is nothing to wait for."""
        if not self.hopeless:
            return None
        if not self.failures:
            return EngineClosed(f"backend {self.tag!r} has no replica, and the engine is being shut down")
        why = f", the last one because of {self.last_error}" if self.last_error else ""
        return NoReplica(
            f"backend {self.tag!r} has no replica: the last {self.failures} tries to start one failed{why}. "
            "The engine keeps trying, more and more slowly, and at once after an update: retry later, and see the "
            "log (engine.controller) for the reasons"
        )

    def give_up_waiting(self) -> list[Slot]:
        """Take everything from the queue, and what was to be repeated."""
        self._drop_copies(self.copies)
        waiting = [*self.waiting.clear(), *self.pausing]
        self.pausing.clear()
        return waiting

    def next_placements(self, now: float, placed: list[Slot], welcome: Target | None = None) -> None:
        """Take from the queue what can be placed now, in order, and add it to ``placed``; drop what is late there.

        The first of them goes where there is a place for it (`welcomed`), if that is given.
        """
        while line := self.waiting or self._timely_copies(now):
            queue = line.head()
            slot = queue[0]
            deadline = slot.call.deadline
            if deadline is not None and now >= deadline and line is self.waiting:
                slot.queue = None  # whoever waits for it looks at the clock, too, and tells its user
                del queue[0]
                line.bytes -= slot.bytes
                continue
            target = self.take(now) if welcome is None else self._use(welcome, now)
            welcome = None
            if target is None:
                return
            # No signal handler runs between these: there is no call.
            slot.queue = None
            slot.target = target
            target.holds[slot] = None
            placed += (slot,)
            del queue[0]
            line.bytes -= slot.bytes
            line.passed = 0 if queue is line.low else line.passed + 1 if line.low else line.passed
            if line is self.waiting:
                self._pace.leave(now)

    def take(self, now: float) -> Target | None:
        """Choose a replica and count one more call there."""
        idle = self._idle
        # As `choose` does, which would be a call on the way of every call to an idle replica.
        target = idle[0] if len(idle) == 1 and self._rested_at > now else self.choose(now)
        if target is not None:
            if not target.in_flight:
                target.heard_at = now
            target.in_flight += 1
            target.blocked_until = 0.0
            self._file(target)
        return target

    def _use(self, target: Target, now: float) -> Target:
        if not target.in_flight:
            target.heard_at = now
        target.in_flight += 1
        target.blocked_until = now + RETRY_S if target.in_turn else 0.0
        self._file(target)
        return target

    # -- copies of shadowed calls --------------------------------------------------------------------------------------

    def place_copy(self, copy: Slot, now: float) -> Target | None:
        """As `place`, for a copy that nobody waits for: behind all calls, and dropped where there is no room."""
        copy.since = now
        if not self.waiting and not self.copies:
            target = self.take(now)
            if target is not None:
                return target
        most = _MAX_COPIES if self.max_queued is None else min(self.max_queued, _MAX_COPIES)
        if self.hopeless or len(self.copies) >= most or self.copies.bytes + bytes_of(copy.call) > _MAX_COPY_BYTES:
            self.dropped_copies += 1
        else:
            self.copies.add(copy)
        return None

    def put_copy_back(self, copy: Slot) -> None:
        """As `put_back`, for a copy."""
        self.copies.add(copy)

    def drop_late_copies(self, now: float) -> None:
        """Drop those whose deadline has passed, or that have waited for long."""
        self._drop_copies([copy for copy in self.copies if _is_late(copy, now)])

    def _timely_copies(self, now: float) -> Line:
        copies = self.copies
        while copies and _is_late(copies.head()[0], now):
            copies.discard(copies.head()[0])
            self.dropped_copies += 1
        return copies

    def _drop_copies(self, late: Iterable[Slot]) -> None:
        for copy in list(late):
            self.copies.discard(copy)
            self.dropped_copies += 1

    def mend(self) -> None:
        """After an exception that struck in any of these methods: make anew what it may have torn."""
        self._idle, self._roomy, self._aside, self._resting, self._rested_at = [], [], [], {}, math.inf
        for target in self.targets.values():
            target.in_flight = len(target.holds)
            target.pool = None
            self._file(target)
        self.waiting.mend()
        self.copies.mend()
        self.retry_scheduled = self.copies_watched = False

    # -- what becomes of calls that were placed ------------------------------------------------------------------------

    def answered(self, target: Target, load: int, now: float) -> None:
        """A replica answered a call, and said how many calls it holds."""
        target.in_flight -= 1  # as in `_count_out`, which would be a call on the way of every answer
        if load > target.in_flight:
            target.elsewhere, target.elsewhere_at = load - target.in_flight, now
        else:
            target.elsewhere = 0
        if not target.in_turn:
            target.blocked_until = target.unreachable_until
        if target.slow_for:
            target.slow_for -= 1
            target.doubted = False
        longer_s = now - target.heard_at - self._usual_s
        target.heard_at = now
        if longer_s > 0.0:
            self._usual_s += longer_s * _QUICKLY
        else:
            self._usual_s *= _SLOWLY
        self._file(target)

    def handed_back(self, target: Target, load: int, now: float) -> None:
        """A replica is at a long call and has not begun this one: it gets one at a time from now on."""
        self._count_out(target, load, now)
        target.blocked_until = target.unreachable_until
        target.slow_for = _QUICK_AGAIN
        self._file(target)

    def refused(self, target: Target, load: int, now: float, size: int = 0) -> None:
        """A replica did not take a call of so many bytes: leave it alone for a moment."""
        self._count_out(target, load, now)
        target.blocked_until = max(now + RETRY_S + size * _RESENDING_S, target.unreachable_until)
        self._file(target)

    def welcomed(self, target: Target, places: int) -> bool:
        """A replica that refused a call has a place for one now, as it tells each caller in turn.

        Args:
            target: The replica.
            places: Just this one, or more: then there are no other callers that want any.

        Returns:
            Whether there is a call for it, which is to go there (`next_placements`).
        """
        busy = target.in_flight
        if not self.waiting or target.gone or busy >= target.limit or (busy and target.slow_for):
            return False
        target.in_turn = places == 1
        return True

    def withdrawn(self, target: Target) -> None:
        """A call that was placed was not sent after all, for reasons of its own."""
        target.in_flight -= 1
        self._file(target)

    def unreachable(self, target: Target, lost: int, now: float) -> None:
        """A replica cannot be reached, and so many calls are lost there: leave it alone for a while.

        Then it gets one call, and no others until it has answered that or had a moment to. A machine that is gone does
        not refuse connections, and every call that found it idle would wait for one.
        """
        target.in_flight -= lost
        target.slow_for = target.slow_for or 1
        target.doubted = True
        target.blocked_until = target.unreachable_until = now + UNREACHABLE_S
        self._file(target)

    def _count_out(self, target: Target, load: int, now: float) -> None:
        target.in_flight -= 1
        target.heard_at = now
        if target.doubted:  # it can be reached
            target.doubted, target.slow_for = False, 0
        if load > target.in_flight:
            target.elsewhere, target.elsewhere_at = load - target.in_flight, now
        else:
            target.elsewhere = 0

    # -- choosing ------------------------------------------------------------------------------------------------------

    def some_blocked(self, now: float) -> bool:
        """Whether a replica is left alone for a while, after which calls that wait may find room."""
        return any(target.blocked_until > now or target.doubted for target in self._resting)

    def choose(self, now: float) -> Target | None:
        """An idle replica if there is one, any; else the less busy of two with room, picked at random.

        Those come last that have answered nothing for much longer than replicas of this backend usually take: they may
        be stopped, or stuck.

        Lu et al., "Join-Idle-Queue: A novel load balancing algorithm for dynamically scalable web services" (2011);
        Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001).
        """
        if self._rested_at <= now:
            self._look_at_resting(now)
        idle = self._idle
        if idle:
            count = len(idle)
            return idle[0] if count == 1 else idle[int(_random() * count)]
        roomy = self._roomy
        count = len(roomy)
        while count > 1:
            patience_s = _MUCH_LONGER * self._usual_s
            heard_since = now - (patience_s if patience_s > _SILENT_S else _SILENT_S)
            first = int(_random() * count)
            second = int(_random() * (count - 1))
            one, other = roomy[first], roomy[second + (second >= first)]
            if one.heard_at < heard_since and self._is_silent(one):
                silent = one
            elif other.heard_at < heard_since and self._is_silent(other):
                silent = other
            else:
                return other if other.busyness(now) < one.busyness(now) else one
            if self._worth_a_try(silent, now):
                return silent
            count = len(roomy)
        if count:
            return roomy[0]
        return min(self._aside, key=lambda target: target.busyness(now), default=None)

    def _is_silent(self, target: Target) -> bool:
        """Of one that was not heard for long: whether it has something to answer, and any of them ever did."""
        return target.in_flight > 0 and self._usual_s > 0.0

    def _worth_a_try(self, target: Target, now: float) -> bool:
        """Whether to give a silent target a call, to see; if not, it is put aside."""
        worth = target.heard_at < target.try_at <= now
        if worth:
            target.tried_at = now
        silent_s = now - target.heard_at if target.heard_at < target.tried_at else 0.0
        target.try_at = now + max(_ASIDE_S, silent_s)
        if not worth:
            target.aside_at = target.heard_at
            self._file(target)
        return worth

    def _file(self, target: Target) -> None:
        """Put a target into the list where it belongs, now that something about it has changed."""
        busy = target.in_flight
        pool: list[Target] | None
        if target.gone or busy >= target.limit or (busy and target.slow_for):
            pool = None
            if target.doubted and not target.gone:
                self._rest(target, target.heard_at + _SILENT_S)
        elif target.blocked_until:
            pool = None
            self._rest(target, target.blocked_until)
        elif busy and target.aside_at == target.heard_at:
            pool = self._aside
            self._rest(target, target.try_at)
        elif busy or target.slow_for:  # others may be at a long call there, though nothing has been heard of it since
            pool = self._roomy
        elif target.elsewhere:
            pool = self._roomy
            self._rest(target, target.elsewhere_at + _FRESH_S)
        else:
            pool = self._idle
        before = target.pool
        if before is pool:
            return
        if before is not None:
            last = before.pop()
            if last is not target:
                before[target.position] = last
                last.position = target.position
        target.pool = pool
        if pool is not None:
            target.position = len(pool)
            pool.append(target)

    def _rest(self, target: Target, until: float) -> None:
        self._resting[target] = until
        self._rested_at = min(self._rested_at, until)

    def _look_at_resting(self, now: float) -> None:
        """File those anew of which it is not known any more that they are blocked, or at the calls of others."""
        rested = [target for target, until in self._resting.items() if until <= now]
        for target in rested:
            del self._resting[target]
        self._rested_at = min(self._resting.values(), default=math.inf)
        for target in rested:
            if target.blocked_until <= now:
                target.blocked_until = target.unreachable_until = 0.0
                target.in_turn = False
            if target.elsewhere_at + _FRESH_S <= now:
                target.elsewhere = 0
            if target.try_at <= now:
                target.aside_at = -1.0
            if target.doubted and target.in_flight and target.heard_at + _SILENT_S <= now:
                target.doubted, target.slow_for = False, 0
            self._file(target)


def _half(call: Call) -> str:
    return ", of which calls of low priority have half" if call.priority else ""


def _is_late(copy: Slot, now: float) -> bool:
    deadline = copy.call.deadline
    return now - copy.since > _COPY_PATIENCE_S or (deadline is not None and now > deadline)
