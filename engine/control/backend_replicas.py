"""The replicas of one backend, as the controller keeps them: started, configured, counted, replaced and ended.

Runs on the controller's loop. Callers learn of nothing here before the controller publishes it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Container, Sequence
from dataclasses import replace
from typing import Any

from ..config import BackendConfig
from ..errors import BackendStartError, EngineClosed, InvalidArgument
from ..seam.adapter import Adapter
from ..seam.error_text import shortened, summary_of
from ..seam.log import Log
from ..seam.serialization import dumps
from ..seam.snapshot import BackendEntry, ReplicaEntry
from ..seam.worker import WorkerSpec
from ..serving.replica_spec import ReplicaSpec
from .backend_plan import BackendPlan
from .backoff import backoff_s
from .checkpoint import KnownBackend, KnownWorker
from .restarts import Restarts
from .rollout import Room
from .workers import Life, Worker, Workers

__all__ = ["BackendReplicas"]

_logger = Log("engine.controller")

_ENTRY = "engine.serving.replica_worker:main"
_LONGEST_REASON = 300
"""Characters of an error that travel to all callers."""
_KEPT_DEAD = 100
"""Deaths that callers are told of: far more than happen between two snapshots that a caller gets."""
_UNSTABLE_AFTER = 3
"""Replicas of a new version that died while it took over after which it is taken for one that does not start."""


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
        told: Waits, for a moment at most, until callers have learnt what was published.

    Attributes:
        plan: What rules now. While another version takes over, that is still the former one.
        lock: Held by whoever changes what is wanted. Replicas that died are replaced meanwhile.
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
        told: Callable[[], Awaitable[Any]],
    ) -> None:
        self._engine_id = engine_id
        self._adapter = adapter
        self._workers = workers
        self._debug = debug
        self._publish = publish
        self._announce = announce
        self._told = told
        self._started = 0  # numbers the replicas
        self._restarts = Restarts()
        self._last_error: str | None = None  # what became of the last one that failed or died
        self._failed_at = 0.0  # monotonic seconds
        self._why = ""  # the last start that failed, in a line
        self._explained: str | None = None  # the log has the traceback of this failure to start; None after a start
        self._dead: deque[str] = deque(maxlen=_KEPT_DEAD)  # ids of the last ones
        self._starting: dict[str, float] = {}  # ids of those that are not ready yet, and when their start began
        self._fills: set[asyncio.Task[None]] = set()  # one for each replica that is missing
        self._waits: list[float] = []  # seconds that replacements have to wait, of those that `refill` has yet to begin
        self._retry = asyncio.Event()  # set, and replaced, when starts that failed are to be tried again at once
        self._telling = False  # what replicas are told is being changed: none is started with what was told before
        self._leaving: set[Worker] = set()  # out of service, and not gone yet
        self._arriving: BackendPlan | None = None  # what takes over
        self._least: int | None = None  # replicas that are to be in service while others are exchanged
        self._dismissals: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly
        self._replaced: set[Worker] = set()  # in service until another one is there
        self._renewing = False
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
    def patience_s(self) -> float:
        """For how many seconds a replica may run no Python code: its calls, or its loop, have a limit."""
        limit_s = self.config.max_call_s
        patience_s = self.config.patience_s(on_loop=self.plan.on_loop)
        return patience_s if limit_s is None else min(patience_s, limit_s)

    @property
    def missing(self) -> int:
        """How many replicas there are too few; negative if there are too many."""
        return self.config.num_replicas - len(self.running)

    def entry(self) -> BackendEntry:
        """The backend as callers are to see it."""
        return BackendEntry(
            self.plan.tag,
            tuple(self._replica_entry(one) for one in self.running if one.life is Life.READY),
            self.config.concurrency(on_loop=self.plan.on_loop),
            self.config.max_queued_requests,
            expecting=not self._hopeless,
            failures=self._restarts.failures,
            dead=tuple(self._dead),
            last_error=self._why if self._restarts.failures else "",
            max_queue_wait_s=self.config.max_queue_wait_s,
            max_retries=self.config.max_retries,
            retry_deaths=self.config.retries_deaths,
            retry_posts=self.config.retry_posts,
        )

    def _replica_entry(self, worker: Worker) -> ReplicaEntry:
        limit = None
        arriving = self._arriving
        if arriving is not None and worker.version == arriving.version != self.plan.version:
            limit = arriving.config.concurrency(on_loop=arriving.on_loop)
        return ReplicaEntry(worker.spec.worker_id, worker.address, limit)

    def known(self) -> KnownBackend:
        """The backend as the next controller is to find it."""
        running = tuple(KnownWorker(one.spec.worker_id, one.spec.name, None, one.version) for one in self.running)
        return KnownBackend(self.plan, self._started, running)

    @property
    def serves(self) -> bool:
        """Whether there is a replica that takes calls."""
        return any(worker.life is Life.READY for worker in self.running)

    @property
    def state(self) -> str:
        """How it is, in a word: starting, ready, failing, unhealthy or draining."""
        if self.deleted:
            return "draining"
        if self.live and self.missing <= 0:
            return "ready"
        if self._hopeless and not self.running:
            return "unhealthy"
        return "failing" if self._restarts.failures else "starting"

    @property
    def _hopeless(self) -> bool:
        """Whether nobody should wait for a replica, if there is none."""
        return self._restarts.hopeless(min(self._starting.values(), default=math.inf))

    def describe(self) -> dict[str, Any]:
        """See `Engine.statistics`: all but what callers count."""
        starting = [worker for worker in map(self._workers.get, self._starting) if worker is not None]
        all_there_are = [*starting, *self.all_ready()]
        workers = {one.spec.worker_id: {**one.describe(), "version": one.version} for one in all_there_are}
        for one in self.running:
            if self.deleted:  # it takes no calls but those that were made before, until none is left
                workers[one.spec.worker_id]["state"] = Life.DRAINING.value
        return {
            "state": self.state,
            "version": self.plan.version,
            "failures": self._restarts.failures,
            "last_error": self._last_error,
            "last_error_s": time.monotonic() - self._failed_at if self._last_error is not None else None,
            "replicas": {worker_id: worker["state"] for worker_id, worker in workers.items()},
            "details": workers,
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
        self._try_anew()
        departures: list[asyncio.Task[None]] = []
        try:
            await self._roll(replace(plan, version=self.plan.version + 1), self._publish, departures)
        except BaseException:
            if departures or self.outdated:
                await self._settle()
            raise
        await asyncio.shield(asyncio.gather(*departures))

    @property
    def outdated(self) -> bool:
        """Whether there are replicas in service that run another version than the one that rules."""
        return any(worker.version != self.plan.version for worker in self.running)

    @property
    def due(self) -> bool:
        """Whether there are replicas in service that others are to take the places of."""
        return self.outdated or not self._replaced.isdisjoint(self.running)

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
                if self._dismissals:
                    await asyncio.wait(self._dismissals)
                # A few at a time, so that nobody waits long for the lock: they may wear out as fast as that goes.
                async with self.lock:
                    worn = [worker for worker in self.running if worker in self._replaced]
                    failed = 0 if await self._settle(worn[: Room.for_few(self.config).at_a_time]) else failed + 1
        finally:
            self._renewing = False
        await self.refill()  # what made room for others that did not start has left its place empty

    async def _settle(self, worn: Collection[Worker] = ()) -> bool:
        """Exchange these replicas, and those of another version; returns whether that is done.

        Why a replica did not start is logged.
        """
        try:
            await self._roll(self.plan, self._announce, [], worn=worn)
        except EngineClosed:
            return False
        except Exception as error:
            if not self.deleted:
                self._note(summary_of(error))
                self._log_failure(error)
            return False
        return True

    async def _roll(
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
            departures: Gets the ends of those that were taken out of service. They finish what they hold meanwhile.
            worn: Replicas that are to be exchanged, too.

        Raises:
            BaseException: Why a replica did not start, or why the store does not keep a step. The steps before stay.
        """
        versions = plan is not self.plan or self.outdated
        room = Room.between(self.config, plan.config) if versions else Room.for_few(plan.config)
        arrived: set[Worker] = set()
        begun = 0

        def apart(running: Sequence[Worker]) -> tuple[list[Worker], list[Worker]]:
            """Those that are to be exchanged and those that stay; of each the oldest first."""
            old = [worker for worker in running if worker.version != plan.version or worker in worn]
            return old, [worker for worker in running if worker not in old]

        self._arriving, self._least = plan, room.least
        try:
            if plan is not self.plan:
                await self._recall_fills()  # of the former version, they would take up the room of the new one
            while self.plan is not plan or apart(self.running)[0] or self.missing > 0:
                if begun - len(arrived.intersection(self.running)) >= _UNSTABLE_AFTER:
                    raise BackendStartError(
                        f"backend {plan.tag!r}: replicas of the new version end soon after they are ready; the last "
                        f"one: {self._last_error}"
                    )
                old, new = apart(self.running)
                count = room.to_start(len(old), len(new), sum(one.life is not Life.GONE for one in self._leaving))
                started = await self._start(plan, count)
                begun += count
                arrived.update(started)
                old, new = apart([*self.running, *started])  # some may have died meanwhile
                going = old[: room.to_let_go(len(old), len(new))]
                staying = old[len(going) :]
                rules = not staying and len(new) >= plan.config.num_replicas
                # Those that died were replaced meanwhile, and so may have been some for which others had been started.
                surplus = [one for one in reversed(new) if one not in arrived][: max(0, len(new) - room.wanted)]
                going += surplus
                staying += [one for one in new if one not in surplus]
                if not count and not going:
                    if not self._dismissals:  # those that leave are ended by the shutdown
                        raise EngineClosed("the engine was shut down")
                    await asyncio.wait(self._dismissals, return_when=asyncio.FIRST_COMPLETED)
                    continue
                await self._step(plan if rules else self.plan, staying, started, publish)
                departures += self._let_go(going)
        finally:
            self._arriving = self._least = None

    async def _step(
        self, plan: BackendPlan, running: list[Worker], started: list[Worker], publish: Callable[[], Any]
    ) -> None:
        """Let this plan rule and these replicas be in service.

        Raises:
            BaseException: Why the store does not keep that. Then those that were started for it are gone.
        """
        before = self.plan, self.running
        self.plan, self.running = plan, running
        try:
            publish()
        except BaseException:
            self.plan, self.running = before
            await self.end(started, at_once=True)
            raise
        if self.plan.version != before[0].version:
            self._give_up_fills()

    async def update(self, changes: Any) -> None:
        """Change the configuration; returns when the replicas that are too many then have ended.

        If ``reconfigure`` raises in some replicas, the others return to the former configuration, which rules. If a new
        replica does not start, all of the change rules but the number of replicas. If the store does not keep the
        change, nothing of it rules. A replica that refuses to return is replaced, and so is one that dies meanwhile or
        takes longer than ``reconfigure_timeout_s``. If the one in its place does not start, nothing of the change
        rules; nor does it if whoever asked for it gives it up.

        Raises:
            InvalidArgument: The change is not valid.
            BaseException: What ``reconfigure`` or a new replica's constructor raised, or why the store does not keep
                the change.
        """
        after = self.config.updated(changes)
        self.plan.check(after)
        self._try_anew()
        if after.limits == self.config.limits and _equal(after.user_config, self.config.user_config):
            return await self._update(after)
        self._telling = True
        try:
            await self._recall_fills()  # those that are missing are started below, with what rules then
            await self._update(after)
        finally:
            self._telling = False

    async def _update(self, after: BackendConfig) -> None:
        before = self.plan
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
            started = await self._start(plan, after.num_replicas - len(self.running) - len(self._fills))
        except BaseException as error:
            # If some were late or died, perhaps nobody can take this configuration: the next ones are to start with the
            # former.
            if late or isinstance(error, asyncio.CancelledError):
                await self._return_from(after)
                raise
            failure = error
            plan = replace(plan, config=after.updated({"num_replicas": before.config.num_replicas}))
        running, there = self.running, self.running + started
        self.plan, self.running = plan, there[: plan.config.num_replicas]
        try:
            self._publish()
        except BaseException:
            self.plan, self.running = before, running
            await self.end(started, at_once=True)
            await self._return_from(after)
            raise
        if failure is not None:
            raise failure
        await asyncio.shield(asyncio.gather(*self._let_go(there[plan.config.num_replicas :])))

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
            ``reconfigure`` raised; and those that took too long, or died. The latter are out of service now.
        """
        changed = not _equal(after.user_config, before.user_config)
        if not changed and after.limits == before.limits:
            return {}, []
        told = after if changed else after.updated({"user_config": None})
        packed = dumps(told, f"config: user_config of backend {self.plan.tag!r}")
        timeout_s = after.reconfigure_timeout_s
        rules = self.plan.version  # others, which an exchange that was broken off has left, are about to go
        replicas = [
            worker
            for worker in self.running
            if worker.life is Life.READY and worker not in but and worker.version == rules
        ]
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
        late += [worker for worker in replicas if worker.life is Life.GONE and worker not in self.running]  # it died
        refused = {worker: outcome for worker, outcome in pairs if isinstance(outcome, BaseException)}
        return {worker: error for worker, error in refused.items() if worker not in late}, late

    # -- starting and ending them --------------------------------------------------------------------------------------

    async def restore(self, known: KnownBackend) -> None:
        """Take over the replicas of a former controller; returns when each has come back or is certain not to."""
        self._started = known.started
        self.live = True
        resources = self.plan.resources
        specs = [
            (WorkerSpec(one.worker_id, one.name, _ENTRY, b"", resources=resources), one.version)
            for one in known.running
        ]
        workers = await asyncio.gather(*[self._workers.adopt(*one) for one in specs])
        self.running = [one for one in workers if one.life is Life.READY]
        self._dead += [one.spec.worker_id for one in workers if one.life is not Life.READY]

    async def _start(self, plan: BackendPlan, count: int) -> list[Worker]:
        """Start replicas, all or none; they are ready to be put in service, but for those that died meanwhile.

        Raises:
            BaseException: What a replica's constructor raised, or why it did not become ready.
        """
        numbers = [self._next_number() for _ in range(count)]
        starts = [asyncio.ensure_future(self._start_one(plan, number)) for number in numbers]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            # Also those that were being killed already: their starts did not wait for that any more.
            ids = [_replica_tag(plan, number) for number in numbers]
            await self.end([one for one in map(self._workers.get, ids) if one is not None], at_once=True)
            raise
        workers = [start.result() for start in starts]
        for worker in workers:
            if worker.life is not Life.READY:  # while the others were still starting
                self._died(worker)
        return [worker for worker in workers if worker.life is Life.READY]

    def _next_number(self) -> int:
        if self.deleted:
            raise self._deleted_error()
        self._started += 1
        return self._started

    async def _start_one(self, plan: BackendPlan, number: int) -> Worker:
        if self.deleted:
            raise self._deleted_error()
        replica_tag = _replica_tag(plan, number)
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
            name=f"replica.{plan.tag}.{number}",
            entry=_ENTRY,
            payload=dumps(spec, f"config: user_config of backend {plan.tag!r}"),
            resources=plan.resources,
        )
        self._starting[replica_tag] = time.monotonic()
        try:
            worker = await self._workers.start(worker_spec, plan.config.start_timeout_s, plan.version)
        finally:
            del self._starting[replica_tag]
        self._restarts.reset()
        self._explained = None
        self._retry_fills()
        return worker

    def _deleted_error(self) -> InvalidArgument:
        return InvalidArgument(f"backend {self.plan.tag!r} was deleted meanwhile")

    def _dismiss(self, leaving: Collection[Worker], *, at_once: bool = False) -> None:
        """Take replicas out of service, come what may, and end them without making anybody wait for that."""
        if leaving:
            self.running = [worker for worker in self.running if worker not in leaving]
            self._announce()
            self._let_go(leaving, at_once=at_once)

    def _let_go(self, leaving: Collection[Worker], *, at_once: bool = False) -> list[asyncio.Task[None]]:
        """End replicas that were published to be out of service, also if whoever waits for that is interrupted.

        Returns:
            What ends each of them.
        """
        self._replaced.difference_update(leaving)
        self._leaving.update(leaving)
        tasks = [asyncio.get_running_loop().create_task(self._see_off(one, at_once=at_once)) for one in leaving]
        for task in tasks:
            self._dismissals.add(task)
            task.add_done_callback(self._dismissals.discard)
        return tasks

    async def _see_off(self, worker: Worker, *, at_once: bool) -> None:
        if not at_once:
            await self._told()
        await self.end([worker], at_once=at_once, others=True)

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

    async def end(
        self, leaving: list[Worker], *, at_once: bool = False, grace_s: float | None = None, others: bool = False
    ) -> None:
        """End replicas that are out of service: when they have finished what they hold, or ``at_once``.

        Args:
            leaving: The replicas.
            at_once: Let them finish nothing.
            grace_s: Seconds that they get at most, if less than the configuration grants.
            others: There are others, or will be, to take what they have not begun.
        """
        granted_s = self.config.graceful_shutdown_timeout_s
        timeout_s = 0.0 if at_once else granted_s if grace_s is None else min(grace_s, granted_s)
        self._leaving.update(leaving)
        try:
            await asyncio.gather(*[self._workers.drain(worker, timeout_s, others=others) for worker in leaving])
        finally:
            self._leaving.difference_update(leaving)

    # -- while they run ------------------------------------------------------------------------------------------------

    def lost(self, worker: Worker) -> bool:
        """A worker died; returns whether it was a replica in service here."""
        if worker not in self.running:
            return False
        self.running.remove(worker)
        self._replaced.discard(worker)
        self._dead.append(worker.spec.worker_id)
        self._died(worker)
        if not self.running:  # before, starts that failed kept nobody from being served
            self._restarts.reset()
            self._retry_fills()
        return True

    def _died(self, worker: Worker) -> None:
        """A replica died that had been ready: another one takes its place."""
        lived_s = time.monotonic() - worker.ready_at
        self._count_loss(worker, f"{worker.exit_reason} after {lived_s:.1f} s", worker.last_words.told())

    def _count_loss(self, worker: Worker, reason: str, last_words: str = "") -> None:
        """A replica is lost: note when another one may start in its place."""
        self._note_loss(worker, reason, last_words)
        num_replicas = self.config.num_replicas
        self._waits.append(self._restarts.died(self._failed_at, answered=worker.answered, replicas=num_replicas))

    def _note_loss(self, worker: Worker, reason: str, last_words: str = "") -> None:
        self._note(f"{worker.spec.name} {reason}{last_words}")
        _logger.warning("%s %s; replacing it%s", worker.spec.name, reason, last_words)

    async def replace_one(self, worker: Worker, reason: str, *, at_once: bool = False) -> None:
        """Have another replica take the place of one; does nothing if that is not in service, or not any more.

        Args:
            worker: The replica to be replaced.
            reason: Why, for the log: follows its name.
            at_once: It is of no use any more, and is ended before there is another. Otherwise it serves until then,
                finishes what it holds, and goes on if the other one does not start.
        """
        if worker not in self.running or (worker in self._replaced and not at_once):
            return
        if at_once:
            self._dead.append(worker.spec.worker_id)
            self._count_loss(worker, reason)
            self._dismiss([worker], at_once=True)
            await self.refill()
            return
        self._note_loss(worker, reason)
        self._replaced.add(worker)
        async with self.lock:
            if worker in self._replaced and not self.deleted and not await self._settle([worker]):
                self._replaced.discard(worker)  # until it asks again
        await self.refill()  # it may have made room, or others may have died, and the other one did not start

    def mark_worn(self, worker: Worker, reason: str) -> bool:
        """Have `renew` exchange a replica in service that has done its share; returns whether it is not to be anyway.

        Args:
            worker: The replica.
            reason: Why, for the log: follows its name.
        """
        if worker in self._replaced:
            return False
        _logger.info("%s %s; another one takes its place", worker.spec.name, reason)
        self._replaced.add(worker)
        return True

    def _note(self, what: str) -> None:
        self._last_error = what
        self._failed_at = time.monotonic()

    def _log_failure(self, error: Exception) -> None:
        """Say why a replica did not start; with its traceback only if that was not said of the last one."""
        what = summary_of(error)
        self._why = shortened(what.partition("\n")[0], _LONGEST_REASON)
        exc_info = error if what != self._explained else None
        self._explained = what
        _logger.error("backend %r: a replica could not be replaced: %s", self.plan.tag, what, exc_info=exc_info)

    def _start_failed(self, error: Exception, began: float) -> None:
        """A replica did not start that is missing."""
        self._note(summary_of(error))
        self._restarts.failed(began, self._failed_at)
        self._log_failure(error)

    # -- filling the places of those that are missing ------------------------------------------------------------------

    @property
    def _short(self) -> int:
        """How many replicas there are too few, but for those that are left out while others are exchanged."""
        return (self.config.num_replicas if self._least is None else self._least) - len(self.running)

    async def refill(self) -> None:
        """Start the replicas that are missing, side by side, each as often as it takes."""
        waits, self._waits = self._waits, []
        count = 0 if self._telling else max(0, self._short - len(self._fills))
        waits_s = (waits + [0.0] * count)[:count]
        fills = [asyncio.get_running_loop().create_task(self._fill(wait_s)) for wait_s in waits_s]
        self._fills.update(fills)
        for outcome in await asyncio.gather(*fills, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _fill(self, wait_s: float) -> None:
        """Start one replica, until one is ready or no longer missing."""
        fill = asyncio.current_task()
        assert fill is not None
        try:
            await asyncio.sleep(wait_s)
            while fill in self._fills and not self.deleted and self._short > 0:  # what it waits for may swallow its end
                began = time.monotonic()
                try:
                    worker = await self._start_one(self.plan, self._next_number())
                except Exception as error:
                    if self.deleted or fill not in self._fills:
                        return
                    self._start_failed(error, began)
                    self._announce()
                    await self._pause()
                    continue
                if self.deleted or self._short <= 0 or fill not in self._fills:  # meanwhile
                    self._let_go([worker], at_once=True)
                    return
                self.running.append(worker)
                self._announce()
                return
        finally:
            self._fills.discard(fill)

    async def _pause(self) -> None:
        """Wait until a place whose start failed is to be tried again."""
        retry = self._retry
        try:
            await asyncio.wait_for(retry.wait(), self._restarts.not_before - time.monotonic())
        except (asyncio.TimeoutError, TimeoutError):
            pass

    def _retry_fills(self) -> None:
        retry, self._retry = self._retry, asyncio.Event()
        retry.set()

    def _try_anew(self) -> None:
        """Forget that starts have failed: something is different now, so that the next ones may succeed."""
        was_hopeless = self._hopeless
        self._restarts.reset()
        self._retry_fills()
        if was_hopeless:
            self._announce()

    async def _recall_fills(self) -> None:
        """As `_give_up_fills`; returns when those that were starting hold nothing any more that others may need."""
        fills = self._give_up_fills()
        if fills:
            await asyncio.wait(fills)

    def _give_up_fills(self) -> set[asyncio.Task[None]]:
        """Start no more of those that are missing, and let nothing be left of those that are starting.

        Returns:
            What is about to end for that.
        """
        fills, self._fills = self._fills, set()
        for fill in fills:
            fill.cancel()
            self._dismissals.add(fill)
            fill.add_done_callback(self._dismissals.discard)
        return fills

    async def end_fills(self) -> None:
        """As a backend that is deleted does: start no more; returns when nothing is left of what was starting."""
        self._give_up_fills()
        await asyncio.gather(*self._dismissals, return_exceptions=True)


def _replica_tag(plan: BackendPlan, number: int) -> str:
    return f"{plan.tag}#{number}"


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are known to be equal; arrays, for one, do not say so in one word."""
    try:
        return bool(one == other)
    except Exception:
        return False
