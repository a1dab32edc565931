"""A replica: one running copy of a backend, and the one door through which calls enter it.

It owns the slots (at most ``limit`` calls held, queued and running), arguments and answers, deadlines and cancellation.
Every call gets exactly one terminal answer, given up or not, so that callers can count.

How calls are run is the subclass's affair: `blocking_replica` and `loop_replica`. `Replica.control` is
called by the worker's control thread and only notes what is to be done; user code runs on one thread. Configurations
are taken one at a time, in the order in which they came.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ..config import BackendConfig
from ..errors import (
    BackendError,
    DeadlineExceeded,
    EngineError,
    InvalidArgument,
    NotSerializable,
    ResultNotSerializable,
)
from ..request import ServeRequest
from ..seam.channel import Channel, ChannelClosed
from ..seam.control_messages import Drain, Ping, Pong, Reconfigure, Reconfigured
from ..seam.http_request import RequestEnvelope, build_http_request
from ..seam.messages import HTTP, INITIAL_CREDIT, Call, Cancel, Credit, End, Failure, FailureKind, Item, Message, Reply
from ..seam.serialization import dumps, loads, pack_exception
from ..seam.service import ServiceLoop
from .user_callable import Method, UserCallable

if TYPE_CHECKING:
    import asyncio

    from ..http.streams import Part

__all__ = ["FAREWELL_S", "Job", "Replica", "awaited"]

_logger = logging.getLogger("engine.backend")
FAREWELL_S = 1.0
"""How long a drained replica waits for its callers to hang up, so that no call is lost in a socket's buffer."""


class Job:
    """A call the replica holds."""

    __slots__ = ("call", "cancelled", "channel", "credit", "method", "more_credit", "request", "task")

    def __init__(self, channel: Channel, call: Call) -> None:
        self.channel = channel
        self.call = call
        self.method: Method | None = None
        self.cancelled = False
        self.credit = INITIAL_CREDIT
        self.more_credit: asyncio.Event | None = None
        self.task: asyncio.Task[None] | None = None
        self.request: Any = None  # Starlette's, whose uploads must be closed

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

    Attributes:
        loads: Unpickles what callers send.
    """

    on_loop: bool
    event_loop: asyncio.AbstractEventLoop | None = None
    """See `engine.seam.service.Service.event_loop`."""

    def __init__(
        self, tag: str, user: UserCallable, config: BackendConfig, tell: Callable[[Any], None], *, debug: bool
    ) -> None:
        self._tag = tag
        self._result_name = f"the result of backend {tag!r}"
        self._user = user
        self._tell = tell
        self._debug = debug
        self.loads: Callable[[bytes], Any] = loads
        self._held = 0
        self._jobs: dict[tuple[Channel, int], Job] = {}
        self._chores: deque[tuple[int, Reconfigure]] = deque()
        self._config_lock = threading.Lock()  # guards the next two, and what `_take` sets
        self._asked = 0  # numbers the configurations, in the order in which they came
        self._taken = 0  # the newest one taken
        self._drain_until: float | None = None
        self._drained_since: float | None = None
        self._service_loop: ServiceLoop | None = None
        self._take(0, config)

    def __repr__(self) -> str:
        state = "draining" if self._drain_until is not None else "open"
        return f"<{type(self).__name__} {self._tag} {state} held={self._held}/{self._limit}>"

    def _take(self, number: int, config: BackendConfig) -> None:
        """Keep to these limits from now on (any thread), unless newer ones were taken meanwhile."""
        with self._config_lock:
            if number >= self._taken:
                self._taken = number
                self._config = config
                self._limit = config.concurrency(on_loop=self.on_loop)
                self._batch_size = config.max_batch_size or 1

    # -- the control thread ----------------------------------------------------------------------------------------

    def control(self, body: Any) -> None:
        """Take a control message (any thread)."""
        if isinstance(body, Ping):
            self._tell(Pong(body.token, self._held))
        elif isinstance(body, Reconfigure):
            self._asked += 1
            if body.user_config_changed:
                self._chores.append((self._asked, body))
            else:  # limits need not wait for user code that takes long
                self._take(self._asked, pickle.loads(body.config))
                self._tell(Reconfigured(body.token, None))
            self._wake()
        elif isinstance(body, Drain):
            self._drain_until = time.monotonic() + body.timeout_s
            self._wake()

    def _wake(self) -> None:
        if self._service_loop is not None:
            self._service_loop.wake()

    def finished(self) -> bool:
        """See `engine.seam.service.Service.finished`."""
        if self._drain_until is None or self._held or self._chores:
            return False
        now = time.monotonic()
        if self._drained_since is None:
            self._drained_since = now
        assert self._service_loop is not None
        return not self._service_loop.open_channels() or now >= self._drained_since + FAREWELL_S

    def _grace_s(self) -> float:
        """For how many seconds it may still be there."""
        return 0.0 if self._drain_until is None else self._drain_until - time.monotonic()

    # -- the door --------------------------------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
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
        """See `engine.seam.channel.ChannelListener.lost`: nobody waits for that caller's calls any more."""
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
            except Exception as error:
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
            job.request = build_http_request(call.head, call.payload)
            return (job.request,), {}
        try:
            args, kwargs = self.loads(call.payload)
        except Exception as error:
            raise NotSerializable(
                f"the argument cannot be rebuilt in the replica ({type(error).__name__}: {error}); "
                "its type must be importable there"
            ) from error
        for arg in args:
            if type(arg) is RequestEnvelope:
                args = tuple(self._opened(job, arg) for arg in args)
                if method.takes_request:
                    return args[:1], {}
                break
        if not method.takes_request:
            return args, kwargs
        data = args[0] if args else None
        if type(data) is ServeRequest:  # passed on
            return (data,), {}
        http_method, headers = loads(call.head) if call.head else ("GET", ())
        return (ServeRequest(data, kwargs=kwargs, method=http_method, headers=headers),), {}

    @staticmethod
    def _opened(job: Job, arg: Any) -> Any:
        if type(arg) is not RequestEnvelope:
            return arg
        job.request = build_http_request(arg.head, arg.body)
        return job.request

    def _batch_items(self, jobs: list[Job]) -> tuple[list[Job], list[Any]]:
        """What a batched method is called with; calls with arguments it cannot take are answered and left out."""
        taken: list[Job] = []
        items: list[Any] = []
        for job in jobs:
            try:
                args, kwargs = self._arguments(job)
                if kwargs or len(args) > 1:
                    raise InvalidArgument(
                        f"{self._name(job)} accepts batches, so each call brings one argument, "
                        f"not {len(args)} and {len(kwargs)} by name"
                    )
            except Exception as error:
                self._fail(job, error)
            else:
                taken.append(job)
                items.append(args[0] if args else None)
        return taken, items

    def _succeed(self, job: Job, result: Any) -> Coroutine[Any, Any, None] | None:
        """Answer with a result; returns what is left to do on an event loop (a stream, a background task)."""
        call = job.call
        if call.kind != HTTP:
            try:
                payload = dumps(result, self._result_name, ResultNotSerializable)
            except EngineError as error:
                self._fail(job, error)
                return None
            self._finish(job, Reply(call.id, 0, b"", payload))
            return None
        from ..http.results import Encoded, encode_result

        try:
            encoded = encode_result(result)
        except Exception as error:
            self._fail(job, error)
            return None
        if isinstance(encoded, Encoded):
            self._finish(job, Reply(call.id, 0, encoded.head, encoded.body))
            return self._background(encoded.background, job) if encoded.background is not None else None
        return self._stream(job, encoded)

    async def _background(self, task: Any, job: Job) -> None:
        try:
            await self._outside(task())
        except Exception:
            _logger.exception("the background task of %s failed", self._name(job))

    async def _stream(self, job: Job, streamed: Any) -> None:
        call = job.call
        parts = streamed.parts(pickle.loads(call.head), on_loop=self.on_loop)
        started = failed = False
        try:
            while (part := await self._next_part(job, parts)) is not None:
                head, chunk = part
                await self._between_items(job)
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
            await self._outside(parts.aclose())
            self._finish(job, End(call.id, 0, failed or job.cancelled))
            if streamed.background is not None:
                await self._background(streamed.background, job)

    def _outside(self, step: Awaitable[Any]) -> Awaitable[Any]:
        """A step of user code, to be awaited; other calls are refused and cancelled meanwhile."""
        raise NotImplementedError

    def _next_part(self, job: Job, parts: AsyncGenerator[Part, None]) -> Awaitable[Part | None]:
        """As `_outside`: the next part of a job's stream, or None; cancelling the job interrupts it where it awaits."""
        raise NotImplementedError

    async def _between_items(self, job: Job) -> None:
        """Return once there is credit, or the job is cancelled."""
        raise NotImplementedError

    def _fail(self, job: Job, error: BaseException) -> None:
        call = job.call
        kind = FailureKind.ENGINE if isinstance(error, EngineError) else FailureKind.USER
        if call.kind == HTTP:
            from ..http.failures import failure_head, is_http_exception

            backends_fault = kind == FailureKind.USER or isinstance(error, BackendError)
            if backends_fault and not (job.cancelled or is_http_exception(error)):
                _logger.error("%s failed, request %s", self._name(job), call.request_id, exc_info=error)
            head, payload = failure_head(error, debug=self._debug)
        else:
            head, payload = b"", pack_exception(error)
        self._finish(job, Failure(call.id, 0, kind, head, payload))

    def _drop(self, job: Job) -> None:
        """Answer a call that nobody waits for, or that came too late, without running it."""
        self._fail(job, DeadlineExceeded("the call's deadline passed before the backend could take it"))

    def _finish(self, job: Job, answer: Reply | Failure | End) -> None:
        """Give a job's slot back and send its terminal answer, with the load as it is then."""
        if self._jobs.pop((job.channel, job.call.id), None) is None:
            return
        self._held = load = self._held - 1
        self._answer(job.channel, answer._replace(load=load) if load else answer)
        if job.request is not None:
            job.request.release()

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

    def _spread(self, jobs: list[Job], results: Any) -> list[tuple[Job, Coroutine[Any, Any, None]]]:
        """Answer a batch, one result each; returns what `_succeed` left to do."""
        if not isinstance(results, (list, tuple)) or len(results) != len(jobs):
            size = f"{len(results)} results" if isinstance(results, (list, tuple)) else f"a {type(results).__name__}"
            error = BackendError(
                f"{self._name(jobs[0])} accepts batches and must return a list as long as the one it gets: "
                f"it got {len(jobs)} requests and returned {size}"
            )
            for job in jobs:
                self._fail(job, error)
            return []
        left = [(job, self._succeed(job, result)) for job, result in zip(jobs, results, strict=True)]
        return [(job, rest) for job, rest in left if rest is not None]


async def awaited(awaitable: Any) -> Any:
    """A coroutine that awaits anything."""
    return await awaitable
