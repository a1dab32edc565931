"""Replicas in steps take the places of others: those of a new version, or of those that are due.

What is started and let go next is decided by `rollout.Room`. Runs on the controller's loop, by whoever holds the
backend's lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ..errors import BackendStartError, EngineClosed
from ..seam.error_text import summary_of
from .backend_plan import BackendPlan
from .refill import Refill
from .replica_pool import ReplicaPool
from .rollout import Room
from .workers import Worker

__all__ = ["Rolling"]

_UNSTABLE_AFTER = 3
"""Replicas of a new version that died while it took over after which it is taken for one that does not start."""


class Rolling:
    """Exchanges replicas of one backend.

    Args:
        pool: Has the replicas.
        refill: Starts those that die meanwhile.
        interrupted: Whether the exchange that goes on is to end.
    """

    def __init__(self, pool: ReplicaPool, refill: Refill, *, interrupted: Callable[[], bool] = lambda: False) -> None:
        self._pool = pool
        self._refill = refill
        self._interrupted = interrupted

    async def settle(self, worn: Collection[Worker] = ()) -> bool:
        """Exchange these replicas, and those of another version; returns whether that is done.

        Why a replica did not start is logged.
        """
        pool = self._pool
        try:
            await self.roll(pool.plan, pool.announce, [], worn=worn)
        except EngineClosed:
            return False
        except Exception as error:
            if not pool.deleted:
                pool.note(summary_of(error))
                pool.log_failure(error)
            return False
        return True

    async def roll(
        self,
        plan: BackendPlan,
        publish: Callable[[], Any],
        departures: list[asyncio.Task[None]],
        *,
        worn: Collection[Worker] = (),
    ) -> None:
        """Exchange the replicas that do not run this version for some that do; then it rules.

        Args:
            plan: What is to rule.
            publish: Keeps each step and lets callers know.
            departures: Gets what ends those that were taken out of service. They finish what they hold meanwhile.
            worn: Replicas that are to be exchanged, too.

        Raises:
            BaseException: Why a replica did not start, or why the store does not keep a step. The steps before stay.
        """
        pool = self._pool
        versions = plan is not pool.plan or pool.outdated
        room = Room.between(pool.config, plan.config) if versions else Room.for_few(plan.config)
        arrived: set[Worker] = set()
        begun = 0

        def apart(running: Sequence[Worker]) -> tuple[list[Worker], list[Worker]]:
            """Those that are to be exchanged and those that stay; of each the oldest first."""
            old = [worker for worker in running if worker.version != plan.version or worker in worn]
            return old, [worker for worker in running if worker not in old]

        pool.arriving, pool.room = plan, room
        try:
            while pool.plan is not plan or apart(pool.running)[0] or pool.missing > len(self._refill.fills):
                if self._interrupted():
                    raise asyncio.CancelledError
                if begun - len(arrived.intersection(pool.running)) >= _UNSTABLE_AFTER:
                    raise BackendStartError(
                        f"backend {plan.tag!r}: replicas of the new version end soon after they are ready; the last "
                        f"one: {pool.last_error}"
                    )
                old, new = apart(pool.running)
                count = room.to_start(len(old), len(new), pool.still_leaving)
                if count and self._refill.fills:  # there is no room for both, and perhaps they never start
                    await self._refill.recall()
                    continue
                pool.coming = count
                try:
                    started = await pool.start(plan, count)
                finally:
                    pool.coming = 0
                begun += count
                arrived.update(started)
                old, new = apart([*pool.running, *started])  # some may have died meanwhile
                going = old[: room.to_let_go(len(old), len(new))]
                staying = old[len(going) :]
                rules = not staying and len(new) >= plan.config.num_replicas
                # Those that died were replaced meanwhile, and so may have been some for which others had been started.
                surplus = [one for one in reversed(new) if one not in arrived][: max(0, len(new) - room.wanted)]
                going += surplus
                staying += [one for one in new if one not in surplus]
                if not count and not going:
                    if not pool.dismissals:  # those that leave are ended by the shutdown
                        raise EngineClosed("the engine was shut down")
                    await asyncio.wait(pool.dismissals, return_when=asyncio.FIRST_COMPLETED)
                    continue
                await self._step(plan if rules else pool.plan, staying, started, publish)
                departures += pool.let_go(going)
        finally:
            pool.arriving = pool.room = None

    async def _step(
        self, plan: BackendPlan, running: list[Worker], started: list[Worker], publish: Callable[[], Any]
    ) -> None:
        """Let this plan rule and these replicas be in service.

        Raises:
            BaseException: Why the store does not keep that. Then those that were started for it are gone.
        """
        pool = self._pool
        before = pool.plan, pool.running
        pool.plan, pool.running = plan, running
        try:
            publish()
        except BaseException:
            pool.plan, pool.running = before
            await pool.take_back(started)
            raise
        if pool.plan.version != before[0].version:
            self._refill.give_up()
