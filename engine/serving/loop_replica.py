"""A replica with ``async def`` callables: its calls are tasks on its service loop's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from ..calling.budget import Budget
from ..calling.line import bytes_of
from ..config import BackendConfig
from ..seam.control_messages import Reconfigure, Reconfigured
from ..seam.may_block import mark_loop_thread, unmark_loop_thread
from ..seam.messages import End
from ..seam.serialization import pack_exception_briefly
from ..seam.service import ServiceLoop
from .batches import last_of, listed
from .call_limit import CallLimit
from .farewell import begin_close, finish_close
from .replica import FAREWELL_S, Job, Replica
from .stacks import stack_of_task, stack_of_thread

if TYPE_CHECKING:
    from ..http.streams import Part

__all__ = ["LoopReplica"]

_END_OF_CHECK_S = 1.0
"""For a check of health to end that a replica which leaves has cancelled."""
_BEATS = 4
"""How often the loop must show that it turns while it is not taken for stuck."""


class LoopReplica(Replica):
    """Runs ``async def`` callables as tasks on an event loop, and plain ones on it too, one at a time."""

    __slots__ = (
        "_batches",
        "_beat_at",
        "_checks",
        "_configuring",
        "_context",
        "_limits",
        "_loop",
        "_reported",
        "_running",
        "_tasks",
        "_timers",
        "event_loop",
    )  # more than an object's own dictionary is quick for

    on_loop = True

    event_loop: asyncio.AbstractEventLoop

    def __init__(self, *args: Any, event_loop: asyncio.AbstractEventLoop, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.event_loop = event_loop
        self._loop: asyncio.AbstractEventLoop  # asyncio's, from `attach` on
        self._batches: dict[str, list[Job]] = {}
        self._running: dict[Job, tuple[asyncio.Task[None], list[Job]]] = {}  # what is in batches that run
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly
        self._checks: set[asyncio.Task[None]] = set()  # of its health
        self._configuring: asyncio.Task[None] | None = None  # does the chores, one after the other
        self._limits: dict[asyncio.Task[Any], CallLimit] = {}  # of the tasks that run calls, if there is a limit
        self._beat_at: float | None = None  # since when the loop has been asked whether it turns, until it does
        self._reported = False  # it was found not to

    def attach(self, loop: ServiceLoop) -> None:
        """See `engine.seam.service.Service.attach`."""
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # other threads, which have things begun here, have their own
        self._service_loop = loop
        mark_loop_thread()
        self._attached()
        if self._chores or self._drain_until is not None:
            self._wake()

    def leave(self) -> None:
        """Finish what answers left to do, call the user's ``close()``, if there is time, and drop the user's object."""
        self.event_loop.run_until_complete(self._leave())

    async def _leave(self) -> None:
        if self._checks:
            for check in self._checks:
                check.cancel()
            await asyncio.wait(self._checks, timeout=min(_END_OF_CHECK_S, max(0.0, self._grace_s())))
        if self._tasks and self._grace_s() > 0:
            await asyncio.wait(self._tasks, timeout=self._grace_s())
        if self._grace_s() > 0:
            closing = begin_close(self._user)
            if closing is not None:
                await finish_close(self._user, closing, self._grace_s())
        self._user.drop()

    def close(self) -> None:
        """End the watch, and take the mark off the loop's thread."""
        self._watchdog.stop()
        self._turns = None  # the channels know this object: they would keep each other in memory
        unmark_loop_thread()

    def run_next(self) -> float | None:
        """See `engine.seam.service.Service.run_next`; tasks run by themselves."""
        return None

    def _wake(self) -> None:
        if self._service_loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._on_wake, context=self._context)
                self._service_loop.wake()
            except RuntimeError:
                pass  # the loop is closed: the replica is leaving already

    def _on_wake(self) -> None:
        if self._chores and (self._configuring is None or self._configuring.done()):
            self._configuring = self._spawn(self._configure())
        if self._drain_until is not None:
            assert self._service_loop is not None
            self._loop.call_later(FAREWELL_S + 0.01, self._service_loop.wake)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._spawn_among(self._tasks, coroutine)

    @staticmethod
    def _spawn_among(tasks: set[asyncio.Task[None]], coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    def _begin(self, job: Job) -> None:
        assert job.method is not None
        if job.method.batched:
            self._join_batch(job)
        elif self._max_call_s is None:
            self._loop.create_task(self._run_one(job))  # which enters itself in `_tasks`: it may end right here
        else:
            self._spawn(self._limited([job], self._run_one, job))

    async def _run_one(self, job: Job) -> None:
        method = job.method
        task = asyncio.current_task()
        assert method is not None and task is not None
        self._tasks.add(task)
        try:
            if job.cancelled or job.expired or not job.channel.begin(job.call.id):
                self._drop(job)
                return
            job.task = task  # only now: a task cancelled before its first step would never answer
            args, kwargs = self._arguments(job)
            deadline, priority = job.call.deadline, job.call.priority
            if deadline is None and not priority:
                result = method.function(*args, **kwargs)
                if type(result) is CoroutineType or inspect.isawaitable(result):
                    result = await result
            else:
                with Budget(deadline, priority):
                    result = method.function(*args, **kwargs)
                    if inspect.isawaitable(result):
                        result = await result
            rest = self._succeed(job, result)
            if rest is not None:
                await rest
        except BaseException as error:
            self._fail(job, error)
        finally:
            self._tasks.discard(task)  # here, as a callback for that would cost the loop a turn for each call

    def _join_batch(self, job: Job) -> None:
        name = job.call.method
        batch = self._batches.setdefault(name, [])
        batch.append(job)
        self._waits(job, bytes_of(job.call))
        if len(batch) >= self._batch_size or self._is_full_of_bytes():
            self._start_batch(name)
        elif len(batch) == 1:
            loop = asyncio.get_running_loop()
            self._timers[name] = loop.call_later(self._config.batch_wait_timeout, self._start_batch, name)

    def _cancel(self, job: Job) -> None:
        super()._cancel(job)
        if job in self._running:
            task, together = self._running[job]
            if all(other.cancelled for other in together):
                task.cancel()
            return
        name = job.call.method
        batch = self._batches.get(name, [])
        if job in batch:
            batch.remove(job)
            if not batch:
                self._start_batch(name)
            self._drop(job)

    def _start_batch(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
        live: list[Job] = []
        for job in self._batches.pop(name, []):
            self._waits_no_more(job)
            if job.cancelled or job.expired:
                self._drop(job)
            else:
                live.append(job)
        if live:
            limited = self._max_call_s is not None
            self._spawn(self._limited(live, self._run_batch, live) if limited else self._run_batch(live))

    async def _run_batch(self, jobs: list[Job]) -> None:
        method = jobs[0].method
        assert method is not None
        for job in jobs:
            if job.cancelled:  # since it was started
                self._drop(job)
        jobs, items = self._batch_items([job for job in jobs if not job.cancelled])
        if not jobs:
            return
        task = asyncio.current_task()
        assert task is not None
        self._running.update(dict.fromkeys(jobs, (task, jobs)))
        try:
            with Budget(last_of(job.call.deadline for job in jobs), min(job.call.priority for job in jobs)):
                results = method.function(items)
                if inspect.isawaitable(results):
                    results = await results
                results = listed(results, len(jobs))
                if inspect.isawaitable(results):
                    results = await results
        except BaseException as error:
            for job in jobs:
                self._fail(job, error)
            return
        finally:
            for job in jobs:
                self._running.pop(job, None)
        for job, rest in self._spread(jobs, results):
            job.task = task  # cancelling it interrupts its stream, as of a call that came alone
            try:
                await rest
            except BaseException as error:
                self._fail(job, error)
            finally:
                job.task = None

    async def _configure(self) -> None:
        while self._chores:
            number, chore = self._chores.popleft()
            assert chore is not None  # its health is checked meanwhile
            await self._reconfigure(number, chore)

    async def _reconfigure(self, number: int, chore: Reconfigure) -> None:
        error = None
        try:
            config: BackendConfig = self.loads(chore.config)
            outcome = self._user.reconfigure(config.user_config)
            if inspect.isawaitable(outcome):
                await outcome
            self._take(number, config)
        except BaseException as failure:
            error = pack_exception_briefly(failure)
        self._tell(Reconfigured(chore.token, error))

    def _outside(self, step: Awaitable[Any]) -> Awaitable[Any]:
        if self._limits:
            self._step_begins()
        return step

    def _next_part(self, job: Job, parts: AsyncGenerator[Part, None]) -> Awaitable[Part | None]:
        if self._limits:
            self._step_begins()
        return anext(parts, None)

    # -- calls that run for too long, and a loop that does not turn --------------------------------------------------

    async def _limited(self, jobs: list[Job], run: Callable[[Any], Awaitable[None]], what: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        limit = self._limits[task] = CallLimit(task, jobs, self._overran, self._outlived)
        limit.begin(self._max_call_s)
        try:
            await run(what)
        finally:
            limit.pause()
            del self._limits[task]

    def _step_begins(self) -> None:
        limit = self._limits.get(asyncio.current_task())  # type: ignore[arg-type]
        if limit is not None:
            limit.begin(self._max_call_s)

    def _overran(self, limit: CallLimit) -> None:
        self._log_where(f"{self._what_runs(limit)}: it is cancelled", stack_of_task(limit.task))

    def _outlived(self, limit: CallLimit) -> None:
        self._log_where(f"{self._what_runs(limit)} and goes on although it was cancelled", stack_of_task(limit.task))
        for job in limit.jobs:
            job.cancelled = True
            if job is limit.streaming:
                self._finish(job, End(job.call.id, 0, True))
            else:
                super()._fail(job, self._too_long(job, limit.limit_s))
        self._ask_to_be_replaced("cannot end a call that runs for too long", hung=False)

    def _what_runs(self, limit: CallLimit) -> str:
        what = " and ".join({self._name(job) for job in limit.jobs})
        return f"a call of {what}{self._requests(limit.jobs)} runs for longer than max_call_s={limit.limit_s:g}"

    def _fail(self, job: Job, error: BaseException) -> None:
        if self._limits:
            limit = self._limits.get(asyncio.current_task())  # type: ignore[arg-type]
            if limit is not None and limit.over:
                error = self._too_long(job, limit.limit_s)
        super()._fail(job, error)

    def _patience_s(self) -> float:
        patience_s = self._config.patience_s(on_loop=True, shares_process=self._shares_process)
        return patience_s if self._max_call_s is None else min(patience_s, self._max_call_s)

    def _gets_on_or_not(self) -> bool:
        return self._patience_s() < math.inf

    def _look_at_work(self, now: float, late_s: float) -> float | None:
        patience_s = self._patience_s()
        if patience_s == math.inf:
            self._beat_at = None
            return None
        beat_at = self._beat_at
        if beat_at is None:
            self._beat_at = now
            try:
                self._loop.call_soon_threadsafe(self._beat)
            except RuntimeError:
                return None  # the loop is closed: the replica has left
            return patience_s / _BEATS
        self._beat_at = beat_at = beat_at + late_s
        remaining_s = beat_at + patience_s - now
        if remaining_s > 0:
            return remaining_s
        self._stuck(now - beat_at, patience_s)
        return patience_s

    def _beat(self) -> None:
        self._beat_at = None
        self._reported = False

    def _stuck(self, age_s: float, patience_s: float) -> None:
        stack = stack_of_thread(self._thread)
        task = asyncio.current_task(self._loop)
        names = [self._name(job) for job in list(self._jobs.values()) if task is not None and job.task is task]
        if self._beat_at is None:
            return  # it turned just now
        which = "stuck_after_s" if self._max_call_s is None or patience_s < self._max_call_s else "max_call_s"
        reason = f"has kept its event loop from turning for {age_s:.1f} s ({which}={patience_s:g})"
        if not self._reported:
            self._log_where(f"{f'a call of {names[0]}' if names else 'something'} {reason}", stack)
        self._reported = True
        self._ask_to_be_replaced(reason, hung=True)

    # -- its health --------------------------------------------------------------------------------------------------

    def _ask_for_check(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the replica has left
            self._loop.call_soon_threadsafe(self._begin_check, context=self._context)

    def _begin_check(self) -> None:
        self._spawn_among(self._checks, self._check_health())

    async def _check_health(self) -> None:
        self._health.begun(time.monotonic())
        error = None
        try:
            outcome = self._user.check_health()
            if inspect.isawaitable(outcome):
                await self._in_time(outcome)
        except BaseException as failure:
            error = failure
        self._checked(error)

    async def _in_time(self, checking: Awaitable[Any]) -> None:
        timeout_s = self._config.health_check_timeout_s
        outcome: list[BaseException | None] = []

        async def check() -> None:
            try:
                await checking
            except BaseException as error:  # SystemExit would end the loop
                outcome.append(error)
            else:
                outcome.append(None)

        task = self._spawn_among(self._checks, check())
        try:
            await asyncio.wait([task], timeout=timeout_s)
        finally:
            task.cancel()  # it is not waited for: it may not end at all
        if not outcome:
            raise TimeoutError(f"check_health has not returned within health_check_timeout_s={timeout_s:g}")
        if outcome[0] is not None:
            raise outcome[0]

    def _check_hangs(self) -> None:
        stack = stack_of_thread(self._thread)
        if self._health.began_at is None:
            return  # it returned just now
        limit = f"health_check_timeout_s={self._config.health_check_timeout_s:g}"
        what = f"has kept its event loop from turning since check_health began ({limit})"
        if not self._reported:
            self._log_where(what, stack)
        self._reported = True
        self._ask_to_be_replaced(what, hung=True)

    async def _between_items(self, job: Job) -> None:
        if self._limits:
            limit = self._limits.get(asyncio.current_task())  # type: ignore[arg-type]
            if limit is not None:
                limit.streaming = job  # its next part is sent when this returns
                limit.pause()
        while job.credit <= 0 and not job.cancelled:
            if job.more_credit is None:
                job.more_credit = asyncio.Event()
            job.more_credit.clear()
            await job.more_credit.wait()
