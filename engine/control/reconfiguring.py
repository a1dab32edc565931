"""A backend gets another configuration: replicas are told, and as many as are wanted then are started or end.

Runs on the controller's loop, by whoever holds the backend's lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container
from dataclasses import replace
from typing import Any

from ..config import BackendConfig
from ..seam.log import Log
from ..seam.serialization import dumps
from .refill import Refill
from .replica_pool import Departures, ReplicaPool
from .workers import Life, Worker

__all__ = ["Reconfiguring"]

_logger = Log("engine.controller")


class Reconfiguring:
    """Changes the configuration of one backend.

    Args:
        pool: Has the replicas.
        refill: Starts those that are missing; not while others are told.
    """

    def __init__(self, pool: ReplicaPool, refill: Refill) -> None:
        self._pool = pool
        self._refill = refill

    async def update(self, changes: Any) -> Departures:
        """Change the configuration.

        If ``reconfigure`` raises in some replicas, the others return to the former configuration, which rules. If a new
        replica does not start, all of the change rules but the number of replicas. If the store does not keep the
        change, nothing of it rules. A replica that refuses to return is replaced, and so is one that dies meanwhile or
        takes longer than ``reconfigure_timeout_s``. If the one in its place does not start, nothing of the change
        rules; nor does it if whoever asked for it gives it up.

        Returns:
            What ends the replicas that are too many then.

        Raises:
            InvalidArgument: The change is not valid.
            BaseException: What ``reconfigure`` or a new replica's constructor raised, or why the store does not keep
                the change.
        """
        pool = self._pool
        after = pool.config.updated(changes)
        pool.plan.check(after)
        pool.try_anew()
        if after.limits == pool.config.limits and _equal(after.user_config, pool.config.user_config):
            return await self._update(after)
        self._refill.paused = True
        try:
            await self._refill.recall()  # those that are missing are started below, with what rules then
            return await self._update(after)
        finally:
            self._refill.paused = False

    async def _update(self, after: BackendConfig) -> Departures:
        pool = self._pool
        before = pool.plan
        try:
            refused, late = await self._reconfigure(before.config, after)
        except BaseException:  # it was given up
            await self._return_from(after)
            raise
        if refused:
            await self._return_from(after, but=refused)
            raise next(iter(refused.values()))
        plan = replace(before, config=after)
        failure: BaseException | None = None
        started: list[Worker] = []
        try:
            started = await pool.start(plan, after.num_replicas - len(pool.running) - len(self._refill.fills))
        except BaseException as error:
            # If some were late or died, perhaps nobody can take this configuration: the next ones are to start with the
            # former.
            if late or isinstance(error, asyncio.CancelledError):
                await self._return_from(after)
                raise
            failure = error
            plan = replace(plan, config=after.updated({"num_replicas": before.config.num_replicas}))
        running, there = pool.running, pool.running + started
        pool.plan, pool.running = plan, there[: plan.config.num_replicas]
        try:
            pool.publish()
        except BaseException:
            pool.plan, pool.running = before, running
            await pool.take_back(started)
            await self._return_from(after)
            raise
        if failure is not None:
            raise failure
        return pool.let_go(there[plan.config.num_replicas :])

    async def _return_from(self, taken: BackendConfig, but: Container[Worker] = ()) -> None:
        """Have the replicas, but for some, return from a configuration that does not rule to the one that does."""
        refused, _ = await self._reconfigure(taken, self._pool.config, but)
        for worker, error in refused.items():
            _logger.error("%s does not return to its former configuration: %r; ending it", worker.spec.name, error)
        self._pool.dismiss(refused)

    async def _reconfigure(
        self, before: BackendConfig, after: BackendConfig, but: Container[Worker] = ()
    ) -> tuple[dict[Worker, BaseException], list[Worker]]:
        """Have the replicas, but for some, go from one configuration to another, if it is another for them.

        Returns:
            Once all have answered or run out of time, those that did not take it, and why: what the backend's
            ``reconfigure`` raised; and those that took too long, or died. The latter are out of service now.
        """
        pool = self._pool
        changed = not _equal(after.user_config, before.user_config)
        if not changed and after.limits == before.limits:
            return {}, []
        told = after if changed else after.updated({"user_config": None})
        packed = dumps(told, f"config: user_config of backend {pool.plan.tag!r}")
        timeout_s = after.reconfigure_timeout_s
        rules = pool.plan.version  # others, which an exchange that was broken off has left, are about to go
        replicas = [
            worker
            for worker in pool.running
            if worker.life is Life.READY and worker not in but and worker.version == rules
        ]
        outcomes = await asyncio.gather(
            *[pool.workers.reconfigure(worker, packed, timeout_s, user_config_changed=changed) for worker in replicas],
            return_exceptions=True,  # the next operation may only begin when all have answered
        )
        pairs = list(zip(replicas, outcomes, strict=True))
        late = [worker for worker, outcome in pairs if outcome is False]
        for worker in late:
            _logger.warning(
                "%s has not taken its new configuration within reconfigure_timeout_s=%g; replacing it",
                worker.spec.name,
                timeout_s,
            )
        pool.dismiss(late)
        late += [worker for worker in replicas if worker.life is Life.GONE and worker not in pool.running]  # it died
        refused = {worker: outcome for worker, outcome in pairs if isinstance(outcome, BaseException)}
        return {worker: error for worker, error in refused.items() if worker not in late}, late


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are known to be equal; arrays, for one, do not say so in one word."""
    try:
        return bool(one == other)
    except Exception:
        return False
