"""What is done with the replicas of one backend: it is created, changed, renewed, and its dead are replaced.

Runs on the controller's loop. Callers learn of nothing here before the controller publishes it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from ..seam.log import Log
from .backend_plan import BackendPlan
from .backoff import backoff_s
from .reconfiguring import Reconfiguring
from .refill import Refill
from .replica_pool import Means, ReplicaPool
from .rolling import Rolling
from .rollout import Room
from .workers import Worker

__all__ = ["BackendReplicas"]

_logger = Log("engine.controller")


class BackendReplicas(ReplicaPool):
    """The replicas of one backend, and what can be done with them.

    Args:
        means: How they are started and kept, and callers told of them.
        plan: What they run.

    Attributes:
        lock: Held by whoever changes what is wanted. Replicas that died are replaced meanwhile.
    """

    def __init__(self, means: Means, plan: BackendPlan) -> None:
        super().__init__(means, plan)
        self.lock = asyncio.Lock()
        self._renewing = False
        self._refill = Refill(self)
        self._rolling = Rolling(self, self._refill)
        self._reconfiguring = Reconfiguring(self, self._refill)

    async def create(self) -> None:
        """Start as many replicas as are wanted, and be there.

        Raises:
            BaseException: What a replica's constructor raised, why it did not become ready, or why the store does not
                keep the backend. Then no replica of it is left.
        """
        try:
            self.running = await self.start(self.plan, self.missing)
            self.live = True
            self.publish()
        except BaseException:
            self.live, self.deleted = False, True
            await self.end(self.running, at_once=True)
            raise

    async def amend(self, given: BackendPlan, *, keep_resources: bool) -> None:
        """Run something else, and keep of the former plan what ``given`` leaves open.

        Args:
            given: The new plan, but its configuration has just the fields that change.
            keep_resources: Whether a replica needs what one of the former version did.

        Raises:
            InvalidArgument: What is given does not fit the configuration.
            BaseException: See `replace`.
        """
        resources = self.plan.resources if keep_resources else given.resources
        plan = replace(given, config=self.config.updated(given.config), resources=resources)
        plan.check(plan.config)
        await self.replace(plan)

    async def replace(self, plan: BackendPlan) -> None:
        """Run something else: in steps as `Room` allows, its replicas take the places of those that run.

        It rules once none of the former version is in service; should the controller die before, the next one returns
        to that. Returns when the former replicas have ended.

        Raises:
            BaseException: What a new replica's constructor raised, why it did not become ready, or why the store does
                not keep the change. Then all is as before; former replicas that had made room are started again.
        """
        self.try_anew()
        departures: list[asyncio.Task[None]] = []
        try:
            await self._rolling.roll(replace(plan, version=self._next_version()), self.publish, departures)
        except BaseException:
            if departures or self.outdated:
                await self._rolling.settle()
            raise
        await asyncio.shield(asyncio.gather(*departures))

    def _next_version(self) -> int:
        """Of which there is no replica: some may be left of one that was rolled back."""
        return 1 + max(self.plan.version, *[worker.version for worker in self.all_ready()], 0)

    async def renew(self) -> None:
        """Exchange the replicas that are due; if others do not start, they go on until some do."""
        if self._renewing:
            return
        self._renewing = True
        failed = 0
        try:
            while self.due and not self.deleted:
                if failed:
                    await asyncio.sleep(backoff_s(failed))
                if self.dismissals:
                    await asyncio.wait(self.dismissals)
                # A few at a time, so that nobody waits long for the lock: they may wear out as fast as that goes.
                async with self.lock:
                    worn = [worker for worker in self.running if worker in self.marked]
                    failed = (
                        0 if await self._rolling.settle(worn[: Room.for_few(self.config).at_a_time]) else failed + 1
                    )
        finally:
            self._renewing = False
        await self._refill.fill()  # what made room for others that did not start has left its place empty

    async def replace_one(self, worker: Worker, reason: str, *, at_once: bool = False) -> None:
        """Have another replica take the place of one; does nothing if that is not in service, or not any more.

        Args:
            worker: The replica to be replaced.
            reason: Why, for the log: follows its name.
            at_once: It is of no use any more, and is ended before there is another. Otherwise it serves until then,
                finishes what it holds, and goes on if the other one does not start.
        """
        if worker not in self.running or (worker in self.marked and not at_once):
            return
        if at_once:
            self._dead.append(worker.spec.worker_id)
            self.count_loss(worker, reason)
            self.dismiss([worker], at_once=True)
            await self._refill.fill()
            return
        self.note_loss(worker, reason)
        self.marked.add(worker)
        async with self.lock:
            if worker in self.marked and not self.deleted and not await self._rolling.settle([worker]):
                self.marked.discard(worker)  # until it asks again
        await self._refill.fill()  # it may have made room, or others may have died, and the other one did not start

    def mark_worn(self, worker: Worker, reason: str) -> bool:
        """Have `renew` exchange a replica in service that has done its share; returns whether it is not to be anyway.

        Args:
            worker: The replica.
            reason: Why, for the log: follows its name.
        """
        if worker in self.marked:
            return False
        _logger.info("%s %s; another one takes its place", worker.spec.name, reason)
        self.marked.add(worker)
        return True

    async def update(self, changes: Any) -> None:
        """Change the configuration; see `Reconfiguring.update`."""
        await self._reconfiguring.update(changes)

    async def refill(self) -> None:
        """Start the replicas that are missing; see `Refill.fill`."""
        await self._refill.fill()

    async def end_fills(self) -> None:
        """As a backend that is deleted does: start no more; returns when nothing is left of what was starting."""
        await self._refill.end()
