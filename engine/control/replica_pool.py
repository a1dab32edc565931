"""The replicas that there are of one backend: which start, which serve, which leave, and what became of the last one.

Who is to start, serve and leave is decided by others (`refill`, `rolling`, `reconfiguring`). Runs on the controller's
loop. Callers learn of nothing here before the controller publishes it.
"""

from __future__ import annotations

import asyncio
import enum
import math
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, NamedTuple

from ..config import BackendConfig
from ..errors import InvalidArgument
from ..seam.adapter import Adapter
from ..seam.error_text import shortened, summary_of
from ..seam.log import Log
from ..seam.serialization import dumps
from ..seam.snapshot import BackendEntry, ReplicaEntry
from ..seam.worker import WorkerSpec
from ..serving.replica_spec import ReplicaSpec
from .backend_plan import BackendPlan
from .checkpoint import KnownBackend, KnownWorker
from .recycling import Recycling
from .restarts import Restarts
from .rollout import Room
from .workers import Life, Worker, Workers

__all__ = ["Departures", "Due", "Means", "ReplicaPool"]

_logger = Log("engine.controller")

_ENTRY = "engine.serving.replica_worker:main"
_LONGEST_REASON = 300
"""Characters of an error that travel to all callers."""
_KEPT_REASONS = 16
_KEPT_DEAD = 100
"""Deaths that callers are told of: far more than happen between two snapshots that a caller gets."""


Departures = Sequence[asyncio.Task[None]]
"""What ends replicas that are out of service."""


class Due(enum.IntEnum):
    """Why another replica is to take the place of one. What is less goes first."""

    ILL = 0
    WORN = 1


class Means(NamedTuple):
    """What a controller lends to each of its backends.

    Attributes:
        engine_id: For replicas to attach to.
        adapter: Runs them.
        workers: Keeps them.
        debug: Whether they send tracebacks to HTTP clients.
        publish: Keeps what there is and lets callers know, or raises.
        announce: Lets callers know come what may: of what has happened and cannot be taken back.
        told: Waits, for a moment at most, until callers have learnt what was published.
    """

    engine_id: str
    adapter: Adapter
    workers: Workers
    debug: bool
    publish: Callable[[], int]
    announce: Callable[[], None]
    told: Callable[[], Awaitable[Any]]


class ReplicaPool:
    """Owns the workers that run one backend.

    Args:
        means: How they are started and kept, and callers told of them.
        plan: What they run.

    Attributes:
        plan: What rules now. While another version takes over, that is still the former one.
        running: The replicas in service, oldest first.
        live: It was created: replicas that die are replaced.
        deleted: It was, or is about to be.
        ending: The engine is being shut down: no replica starts any more.
        arriving: What takes over.
        room: What there may be while replicas are exchanged; None while none are.
        coming: How many an exchange is starting.
        leaving: Replicas out of service that are not gone yet.
        marked: Replicas in service that others are to take the places of, and why.
        dismissals: What ends replicas. (The loop itself holds tasks weakly.)
        restarts: When those that are missing may start.
        recycling: Whether that is of use where replicas need too much memory.
        notice: What is amiss with the configuration, for people.
        waits: Seconds that replacements have to wait, of those that have yet to begin.
        retry: Set, and replaced, when starts that failed are to be tried again at once.
        last_error: What became of the last replica that failed or died.
    """

    def __init__(self, means: Means, plan: BackendPlan) -> None:
        self._means = means
        self._started = 0  # numbers the replicas
        self._failed_at = 0.0  # monotonic seconds
        self._why = ""  # the last start that failed, in a line
        self._explained: deque[str] = deque(maxlen=_KEPT_REASONS)  # the log has the tracebacks of these, since a start
        self._dead: deque[str] = deque(maxlen=_KEPT_DEAD)  # ids of the last ones
        self._starting: dict[str, float] = {}  # ids of those that are not ready yet, and when their start began
        self.workers = means.workers
        self.publish = means.publish
        self.announce = means.announce
        self.plan = plan
        self.running: list[Worker] = []
        self.live = False
        self.deleted = False
        self.ending = False
        self.arriving: BackendPlan | None = None
        self.room: Room | None = None
        self.coming = 0
        self.leaving: set[Worker] = set()
        self.marked: dict[Worker, Due] = {}
        self.dismissals: set[asyncio.Task[None]] = set()
        self.restarts = Restarts()
        self.recycling = Recycling()
        self.notice: str | None = None
        self.waits: list[float] = []
        self.retry = asyncio.Event()
        self.last_error: str | None = None

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
            expecting=not self.hopeless and not self.ending,
            failures=self.restarts.failures,
            dead=tuple(self._dead),
            last_error=self._why if self.restarts.failures else "",
            max_queue_wait_s=self.config.max_queue_wait_s,
            max_retries=self.config.max_retries,
            retry_deaths=self.config.retries_deaths,
            retry_posts=self.config.retry_posts,
            max_queued_bytes=self.config.max_queued_bytes,
        )

    def _replica_entry(self, worker: Worker) -> ReplicaEntry:
        limit = None
        arriving = self.arriving
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
        if self.hopeless and not self.running:
            return "unhealthy"
        return "failing" if self.restarts.failures else "starting"

    @property
    def hopeless(self) -> bool:
        """Whether nobody should wait for a replica, if there is none."""
        return self.restarts.hopeless(min(self._starting.values(), default=math.inf))

    def describe(self) -> dict[str, Any]:
        """See `Engine.statistics`: all but what callers count."""
        starting = [worker for worker in map(self.workers.get, self._starting) if worker is not None]
        all_there_are = [*starting, *self.all_ready()]
        workers = {one.spec.worker_id: {**one.describe(), "version": one.version} for one in all_there_are}
        for one in self.running:
            if self.deleted:  # it takes no calls but those that were made before, until none is left
                workers[one.spec.worker_id]["state"] = Life.DRAINING.value
        return {
            "state": self.state,
            "version": self.plan.version,
            "failures": self.restarts.failures,
            "notice": self.notice,
            "last_error": self.last_error,
            "last_error_s": time.monotonic() - self._failed_at if self.last_error is not None else None,
            "replicas": {worker_id: worker["state"] for worker_id, worker in workers.items()},
            "details": workers,
        }

    @property
    def still_leaving(self) -> int:
        """How many replicas there are that are out of service."""
        return sum(worker.life is not Life.GONE for worker in self.leaving)

    @property
    def outdated(self) -> bool:
        """Whether there are replicas in service that run another version than the one that rules."""
        return any(worker.version != self.plan.version for worker in self.running)

    @property
    def due(self) -> bool:
        """Whether there are replicas in service that others are to take the places of."""
        return self.outdated or any(worker in self.marked for worker in self.running)

    # -- starting them -------------------------------------------------------------------------------------------------

    async def restore(self, known: KnownBackend) -> None:
        """Take over the replicas of a former controller; returns when each has come back or is certain not to."""
        self._started = known.started
        self.live = True
        resources = self.plan.resources
        specs = [
            (WorkerSpec(one.worker_id, one.name, _ENTRY, b"", resources=resources), one.version)
            for one in known.running
        ]
        workers = await asyncio.gather(*[self.workers.adopt(*one) for one in specs])
        self.running = [one for one in workers if one.life is Life.READY]
        self._dead += [one.spec.worker_id for one in workers if one.life is not Life.READY]

    async def start(self, plan: BackendPlan, count: int) -> list[Worker]:
        """Start replicas, all or none; they are ready to be put in service, but for those that died meanwhile.

        Raises:
            BaseException: What a replica's constructor raised, or why it did not become ready.
        """
        numbers = [self.next_number() for _ in range(count)]
        starts = [asyncio.ensure_future(self.start_one(plan, number)) for number in numbers]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            undoing = self._dismissal(self._undo(starts, [_replica_tag(plan, number) for number in numbers]))
            await _see_through([undoing])
            raise
        workers = [start.result() for start in starts]
        for worker in workers:
            if worker.life is not Life.READY:  # while the others were still starting
                self._died(worker)
        return [worker for worker in workers if worker.life is Life.READY]

    async def _undo(self, starts: list[asyncio.Task[Worker]], ids: list[str]) -> None:
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        # Also those that were being killed already: their starts did not wait for that any more.
        await self.end([one for one in map(self.workers.get, ids) if one is not None], at_once=True)

    def next_number(self) -> int:
        """A number for a replica that is to be started.

        Raises:
            InvalidArgument: The backend was deleted.
        """
        if self.deleted:
            raise self.deleted_error()
        self._started += 1
        return self._started

    async def start_one(self, plan: BackendPlan, number: int) -> Worker:
        """Start a replica; see `start`."""
        if self.deleted:
            raise self.deleted_error()
        replica_tag = _replica_tag(plan, number)
        spec = ReplicaSpec(
            engine_id=self._means.engine_id,
            adapter_name=self._means.adapter.name,
            control_address=self._means.adapter.control_address,
            backend_tag=plan.tag,
            replica_tag=replica_tag,
            definition=plan.definition,
            config=plan.config,
            debug=self._means.debug,
            shares_process=self._means.adapter.shares_process,
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
            worker = await self.workers.start(worker_spec, plan.config.start_timeout_s, plan.version)
        finally:
            del self._starting[replica_tag]
        self.restarts.reset()
        self._explained.clear()
        self.retry_starts()
        return worker

    def deleted_error(self) -> InvalidArgument:
        """What is told to those who still want something of it."""
        return InvalidArgument(f"backend {self.plan.tag!r} was deleted meanwhile")

    def retry_starts(self) -> None:
        """Have starts that failed tried again at once."""
        retry, self.retry = self.retry, asyncio.Event()
        retry.set()

    async def pause(self, longest_s: float) -> None:
        """Wait before a start that failed is tried again, unless there is reason to do so at once."""
        try:
            await asyncio.wait_for(self.retry.wait(), longest_s)
        except (asyncio.TimeoutError, TimeoutError):
            pass

    def try_anew(self) -> None:
        """Forget what was in vain: something is different now, so that the next ones may succeed."""
        was_hopeless = self.hopeless
        self.restarts.reset()
        self.recycling.reset()
        self.notice = None
        self.retry_starts()
        if was_hopeless:
            self.announce()

    # -- ending them ---------------------------------------------------------------------------------------------------

    def dismiss(self, leaving: Collection[Worker], *, at_once: bool = False) -> None:
        """Take replicas out of service, come what may, and end them without making anybody wait for that."""
        if leaving:
            self.running = [worker for worker in self.running if worker not in leaving]
            self.announce()
            self.let_go(leaving, at_once=at_once)

    def let_go(self, leaving: Collection[Worker], *, at_once: bool = False) -> list[asyncio.Task[None]]:
        """End replicas that were published to be out of service, also if whoever waits for that is interrupted.

        Returns:
            What ends each of them.
        """
        for worker in leaving:
            self.marked.pop(worker, None)
        self.leaving.update(leaving)
        return [self._dismissal(self._see_off(one, at_once=at_once)) for one in leaving]

    async def take_back(self, started: Collection[Worker]) -> None:
        """End replicas that are not to be in service after all, also if whoever waits for that is interrupted."""
        await _see_through(self.let_go(started, at_once=True))

    def _dismissal(self, ending: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(ending)
        self.dismissals.add(task)
        task.add_done_callback(self.dismissals.discard)
        return task

    async def _see_off(self, worker: Worker, *, at_once: bool) -> None:
        if not at_once:
            await self._means.told()
        await self.end([worker], at_once=at_once, others=True)
        if not at_once and not worker.drained:  # its calls fail: if its machine fell silent, on this word alone
            self._dead.append(worker.spec.worker_id)
            self.announce()

    async def kill_all(self) -> None:
        """End every replica at once, whatever stage it is in: whoever waits for one of them hears that it is gone."""
        starting = [worker for worker in map(self.workers.get, self._starting) if worker is not None]
        for worker in starting:
            worker.error = worker.error or self.deleted_error()
        doomed = {*[worker for worker in starting if worker.watched], *self.running, *self.leaving}
        await asyncio.gather(*[self.workers.kill(worker) for worker in doomed])

    def all_ready(self) -> list[Worker]:
        """The replicas that have been ready and are not gone: in service, or about to leave."""
        return [*self.running, *self.leaving.difference(self.running)]

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
        self.leaving.update(leaving)
        try:
            await asyncio.gather(*[self.workers.drain(worker, timeout_s, others=others) for worker in leaving])
        finally:
            self.leaving.difference_update(leaving)

    # -- those that fail -----------------------------------------------------------------------------------------------

    def lost(self, worker: Worker) -> bool:
        """A worker died; returns whether it was a replica in service here."""
        if worker not in self.running:
            return False
        self.running.remove(worker)
        self.marked.pop(worker, None)
        self._dead.append(worker.spec.worker_id)
        self._died(worker)
        if not self.running:  # before, starts that failed kept nobody from being served
            self.restarts.reset()
            self.retry_starts()
        return True

    def _died(self, worker: Worker) -> None:
        """A replica died that had been ready: another one takes its place."""
        lived_s = time.monotonic() - worker.ready_at
        self.count_loss(worker, f"{worker.exit_reason} after {lived_s:.1f} s", worker.last_words.told())

    def count_loss(self, worker: Worker, reason: str, last_words: str = "") -> None:
        """A replica is lost: note when another one may start in its place."""
        self.note_loss(worker, reason, last_words)
        num_replicas = self.config.num_replicas
        self.waits.append(self.restarts.died(self._failed_at, answered=worker.answered, replicas=num_replicas))

    def note_loss(self, worker: Worker, reason: str, last_words: str = "") -> None:
        """A replica is lost, or about to be: keep and log why."""
        self.note(f"{worker.spec.name} {reason}{last_words}")
        what_next = "the engine is being shut down" if self.ending else "replacing it"
        _logger.warning("%s %s; %s%s", worker.spec.name, reason, what_next, last_words)

    def note(self, what: str) -> None:
        """Keep what became of the last replica that failed or died."""
        self.last_error = what
        self._failed_at = time.monotonic()

    def log_failure(self, error: Exception, *, again: bool = False) -> None:
        """Say why a replica did not start; with its traceback only if that was not said before.

        Args:
            error: Why.
            again: It failed side by side with another one, and is mentioned only if that was for another reason.
        """
        what = summary_of(error)
        self._why = shortened(what.partition("\n")[0], _LONGEST_REASON)
        reason = re.sub(r"\d+", "#", what)  # but for which replica, process or port it was
        exc_info = error if reason not in self._explained else None
        if exc_info is not None:
            self._explained.append(reason)
        elif again:
            return
        _logger.error("backend %r: a replica could not be replaced: %s", self.plan.tag, what, exc_info=exc_info)

    def start_failed(self, error: Exception, began: float) -> None:
        """A replica did not start that is missing."""
        self.note(summary_of(error))
        counts = self.restarts.failed(began, self._failed_at)
        self.log_failure(error, again=not counts)


async def _see_through(tasks: Collection[asyncio.Task[None]]) -> None:
    """Wait until all are done. Who is interrupted meanwhile hears so afterwards."""
    interrupted: asyncio.CancelledError | None = None
    while left := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _replica_tag(plan: BackendPlan, number: int) -> str:
    return f"{plan.tag}#{number}"
