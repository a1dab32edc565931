"""A replica: one running copy of a backend, and the one door through which calls enter it.

It owns the slots (at most ``limit`` calls held, queued and running), the queue, batching, deadlines and cancellation.
Every call gets exactly one terminal answer, given up or not, so that callers can count.

`BlockingReplica` runs plain callables, one at a time, on the host's thread, straight between two reads of its sockets.
`LoopReplica` runs ``async def`` ones as tasks on the host's event loop. `control` is called by the worker's control
thread and only notes what is to be done; user code runs on one thread.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from .adapter import Channel, ChannelClosed, ServiceHost
from .config import BackendConfig
from .context import mark_loop_thread, unmark_loop_thread
from .control import Drain, Ping, Pong, Reconfigure, Reconfigured
from .errors import BackendError, DeadlineExceeded, EngineError, ResultNotSerializable
from .messages import HTTP, INITIAL_CREDIT, Call, Cancel, Credit, End, Failure, FailureKind, Item, Message, Reply
from .request import RequestEnvelope, ServeRequest, build_http_request
from .serialization import dumps, loads, pack_exception
from .user_callable import Method, UserCallable

__all__ = ["BlockingReplica", "LoopReplica", "Replica", "make_replica"]

_logger = logging.getLogger("engine.backend")
_FAREWELL_S = 1.0
"""How long a drained replica waits for its callers to hang up, so that no call is lost in a socket's buffer."""


class Job:
    """A call the replica holds."""

    __slots__ = ("call", "cancelled", "channel", "credit", "method", "more_credit", "task")

    def __init__(self, channel: Channel, call: Call) -> None:
        self.channel = channel
        self.call = call
        self.method: Method | None = None
        self.cancelled = False
        self.credit = INITIAL_CREDIT
        self.more_credit: asyncio.Event | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def expired(self) -> bool:
        """Whether its deadline passed."""
        return self.call.deadline is not None and time.monotonic() > self.call.deadline


class Replica:
    """What both kinds of replica share.

    Args:
        tag: The backend's tag.
        user: The user's callable.
        config: How to run it.
        tell: Sends a control message to the controller.
        debug: Tell HTTP clients tracebacks.
    """

    on_loop: bool

    def __init__(
        self, tag: str, user: UserCallable, config: BackendConfig, tell: Callable[[Any], None], *, debug: bool
    ) -> None:
        self._tag = tag
        self._user = user
        self._tell = tell
        self._debug = debug
        self._held = 0
        self._jobs: dict[tuple[Channel, int], Job] = {}
        self._chores: deque[Reconfigure] = deque()
        self._drain_until: float | None = None
        self._drained_since: float | None = None
        self._host: ServiceHost | None = None
        self._take(config)

    def __repr__(self) -> str:
        state = "draining" if self._drain_until is not None else "open"
        return f"<{type(self).__name__} {self._tag} {state} held={self._held}/{self._limit}>"

    def _take(self, config: BackendConfig) -> None:
        self._config = config
        self._limit = config.concurrency(blocking=not self.on_loop)
        self._batch_size = config.max_batch_size or 1

    # -- the control thread ----------------------------------------------------------------------------------------

    def control(self, body: Any) -> None:
        """Take a control message (any thread)."""
        if isinstance(body, Ping):
            self._tell(Pong(body.token, self._held))
        elif isinstance(body, Reconfigure):
            self._chores.append(body)
            self._wake()
        elif isinstance(body, Drain):
            self._drain_until = time.monotonic() + body.timeout_s
            self._wake()

    def _wake(self) -> None:
        if self._host is not None:
            self._host.wake()

    def finished(self) -> bool:
        """See `engine.adapter.Service.finished`."""
        if self._drain_until is None or self._held or self._chores:
            return False
        now = time.monotonic()
        if self._drained_since is None:
            self._drained_since = now
        assert self._host is not None
        return not self._host.open_channels() or now >= self._drained_since + _FAREWELL_S

    # -- the door --------------------------------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.adapter.ChannelListener.received`."""
        kind = type(message)
        if kind is Call:
            self._accept(channel, message)  # type: ignore[arg-type]
        elif kind is Cancel:
            job = self._jobs.get((channel, message.id))  # type: ignore[union-attr]
            if job is not None:
                self._cancel(job)
        elif kind is Credit:
            job = self._jobs.get((channel, message.id))  # type: ignore[union-attr]
            if job is not None:
                job.credit += message.amount  # type: ignore[union-attr]
                if job.more_credit is not None:
                    job.more_credit.set()

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.adapter.ChannelListener.lost`: nobody waits for that caller's calls any more."""
        for job in [job for (origin, _), job in self._jobs.items() if origin is channel]:
            self._cancel(job)
        if self._drain_until is not None:
            self._wake()

    def _accept(self, channel: Channel, call: Call) -> None:
        if self._drain_until is not None:
            self._answer(channel, Failure(call.id, self._held, FailureKind.DRAINING, b"", b""))
        elif self._held >= self._limit:
            self._answer(channel, Failure(call.id, self._held, FailureKind.REFUSED, b"", b""))
        else:
            self._held += 1
            job = Job(channel, call)
            self._jobs[channel, call.id] = job
            try:
                job.method = self._user.method(call.method)
            except EngineError as error:
                self._fail(job, error)
                return
            self._begin(job)

    def _begin(self, job: Job) -> None:
        raise NotImplementedError

    def _cancel(self, job: Job) -> None:
        job.cancelled = True
        if job.more_credit is not None:
            job.more_credit.set()
        if job.task is not None:
            job.task.cancel()

    # -- arguments and results -------------------------------------------------------------------------------------

    def _arguments(self, job: Job) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the user's method is called with, for one call."""
        call, method = job.call, job.method
        assert method is not None
        if call.kind == HTTP:
            return (build_http_request(call.head, call.payload),), {}
        args, kwargs = loads(call.payload)
        if any(type(arg) is RequestEnvelope for arg in args):
            args = tuple(
                build_http_request(arg.head, arg.body) if type(arg) is RequestEnvelope else arg for arg in args
            )
            if method.takes_request:
                return args[:1], {}
        if not method.takes_request:
            return args, kwargs
        http_method, headers = loads(call.head) if call.head else ("GET", ())
        data = args[0] if args else None
        return (ServeRequest(data, kwargs=kwargs, method=http_method, headers=headers),), {}

    def _batch_item(self, job: Job) -> Any:
        args, _ = self._arguments(job)
        return args[0] if args else None

    def _succeed(self, job: Job, result: Any) -> Coroutine[Any, Any, None] | None:
        """Answer with a result; returns what is left to do on an event loop (a stream, a background task)."""
        call = job.call
        if call.kind != HTTP:
            try:
                payload = dumps(result, f"the result of {self._name(job)}", ResultNotSerializable)
            except EngineError as error:
                self._fail(job, error)
                return None
            self._finish(job, lambda load: Reply(call.id, load, b"", payload))
            return None
        from .responses import Encoded, encode_result

        try:
            encoded = encode_result(result)
        except Exception as error:
            self._fail(job, error)
            return None
        if isinstance(encoded, Encoded):
            self._finish(job, lambda load: Reply(call.id, load, encoded.head, encoded.body))
            return self._background(encoded.background, job) if encoded.background is not None else None
        return self._stream(job, encoded)

    async def _background(self, task: Any, job: Job) -> None:
        try:
            await task()
        except Exception:
            _logger.exception("the background task of %s failed", self._name(job))

    async def _stream(self, job: Job, streamed: Any) -> None:
        call = job.call
        parts = streamed.parts(pickle.loads(call.head))
        started = failed = False
        try:
            async for head, chunk in parts:
                while job.credit <= 0 and not job.cancelled:
                    await self._wait_for_credit(job)
                if job.cancelled:
                    break
                job.credit -= 1
                started = True
                self._answer(job.channel, Item(call.id, head, chunk))
        except Exception as error:
            failed = True
            if not started:
                self._fail(job, error)
                return
            _logger.exception("%s failed in the middle of its stream, request %s", self._name(job), call.request_id)
        finally:
            await parts.aclose()
            self._finish(job, lambda load: End(call.id, load, failed or job.cancelled))

    async def _wait_for_credit(self, job: Job) -> None:
        raise NotImplementedError

    def _fail(self, job: Job, error: BaseException) -> None:
        call = job.call
        kind = FailureKind.ENGINE if isinstance(error, EngineError) else FailureKind.USER
        if call.kind == HTTP:
            from .responses import failure_head

            if kind == FailureKind.USER and not _is_http_exception(error):
                _logger.error("%s failed, request %s", self._name(job), call.request_id, exc_info=error)
            head, payload = failure_head(error, debug=self._debug)
        else:
            head, payload = b"", pack_exception(error)
        self._finish(job, lambda load: Failure(call.id, load, kind, head, payload))

    def _drop(self, job: Job) -> None:
        """Answer a call that nobody waits for, or that came too late, without running it."""
        self._fail(job, DeadlineExceeded("the call's deadline passed before the backend could take it"))

    def _finish(self, job: Job, answer: Callable[[int], Message]) -> None:
        if self._jobs.pop((job.channel, job.call.id), None) is None:
            return
        self._held -= 1
        self._answer(job.channel, answer(self._held))

    def _answer(self, channel: Channel, message: Message) -> None:
        try:
            channel.send(message)
        except ChannelClosed:
            pass  # the caller is gone, and `lost` follows
        except EngineError as error:
            if isinstance(message, Reply):
                failure = ResultNotSerializable(f"the result of backend {self._tag!r} cannot be sent: {error}")
                packed = pack_exception(failure)
                self._answer(channel, Failure(message.id, message.load, FailureKind.ENGINE, b"", packed))

    def _name(self, job: Job) -> str:
        return f"backend {self._tag!r}" if job.call.method == "__call__" else f"{self._tag!r}.{job.call.method}"

    def _spread(self, jobs: list[Job], results: Any) -> list[Coroutine[Any, Any, None]]:
        """Answer a batch, one result each."""
        if not isinstance(results, (list, tuple)) or len(results) != len(jobs):
            size = f"{len(results)} results" if isinstance(results, (list, tuple)) else f"a {type(results).__name__}"
            error = BackendError(
                f"{self._name(jobs[0])} accepts batches and must return a list as long as the one it gets: "
                f"it got {len(jobs)} requests and returned {size}"
            )
            for job in jobs:
                self._fail(job, error)
            return []
        left = [self._succeed(job, result) for job, result in zip(jobs, results, strict=True)]
        return [rest for rest in left if rest is not None]


class BlockingReplica(Replica):
    """Runs plain callables one at a time on the host's thread."""

    on_loop = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._queue: deque[Job] = deque()
        self._batch_due: float | None = None  # when the batch at the head of the queue runs, full or not
        self._loop: asyncio.AbstractEventLoop | None = None  # for streams and stray coroutines; made when needed

    def attach(self, host: ServiceHost) -> None:
        """See `engine.adapter.Service.attach`."""
        self._host = host

    def close(self) -> None:
        """Release the private loop."""
        if self._loop is not None:
            self._loop.close()

    def _begin(self, job: Job) -> None:
        self._queue.append(job)

    def run_next(self) -> float | None:
        """See `engine.adapter.Service.run_next`."""
        while self._chores:
            self._reconfigure(self._chores.popleft())
        queue = self._queue
        while queue and (queue[0].cancelled or queue[0].expired):
            self._drop(queue.popleft())
        if not queue:
            return self._farewell()
        method = queue[0].method
        assert method is not None
        if method.batched:
            due = self._collect(method)
            if due > 0:
                return due
        else:
            self._run_one(queue.popleft())
        return 0.0 if queue or self._drain_until is not None else None

    def _farewell(self) -> float | None:
        if self._drained_since is None:
            return None
        return max(0.001, self._drained_since + _FAREWELL_S - time.monotonic())

    def _run_one(self, job: Job) -> None:
        method = job.method
        assert method is not None
        try:
            args, kwargs = self._arguments(job)
            result = method.function(*args, **kwargs)
            if inspect.iscoroutine(result):
                result = self._complete(result)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            self._fail(job, error)
            return
        rest = self._succeed(job, result)
        if rest is not None:
            self._complete(rest)

    def _collect(self, method: Method) -> float:
        """Run the batch at the head of the queue; or return for how many seconds it waits for more calls."""
        batch = [job for job in self._queue if job.method is method][: self._batch_size]
        if len(batch) < self._batch_size and self._config.batch_wait_timeout and self._drain_until is None:
            now = time.monotonic()
            if self._batch_due is None:
                self._batch_due = now + self._config.batch_wait_timeout
            if now < self._batch_due:
                return self._batch_due - now
        self._batch_due = None
        taken = set(map(id, batch))
        self._queue = deque(job for job in self._queue if id(job) not in taken)
        live: list[Job] = []
        for job in batch:
            if job.cancelled or job.expired:
                self._drop(job)
            else:
                live.append(job)
        if live:
            self._run_batch(method, live)
        return 0.0

    def _run_batch(self, method: Method, jobs: list[Job]) -> None:
        try:
            results = method.function([self._batch_item(job) for job in jobs])
            if inspect.iscoroutine(results):
                results = self._complete(results)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            for job in jobs:
                self._fail(job, error)
            return
        for rest in self._spread(jobs, results):
            self._complete(rest)

    def _reconfigure(self, chore: Reconfigure) -> None:
        error = None
        try:
            config: BackendConfig = pickle.loads(chore.config)
            if chore.user_config_changed:
                outcome = self._user.reconfigure(config.user_config)
                if inspect.isawaitable(outcome):
                    self._complete(_awaited(outcome))
            self._take(config)
        except Exception as failure:
            error = pack_exception(failure)
        self._tell(Reconfigured(chore.token, error))

    def _complete(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(coroutine)

    async def _wait_for_credit(self, job: Job) -> None:
        assert self._host is not None
        self._host.poll(None)
        await asyncio.sleep(0)


class LoopReplica(Replica):
    """Runs ``async def`` callables as tasks on the host's event loop, and plain ones on it too, one at a time."""

    on_loop = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: dict[str, list[Job]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly

    def attach(self, host: ServiceHost) -> None:
        """See `engine.adapter.Service.attach`."""
        self._host = _LoopGuard(host, asyncio.get_running_loop(), self._on_wake)
        mark_loop_thread()
        if self._chores or self._drain_until is not None:
            self._host.wake()

    def close(self) -> None:
        """Take the mark off the loop's thread."""
        unmark_loop_thread()

    def run_next(self) -> float | None:
        """See `engine.adapter.Service.run_next`; tasks run by themselves."""
        return None

    def _on_wake(self) -> None:
        loop = asyncio.get_running_loop()
        while self._chores:
            self._spawn(self._reconfigure(self._chores.popleft()))
        if self._drain_until is not None:
            assert self._host is not None
            loop.call_later(_FAREWELL_S + 0.01, self._host.wake)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _finish(self, job: Job, answer: Callable[[int], Message]) -> None:
        super()._finish(job, answer)
        if self._drain_until is not None and not self._held:
            self._wake()

    def _begin(self, job: Job) -> None:
        assert job.method is not None
        if job.method.batched:
            self._join_batch(job)
        else:
            job.task = self._spawn(self._run_one(job))

    async def _run_one(self, job: Job) -> None:
        method = job.method
        assert method is not None
        try:
            if job.expired:
                self._drop(job)
                return
            args, kwargs = self._arguments(job)
            result = method.function(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
            rest = self._succeed(job, result)
            if rest is not None:
                await rest
        except asyncio.CancelledError as error:
            self._fail(job, error)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
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
        try:
            results = method.function([self._batch_item(job) for job in jobs])
            if inspect.isawaitable(results):
                results = await results
        except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
            for job in jobs:
                self._fail(job, error)
            return
        for rest in self._spread(jobs, results):
            await rest

    async def _reconfigure(self, chore: Reconfigure) -> None:
        error = None
        try:
            config: BackendConfig = pickle.loads(chore.config)
            if chore.user_config_changed:
                outcome = self._user.reconfigure(config.user_config)
                if inspect.isawaitable(outcome):
                    await outcome
            self._take(config)
        except Exception as failure:
            error = pack_exception(failure)
        self._tell(Reconfigured(chore.token, error))

    async def _wait_for_credit(self, job: Job) -> None:
        if job.more_credit is None:
            job.more_credit = asyncio.Event()
        job.more_credit.clear()
        await job.more_credit.wait()


class _LoopGuard:
    """A service host whose `wake` also runs a function of the replica's on the loop."""

    def __init__(self, host: ServiceHost, loop: asyncio.AbstractEventLoop, on_wake: Callable[[], None]) -> None:
        self._host = host
        self._loop = loop
        self._on_wake = on_wake
        self.poll = host.poll
        self.open_channels = host.open_channels

    def wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._on_wake)
            self._host.wake()
        except RuntimeError:
            pass  # the loop is closed: the replica is leaving already


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _is_http_exception(error: BaseException) -> bool:
    return any(cls.__name__ == "HTTPException" and cls.__module__.startswith("starlette") for cls in type(error).__mro__)


def make_replica(
    tag: str,
    target: tuple[Any, tuple[Any, ...], dict[str, Any]],
    config: BackendConfig,
    tell: Callable[[Any], None],
    *,
    debug: bool,
) -> BlockingReplica | LoopReplica:
    """Construct the user's object and the replica around it; ``reconfigure`` has run when this returns."""
    user = UserCallable(tag, *target)
    if config.user_config is not None:
        outcome = user.reconfigure(config.user_config)
        if inspect.isawaitable(outcome):
            asyncio.run(_awaited(outcome))  # type: ignore[arg-type]
    kind = LoopReplica if user.on_loop else BlockingReplica
    return kind(tag, user, config, tell, debug=debug)
