"""When a call that may have begun is repeated: the decisions. Pure: times and counts are passed in.

Calls that have not begun are no business of this module, but for one thing: what kills replicas before they begin
anything must not go round for ever.
"""

from __future__ import annotations

import math
from typing import Final

from ..seam.messages import AS_CONFIGURED, AS_CONFIGURED_FOR_POSTS

__all__ = ["MOST_DEATHS", "MOST_LOSSES", "Past", "RetryBudget", "allowance", "pause_s"]

MOST_DEATHS: Final = 2
"""A call that so many replicas died of, for all that is known, is given to no other one."""
MOST_LOSSES: Final = 16
"""The same of a call with which so many died before they had begun any: reading it may be what kills them."""
_FRACTION = 0.2
_SPARE = 10.0
_WINDOW_S = 10.0
_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0


class Past:
    """What has become of a call so far, by the numbers under which it was sent: noting one twice changes nothing.

    Attributes:
        deaths: Those under which it may have begun when its replica died.
        losses: Those under which it had not, and no other call either.
        repeats: Those after which it was repeated.
    """

    __slots__ = ("deaths", "losses", "repeats")

    def __init__(self) -> None:
        self.deaths: set[int] = set()
        self.losses: set[int] = set()
        self.repeats: set[int] = set()


class RetryBudget:
    """How many calls of one endpoint a caller may repeat: a fifth of those of the last ten seconds or so, and a few.

    Repeats then cannot multiply an outage: where everything fails, there are at most 20 % more calls.
    """

    __slots__ = ("_at", "_calls", "_recent", "_spent")

    def __init__(self, calls: int, now: float) -> None:
        self._calls = calls  # that were counted when it was looked at last
        self._at = now
        self._recent = float(calls)  # calls and repeats, of which those that are long ago count for little
        self._spent = 0.0

    def spend(self, calls: int, now: float) -> bool:
        """Take one repeat from it; False if none is left.

        Args:
            calls: How many calls the endpoint has had, ever.
            now: The time, which does not go back.
        """
        passed_s = max(0.0, now - self._at)
        faded = math.exp(-passed_s / _WINDOW_S)
        came = max(0, calls - self._calls)
        # They came evenly, as far as is known: the first of them have faded, too.
        self._recent = self._recent * faded + came * (_WINDOW_S * (1 - faded) / passed_s if passed_s else 1.0)
        self._spent *= faded
        self._calls, self._at = calls, now
        if self._spent + 1 > _FRACTION * self._recent + _SPARE:
            return False
        self._spent += 1
        return True


def allowance(retries: int, most: int, *, posts: bool) -> int:
    """How often a call may be repeated.

    Args:
        retries: What the call itself says (`engine.seam.messages.Call.retries`).
        most: What its backend says.
        posts: Whether the backend says so of POST and PATCH, too.
    """
    if retries == AS_CONFIGURED:
        return most
    if retries == AS_CONFIGURED_FOR_POSTS:
        return most if posts else 0
    return retries


def pause_s(repeats: int, chance: float) -> float:
    """How long to wait before a call is repeated.

    Args:
        repeats: How often it was repeated before.
        chance: From 0 to 1, at random, so that calls which failed together do not come back together.
    """
    return float(min(_PAUSE_S * 2 ** min(repeats, 16), _LONGEST_PAUSE_S) * (0.5 + chance))  # no float holds 2**1024
