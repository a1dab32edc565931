"""The order of calls that reach an async actor, which runs what it is sent in any order.

Numbers bring back the order in which a caller made its calls. A number that does not come (its call was lost) is not
waited for long.
"""

from __future__ import annotations

import asyncio

__all__ = ["Turns"]

_PATIENCE_S = 0.05
"""Calls overtake each other by microseconds."""


class Turns:
    """Lets the calls of each source go in the order of their numbers. Belongs to one event loop."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self._waiting: dict[tuple[str, int], asyncio.Future[None]] = {}

    async def take(self, source: str, number: int) -> None:
        """Return when all calls of this source with lower numbers, from 0 on, have taken their turns.

        Does not suspend when it is this call's turn already.
        """
        if number > self._next.get(source, 0):
            await self._await_turn(source, number)
        self._next[source] = max(self._next.get(source, 0), number + 1)
        follower = self._waiting.get((source, number + 1))
        if follower is not None:
            _release(follower)

    async def _await_turn(self, source: str, number: int) -> None:
        loop = asyncio.get_running_loop()
        turn = self._waiting[source, number] = loop.create_future()
        timer = loop.call_later(_PATIENCE_S, self._release_up_to, source, number)
        try:
            await turn
        finally:
            timer.cancel()
            del self._waiting[source, number]

    def _release_up_to(self, source: str, number: int) -> None:
        """Let this call go, and before it those that came later though they were made earlier."""
        for other, earlier in sorted(self._waiting):
            if other == source and earlier <= number:
                _release(self._waiting[other, earlier])


def _release(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
