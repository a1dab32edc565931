"""Handles: a caller's references to an endpoint, for threads (`Handle`) and for event loops (`AsyncHandle`).

A handle is small, immutable and picklable. Unpickled in another process it finds that process's client of the engine,
or attaches one on first use.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import getpid
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

from ..config import LONGEST_S
from ..errors import DeadlineExceeded, EngineClosed, InvalidArgument, MethodNotFound
from ..seam.connector import PlatformRefs
from ..seam.may_block import check_may_wait, running_asyncio_loop
from ..seam.messages import AS_CONFIGURED, PYTHON, Call
from ..seam.serialization import dumps_arguments
from ..seam.workplace import settles_later, surrounding_engine
from .answers import ThreadSlot, answer_to, open_answer
from .arguments import PLAIN, enveloped, prepared, prepared_async, refs_in, resolved, when_all_done
from .budget import NO_LIMIT, PRIORITIES, Limit, deadline_error, limit_of, running_budget, seconds_until
from .caller import Caller
from .client import Client
from .connectors import connector_for
from .ref import Ref
from .traffic import hash_fraction

if TYPE_CHECKING:
    from typing_extensions import Self, TypeVar

    T_co = TypeVar("T_co", covariant=True, default=Any)
    Headers = Mapping[str, str] | Iterable[tuple[str, str]]
else:
    from typing import TypeVar

    T_co = TypeVar("T_co", covariant=True)

__all__ = ["AsyncHandle", "CallOptions", "Handle", "make_handle"]

_new = tuple.__new__  # a named tuple's own constructor takes longer
_EARLY_S = 0.01
"""A platform's clock may say a little before ours that the time is over."""
_RETRIES = 2
"""How often a call is repeated that only says that it may be."""
_HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass(frozen=True)
class CallOptions:
    """What ``handle.options`` sets.

    Attributes:
        method_name: The backend's method to call.
        shard_key: Calls with equal keys go to the same backend.
        http_method: ``request.method`` of the call.
        http_headers: ``request.headers`` of the call.
        timeout_s: Seconds until the call fails with `errors.DeadlineExceeded`, or None.
        inherit_deadline: Whether the call also ends with the one whose user code makes it, if that has a deadline.
        idempotent: Whether running the call again does no harm, so that it may be repeated after it has begun; None
            leaves that to the backend's ``max_retries``.
        max_retries: How often, if ``idempotent``; None means 2.
        priority: ``"low"`` for background work, which yields to other calls and is refused first, or ``"normal"``. None
            means that of the call whose user code makes it, and else normal.
    """

    method_name: str = "__call__"
    shard_key: str | None = None
    http_method: str = "GET"
    http_headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float | None = None
    inherit_deadline: bool = True
    idempotent: bool | None = None
    max_retries: int | None = None
    priority: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method_name, str) or not self.method_name.isidentifier():
            raise InvalidArgument(f"method_name must be the name of a method, not {self.method_name!r}")
        if self.shard_key is not None and not isinstance(self.shard_key, str):
            raise InvalidArgument(f"shard_key must be a str or None, not {self.shard_key!r}")
        if not isinstance(self.http_method, str) or self.http_method.upper() not in _HTTP_METHODS:
            raise InvalidArgument(f"http_method must be one of {', '.join(_HTTP_METHODS)}, not {self.http_method!r}")
        object.__setattr__(self, "http_method", self.http_method.upper())  # as it arrives over HTTP
        timeout = self.timeout_s
        if timeout is not None and (
            isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 <= timeout <= LONGEST_S
        ):
            raise InvalidArgument(f"timeout_s must be a number of seconds from 0 to a year or None, not {timeout!r}")
        if not isinstance(self.inherit_deadline, bool):
            raise InvalidArgument(f"inherit_deadline must be True or False, not {self.inherit_deadline!r}")
        if self.idempotent is not None and not isinstance(self.idempotent, bool):
            raise InvalidArgument(f"idempotent must be True, False or None, not {self.idempotent!r}")
        if self.priority is not None and (not isinstance(self.priority, str) or self.priority not in PRIORITIES):
            raise InvalidArgument(f'priority must be "normal", "low" or None, not {self.priority!r}')
        most = self.max_retries
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            raise InvalidArgument(f"max_retries must be an integer of at least 0 or None, not {most!r}")
        if most and not self.idempotent:
            raise InvalidArgument(
                f"max_retries={most} without idempotent=True: a call can be repeated that has run already, in part or "
                "wholly; say that it may by options(idempotent=True, max_retries=...)"
            )

    def head(self) -> bytes:
        """`engine.seam.messages.Call.head` of such a call: empty unless there is something to say."""
        if not self.http_headers and self.http_method == "GET":
            return b""
        return pickle.dumps((self.http_method, self.http_headers), 5)

    def retries(self) -> int:
        """`engine.seam.messages.Call.retries` of such a call."""
        if self.idempotent is None:
            return AS_CONFIGURED
        return (_RETRIES if self.max_retries is None else self.max_retries) if self.idempotent else 0


_OPTIONS = frozenset(CallOptions.__dataclass_fields__)


def _misplaced(kwargs: dict[str, Any]) -> InvalidArgument:
    names = [name for name in kwargs if name in _OPTIONS]
    options = ", ".join(f"{name}={kwargs[name]!r}" for name in names)
    return InvalidArgument(
        f"{names[0]} is an option of calls, not a query parameter: pass it by handle.options({options}).call(...)"
    )


def _header_pairs(headers: Any) -> tuple[tuple[str, str], ...]:
    pairs = list(headers.items()) if isinstance(headers, Mapping) else headers
    try:
        checked = tuple((name, value) for name, value in pairs)
    except (TypeError, ValueError):
        raise InvalidArgument(f"http_headers must be a dict of str to str, not {headers!r}") from None
    for name, value in checked:
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidArgument(f"http_headers must map str to str, not {name!r} to {value!r}")
    return checked


class _BaseHandle:
    """What both kinds of handle share."""

    __slots__ = (
        "_adapter_name",
        "_client",
        "_control_address",
        "_endpoint",
        "_engine_id",
        "_head",
        "_limited",
        "_options",
        "_retries",
    )

    def __init__(
        self, engine_id: str, adapter_name: str, control_address: str, endpoint: str, options: CallOptions
    ) -> None:
        self._engine_id = engine_id
        self._adapter_name = adapter_name
        self._control_address = control_address
        self._endpoint = endpoint
        self._options = options
        self._head = options.head()
        self._retries = options.retries()
        self._limited = options.timeout_s is not None or options.priority is not None
        if options.shard_key is not None:
            hash_fraction(options.shard_key)  # which imports what it needs: calls do not
        self._client: Client | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} to {self._endpoint!r} of engine {self._engine_id!r}>"

    def __reduce__(self) -> Any:
        if not self._engine_id and not settles_later():  # if it does, then so does whoever unpickles it
            self._settle()
        state = (self._engine_id, self._adapter_name, self._control_address, self._endpoint, self._options)
        return type(self), state

    if not TYPE_CHECKING:  # type checkers find these mistakes themselves, unless there is a method for them

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise InvalidArgument(
                "a handle is called by its methods: handle.call(x) gives the result, handle.remote(x) a ref"
            )

        def __getattr__(self, name: str) -> Any:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name.startswith("_"):  # whoever copies, mocks or shows it asks for such
                raise AttributeError(message, name=name, obj=self)
            raise MethodNotFound(
                f"{message}: if it is a method of the backend, use handle.options(method_name={name!r}).call(...)"
            )

    def bound_to(self, client: Client) -> Self:
        """This handle, with its process's client known from the start."""
        self._client = client
        return self

    def _with(self, changes: dict[str, Any]) -> Any:
        if "http_headers" in changes:
            changes["http_headers"] = _header_pairs(changes["http_headers"])
        values = {name: getattr(self._options, name) for name in CallOptions.__dataclass_fields__}
        for name in changes:
            if name not in values:
                raise InvalidArgument(f"options: unknown option {name!r}; the options are {', '.join(values)}")
        copy = type(self)(
            self._engine_id, self._adapter_name, self._control_address, self._endpoint, CallOptions(**values | changes)
        )
        copy._client = self._client
        return copy

    def _limit(self) -> Limit:
        """How long a call that begins now may take."""
        if not self._limited and running_budget() is None:
            return NO_LIMIT
        return self._limit_by_options()

    def _limit_by_options(self) -> Limit:
        options = self._options
        priority = None if options.priority is None else PRIORITIES[options.priority]
        return limit_of(options.timeout_s, inherits=options.inherit_deadline, priority=priority)

    def _late(self, error: DeadlineExceeded, limit: Limit) -> DeadlineExceeded:
        """What to raise for what was raised on the way to the call: also an argument may have been late on its own."""
        if limit.deadline is None or time.monotonic() < limit.deadline - _EARLY_S:
            return error
        assert limit.timeout_s is not None
        return deadline_error(self._endpoint, limit.timeout_s)

    def _reach(self, limit: Limit) -> Client:
        client = self._client
        if client is None:
            if not self._engine_id:
                self._settle()
            client = Client.find(self._engine_id) or Client.attach(
                self._engine_id, self._subscribed, seconds_until(limit.deadline)
            )
            if client is None:
                assert limit.timeout_s is not None
                raise deadline_error(self._endpoint, limit.timeout_s)
            self._client = client
        if client.pid != getpid():
            raise EngineClosed(
                "this handle belongs to the process that this one was forked from: pass it on pickled, "
                "or create an engine here"
            )
        return client

    def _expire(self, ref: Ref, limit: Limit) -> None:
        if limit.deadline is not None:
            assert limit.timeout_s is not None
            ref.expire_at(limit.deadline, limit.timeout_s)

    def _subscribed(self) -> Client:
        connector, made = connector_for(self._engine_id, self._adapter_name)
        return Client.subscribe(self._engine_id, connector, self._control_address, owns_connector=made)

    def _settle(self) -> None:
        """Belong to the engine that this process works for: an inert one made this handle."""
        self._engine_id, self._adapter_name, self._control_address = surrounding_engine()

    def _start_on_platform(
        self, refs: PlatformRefs, args: tuple[Any, ...], kwargs: dict[str, Any], limit: Limit
    ) -> Any:
        args, kwargs, lifted = refs.lift(args, kwargs)
        call = self._call_of(args, kwargs, limit.deadline, limit.priority)
        return refs.start(self._endpoint, call, self._options.shard_key, lifted, limit.timeout_s)

    def _call_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None, priority: int) -> Call:
        options = self._options
        if options.method_name == "__call__":
            if len(args) > 1:
                raise InvalidArgument(
                    f"a backend takes one argument (and query parameters by name), not {len(args)}; "
                    "call a method with .options(method_name=...) to pass several"
                )
            if kwargs and not _OPTIONS.isdisjoint(kwargs):
                raise _misplaced(kwargs)
        payload = dumps_arguments(args, kwargs, "the argument")
        return _new(
            Call, (0, PYTHON, options.method_name, deadline, "", self._head, payload, self._retries, priority, False)
        )


class Handle(_BaseHandle, Generic[T_co]):
    """Calls an endpoint from plain (blocking) code; safe to share between threads.

    ``handle: Handle[int] = engine.get_handle("sum")`` tells type checkers what calls give; nobody else checks it.
    """

    __slots__ = ()

    @overload
    def options(
        self,
        *,
        method_name: str,
        shard_key: str | None = ...,
        http_method: str = ...,
        http_headers: Headers = ...,
        timeout_s: float | None = ...,
        inherit_deadline: bool = ...,
        idempotent: bool | None = ...,
        max_retries: int | None = ...,
        priority: Literal["normal", "low"] | None = ...,
    ) -> Handle[Any]: ...
    @overload
    def options(
        self,
        *,
        shard_key: str | None = ...,
        http_method: str = ...,
        http_headers: Headers = ...,
        timeout_s: float | None = ...,
        inherit_deadline: bool = ...,
        idempotent: bool | None = ...,
        max_retries: int | None = ...,
        priority: Literal["normal", "low"] | None = ...,
    ) -> Handle[T_co]: ...

    def options(self, **changes: Any) -> Handle[Any]:
        """A new handle whose calls differ; see `CallOptions` for the names.

        Raises:
            errors.InvalidArgument: An option is unknown or has a wrong value.
        """
        copy: Handle[Any] = self._with(changes)
        return copy

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Start a call without waiting for it.

        Args:
            args: The data (one object), or a named method's arguments. A ref is replaced by its result.
            kwargs: The query parameters, or a named method's keyword arguments.

        Returns:
            A ref to the result: a `Ref`, or the platform's own (on Ray a ``ray.ObjectRef``). Every error but a bad
            argument arrives through it.

        Raises:
            errors.NotSerializable: An argument cannot be pickled.
            errors.EngineClosed: The engine was shut down before.
        """
        limit = self._limit()
        client = self._client or self._reach(limit)
        client.check_open()
        deadline = limit.deadline
        if client.refs is not None:
            try:
                args, kwargs = prepared(args, kwargs, None, deadline)
            except DeadlineExceeded as error:
                raise self._late(error, limit) from None
            return self._start_on_platform(client.refs, args, kwargs, limit)
        caller = client.threads or client.thread_caller()
        ref = Ref(caller, self._endpoint)
        if not kwargs and (not args or (len(args) == 1 and type(args[0]) in PLAIN)):
            ref.stand_for(self._call_of(args, kwargs, deadline, limit.priority), self._options.shard_key)
            caller.submit(ref)
        elif pending := refs_in(args, kwargs):
            forget = when_all_done(pending, lambda: self._start_resolved(caller, ref, args, kwargs, limit))
            ref.add_done_callback(lambda _: forget())  # given up or late: the other arguments may be large
        else:
            self._start(caller, ref, args, kwargs, limit)
        if deadline is not None:
            self._expire(ref, limit)
        return ref

    def call(self, *args: Any, **kwargs: Any) -> T_co:
        """Make a call and wait for its result: the shortest path, with no ref in between.

        Raises:
            errors.DeadlineExceeded: ``timeout_s`` passed.
            errors.WouldBlock: Called on the event loop of an async backend.
            BaseException: Whatever the backend raised.
        """
        check_may_wait("a sync handle's call()")
        options = self._options
        limit = NO_LIMIT  # as in `_limit`, which would be a call on the way of every call
        if self._limited or running_budget() is not None:
            limit = self._limit_by_options()
        client = self._client
        if client is None or client.pid != getpid():
            client = self._reach(limit)
        caller = client.threads or client.thread_caller()
        timeout_s, deadline, priority = limit
        if kwargs or (args and (len(args) != 1 or type(args[0]) not in PLAIN)):
            try:
                args, kwargs = prepared(args, kwargs, client.refs, deadline)
            except DeadlineExceeded as error:
                raise self._late(error, limit) from None
        slot = ThreadSlot(self._endpoint, self._call_of(args, kwargs, deadline, priority), options.shard_key)
        try:
            caller.submit(slot)
            slot.wait(caller, timeout_s, deadline)
        except BaseException:
            caller.cancel(slot)
            raise
        return slot.open() if slot.error is not None else open_answer(slot.answer)  # type: ignore[no-any-return]

    def _start(self, caller: Caller, ref: Ref, args: tuple[Any, ...], kwargs: dict[str, Any], limit: Limit) -> None:
        call = self._call_of(enveloped(args), kwargs, limit.deadline, limit.priority)
        ref.stand_for(call, self._options.shard_key)
        caller.submit(ref)

    def _start_resolved(
        self, caller: Caller, ref: Ref, args: tuple[Any, ...], kwargs: dict[str, Any], limit: Limit
    ) -> None:
        if ref.done():
            return
        try:
            args, kwargs = resolved(args, kwargs)
            self._start(caller, ref, args, kwargs, limit)
        except BaseException as error:
            ref.fail(error.with_traceback(None))  # which knows this frame, and so the ref


class AsyncHandle(_BaseHandle, Generic[T_co]):
    """Calls an endpoint from a coroutine, on asyncio, uvloop or trio; ``AsyncHandle[int]`` as with `Handle`."""

    __slots__ = ()

    @overload
    def options(
        self,
        *,
        method_name: str,
        shard_key: str | None = ...,
        http_method: str = ...,
        http_headers: Headers = ...,
        timeout_s: float | None = ...,
        inherit_deadline: bool = ...,
        idempotent: bool | None = ...,
        max_retries: int | None = ...,
        priority: Literal["normal", "low"] | None = ...,
    ) -> AsyncHandle[Any]: ...
    @overload
    def options(
        self,
        *,
        shard_key: str | None = ...,
        http_method: str = ...,
        http_headers: Headers = ...,
        timeout_s: float | None = ...,
        inherit_deadline: bool = ...,
        idempotent: bool | None = ...,
        max_retries: int | None = ...,
        priority: Literal["normal", "low"] | None = ...,
    ) -> AsyncHandle[T_co]: ...

    def options(self, **changes: Any) -> AsyncHandle[Any]:
        """As `Handle.options`."""
        copy: AsyncHandle[Any] = self._with(changes)
        return copy

    async def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Start a call; the ref it gives is awaited in turn. As `Handle.remote`.

        The call starts when this coroutine is awaited.
        """
        limit = self._limit()
        client = self._reach(limit) if self._client is not None else await self._reach_aside(limit)
        client.check_open()
        try:
            args, kwargs = await prepared_async(args, kwargs, None, limit.deadline)
        except DeadlineExceeded as error:
            raise self._late(error, limit) from None
        if client.refs is not None:
            return self._start_on_platform(client.refs, args, kwargs, limit)
        caller = client.thread_caller() if running_asyncio_loop() is None else client.loop_caller()
        return self._started(caller, args, kwargs, limit)

    async def _reach_aside(self, limit: Limit) -> Client:
        """As `_reach`, for the first time: a process that is new to the engine subscribes, which blocks a thread."""
        if not self._engine_id:
            self._settle()
        if Client.find(self._engine_id) is None:
            from anyio import to_thread

            return await to_thread.run_sync(self._reach, limit)
        return self._reach(limit)

    def _started(self, caller: Caller, args: tuple[Any, ...], kwargs: dict[str, Any], limit: Limit) -> Ref:
        ref = Ref(caller, self._endpoint)
        ref.stand_for(self._call_of(args, kwargs, limit.deadline, limit.priority), self._options.shard_key)
        caller.submit(ref)
        self._expire(ref, limit)
        return ref

    async def call(self, *args: Any, **kwargs: Any) -> T_co:
        """Make a call and await its result. Cancelling the await gives the call up. As `Handle.call`."""
        loop = running_asyncio_loop()
        options = self._options
        limit = NO_LIMIT  # as in `_limit`, which would be a call on the way of every call
        if self._limited or running_budget() is not None:
            limit = self._limit_by_options()
        client = self._client
        if client is None:
            client = await self._reach_aside(limit)
        elif client.pid != getpid():
            client = self._reach(limit)
        timeout_s, deadline, priority = limit
        if kwargs or (args and (len(args) != 1 or type(args[0]) not in PLAIN)):
            try:
                args, kwargs = await prepared_async(args, kwargs, client.refs, deadline)
            except DeadlineExceeded as error:
                raise self._late(error, limit) from None
        if loop is None:
            return await self._call_by_ref(client.thread_caller(), args, kwargs, limit)  # type: ignore[no-any-return]
        call = self._call_of(args, kwargs, deadline, priority)
        caller = client.loop_caller(loop)
        answer = await answer_to(caller, self._endpoint, call, timeout_s, shard_key=options.shard_key, loop=loop)
        return open_answer(answer)  # type: ignore[no-any-return]

    async def _call_by_ref(self, caller: Caller, args: tuple[Any, ...], kwargs: dict[str, Any], limit: Limit) -> Any:
        ref = self._started(caller, args, kwargs, limit)
        try:
            return await ref
        finally:
            ref.cancel()


def make_handle(
    engine_id: str, adapter_name: str, control_address: str, endpoint: str, *, sync: bool
) -> Handle | AsyncHandle:
    """A handle of either kind with default options."""
    kind = Handle if sync else AsyncHandle
    return kind(engine_id, adapter_name, control_address, endpoint, CallOptions())
