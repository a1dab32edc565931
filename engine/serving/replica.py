"""A replica: one running copy of a backend, and the one door through which calls enter it.

It owns the slots (at most ``limit`` calls held, queued and running), arguments and answers, deadlines and cancellation.
Every call gets exactly one terminal answer, given up or not, so that callers can count. Whatever user code raises,
`BaseException` and what cannot even be printed included, becomes such an answer: failing a call cannot fail.

How calls are run is the subclass's affair: `blocking_replica` and `loop_replica`. `Replica.control` is
called by the worker's control thread and only notes what is to be done; user code runs on one thread. Configurations
are taken one at a time, in the order in which they came.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from ..calling.budget import Budget
from ..calling.line import bytes_of
from ..config import BackendConfig, name_of_exception
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
from ..seam.control_messages import Answered, Drain, Ping, Pong, Reconfigure, Reconfigured, Unhealthy
from ..seam.error_text import a_kind_of, message_of, summary_of, traceback_of
from ..seam.http_request import RequestEnvelope, build_http_request
from ..seam.log import Log
from ..seam.messages import (
    ANY_CALL,
    HTTP,
    INITIAL_CREDIT,
    Call,
    Cancel,
    Credit,
    End,
    Failure,
    FailureKind,
    Item,
    Message,
    Reply,
    credit_of,
)
from ..seam.serialization import dumps, loads, loads_leniently, pack_exception, shorten_packed_exception
from ..seam.service import ServiceLoop
from .turns import Turns
from .user_callable import Method, NoSuchMethod, UserCallable
from .watching import Watched
from .wear import Memory, worn_by_calls

if TYPE_CHECKING:
    import asyncio

    from ..http.streams import Part

__all__ = ["FAREWELL_S", "Job", "Replica", "awaited"]

_logger = Log("engine.backend")
_new = tuple.__new__  # a named tuple's own constructor takes longer
_NOT_BEGUN = frozenset((FailureKind.REFUSED, FailureKind.DRAINING, FailureKind.BUSY))
FAREWELL_S = 1.0
"""How long a drained replica waits for its callers to hang up, so that no call is lost in a socket's buffer."""


class Job:
    """A call the replica holds."""

    __slots__ = ("call", "cancelled", "channel", "credit", "kept", "method", "more_credit", "request", "size", "task")

    def __init__(self, channel: Channel, call: Call) -> None:
        self.channel = channel
        self.call = call
        self.method: Method | None = None
        self.cancelled = False
        self.kept = False  # its caller knows that it has to wait here
        self.size = 0  # bytes that it takes where it waits, if it does
        self.credit = INITIAL_CREDIT
        self.more_credit: asyncio.Event | None = None
        self.task: asyncio.Task[None] | None = None
        self.request: Any = None  # Starlette's, whose uploads must be closed

    @property
    def expired(self) -> bool:
        """Whether its deadline passed."""
        return self.call.deadline is not None and time.monotonic() > self.call.deadline


class Replica(Watched):
    """What both kinds of replica share.

    Args:
        tag: The backend's tag.
        user: The user's callable.
        config: How to run it.
        tell: Sends a control message to the controller.
        debug: Tell HTTP clients tracebacks.
        replica_tag: Which of the backend's replicas it is, for the log.
        shares_process: It runs in the engine's own process, where a debugger may hold it.

    Attributes:
        loads: Unpickles what callers send.
    """

    __slots__ = (
        "_answered",
        "_asked",
        "_batch_size",
        "_calls",
        "_chores",
        "_config_lock",
        "_debug",
        "_drained_since",
        "_full_at",
        "_hands_over",
        "_held",
        "_jobs",
        "_limit",
        "_max_call_s",
        "_memory",
        "_most_calls",
        "_result_name",
        "_retry_on",
        "_service_loop",
        "_shares_process",
        "_taken",
        "_turns",
        "_user",
        "_waiting_bytes",
        "_wanted_bytes",
        "loads",
    )  # more than an object's own dictionary is quick for

    event_loop: asyncio.AbstractEventLoop | None = None
    """See `engine.seam.service.Service.event_loop`."""

    def __init__(
        self,
        tag: str,
        user: UserCallable,
        config: BackendConfig,
        tell: Callable[[Any], None],
        *,
        debug: bool,
        replica_tag: str = "",
        shares_process: bool = False,
    ) -> None:
        super().__init__(tag, replica_tag, tell, has_health_check=user.has_health_check)
        self._shares_process = shares_process
        self._result_name = f"the result of backend {tag!r}"
        self._user = user
        self._debug = debug
        self.loads: Callable[[bytes], Any] = loads
        self._held = 0
        self._turns: Turns | None = None  # as long as callers have been refused
        self._waiting_bytes = 0  # of calls that have not begun, and had to wait
        self._wanted_bytes = 0  # of one that was too large for what there is room for
        self._answered = False  # as the controller was told
        self._calls = 0  # that user code was given
        self._memory = Memory()
        self._jobs: dict[tuple[Channel, int], Job] = {}
        self._chores: deque[tuple[int, Reconfigure | None]] = deque()  # None is a check of its health
        self._config_lock = threading.Lock()  # guards the next two, and what `_take` sets
        self._asked = 0  # numbers the configurations, in the order in which they came
        self._taken = 0  # the newest one taken
        self._drained_since: float | None = None
        self._hands_over = False  # others are to take what has not begun
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
                self._full_at = self._limit if self._turns is None else 0
                self._batch_size = config.max_batch_size or 1
                self._retry_on = frozenset(config.retry_on)
                self._max_call_s = config.max_call_s
                self._watch()
                self._most_calls = config.max_calls_per_replica or sys.maxsize

    # -- the control thread ----------------------------------------------------------------------------------------

    def control(self, body: Any) -> None:
        """Take a control message (any thread)."""
        if isinstance(body, Ping):
            self._tell(Pong(body.token, self._held))
            # Again, until it is replaced: a controller that has died meanwhile has not kept it.
            too_much, from_start = self._memory.look(self._config, self._calls)
            self._say_worn(worn_by_calls(self._config, self._calls))
            self._say_worn(too_much, from_start=from_start)
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
            self._hands_over = self._hands_over or body.others
            self._wake()

    def _say_worn(self, why: str, *, from_start: bool = False) -> None:
        if why:
            self._tell(Unhealthy(why, hung=False, worn=True, from_start=from_start))

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

    def delayed(self) -> None:
        """See `engine.seam.service.Service.delayed`."""

    # -- the door --------------------------------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
        if type(message) is not Call:
            self._heard(channel, message)
        elif self._drain_until is not None:
            self._refuse(channel, message, FailureKind.DRAINING)
        elif self._held >= self._full_at:
            self._take_or_refuse(channel, message)
        else:
            self._held += 1
            job = Job(channel, message)
            self._jobs[channel, message.id] = job
            if message.deadline is not None and job.expired:  # on its way here: it is neither queued nor batched
                self._drop(job)
                return
            job.method = self._user.found.get(message.method)
            if job.method is None:
                try:
                    job.method = self._user.method(message.method)
                except BaseException as error:
                    self._fail(job, error)
                    return
            self._begin(job)

    def _heard(self, channel: Channel, message: Message) -> None:
        if not isinstance(message, (Cancel, Credit)):
            return
        job = self._jobs.get((channel, message.id))
        if job is None:
            if message.id == ANY_CALL and self._turns is not None:  # it has nothing more to send
                self._turns.declined(channel)
                self._offer_places()
            return
        if isinstance(message, Cancel):
            self._cancel(job)
        else:
            job.credit += message.amount
            if job.more_credit is not None:
                job.more_credit.set()

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`: nobody waits for that caller's calls any more."""
        for job in [job for (origin, _), job in self._jobs.items() if origin is channel]:
            self._cancel(job)
        if self._turns is not None:
            self._turns.forget(channel)
            self._offer_places()
        if self._drain_until is not None:
            self._wake()

    # -- whose turn it is ------------------------------------------------------------------------------------------

    def _take_or_refuse(self, channel: Channel, call: Call) -> None:
        """Take a call while others wait for places, or refuse it: places are kept for those whose turn it is."""
        turns = self._turns
        if turns is None:
            turns = self._turns = Turns()
        turns.lapse(time.monotonic())
        turns.came(channel)
        if self._held + turns.kept < self._limit:
            self._full_at = self._limit
            self.received(channel, call)
        else:
            self._refuse(channel, call, FailureKind.REFUSED)
            turns.refused(channel, low=bool(call.priority))
        self._offer_places(channel)

    def _offer_places(self, last: Channel | None = None) -> None:
        """Tell callers that were refused of places that are free now, in turn.

        Args:
            last: The caller that was answered or heard just now, and may want another place at once.
        """
        turns = self._turns
        if turns is None:
            return
        now = time.monotonic()
        turns.lapse(now)
        while self._held + turns.kept < self._limit and self._drain_until is None and not self._is_full_of_bytes():
            channel = turns.next(now)
            if channel is None:
                break
            places = 1
            if last is channel and turns.only(channel) and all(origin is channel for origin, _ in self._jobs):
                turns.declined(channel)  # there are no others: it can do as it likes
                places = self._limit
            try:
                channel.send(Credit(ANY_CALL, places))
            except ChannelClosed:
                turns.forget(channel)
        if not turns or self._drain_until is not None:
            self._turns = None
        self._count_places()

    def _count_places(self) -> None:
        """Note from how many calls on it is to be looked whose turn it is: always, while anybody has one."""
        with self._config_lock:
            self._full_at = self._limit if self._turns is None else 0

    # -- what waits here -------------------------------------------------------------------------------------------

    def _may_wait(self, job: Job) -> bool:
        """Let a call wait that has not begun; if it is too large for what there is room for, it is refused.

        One for a batch may take the batch over the limit, which is full then.
        """
        most, size = self._config.max_queued_bytes, bytes_of(job.call)
        assert job.method is not None
        if most is None or not self._waiting_bytes or self._waiting_bytes + (not job.method.batched and size) <= most:
            self._waits(job, size)
            return True
        self._wanted_bytes = size
        if self._turns is None:
            self._turns = Turns()
        self._turns.refused(job.channel, low=bool(job.call.priority))
        self._finish(job, Failure(job.call.id, 0, FailureKind.REFUSED, b"", b""))
        return False

    def _waits(self, job: Job, size: int) -> None:
        job.size = size
        self._waiting_bytes += size
        self._wanted_bytes = 0

    def _waits_no_more(self, job: Job) -> None:
        """A call begins, or does not wait any more for another reason (idempotent)."""
        self._waiting_bytes -= job.size
        job.size = 0

    def _is_full_of_bytes(self) -> bool:
        """Whether the calls that wait leave no room, or not enough for the one that was refused last."""
        most, waiting = self._config.max_queued_bytes, self._waiting_bytes
        return most is not None and waiting > 0 and (waiting >= most or waiting + self._wanted_bytes > most)

    def _refuse(self, channel: Channel, call: Call, kind: int) -> None:
        with contextlib.suppress(ChannelClosed):  # the caller is gone, and `lost` follows
            channel.send(Failure(call.id, self._held, kind, b"", b""))

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
        self._calls += 1
        if self._calls >= self._most_calls:
            self._most_calls = sys.maxsize  # that is said once
            self._say_worn(worn_by_calls(self._config, self._calls))
        if call.kind == HTTP:
            job.request = build_http_request(call.head, call.payload)
            return (job.request,), {}
        try:
            args, kwargs = self.loads(call.payload)
        except BaseException as error:
            args, kwargs = self._loaded_leniently(call.payload, error)
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
    def _loaded_leniently(payload: bytes, failure: BaseException) -> tuple[tuple[Any, ...], dict[str, Any]]:
        with contextlib.suppress(Exception):
            return loads_leniently(payload)  # type: ignore[no-any-return]
        raise NotSerializable(
            f"the argument cannot be rebuilt in the replica ({summary_of(failure)}); its type must be importable there"
        ) from failure

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
            if not job.channel.begin(job.call.id):
                self._drop(job)
                continue
            try:
                args, kwargs = self._arguments(job)
                if kwargs or len(args) > 1:
                    raise InvalidArgument(
                        f"{self._name(job)} accepts batches, so each call brings one argument, "
                        f"not {len(args)} and {len(kwargs)} by name"
                    )
            except BaseException as error:
                self._fail(job, error)
            else:
                taken.append(job)
                items.append(args[0] if args else None)
        return taken, items

    def _succeed(self, job: Job, result: Any) -> Coroutine[Any, Any, None] | None:
        """Answer with a result; returns what is left to do on an event loop (a stream, a background task).

        Neither this nor what it returns raises.
        """
        call = job.call
        if call.kind != HTTP:
            try:
                payload = dumps(result, self._result_name, ResultNotSerializable)
            except BaseException as error:
                self._fail(job, error)
                return None
            self._finish(job, _new(Reply, (call.id, 0, b"", payload)))
            return None
        results = _http_results()
        try:
            encoded = results.encode_result(result, job.request)
        except BaseException as error:
            self._fail(job, error)
            return None
        if isinstance(encoded, results.Encoded):
            self._finish(job, Reply(call.id, 0, encoded.head, encoded.body))
            return self._background(encoded.background, job) if encoded.background is not None else None
        return self._stream(job, encoded)

    async def _background(self, task: Any, job: Job) -> None:
        try:
            with Budget(None, job.call.priority):
                await self._outside(task())
        except BaseException as error:
            self._log(f"the background task of {self._name(job)} failed", job, error)
        finally:
            del task  # what it raised knows this frame: they would keep each other in memory

    async def _stream(self, job: Job, streamed: Any) -> None:
        call = job.call
        parts = streamed.parts(pickle.loads(call.head), on_loop=self.on_loop)
        started = False
        failure: BaseException | None = None
        try:
            with Budget(call.deadline, call.priority) as budget:  # to the first part of the answer
                try:
                    while (part := await self._next_part(job, parts)) is not None:
                        head, chunk = part
                        await self._between_items(job)
                        if job.cancelled:
                            break
                        job.credit -= credit_of(chunk)
                        self._send_item(job, Item(call.id, head, chunk))
                        started = True
                        budget.end()
                finally:
                    await self._outside(parts.aclose())
        except BaseException as error:
            failure = error
        if failure is not None and not started:
            self._fail(job, failure)
        else:
            if failure is not None and not job.cancelled:
                self._log(f"{self._name(job)} failed in the middle of its stream", job, failure)
            self._finish(job, End(call.id, 0, failure is not None or job.cancelled))
        failure = None  # it knows this frame, and the request: they would keep each other in memory
        if streamed.background is not None:
            await self._background(streamed.background, job)

    def _send_item(self, job: Job, item: Item) -> None:
        try:
            job.channel.send(item)
        except ChannelClosed:
            pass  # the caller is gone, and `lost` follows
        except Exception as error:
            raise ResultNotSerializable(
                f"a part of the stream of {self._name(job)} cannot be sent: {_reason(error)}"
            ) from error

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
        """Answer a call with what went wrong, whatever that is."""
        self._finish(job, self._failure(job, error))

    def _failure(self, job: Job, error: BaseException) -> Failure:
        call = job.call
        kind = FailureKind.ENGINE if issubclass(type(error), EngineError) else FailureKind.USER
        if _is_one_of(error, self._retry_on):
            kind = FailureKind.REPEATABLE
        advice = _advice_on(error)
        if advice and hasattr(error, "add_note"):
            error.add_note(advice)  # shown by tracebacks: in the log, and at the caller
        if call.kind != HTTP:
            return Failure(call.id, 0, kind, b"", pack_exception(error))
        from ..http.failures import tell_failure

        of_the_request = type(error) is NoSuchMethod
        head, body, untold, cause = tell_failure(error, of_the_request=of_the_request, debug=self._debug)
        if untold is not None and not job.cancelled:
            self._log(f"{self._name(job)} failed" + (f" ({advice})" if advice else ""), job, untold)
        return Failure(call.id, 0, kind, head, body, cause)

    def _log(self, what: str, job: Job, error: BaseException) -> None:
        logged = False
        with contextlib.suppress(BaseException):  # of the error itself, asked for its text in the main thread
            logged = _logger.error("%s, request %s", what, job.call.request_id, exc_info=error)
        if not logged:
            with contextlib.suppress(BaseException):
                _logger.error("%s, request %s\n%s", what, job.call.request_id, traceback_of(error))

    def _drop(self, job: Job) -> None:
        """Answer a call that nobody waits for, or that came too late, without running it."""
        self._fail(job, DeadlineExceeded("the call's deadline passed before the backend could take it"))

    def _finish(self, job: Job, answer: Reply | Failure | End) -> None:
        """Give a job's slot back and send its terminal answer, with the load as it is then."""
        if self._jobs.pop((job.channel, job.call.id), None) is None:
            return
        self._held = load = self._held - 1
        if job.size:
            self._waits_no_more(job)
        try:
            # All of them begin with the number and the load; `_replace` would take as long as all else here.
            job.channel.send(_new(type(answer), (answer[0], load, *answer[2:])) if load else answer)
        except ChannelClosed:
            pass  # the caller is gone, and `lost` follows
        except Exception as error:
            self._send_instead(job, answer, load, error)
        if job.request is not None:
            try:
                job.request.release()
            except BaseException as error:
                self._log(f"the uploads of a request to {self._name(job)} could not be closed", job, error)
        if not self._answered and not (type(answer) is Failure and answer.kind in _NOT_BEGUN):
            self._answered = True
            self._tell(Answered())
        if self._turns is not None:
            self._offer_places(job.channel)
        if self._drain_until is not None and self.on_loop and not load:
            self._wake()  # a plain one looks by itself after each call

    def _send_instead(self, job: Job, answer: Reply | Failure | End, load: int, why: Exception) -> None:
        """Answer a call whose answer cannot be sent, because it is larger than a message may be."""
        if isinstance(answer, Failure) and not answer.head:
            failure = answer._replace(payload=shorten_packed_exception(answer.payload))
        else:
            what = f"the failure of {self._name(job)}" if isinstance(answer, Failure) else self._result_name
            failure = self._failure(job, ResultNotSerializable(f"{what} cannot be sent: {_reason(why)}"))
        with contextlib.suppress(ChannelClosed):
            job.channel.send(failure._replace(load=load))

    def _too_long(self, job: Job, limit_s: float) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"a call of {self._name(job)} ran for longer than max_call_s={limit_s:g} and was ended; what it did until "
            "then is done"
        )

    def _name(self, job: Job) -> str:
        return f"backend {self._tag!r}" if job.call.method == "__call__" else f"{self._tag!r}.{job.call.method}"

    def _requests(self, jobs: Iterable[Job]) -> str:
        """In parentheses, which requests these are; empty for calls by handle, which have no number of their own."""
        numbers = ", ".join(job.call.request_id for job in jobs if job.call.request_id)
        return f" (request {numbers})" if numbers else ""

    def _spread(self, jobs: list[Job], results: Any) -> list[tuple[Job, Coroutine[Any, Any, None]]]:
        """Answer a batch, one result each; returns what `_succeed` left to do."""
        try:
            answers = self._one_each(jobs, results)
        except BaseException as error:
            for job in jobs:
                self._fail(job, error)
            return []
        left = [(job, self._succeed(job, result)) for job, result in zip(jobs, answers, strict=True)]
        return [(job, rest) for job, rest in left if rest is not None]

    def _one_each(self, jobs: list[Job], results: Any) -> list[Any]:
        if not isinstance(results, list) or len(results) != len(jobs):
            size = f"{len(results)} results" if isinstance(results, list) else a_kind_of(results)
            raise BackendError(
                f"{self._name(jobs[0])} accepts batches and must return a list as long as the one it gets (or a tuple, "
                f"an array, a generator): it got {len(jobs)} requests and returned {size}"
            )
        return results


@functools.cache
def _http_results() -> Any:
    """The module `engine.http.results`, imported when the first request is answered and not looked for again."""
    from ..http import results

    return results


def _is_one_of(error: BaseException, names: frozenset[Any]) -> bool:
    """Whether an error is of a type with one of these names, or of one derived from it."""
    try:
        return any(name_of_exception(kind) in names for kind in type(error).__mro__)
    except BaseException:  # of a user's metaclass
        return False


def _advice_on(error: BaseException) -> str:
    """What to do about an error that says only what went wrong; empty for most."""
    if type(error) in (TypeError, AttributeError) and message_of(error).startswith("'coroutine' object"):
        return "request.json(), body() and form() must be awaited: write `async def`, and `(await request.json())[...]`"
    return ""


def _reason(error: Exception) -> str:
    return message_of(error) if isinstance(error, EngineError) else summary_of(error)


async def awaited(awaitable: Any) -> Any:
    """A coroutine that awaits anything."""
    return await awaitable
