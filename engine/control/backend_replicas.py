"""The replicas of one backend, as the controller keeps them: started, configured, counted, replaced and ended.

Runs on the controller's loop. Callers learn of nothing here before the controller publishes it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Container
from dataclasses import replace
from typing import Any

from ..config import BackendConfig
from ..errors import InvalidArgument
from ..seam.adapter import Adapter
from ..seam.error_text import summary_of
from ..seam.log import Log
from ..seam.serialization import dumps
from ..seam.snapshot import BackendEntry, ReplicaEntry
from ..seam.worker import WorkerSpec
from ..serving.replica_spec import ReplicaSpec
from .backend_plan import BackendPlan
from .backoff import backoff_s
from .checkpoint import KnownBackend, KnownWorker
from .workers import Life, Worker, Workers

__all__ = ["BackendReplicas"]

_logger = Log("engine.controller")

_ENTRY = "engine.serving.replica_worker:main"
_STABLE_S = 10.0
"""A replica that lived this long died of bad luck: the next one starts at once. Others wait longer and longer."""
_KEPT_DEAD = 100
"""Deaths that callers are told of: far more than happen between two snapshots that a caller gets."""
_HOPELESS_AFTER = 3
"""Failures in a row after which callers are told that there is no replica, rather than left waiting for one."""


class BackendReplicas:
    """Owns the workers that run one backend.

    Args:
        engine_id: For replicas to attach to.
        adapter: Runs them.
        workers: Keeps them.
        plan: What they run.
        debug: Whether they send tracebacks to HTTP clients.
        publish: Keeps what there is and lets callers know, or raises.
        announce: Lets callers know come what may: of what has happened and cannot be taken back.

    Attributes:
        plan: What rules now.
        lock: Held by whoever starts, configures or removes replicas.
        running: The replicas in service, oldest first.
        live: It was created: replicas that die are replaced.
        deleted: It was, or is about to be.
    """

    def __init__(
        self,
        engine_id: str,
        adapter: Adapter,
        workers: Workers,
        plan: BackendPlan,
        *,
        debug: bool,
        publish: Callable[[], int],
        announce: Callable[[], None],
    ) -> None:
        self._engine_id = engine_id
        self._adapter = adapter
        self._workers = workers
        self._debug = debug
        self._publish = publish
        self._announce = announce
        self._started = 0  # numbers the replicas
        self._failures = 0  # replicas in a row that did not start, or died soon
        self._last_error: str | None = None  # what became of the last one that failed or died
        self._failed_at = 0.0  # monotonic seconds
        self._explained: str | None = None  # the log has the traceback of this failure to start; None after a start
        self._dead: deque[str] = deque(maxlen=_KEPT_DEAD)  # ids of the last ones
        self._starting: set[str] = set()  # ids of those that are not ready yet
        self._leaving: set[Worker] = set()  # out of service, and not gone yet
        self._dismissals: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly
        self._replaced: set[Worker] = set()  # in service until another one is there
        self.plan = plan
        self.lock = asyncio.Lock()
        self.running: list[Worker] = []
        self.live = False
        self.deleted = False

    # -- looking at it -------------------------------------------------------------------------------------------------

    @property
    def config(self) -> BackendConfig:
        """Its configuration."""
        return self.plan.config

    @property
    def missing(self) -> int:
        """How many replicas there are too few; negative if there are too many."""
        return self.config.num_replicas - len(self.running)

    def entry(self) -> BackendEntry:
        """The backend as callers are to see it."""
        return BackendEntry(
            self.plan.tag,
            tuple(ReplicaEntry(one.spec.worker_id, one.address) for one in self.running if one.life is Life.READY),
            self.config.concurrency(on_loop=self.plan.on_loop),
            self.config.max_queued_requests,
            expecting=self._failures < _HOPELESS_AFTER,
            failures=self._failures,
            dead=tuple(self._dead),
        )

    def known(self) -> KnownBackend:
        """The backend as the next controller is to find it."""
        running = tuple(KnownWorker(one.spec.worker_id, one.spec.name, None) for one in self.running)
        return KnownBackend(self.plan, self._started, running)

    @property
    def state(self) -> str:
        """How it is, in a word: starting, ready, failing or draining."""
        if self.deleted:
            return "draining"
        if self.live and self.missing <= 0:
            return "ready"
        return "failing" if self._failures else "starting"

    def describe(self) -> dict[str, Any]:
        """See `Engine.statistics`: all but what callers count."""
        starting = [worker for worker in map(self._workers.get, self._starting) if worker is not None]
        workers = {one.spec.worker_id: one for one in [*starting, *self.all_ready()]}
        return {
            "state": self.state,
            "failures": self._failures,
            "last_error": self._last_error,
            "last_error_s": time.monotonic() - self._failed_at if self._last_error is not None else None,
            "replicas": {worker_id: worker.life.value for worker_id, worker in workers.items()},
            "details": {worker_id: worker.describe() for worker_id, worker in workers.items()},
        }

    # -- changes of what is wanted -------------------------------------------------------------------------------------

    async def create(self) -> None:
        """Start as many replicas as are wanted, and be there.

        Raises:
            BaseException: What a replica's constructor raised, why it did not become ready, or why the store does not
                keep the backend. Then no replica of it is left.
        """
        try:
            self.running = await self._start(self.plan, self.missing)
            self.live = True
            self._publish()
        except BaseException:
            self.live, self.deleted = False, True
            await self.end(self.running, at_once=True)
            raise

    async def replace(self, plan: BackendPlan) -> list[Worker]:
        """Run something else: first its replicas are started, then they take the places of those that run.

        Returns:
            The former replicas. They are out of service, and the caller's to end.

        Raises:
            BaseException: What a new replica's constructor raised, why it did not become ready, or why the store does
                not keep the change. Then all is as before.
        """
        started = await self._start(plan, plan.config.num_replicas)
        before = self.plan, self.running, self._failures
        self.plan, self.running, self._failures = plan, started, 0
        try:
            self._publish()
        except BaseException:
            self.plan, self.running, self._failures = before
            await self.end(started, at_once=True)
            raise
        return before[1]

    async def update(self, changes: Any) -> list[Worker]:
        """Change the configuration.

        If ``reconfigure`` raises in some replicas, the others return to the former configuration, which rules. If a new
        replica does not start, all of the change rules but the number of replicas. If the store does not keep the
        change, nothing of it rules. A replica that refuses to return is replaced, and so is one that takes longer than
        ``reconfigure_timeout_s``. If the one in its place does not start, nothing of the change rules; nor does it if
        whoever asked for it gives it up.

        Returns:
            The replicas that are too many now. They are out of service, and the caller's to end.

        Raises:
            InvalidArgument: The change is not valid.
            BaseException: What ``reconfigure`` or a new replica's constructor raised, or why the store does not keep
                the change.
        """
        before = self.plan
        after = before.config.updated(changes)
        before.check(after)
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
            started = await self._start(plan, after.num_replicas - len(self.running))
        except BaseException as error:
            # If some were late, perhaps nobody can take this configuration: the next ones are to start with the former.
            if late or isinstance(error, asyncio.CancelledError):
                await self._return_from(after)
                raise
            failure = error
            plan = replace(plan, config=after.updated({"num_replicas": before.config.num_replicas}))
        running = self.running
        self.plan, self.running = plan, (running + started)[: plan.config.num_replicas]
        try:
            self._publish()
        except BaseException:
            self.plan, self.running = before, running
            await self.end(started, at_once=True)
            await self._return_from(after)
            raise
        if failure is not None:
            raise failure
        return running[plan.config.num_replicas :]

    async def _return_from(self, taken: BackendConfig, but: Container[Worker] = ()) -> None:
        """Have the replicas, but for some, return from a configuration that does not rule to the one that does."""
        refused, _ = await self._reconfigure(taken, self.config, but)
        for worker, error in refused.items():
            _logger.error("%s does not return to its former configuration: %r; ending it", worker.spec.name, error)
        self._dismiss(refused)

    async def _reconfigure(
        self, before: BackendConfig, after: BackendConfig, but: Container[Worker] = ()
    ) -> tuple[dict[Worker, BaseException], list[Worker]]:
        """Have the replicas, but for some, go from one configuration to another, if it is another for them.

        Returns:
            Once all have answered or run out of time, those that did not take it, and why: what the backend's
            ``reconfigure`` raised; and those that took too long. The latter are out of service now.
        """
        changed = not _equal(after.user_config, before.user_config)
        if not changed and after.limits == before.limits:
            return {}, []
        told = after if changed else after.updated({"user_config": None})
        packed = dumps(told, f"config: user_config of backend {self.plan.tag!r}")
        timeout_s = after.reconfigure_timeout_s
        replicas = [worker for worker in self.running if worker.life is Life.READY and worker not in but]
        outcomes = await asyncio.gather(
            *[self._workers.reconfigure(worker, packed, timeout_s, user_config_changed=changed) for worker in replicas],
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
        self._dismiss(late)
        return {worker: outcome for worker, outcome in pairs if isinstance(outcome, BaseException)}, late

    # -- starting and ending them --------------------------------------------------------------------------------------

    async def restore(self, known: KnownBackend) -> None:
        """Take over the replicas of a former controller; returns when each has come back or is certain not to."""
        self._started = known.started
        self.live = True
        resources = self.plan.resources
        specs = [WorkerSpec(one.worker_id, one.name, _ENTRY, b"", resources=resources) for one in known.running]
        workers = await asyncio.gather(*[self._workers.adopt(spec) for spec in specs])
        self.running = [one for one in workers if one.life is Life.READY]
        self._dead += [one.spec.worker_id for one in workers if one.life is not Life.READY]

    async def _start(self, plan: BackendPlan, count: int) -> list[Worker]:
        """Start replicas, all or none; they are ready to be put in service, but for those that died meanwhile.

        Raises:
            BaseException: What a replica's constructor raised, or why it did not become ready.
        """
        before = self._started
        starts = [asyncio.ensure_future(self._start_one(plan)) for _ in range(count)]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            # Also those that were being killed already: their starts did not wait for that any more.
            ids = [_replica_tag(plan, number) for number in range(before + 1, self._started + 1)]
            await self.end([one for one in map(self._workers.get, ids) if one is not None], at_once=True)
            raise
        ready = []
        for start in starts:
            worker = start.result()
            if worker.life is Life.READY:
                ready.append(worker)
            else:  # while the others were still starting
                self._failed(f"{worker.spec.name} {worker.exit_reason} as soon as it was ready")
                _logger.warning("%s", self._last_error)
        return ready

    async def _start_one(self, plan: BackendPlan) -> Worker:
        if self.deleted:
            raise self._deleted_error()
        self._started += 1
        replica_tag = _replica_tag(plan, self._started)
        spec = ReplicaSpec(
            engine_id=self._engine_id,
            adapter_name=self._adapter.name,
            control_address=self._adapter.control_address,
            backend_tag=plan.tag,
            replica_tag=replica_tag,
            definition=plan.definition,
            config=plan.config,
            debug=self._debug,
            shares_process=self._adapter.shares_process,
        )
        worker_spec = WorkerSpec(
            worker_id=replica_tag,
            name=f"replica.{plan.tag}.{self._started}",
            entry=_ENTRY,
            payload=dumps(spec, f"config: user_config of backend {plan.tag!r}"),
            resources=plan.resources,
        )
        self._starting.add(replica_tag)
        try:
            return await self._workers.start(worker_spec, plan.config.start_timeout_s)
        finally:
            self._starting.discard(replica_tag)

    def _deleted_error(self) -> InvalidArgument:
        return InvalidArgument(f"backend {self.plan.tag!r} was deleted meanwhile")

    def _dismiss(self, leaving: Collection[Worker], *, at_once: bool = False) -> None:
        """Take replicas out of service, come what may, and end them without making anybody wait for that."""
        if leaving:
            self.running = [worker for worker in self.running if worker not in leaving]
            self._announce()
            task = asyncio.get_running_loop().create_task(self.end(list(leaving), at_once=at_once))
            self._dismissals.add(task)
            task.add_done_callback(self._dismissals.discard)

    async def kill_all(self) -> None:
        """End every replica at once, whatever stage it is in: whoever waits for one of them hears that it is gone."""
        starting = [worker for worker in map(self._workers.get, self._starting) if worker is not None]
        for worker in starting:
            worker.error = worker.error or self._deleted_error()
        doomed = {*[worker for worker in starting if worker.watched], *self.running, *self._leaving}
        await asyncio.gather(*[self._workers.kill(worker) for worker in doomed])

    def all_ready(self) -> list[Worker]:
        """The replicas that have been ready and are not gone: in service, or about to leave."""
        return [*self.running, *self._leaving.difference(self.running)]

    async def end(self, leaving: list[Worker], *, at_once: bool = False, grace_s: float | None = None) -> None:
        """End replicas that are out of service: when they have finished what they hold, or ``at_once``.

        Args:
            leaving: The replicas.
            at_once: Let them finish nothing.
            grace_s: Seconds that they get at most, if less than the configuration grants.
        """
        granted_s = self.config.graceful_shutdown_timeout_s
        timeout_s = 0.0 if at_once else granted_s if grace_s is None else min(grace_s, granted_s)
        self._leaving.update(leaving)
        try:
            await asyncio.gather(*[self._workers.drain(worker, timeout_s) for worker in leaving])
        finally:
            self._leaving.difference_update(leaving)

    # -- while they run ------------------------------------------------------------------------------------------------

    def lost(self, worker: Worker) -> bool:
        """A worker died; returns whether it was a replica in service here."""
        if worker not in self.running:
            return False
        self.running.remove(worker)
        self._dead.append(worker.spec.worker_id)
        lived = time.monotonic() - worker.ready_at
        _logger.warning("%s %s after %.1f s; replacing it", worker.spec.name, worker.exit_reason, lived)
        before = 0 if lived > _STABLE_S else self._failures + 1
        self._failed(f"{worker.spec.name} {worker.exit_reason} after {lived:.1f} s")
        self._failures = before
        return True

    async def replace_one(self, worker: Worker, reason: str, *, at_once: bool = False) -> None:
        """Have another replica take the place of one; does nothing if that is not in service, or not any more.

        Args:
            worker: The replica to be replaced.
            reason: Why, for the log: follows its name.
            at_once: It is of no use any more, and is ended before there is another. Otherwise it serves until then,
                finishes what it holds, and goes on if the other one does not start.
        """
        if worker not in self.running or worker in self._replaced:
            return
        self._last_error = f"{worker.spec.name} {reason}"
        self._failed_at = time.monotonic()
        _logger.warning("%s; replacing it", self._last_error)
        if at_once:
            self._dead.append(worker.spec.worker_id)
            self._dismiss([worker], at_once=True)
            await self.refill()
            return
        self._replaced.add(worker)
        try:
            async with self.lock:
                await self._swap(worker)
        finally:
            self._replaced.discard(worker)

    async def _swap(self, worker: Worker) -> None:
        if self.deleted or worker not in self.running:
            return
        try:
            self.running += await self._start(self.plan, 1)
        except Exception as error:
            if not self.deleted:
                self._log_failure(error)
            return
        # It may have died meanwhile, and then its place is the new one's. If the new one did, it stays.
        if worker in self.running and self.missing < 0:
            self._dismiss([worker])
        else:
            self._announce()

    def _failed(self, what: str) -> None:
        self._failures += 1
        self._last_error = what
        self._failed_at = time.monotonic()

    def _log_failure(self, error: Exception) -> None:
        """Say why a replica did not start; with its traceback only if that was not said of the last one."""
        what = summary_of(error)
        exc_info = error if what != self._explained else None
        self._explained = what
        _logger.error("backend %r: a replica could not be replaced: %s", self.plan.tag, what, exc_info=exc_info)

    async def refill(self) -> None:
        """Start the replicas that are missing, one after the other; the more fail in a row, the more slowly."""
        while True:
            if self._failures > 1:
                await asyncio.sleep(backoff_s(self._failures - 1))
            async with self.lock:
                if self.deleted or self.missing <= 0:
                    return
                try:
                    ready = await self._start(self.plan, 1)
                    self.running += ready
                    self._explained = None
                except Exception as error:
                    if self.deleted:
                        return
                    self._failed(summary_of(error))
                    self._log_failure(error)
                self._announce()


def _replica_tag(plan: BackendPlan, number: int) -> str:
    return f"{plan.tag}#{number}"


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are known to be equal; arrays, for one, do not say so in one word."""
    try:
        return bool(one == other)
    except Exception:
        return False
