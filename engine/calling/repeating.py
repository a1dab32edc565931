"""What becomes of one call that has failed, or whose replica has died: is it repeated, and if not, what is it told?

Called by the caller that has the call, under its lock; `engine.calling.retries` has the rules. Deciding the same thing
a second time changes nothing, so that whoever is struck by a signal handler in its midst does it again.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from ..errors import ReplicaDied
from .answers import CopySlot
from .replica_set import ReplicaSet, Target
from .retries import MOST_DEATHS, MOST_LOSSES, Past, RetryBudget, allowance, pause_s
from .router import Endpoint, Router
from .slot import Slot

__all__ = ["Repeat", "died_before", "died_with", "repeat"]


class Repeat(NamedTuple):
    """A call is repeated.

    Attributes:
        replica_set: Where it pauses now (`ReplicaSet.pausing`), to be placed again.
        delay_s: After so many seconds.
    """

    replica_set: ReplicaSet
    delay_s: float


def repeat(slot: Slot, call_id: int, router: Router, now: float, *, died: bool, closed: bool) -> Repeat | str:
    """Repeat a call that has begun, or may have, if that is allowed.

    Args:
        slot: Its slot.
        call_id: The number under which it was sent.
        router: The caller's.
        now: The time.
        died: Whether its replica has died, and not said itself that the call may be repeated.
        closed: Whether the caller takes no more calls.

    Returns:
        The repeat, or why there is none, as part of a sentence.
    """
    replica_set: ReplicaSet = slot.target.replica_set
    most = allowance(slot.call.retries, replica_set.max_retries, posts=replica_set.retry_posts)
    if not most or (died and not replica_set.retry_deaths) or isinstance(slot, CopySlot):
        return ", and the call may have run: repeat it only if that is safe"
    past = slot.remember()
    if died:
        past.deaths.add(call_id)
        if len(past.deaths) >= MOST_DEATHS:
            return f"; {MOST_DEATHS} have died with this call, so it is given to no other: it may be what they die of"
    delay_s = pause_s(len(past.repeats), random.random())
    if call_id not in past.repeats:  # else whoever decided it was struck
        endpoint = None if closed else router.endpoints.get(slot.endpoint)
        why = _why_not(slot, past, most, endpoint, now, delay_s)
        if why is not None:
            return f"; the call is not repeated{' any more' if past.repeats else ''}: {why}"
        past.repeats.add(call_id)
    if slot.call_id == call_id and slot.queue is None and slot not in slot.target.holds:
        slot.come_back()  # now: its thread may drive a channel on which nothing will come
        if router.replica_sets.get(replica_set.tag) is not replica_set and slot.endpoint in router.endpoints:
            # Its backend was deleted: whoever ends the calls that wait does not look there any more.
            replica_set, _ = router.route(slot.endpoint, slot.shard_key)
        replica_set.pausing[slot] = None
    return Repeat(replica_set, delay_s)


def _why_not(slot: Slot, past: Past, most: int, endpoint: Endpoint | None, now: float, delay_s: float) -> str | None:
    deadline = slot.call.deadline
    if len(past.repeats) >= most:
        return f"max_retries={most}"
    if hasattr(slot, "spoken"):
        return "a part of its answer has been delivered"
    if deadline is not None and now + delay_s >= deadline:
        return "its time is nearly over"
    if endpoint is None:
        return "its endpoint is gone"
    if endpoint.budget is None:
        endpoint.budget = RetryBudget(endpoint.calls, now)
    if not endpoint.budget.spend(endpoint.calls, now):
        return f"too many of those of endpoint {slot.endpoint!r} are"
    return None


def died_before(target: Target, reason: str) -> ReplicaDied:
    """What a call is told with which too many replicas have died before they began anything."""
    return ReplicaDied(
        f"replica {target.replica_tag} died before it began this call ({reason}), as {MOST_LOSSES} did one after the "
        "other, so it is not given to another one: reading it may be what they die of"
    )


def died_with(target: Target, reason: str, advice: str) -> ReplicaDied:
    """What a call is told that had begun, or may have, and is not repeated; ``advice`` says why, as `repeat` does."""
    fate = "it was ended on purpose" if target.gone and not target.dead else "it is being replaced"
    return ReplicaDied(
        f"replica {target.replica_tag} died while it held this call ({reason}); {fate}{advice}. How it ended is told "
        "by the log (engine.controller) and by last_error in engine.statistics()"
    )
