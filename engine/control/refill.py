"""Starting the replicas of one backend that are missing: side by side, each as often as it takes.

Runs on the controller's loop.
"""

from __future__ import annotations

import asyncio
import math
import time

from .replica_pool import ReplicaPool

__all__ = ["Refill"]


class Refill:
    """Fills the places of replicas that died, or did not start.

    Args:
        pool: Has the replicas.

    Attributes:
        fills: One task for each replica that is missing.
        paused: What replicas are told is being changed: none is started with what was told before.
    """

    def __init__(self, pool: ReplicaPool) -> None:
        self._pool = pool
        self.fills: set[asyncio.Task[None]] = set()
        self.paused = False

    @property
    def _short(self) -> int:
        """How many replicas there are too few, but for those that are left out while others are exchanged."""
        pool = self._pool
        return (pool.config.num_replicas if pool.room is None else pool.room.least) - len(pool.running)

    @property
    def _room(self) -> float:
        """How many more there may be. An exchange that leaves none starts what is missing itself once there is some."""
        pool = self._pool
        there = len(pool.running) + pool.still_leaving + pool.coming
        return math.inf if pool.room is None else pool.room.most - there

    async def fill(self) -> None:
        """Start the replicas that are missing, side by side, each as often as it takes."""
        waits, self._pool.waits = self._pool.waits, []
        count = 0 if self.paused else max(0, int(min(self._short, self._room)) - len(self.fills))
        waits_s = (waits + [0.0] * count)[:count]
        fills = [asyncio.get_running_loop().create_task(self._fill(wait_s)) for wait_s in waits_s]
        self.fills.update(fills)
        for outcome in await asyncio.gather(*fills, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _fill(self, wait_s: float) -> None:
        """Start one replica, until one is ready or no longer missing."""
        pool = self._pool
        fill = asyncio.current_task()
        assert fill is not None
        try:
            await asyncio.sleep(wait_s)
            while fill in self.fills and not pool.deleted and self._short > 0:  # what it waits for may swallow its end
                began = time.monotonic()
                try:
                    worker = await pool.start_one(pool.plan, pool.next_number())
                except Exception as error:
                    if pool.deleted or fill not in self.fills:
                        return
                    pool.start_failed(error, began)
                    pool.announce()
                    await pool.pause(pool.restarts.not_before - time.monotonic())
                    continue
                if pool.deleted or self._short <= 0 or fill not in self.fills:  # meanwhile
                    pool.let_go([worker], at_once=True)
                    return
                pool.running.append(worker)
                pool.announce()
                return
        finally:
            self.fills.discard(fill)

    async def recall(self) -> None:
        """As `give_up`; returns when those that were starting hold nothing any more that others may need."""
        fills = self.give_up()
        if fills:
            await asyncio.wait(fills)

    def give_up(self) -> set[asyncio.Task[None]]:
        """Start no more of those that are missing, and let nothing be left of those that are starting.

        Returns:
            What is about to end for that.
        """
        fills, self.fills = self.fills, set()
        for fill in fills:
            fill.cancel()
            self._pool.dismissals.add(fill)
            fill.add_done_callback(self._pool.dismissals.discard)
        return fills

    async def end(self) -> None:
        """As a backend that is deleted does: start no more; returns when nothing is left of what was starting."""
        self.give_up()
        await asyncio.gather(*self._pool.dismissals, return_exceptions=True)
