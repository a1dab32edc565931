"""What is done with the replicas of one backend: it is created, changed, renewed, and its dead are replaced.

Runs on the controller's loop. Callers learn of nothing here before the controller publishes it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..errors import Superseded
from ..seam.log import Log
from .backend_plan import BackendPlan
from .backoff import backoff_s
from .reconfiguring import Reconfiguring
from .refill import Refill
from .replica_pool import Departures, Due, Means, ReplicaPool
from .rolling import Rolling
from .rollout import Room
from .turns import GaveWay, Turns
from .workers import Worker

__all__ = ["BackendReplicas"]

_logger = Log("engine.controller")


class BackendReplicas(ReplicaPool):
    """The replicas of one backend, and what can be done with them.

    Args:
        means: How they are started and kept, and callers told of them.
        plan: What they run.

    Attributes:
        turns: Of those who change what is wanted. Replicas that died are replaced meanwhile.
    """

    def __init__(self, means: Means, plan: BackendPlan) -> None:
        super().__init__(means, plan)
        self.turns = Turns()
        self._renewing = False
        self._refill = Refill(self)
        self._rolling = Rolling(self, self._refill, interrupted=lambda: self.turns.interrupted)
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
            await self.take_back(self.running)
            raise

    def amended(self, given: BackendPlan, *, keep_resources: bool) -> BackendPlan:
        """A new plan that keeps of the one that rules what ``given`` leaves open.

        Args:
            given: The new plan, but its configuration has just the fields that change.
            keep_resources: Whether a replica needs what one of the former version did.

        Raises:
            InvalidArgument: What is given does not fit the configuration.
        """
        resources = self.plan.resources if keep_resources else given.resources
        plan = replace(given, config=self.config.updated(given.config), resources=resources)
        plan.check(plan.config)
        return plan

    async def replace(self, plan: BackendPlan) -> Departures:
        """Run something else: in steps as `Room` allows, its replicas take the places of those that run.

        It rules once none of the former version is in service; should the controller die before, the next one returns
        to that.

        Returns:
            What ends the former replicas.

        Raises:
            Superseded: Somebody else wants to run something else again, and takes over from what there is now.
            BaseException: What a new replica's constructor raised, why it did not become ready, or why the store does
                not keep the change. Then all is as before; former replicas that had made room are started again.
        """
        self.try_anew()
        departures: list[asyncio.Task[None]] = []
        plan = replace(plan, version=self._next_version())
        try:
            await self.turns.exchange(self._rolling.roll(plan, self.publish, departures))
        except GaveWay:
            if self.deleted:
                raise self.deleted_error() from None
            raise Superseded(f"backend {self.plan.tag!r}: a newer update came before this one was done") from None
        except BaseException:
            if departures or self.outdated:
                with suppress(GaveWay):
                    await self.turns.exchange(self._rolling.settle())
            raise
        return departures

    def _next_version(self) -> int:
        """Of which there is no replica: some may be left of one that was rolled back."""
        return 1 + max(self.plan.version, *[worker.version for worker in self.all_ready()], 0)

    async def renew(self) -> None:
        """Exchange the replicas that are due; if others do not start, they go on until some do.

        Those first that are not well. Whoever changes the backend meanwhile does not wait for that.
        """
        if self._renewing:
            return
        self._renewing = True
        failed = 0
        try:
            while self.due and not self.deleted:
                if failed:
                    await self.pause(backoff_s(failed))
                if self.dismissals:
                    await asyncio.wait(self.dismissals)
                async with self.turns.background():
                    due = [one for one in self.running if one in self.marked]
                    due.sort(key=lambda one: self.marked[one])
                    few = due[: Room.for_few(self.config).at_a_time]  # they may wear out as fast as that goes
                    with suppress(GaveWay):
                        done = await self.turns.exchange(self._rolling.settle(few), background=True)
                        failed = 0 if done else failed + 1
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
        if worker not in self.running or (self.marked.get(worker) is Due.ILL and not at_once):
            return
        if at_once:
            self._dead.append(worker.spec.worker_id)
            self.count_loss(worker, reason)
            self.dismiss([worker], at_once=True)
            await self._refill.fill()
            return
        self.note_loss(worker, reason)
        self.marked[worker] = Due.ILL
        await self.renew()

    def mark_worn(self, worker: Worker, reason: str, *, from_start: bool = False) -> bool:
        """Have `renew` exchange a replica in service that has done its share; returns whether there is reason to.

        Args:
            worker: The replica.
            reason: Why, for the log: follows its name.
            from_start: It would soon be the same with another one: so only now and then. It says so again and again.
        """
        if worker in self.marked:
            return False
        if from_start and not self.recycling.allows(time.monotonic()):
            if self.notice is None:
                self.notice = (
                    f"{worker.spec.name} {reason}, and so it was at its first calls: another one in its place is no "
                    "better. That is tried more and more rarely: raise max_rss_mb, or have replicas need less"
                )
                _logger.warning("backend %r: %s", self.plan.tag, self.notice)
            return False
        _logger.info("%s %s; another one takes its place", worker.spec.name, reason)
        self.marked[worker] = Due.WORN
        return True

    async def update(self, changes: Any) -> Departures:
        """Change the configuration; see `Reconfiguring.update`."""
        return await self._reconfiguring.update(changes)

    async def refill(self) -> None:
        """Start the replicas that are missing; see `Refill.fill`."""
        await self._refill.fill()

    async def end_fills(self) -> None:
        """As a backend that is deleted does: start no more; returns when nothing is left of what was starting."""
        await self._refill.end()
