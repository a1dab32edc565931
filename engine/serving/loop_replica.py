"""A replica with ``async def`` callables: its calls are tasks on its service loop's event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from typing import TYPE_CHECKING, Any

from ..calling.budget import Budget
from ..config import BackendConfig
from ..seam.control_messages import Reconfigure, Reconfigured
from ..seam.may_block import mark_loop_thread, unmark_loop_thread
from ..seam.messages import End, Failure, Reply
from ..seam.serialization import pack_exception_briefly
from ..seam.service import ServiceLoop
from .batches import last_of, listed
from .farewell import begin_close, finish_close
from .replica import FAREWELL_S, Job, Replica

if TYPE_CHECKING:
    from ..http.streams import Part

__all__ = ["LoopReplica"]


class LoopReplica(Replica):
    """Runs ``async def`` callables as tasks on an event loop, and plain ones on it too, one at a time."""

    on_loop = True

    event_loop: asyncio.AbstractEventLoop

    def __init__(self, *args: Any, event_loop: asyncio.AbstractEventLoop, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.event_loop = event_loop
        self._loop: asyncio.AbstractEventLoop  # asyncio's, from `attach` on
        self._batches: dict[str, list[Job]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly
        self._configuring: asyncio.Task[None] | None = None  # does the chores, one after the other

    def attach(self, loop: ServiceLoop) -> None:
        """See `engine.seam.service.Service.attach`."""
        self._loop = asyncio.get_running_loop()
        self._service_loop = loop
        mark_loop_thread()
        if self._chores or self._drain_until is not None:
            self._wake()

    def leave(self) -> None:
        """Finish what answers left to do, call the user's ``close()``, if there is time, and drop the user's object."""
        self.event_loop.run_until_complete(self._leave())

    async def _leave(self) -> None:
        if self._tasks and self._grace_s() > 0:
            await asyncio.wait(self._tasks, timeout=self._grace_s())
        if self._grace_s() > 0:
            closing = begin_close(self._user)
            if closing is not None:
                await finish_close(self._user, closing, self._grace_s())
        self._user.drop()

    def close(self) -> None:
        """Take the mark off the loop's thread."""
        unmark_loop_thread()

    def run_next(self) -> float | None:
        """See `engine.seam.service.Service.run_next`; tasks run by themselves."""
        return None

    def _wake(self) -> None:
        if self._service_loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._on_wake)
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
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _finish(self, job: Job, answer: Reply | Failure | End) -> None:
        super()._finish(job, answer)
        if self._drain_until is not None and not self._held:
            self._wake()

    def _begin(self, job: Job) -> None:
        assert job.method is not None
        if job.method.batched:
            self._join_batch(job)
        else:
            self._spawn(self._run_one(job))

    async def _run_one(self, job: Job) -> None:
        method = job.method
        assert method is not None
        if job.cancelled or job.expired or not job.channel.begin(job.call.id):
            self._drop(job)
            return
        job.task = asyncio.current_task()  # only now: a task cancelled before its first step would never answer
        try:
            args, kwargs = self._arguments(job)
            deadline = job.call.deadline
            if deadline is None:
                result = method.function(*args, **kwargs)
                if inspect.isawaitable(result):
                    result = await result
            else:
                with Budget(deadline):
                    result = method.function(*args, **kwargs)
                    if inspect.isawaitable(result):
                        result = await result
            rest = self._succeed(job, result)
            if rest is not None:
                await rest
        except BaseException as error:
            self._fail(job, error)

    def _join_batch(self, job: Job) -> None:
        name = job.call.method
        batch = self._batches.setdefault(name, [])
        batch.append(job)
        if len(batch) >= self._batch_size:
            self._start_batch(name)
        elif len(batch) == 1:
            loop = asyncio.get_running_loop()
            self._timers[name] = loop.call_later(self._config.batch_wait_timeout, self._start_batch, name)

    def _start_batch(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
        live: list[Job] = []
        for job in self._batches.pop(name, []):
            if job.cancelled or job.expired:
                self._drop(job)
            else:
                live.append(job)
        if live:
            self._spawn(self._run_batch(live))

    async def _run_batch(self, jobs: list[Job]) -> None:
        method = jobs[0].method
        assert method is not None
        jobs, items = self._batch_items(jobs)
        if not jobs:
            return
        try:
            with Budget(last_of(job.call.deadline for job in jobs)):
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
        for job, rest in self._spread(jobs, results):
            try:
                await rest
            except BaseException as error:
                self._fail(job, error)

    async def _configure(self) -> None:
        while self._chores:
            await self._reconfigure(*self._chores.popleft())

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
        return step

    def _next_part(self, job: Job, parts: AsyncGenerator[Part, None], *, plain: bool) -> Awaitable[Part | None]:
        return anext(parts, None)

    async def _between_items(self, job: Job) -> None:
        while job.credit <= 0 and not job.cancelled:
            if job.more_credit is None:
                job.more_credit = asyncio.Event()
            job.more_credit.clear()
            await job.more_credit.wait()
