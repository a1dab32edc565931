"""Whose call a replica takes next that holds as many as it may. Pure: times are passed in.

A full replica refuses calls, which wait with their callers then. It remembers those callers, and whenever a place
becomes free, it tells the next of them, one after the other and round again, and keeps the place for it for a moment.
Otherwise a caller with many calls, which sends the next one as soon as one is answered, would leave nothing to others,
who can only look now and then. One that has nothing to send any more says so, and is forgotten until it is refused
again.

Callers whose calls are of low priority come after the others, but every tenth turn is theirs, as in
`engine.calling.line`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from ..calling.line import MOST_PASSED
from ..seam.channel import Channel
from ..seam.messages import LOW, NORMAL, Call

__all__ = ["KEPT_S", "Turns", "next_of"]

KEPT_S: Final = 0.05
"""How long a place is kept for a caller that was told of it: it may have stopped, or be busy itself."""


class Turns:
    """The callers that a full replica has refused, and who of them gets the next place.

    They are in one row, in the order in which they were told of a place last: also those that want none just now, so
    that one which comes back has lost nothing by that.
    """

    __slots__ = ("_kept", "_passed", "_row", "_wants")

    def __init__(self) -> None:
        self._row: dict[Channel, None] = {}
        self._wants: dict[Channel, bool] = {}  # who wants a place, and whether only for a call of low priority
        self._kept: dict[Channel, float] = {}  # for whom places are kept, and until when
        self._passed = 0  # turns in a row while a caller waited that has only calls of low priority

    def __bool__(self) -> bool:
        return bool(self._wants or self._kept)

    def __repr__(self) -> str:
        return f"<Turns row={len(self._row)} wants={len(self._wants)} kept={len(self._kept)}>"

    @property
    def kept(self) -> int:
        """How many places are kept for callers that are on their way."""
        return len(self._kept)

    def refused(self, channel: Channel, *, low: bool) -> None:
        """A caller's call was refused: it wants a place, and has a turn from now on."""
        self._row.setdefault(channel)
        self._wants[channel] = low and self._wants.get(channel, True)

    def next(self, now: float) -> Channel | None:
        """Keep a place for the caller whose turn it is, which goes to the end of the row. None: nobody wants one."""
        waiting = [channel for channel in self._row if channel in self._wants and channel not in self._kept]
        first_low = next((channel for channel in waiting if self._wants[channel]), None)
        chosen = next((channel for channel in waiting if not self._wants[channel]), None)
        if first_low is None:
            self._passed = 0
        elif chosen is None or self._passed >= MOST_PASSED:
            self._passed = 0
            chosen = first_low
        else:
            self._passed += 1
        if chosen is not None:
            del self._row[chosen]
            self._row[chosen] = None
            self._kept[chosen] = now + KEPT_S
        return chosen

    def came(self, channel: Channel) -> None:
        """A caller sends a call, and takes the place that was kept for it, if one was."""
        self._kept.pop(channel, None)

    def only(self, channel: Channel) -> bool:
        """Whether no other caller wants a place."""
        return len(self._wants) == 1 and channel in self._wants

    def lapse(self, now: float) -> None:
        """Keep no places any longer for callers that have not come in time."""
        for channel in [channel for channel, until in self._kept.items() if until <= now]:
            self.declined(channel)

    def declined(self, channel: Channel) -> None:
        """A caller wants no place until it is refused again."""
        self._wants.pop(channel, None)
        self._kept.pop(channel, None)

    def forget(self, channel: Channel) -> None:
        """A caller is gone (idempotent)."""
        self.declined(channel)
        self._row.pop(channel, None)


class Held(Protocol):
    """A call that a replica holds (`engine.serving.replica.Job`)."""

    @property
    def call(self) -> Call:
        """The call."""

    @property
    def channel(self) -> Channel:
        """Of its caller."""


def next_of(jobs: Iterable[Held], passed: int, last: Channel | None) -> tuple[int, int]:
    """Which of the calls that wait in a replica is next: by priority, then another caller's, then in order.

    Args:
        jobs: The calls, at least one.
        passed: How many of normal priority were next in a row while one of low priority waited.
        last: The caller whose call was next before.

    Returns:
        Its place, and what is ``passed`` from then on.
    """
    first: list[int | None] = [None, None]
    first_of_others: list[int | None] = [None, None]
    for place, job in enumerate(jobs):
        priority = job.call.priority
        if first[priority] is None:
            first[priority] = place
        if first_of_others[priority] is None and job.channel is not last:
            first_of_others[priority] = place
    normal, low = (
        first[which] if first_of_others[which] is None else first_of_others[which] for which in (NORMAL, LOW)
    )
    if normal is not None and (low is None or passed < MOST_PASSED):
        return normal, 0 if low is None else passed + 1
    assert low is not None
    return low, 0
