"""A replica of plain callables: one call at a time, on its service loop's thread, between two reads of its sockets.

Short calls wait here for each other, so that the next one is at hand when one ends. While a long one runs, those that
wait are handed back to their callers, who may know of an idle replica. A caller who sends one all the same, having
been told, knows of none: that call waits here (`Call.informed`).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from ..calling.budget import Budget, running_budget
from ..config import BackendConfig
from ..seam.channel import Channel
from ..seam.control_messages import Reconfigure, Reconfigured
from ..seam.messages import End, Failure, FailureKind
from ..seam.serialization import pack_exception_briefly
from ..seam.service import ServiceLoop
from .batches import last_of, listed
from .interruption import Interrupter
from .replica import FAREWELL_S, Job, Replica, awaited
from .stacks import stack_of_task, stack_of_thread
from .turns import next_of
from .user_callable import Method

if TYPE_CHECKING:
    import asyncio

    from ..http.streams import Part

__all__ = ["BlockingReplica"]

_LONG_S = 0.01
"""How long a call runs before others, which wait for it, are handed back: what is shorter is not worth the way."""
_LAST_WORD_S = 1.0
"""How long a replica that hangs takes at most to tell those whose calls it holds, before it says so to be ended."""


class BlockingReplica(Replica):
    """Runs plain callables one at a time on the service loop's thread.

    Attributes:
        interrupter: Stops those whose calls are cancelled, once it was told how.
    """

    __slots__ = (
        "_batch",
        "_batch_due",
        "_batch_head",
        "_began",
        "_gave_way",
        "_hangs",
        "_last",
        "_later",
        "_loop",
        "_mixed",
        "_passed",
        "_passed_then",
        "_queue",
        "_reported",
        "_seen",
        "_step_began",
        "_stood_still_s",
        "_streaming",
        "_told",
        "_told_callers",
        "interrupter",
    )  # more than an object's own dictionary is quick for

    on_loop = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interrupter = Interrupter()
        self._queue: deque[Job] = deque()
        self._batch: list[Job] | None = None  # that runs
        self._later: deque[Job] = deque()  # of a batch that ran, those whose streams wait for each other
        # What `_batch_due` counts from: channel and number of a call, not the call itself, which may be given up.
        self._batch_head: tuple[Channel, int] | None = None
        self._batch_due: float | None = None  # when the batch at the head of the queue runs, full or not
        self._loop: asyncio.AbstractEventLoop | None = None  # for streams and stray coroutines; made when needed
        self._began: float | None = None  # when the call that runs began; None also for batches, which fill meanwhile
        self._told: set[Channel] = set()  # callers that were told that it is a long one
        self._mixed = False  # what waits differs in priority, or in who called
        self._passed = self._passed_then = 0  # see `next_of`, now and once the call at the head of the queue is taken
        self._last: Channel | None = None  # who made the last call that was taken from a mixed queue
        self._gave_way = False  # those that waited for the stream that runs were handed back
        # When the batch, or the step of a stream or a background task that runs began; `inf` between two such steps.
        # None if nothing but `_began` says.
        self._step_began: float | None = None
        self._streaming: Job | None = None  # some of its stream was sent
        # The watchdog's: what it sees run, and for how long the process stood still meanwhile.
        self._seen: float | None = None
        self._stood_still_s = 0.0
        self._reported: float | None = None  # the last that was found to hang
        # When what hangs began, and how long that may take: those who called it are still to be told.
        self._hangs: tuple[float, float] | None = None
        self._told_callers = threading.Event()

    def attach(self, loop: ServiceLoop) -> None:
        """See `engine.seam.service.Service.attach`."""
        self._service_loop = loop
        self._attached()

    def configure(self, user_config: Any) -> None:
        """Take the first ``user_config``; on the thread that constructed the user's object."""
        outcome = self._user.reconfigure(user_config)
        if hasattr(outcome, "__await__"):
            self._complete(awaited(outcome))

    def leave(self) -> None:
        """Call the user's ``close()``, if the replica leaves in order, and drop the user's object."""
        if self._grace_s() > 0:
            from .farewell import begin_close, finish_close

            closing = begin_close(self._user)
            if closing is not None:
                self._complete(finish_close(self._user, closing, self._grace_s()))
        self._user.drop()

    def close(self) -> None:
        """End the watch, and release the private loop."""
        self._watchdog.stop()
        self._turns = self._last = None  # the channels know this object: they would keep each other in memory
        if self._loop is not None:
            from ..seam.event_loop import close_event_loop

            close_event_loop(self._loop)

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`."""
        self._told.discard(channel)
        self._last = None
        super().lost(channel, reason)

    def _begin(self, job: Job) -> None:
        queue = self._queue
        if queue and (queue[-1].channel is not job.channel or queue[-1].call.priority != job.call.priority):
            self._mixed = True
        if (self._held > 1 or job.method.batched) and not self._may_wait(job):  # type: ignore[union-attr]
            return
        queue.append(job)
        if self._began is None:
            return
        if job.call.informed and job.channel in self._told:  # what was sent before it was told is handed back, too
            job.kept = True
        elif time.monotonic() - self._began >= _LONG_S:
            self._hand_back()

    def delayed(self) -> None:
        """See `engine.seam.service.Service.delayed`."""
        if self._hangs is not None:
            self._give_up()
        elif self._hands_over:
            self._hand_over()
        elif self._began is not None:
            self._hand_back()

    def _hand_back(self) -> None:
        """Let callers take elsewhere what waits for a long call; not while leaving, when there may be no others."""
        if self._drain_until is not None:
            return
        kept: deque[Job] = deque()
        handed_back: list[Job] = []
        for job in self._queue:
            assert job.method is not None
            (kept if job.kept or job.method.batched else handed_back).append(job)
        self._queue = kept
        for job in handed_back:
            self._told.add(job.channel)
            self._finish(job, Failure(job.call.id, 0, FailureKind.BUSY, b"", b""))

    def _hand_over(self) -> None:
        """Let others take whatever has not begun."""
        queue, self._queue = self._queue, deque()
        for job in queue:
            self._finish(job, Failure(job.call.id, 0, FailureKind.DRAINING, b"", b""))

    def run_next(self) -> float | None:
        """See `engine.seam.service.Service.run_next`."""
        if self._hands_over:
            self._hand_over()
        while self._chores:
            number, chore = self._chores.popleft()
            if chore is None:
                self._check_health()
            else:
                self._reconfigure(number, chore)
        queue = self._queue
        while queue and queue[0].call.deadline is not None and queue[0].expired:
            self._drop(queue.popleft())
        if not queue:
            return self._farewell()
        if self._mixed:
            self._bring_forward()
        method = queue[0].method
        assert method is not None
        if method.batched:
            due = self._collect(method)
            if due > 0:
                return due
        else:
            self._began = time.monotonic()
            if self._mixed:
                self._note_turn(queue[0])
            job = queue.popleft()
            if job.size:
                self._waits_no_more(job)
            try:
                self._run_one(job)
            finally:
                self._began = None
                self._gave_way = False
                if self._told:
                    self._told.clear()
        # Another thread may have heard of more to do while user code ran.
        return 0.0 if self._queue or self._chores or self._drain_until is not None else None

    def _bring_forward(self) -> None:
        """Put the call at the head of the queue whose turn it is."""
        queue = self._queue
        if len(queue) < 2:
            self._mixed = False
            return
        place, self._passed_then = next_of(queue, self._passed, self._last)
        if place:
            job = queue[place]
            del queue[place]
            queue.appendleft(job)

    def _note_turn(self, job: Job) -> None:
        """The call at the head of the queue is taken from there."""
        self._passed, self._last = self._passed_then, job.channel

    # -- calls that run for too long -----------------------------------------------------------------------------------

    def _gets_on_or_not(self) -> bool:
        return self._max_call_s is not None

    def _running_since(self) -> float | None:
        """When what runs now began: a call, a batch, a step of a stream or of a background task."""
        step = self._step_began
        if step is None:
            return self._began
        return None if step == math.inf else step

    def _look_at_work(self, now: float, late_s: float) -> float | None:
        limit_s, since = self._max_call_s, self._running_since()
        if limit_s is None or since is None:
            return limit_s  # what begins only now is looked at before it can be late
        if since != self._seen:
            self._seen, self._stood_still_s = since, 0.0
        self._stood_still_s += late_s
        remaining_s = since + limit_s + self._stood_still_s - now
        if remaining_s > 0:
            return remaining_s
        self._overran(since, now - since, limit_s)
        return limit_s

    def _overran(self, since: float, age_s: float, limit_s: float) -> None:
        """Tell everybody, in the order that leaves nobody waiting: the log, those who called, the controller."""
        stack = self._stack()
        running = self._running()
        if self._running_since() != since:
            return  # it ended just now
        what = " and ".join({self._name(job) for job in running}) or f"a background task of backend {self._tag!r}"
        told = (
            f"a call of {what}{self._requests(running)} has run for {age_s:.1f} s, longer than max_call_s={limit_s:g}"
        )
        if self._reported != since:
            self._log_where(told, stack)
        self._reported = since
        self._say_that_it_hangs(since, f"has been in one call for {age_s:.1f} s (max_call_s={limit_s:g})", limit_s)

    def _say_that_it_hangs(self, since: float, reason: str, limit_s: float) -> None:
        self._hangs = since, limit_s
        self._told_callers.clear()
        assert self._service_loop is not None
        self._service_loop.wake()  # whoever reads meanwhile calls `delayed`
        if not self._told_callers.wait(_LAST_WORD_S) and not self._still_runs(since):
            self._hangs = None
            return  # it ended before anybody was told: what runs by now is not to be killed for it
        self._ask_to_be_replaced(reason, hung=True)

    def _still_runs(self, since: float) -> bool:
        return since in (self._running_since(), self._health.began_at)

    def _stack(self) -> str:
        stack = stack_of_thread(self._thread)
        if self._loop is not None and self._loop.is_running():
            import asyncio

            stack += "".join(f"  in {task!r}:\n{stack_of_task(task)}" for task in asyncio.all_tasks(self._loop))
        return stack

    def _running(self) -> list[Job]:
        """The jobs that are being run. Any thread may ask: nothing is looked through while it may change."""
        jobs, waiting = list(self._jobs.values()), {id(job) for job in [*self._queue, *self._later]}
        return [job for job in jobs if id(job) not in waiting]

    def _give_up(self) -> None:
        """Answer all that is held, for what runs hangs: whoever delivers messages meanwhile does so."""
        hangs, self._hangs = self._hangs, None
        if hangs is None or not self._still_runs(hangs[0]):
            return
        limit_s = hangs[1]
        self._drain_until = self._drain_until or time.monotonic()
        running = self._running()
        self._hand_over()
        for job in running:
            job.cancelled = True
            if job is self._streaming:
                self._finish(job, End(job.call.id, 0, True))
            else:
                self._fail(job, self._too_long(job, limit_s))
        self._told_callers.set()

    # -- its health ----------------------------------------------------------------------------------------------------

    def first_check(self) -> None:
        """Call ``check_health`` before there are calls, on the thread that constructed the user's object."""
        outcome = self._user.check_health()
        if hasattr(outcome, "__await__"):
            self._complete(awaited(outcome))

    def _ask_for_check(self) -> None:
        self._chores.append((0, None))
        self._wake()

    def _check_health(self) -> None:
        error = None
        now = time.monotonic()
        self._health.begun(now)
        self._began, self._step_began = now, math.inf  # who waits for long goes elsewhere; it is no call, though
        try:
            self._run_user_code(None, self._user.check_health)
        except BaseException as failure:
            error = failure
        finally:
            self._began = None
            self._step_began = None
            self._told.clear()
        self._checked(error)

    def _check_hangs(self) -> None:
        began_at = self._health.began_at
        stack = self._stack()
        if began_at is None or self._health.began_at != began_at:
            return  # it returned just now
        what = f"has not returned from check_health within {self._config.health_check_timeout_s:g} s"
        if self._reported != began_at:
            self._log_where(what, stack)
        self._reported = began_at
        self._say_that_it_hangs(began_at, what, self._config.health_check_timeout_s)

    # -- running -------------------------------------------------------------------------------------------------------

    def _farewell(self) -> float | None:
        """For how long to wait for callers to hang up, if the replica is to leave."""
        if self._drain_until is None:
            return None
        now = time.monotonic()
        if self._drained_since is None:
            self._drained_since = now
        return max(0.001, self._drained_since + FAREWELL_S - now)

    def _run_one(self, job: Job) -> None:
        method = job.method
        assert method is not None
        if not job.channel.begin(job.call.id):
            self._drop(job)
            return
        try:
            args, kwargs = self._arguments(job)
            deadline, priority = job.call.deadline, job.call.priority
            if deadline is None and not priority and running_budget() is None:  # one before is there if it was struck
                result = self._run_user_code(job, method.function, *args, **kwargs)
            else:
                with Budget(deadline, priority):
                    result = self._run_user_code(job, method.function, *args, **kwargs)
        except BaseException as error:
            self._fail(job, error)
            return
        rest = self._succeed(job, result)
        if rest is not None:
            self._complete_rest(job, rest)

    def _collect(self, method: Method) -> float:
        """Run the batch at the head of the queue; or return for how many seconds it waits for more calls."""
        alike = [job for job in self._queue if job.method is method]
        if self._mixed:
            alike[1:] = sorted(alike[1:], key=_priority_of)
        batch = alike[: self._batch_size]
        incomplete = len(batch) < self._batch_size and not self._is_full_of_bytes()
        if incomplete and self._config.batch_wait_timeout and self._drain_until is None:
            now = time.monotonic()
            head = batch[0].channel, batch[0].call.id
            if self._batch_due is None or self._batch_head != head:
                self._batch_head = head
                self._batch_due = now + self._config.batch_wait_timeout
            if now < self._batch_due:
                return self._batch_due - now
        self._batch_due = self._batch_head = None
        if self._mixed:
            self._note_turn(batch[0])
        taken = set(map(id, batch))
        self._queue = deque(job for job in self._queue if id(job) not in taken)
        live: list[Job] = []
        for job in batch:
            self._waits_no_more(job)
            if job.expired:
                self._drop(job)
            else:
                live.append(job)
        if live:
            self._step_began = time.monotonic()
            try:
                self._run_batch(method, live)
            finally:
                self._step_began = None
        return 0.0

    def _run_batch(self, method: Method, jobs: list[Job]) -> None:
        jobs, items = self._batch_items(jobs)
        if not jobs:
            return
        self._batch = jobs
        try:
            with Budget(last_of(job.call.deadline for job in jobs), min(job.call.priority for job in jobs)):
                results = self._run_user_code(jobs, method.function, items)
                if type(results) is not list:
                    results = self._run_user_code(jobs, listed, results, len(jobs))
        except BaseException as error:
            for job in jobs:
                self._fail(job, error)
            return
        finally:
            self._batch = None
        left = self._spread(jobs, results)
        self._later.extend(job for job, _ in left)
        for job, rest in left:
            self._later.popleft()
            if job.cancelled:
                self._cancel(job)  # what runs for it begins only now
            self._complete_rest(job, rest)

    def _reconfigure(self, number: int, chore: Reconfigure) -> None:
        error = None
        try:
            config: BackendConfig = self.loads(chore.config)
            self._run_user_code(None, self._user.reconfigure, config.user_config)
            self._take(number, config)
        except BaseException as failure:
            error = pack_exception_briefly(failure)
        self._tell(Reconfigured(chore.token, error))

    def _run_user_code(
        self, work: Job | list[Job] | None, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call user code, for a call or a batch if it may be interrupted."""
        loop = self._service_loop
        interrupter = self.interrupter
        assert loop is not None
        loop.step_out()
        try:
            try:
                interrupter.open = work
                result = function(*args, **kwargs)
            finally:
                interrupter.open = None
            return self._complete(self._awaited(work, result)) if hasattr(result, "__await__") else result
        finally:
            loop.step_in()

    async def _awaited(self, work: Job | list[Job] | None, awaitable: Any) -> Any:
        """Await what a plain callable returned; its calls are cancelled as those of an async one."""
        import asyncio

        jobs = [] if work is None or not self._config.cancel_running else [work] if isinstance(work, Job) else work
        task = asyncio.current_task()
        assert task is not None
        for job in jobs:
            job.task = task
        if jobs and all(job.cancelled for job in jobs):
            task.cancel()
        try:
            return await awaitable
        finally:
            for job in jobs:
                job.task = None

    def _complete(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None:
            import asyncio

            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(coroutine)

    def _complete_rest(self, job: Job, rest: Coroutine[Any, Any, None]) -> None:
        try:
            self._complete(rest)
        except BaseException as error:  # the end of a stream, say, that raised while it was closed
            self._fail(job, error)
        finally:
            self._began = self._streaming = None  # in this order: the call is not one of a single long step
            self._step_began = None

    def _stream(self, job: Job, streamed: Any) -> Coroutine[Any, Any, None]:
        streamed.step = partial(self._next_item, job)
        return super()._stream(job, streamed)

    def _next_item(self, job: Job, source: Iterator[Any]) -> Any:
        interrupter = self.interrupter
        try:
            interrupter.open = job
            item = next(source)
        finally:
            interrupter.open = None
        return item

    async def _outside(self, step: Awaitable[Any]) -> Any:
        loop = self._service_loop
        assert loop is not None
        self._step_began = time.monotonic()
        loop.step_out()
        try:
            return await step
        finally:
            loop.step_in()
            self._step_began = math.inf
            del step  # what it raised knows this frame: they would keep each other in memory

    async def _next_part(self, job: Job, parts: AsyncGenerator[Part, None]) -> Part | None:
        import asyncio

        task = job.task = asyncio.current_task()
        if job.cancelled and task is not None:
            task.cancel()
        try:
            return await self._outside(anext(parts, None))  # type: ignore[no-any-return]
        finally:
            job.task = None

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        if job in self._queue:
            self._queue.remove(job)
            self._drop(job)
            return
        batch = self._batch
        if batch is None or job not in batch:
            self._stop(job, job)
        elif all(other.cancelled for other in batch):
            self._stop(batch, job)

    def _stop(self, work: Job | list[Job], job: Job) -> None:
        """Stop what runs for a call, or for its batch: at an await by cancellation, elsewhere by an exception."""
        if job.task is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(_cancel_task, job)
        if self._config.cancel_running and job not in self._later:
            grace_s = self._config.cancel_grace_s
            self.interrupter.interrupt(
                work,
                "nobody waits for this call any more",
                lasts=lambda: self._jobs.get((job.channel, job.call.id)) is job,
                grace_s=grace_s,
                outlasted=lambda: self._outlasted(job, grace_s or 0.0),
            )

    def _outlasted(self, job: Job, grace_s: float) -> None:
        """A call goes on although it was cancelled: be replaced, but hand back first what waits for it."""
        reason = f"has gone on with {self._name(job)} for {grace_s:g} s after it was cancelled"
        since = self._running_since()
        if self._jobs.get((job.channel, job.call.id)) is not job:
            return  # it ended just now: what runs by then is not to be ended for it
        if since is None:  # between two steps of a stream, where whoever runs it looks at its cancellation
            self._ask_to_be_replaced(reason, hung=True)
        else:
            self._say_that_it_hangs(since, reason, grace_s)

    async def _between_items(self, job: Job) -> None:
        assert self._service_loop is not None
        self._streaming = job  # its next part is sent when this returns
        self._service_loop.poll(0.0)
        until_long_s = self._give_way()
        while job.credit <= 0 and not job.cancelled:
            self._service_loop.poll(until_long_s)
            until_long_s = self._give_way()

    def _give_way(self) -> float | None:
        """Hand back what waits for a stream that has become long, be its steps short; or say in how long it will be."""
        if self._hands_over:
            self._hand_over()
        if self._gave_way or self._began is None:
            return None
        remaining_s = self._began + _LONG_S - time.monotonic()
        if remaining_s > 0:
            return remaining_s
        self._gave_way = True  # who comes later is handed back at once
        self._hand_back()
        return None


def _priority_of(job: Job) -> int:
    return job.call.priority


def _cancel_task(job: Job) -> None:
    # Seen by the loop's thread alone: closing the stream, which may have begun meanwhile, is not to be interrupted.
    if job.task is not None:
        job.task.cancel()
