"""Options, validated once, at construction.

Every message names the field, the value and what is allowed. Nothing here reads the environment.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import InvalidArgument, ReplicaDied

__all__ = ["LONGEST_S", "BackendConfig", "HTTPOptions", "name_of_exception"]

C = TypeVar("C")


def name_of_exception(kind: type) -> str:
    """What ``retry_on`` calls a type of exceptions."""
    return f"{kind.__module__}.{kind.__qualname__}"


_REPLICA_DIED = name_of_exception(ReplicaDied)
_NAMES_OF_DEATH = frozenset(map(name_of_exception, ReplicaDied.__mro__))

_MAX_ASYNC_QUERIES = 1_000_000
_BLOCKING_QUERIES = 8
LONGEST_S = 366 * 86400.0
"""Longest time to wait for anything, in seconds. What the system's calls take overflows not far above it."""


def _remembers_what_is_set(cls: type[C]) -> type[C]:
    """Have instances of a dataclass hold only what they were given; a field that was not is read from the class.

    So the fields that were set are those in ``vars(instance)``, also after pickling and copying.
    """
    generated: Callable[..., None] = cls.__init__

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        generated(self, *args, **kwargs)
        names = [field.name for field in dataclasses.fields(self)]
        for name in names[len(args) :]:
            if name not in kwargs:
                delattr(self, name)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_remembers_what_is_set
@dataclass(unsafe_hash=True)
class BackendConfig:
    """How a backend is run.

    It may be filled in after construction (``config.num_replicas = 2``). It remembers which fields were set, whatever
    they were set to: an update by it changes those and no other. Whether they were does not matter to ``==``.
    (`dataclasses.replace` sets all of them, as it passes all to the constructor; `updated` does not.)

    Attributes:
        num_replicas: Copies to run, at least 1.
        max_concurrent_queries: Calls one replica holds at once, queued and running. None means 8 for a sync callable
            (twice ``max_batch_size`` if that is more than 1) and 1,000,000 for an async one.
        max_queued_requests: Calls each caller may queue once every replica is full; the next one fails with
            `errors.Overloaded` (HTTP 503). 0 rejects at once, None never does.
        max_batch_size: Calls passed together to a backend marked with `accept_batch`. None means 1.
        batch_wait_timeout: Seconds the first call of a batch waits for the others.
        user_config: Passed to the backend's ``reconfigure`` at construction and whenever it changes.
        graceful_shutdown_timeout_s: Seconds a replica that is to leave may take to finish what it holds.
        start_timeout_s: Seconds a replica may take to become ready.
        reconfigure_timeout_s: Seconds a replica may take to take a new ``user_config``, what it runs just then
            included. One that takes longer is replaced.
        cancel_running: Whether a plain callable that runs is interrupted once its call is cancelled, by an
            `errors.CallCancelled` raised in it; else it runs to its end. Calls of an async one are cancelled always.
        cancel_grace_s: Seconds that such a call may go on, to clean up or because it is in code that cannot be
            interrupted, before its replica is replaced. None never replaces it.
        max_surge: Replicas that there may be beyond ``num_replicas`` while others take their places (a new version, or
            recycling), a number or a share such as ``"25%"``, rounded up. With 0, for which there must be a
            ``max_unavailable``, one ends before another one starts: right where there is no second GPU.
        max_unavailable: Replicas that may be missing from ``num_replicas`` meanwhile; a share is rounded down.
        max_call_s: Seconds for which a call (a batch, one step of a stream) may run; None means any. One that runs for
            longer is ended and fails with `errors.DeadlineExceeded` (HTTP 504), by replacing its replica if need be.
        stuck_after_s: Seconds for which an async callable may keep its event loop from turning before its replica
            is replaced; ``math.inf`` means any. None means 60, but any on an adapter that runs it in the engine's
            own process. A sync callable keeps no loop from turning.
        max_queue_wait_s: Seconds that a call may be expected to wait with its caller, judged by how fast its queue is
            emptied; beyond it, calls fail at once with `errors.Overloaded`. The more come than can be served, the fewer
            may wait, down to one. None: they wait. A call with a deadline is refused in any case if it cannot be
            expected to make it.
        max_calls_per_replica: Calls a replica begins before another one takes its place. None means any number.
        max_rss_mb: Memory (resident, in 10^6 bytes) a replica's process may have before another one takes its place.
            None means any. Not looked at where replicas run in the application's own process.
        max_age_s: Seconds after which another replica takes the place of one, or up to a tenth earlier, so that not all
            are replaced at once. None means never.
        health_check_period_s: Seconds between two calls of the backend's ``check_health``, if it has one, give or take
            a tenth. None means that it is called only before a replica takes calls.
        health_check_timeout_s: Seconds such a call may take; else it counts as failed.
        health_check_threshold: Failures in a row after which a replica is replaced.
        max_retries: How often a call may be repeated that may have begun, so that it may run more than once. Over HTTP
            that goes for GET, HEAD, PUT, DELETE and OPTIONS. A call may say otherwise: `CallOptions.idempotent`.
        retry_on: What is followed by that: types of exceptions, or their full names. They are kept as names; an
            exception of a derived type counts, too. `errors.ReplicaDied` is the death of the replica.
        retry_posts: Whether it goes for POST and PATCH, too.
        max_queued_bytes: Bytes that the arguments of calls may have together which wait with one caller; the next call
            fails with `errors.Overloaded`, unless none waits. As many may wait in a replica, the others with their
            callers; and a batch that has so many is full. None means any number.

    Raises:
        errors.InvalidArgument: A field has the wrong type or value, at construction or when it is set; or there is no
            field of that name.
    """

    num_replicas: int = 1
    max_concurrent_queries: int | None = None
    max_queued_requests: int | None = 1000
    max_batch_size: int | None = None
    batch_wait_timeout: float = 0.0
    user_config: Any = None
    graceful_shutdown_timeout_s: float = 20.0
    start_timeout_s: float = 120.0
    reconfigure_timeout_s: float = 30.0
    cancel_running: bool = True
    cancel_grace_s: float | None = 20.0
    max_surge: int | str = "100%"
    max_unavailable: int | str = 0
    max_call_s: float | None = None
    stuck_after_s: float | None = None
    max_queue_wait_s: float | None = None
    max_calls_per_replica: int | None = None
    max_rss_mb: float | None = None
    max_age_s: float | None = None
    health_check_period_s: float | None = 10.0
    health_check_timeout_s: float = 30.0
    health_check_threshold: int = 3
    max_retries: int = 0
    retry_on: Sequence[type[BaseException] | str] = (_REPLICA_DIED,)
    retry_posts: bool = False
    max_queued_bytes: int | None = 256 * 1024 * 1024

    def __setattr__(self, name: str, value: Any) -> None:
        _known_fields(type(self), "config", {name: value})
        if name in _COUNTS:
            least, optional = _COUNTS[name]
            _check_integer("config", name, value, least, optional=optional)
        elif name in _SWITCHES:
            _check_switch("config", name, value)
        elif name == "retry_on":
            value = _names_of_exceptions("config", name, value)
        elif name in _SHARES:
            _check_share("config", name, value)
        elif name in _LIMITS:
            _check_limit("config", name, value, endless=_LIMITS[name])
        elif name == "max_rss_mb":
            _check_megabytes("config", name, value)
        elif name != "user_config":
            _check_seconds("config", name, value, optional=name in _ENDLESS)
        super().__setattr__(name, value)

    @classmethod
    def of(cls, value: BackendConfig | Mapping[str, Any] | None) -> BackendConfig:
        """Turn what a user passed as ``config`` into a `BackendConfig` of our own, which the user cannot change."""
        return cls().updated({} if value is None else value)

    def updated(self, changes: BackendConfig | Mapping[str, Any]) -> BackendConfig:
        """Return a copy with these fields changed, or with those that were set in a `BackendConfig`; validated anew."""
        given = vars(changes) if isinstance(changes, BackendConfig) else changes
        _known_fields(type(self), "config", given)
        return type(self)(**{**vars(self), **given})

    @property
    def limits(self) -> tuple[Any, ...]:
        """What a replica must know of it beside ``user_config``; the rest is for the controller and callers."""
        batches = self.max_batch_size, self.batch_wait_timeout
        times = self.max_call_s, self.stuck_after_s
        wear = self.max_calls_per_replica, self.max_rss_mb
        checks = self.health_check_period_s, self.health_check_timeout_s, self.health_check_threshold
        cancelling = self.cancel_running, self.cancel_grace_s
        waiting = self.max_concurrent_queries, self.max_queued_bytes
        return *waiting, *batches, *cancelling, *times, *wear, *checks, self.retry_on

    @property
    def retries_deaths(self) -> bool:
        """Whether ``retry_on`` has the death of a replica."""
        return not _NAMES_OF_DEATH.isdisjoint(self.retry_on)

    def concurrency(self, *, on_loop: bool) -> int:
        """``max_concurrent_queries`` with its default filled in for a sync or an async callable."""
        if self.max_concurrent_queries is not None:
            return self.max_concurrent_queries
        if on_loop:
            return _MAX_ASYNC_QUERIES
        return 2 * self.max_batch_size if self.max_batch_size not in (None, 1) else _BLOCKING_QUERIES

    def patience_s(self, *, on_loop: bool, shares_process: bool = False) -> float:
        """``stuck_after_s`` with its default filled in; ``math.inf`` if nothing is ever taken for stuck.

        No default hits what is legal: a call may keep the interpreter of a sync callable busy for as long as it likes,
        and in the application's own process a debugger may hold the loop.
        """
        if self.stuck_after_s is not None:
            return self.stuck_after_s
        return _STUCK_AFTER_S if on_loop and not shares_process else math.inf


_COUNTS = {
    "num_replicas": (1, False),
    "max_concurrent_queries": (1, True),
    "max_queued_requests": (0, True),
    "max_batch_size": (1, True),
    "max_calls_per_replica": (1, True),
    "health_check_threshold": (1, False),
    "max_retries": (0, False),
    "max_queued_bytes": (1, True),
}
"""Fields of `BackendConfig` that are integers: the least value, and whether they may be None."""
_SWITCHES = frozenset({"cancel_running", "retry_posts"})
"""Fields of `BackendConfig` that are True or False."""
_ENDLESS = frozenset({"cancel_grace_s", "max_queue_wait_s"})
"""Fields of `BackendConfig` that may be None instead of seconds."""

_SHARES = ("max_surge", "max_unavailable")
"""Fields of `BackendConfig` that are a number of replicas or a percentage of them."""

_LIMITS = {"max_call_s": False, "stuck_after_s": True, "max_age_s": False, "health_check_period_s": False}
"""Fields of `BackendConfig` that are positive seconds or None: whether ``math.inf`` is one of them, too."""

_STUCK_AFTER_S = 60.0
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.1


@dataclass(frozen=True)
class HTTPOptions:
    """How the engine is reached over HTTP.

    Attributes:
        location: ``"HeadOnly"`` runs the ingress where the engine was created, ``"EveryNode"`` on every node;
            ``"NoServer"`` and None run none.
        host: Address to bind; None runs no server, like ``location=None``.
        port: Port to bind; 0 picks a free one.
        middlewares: ASGI middlewares, the first one outermost: `starlette.middleware.Middleware` objects, or
            callables that take the application and return one.
        workers: Ingress processes per node, sharing the port.
        max_body_bytes: Larger request bodies are answered with 413.
        max_bodies_bytes: Bytes that the bodies of all requests which a server process holds may have together; while
            there is no room, requests are answered with 503. At least ``max_body_bytes`` in any case.
        request_timeout_s: Deadline of every HTTP request in seconds (then 504), or None. A client may shorten it by the
            header ``x-request-timeout-ms``.
        debug: Tell clients the traceback of a failed backend.
        stall_timeout_s: Seconds for which a client may owe the next part of its request (then 408), or take nothing of
            its answer (then the connection is broken off); or None.
        status_details: Whether ``/-/routes`` and ``/-/readyz`` tell clients the names of endpoints and backends, and
            how they are. None: only where ``host`` is a loopback address, and not where `Engine.asgi` is mounted.
        server_options: Settings of the server by name (hypercorn's: ``certfile``, ``keyfile``, ``backlog``, ...);
            also accepted directly as keys of ``http_options``.
        priority_header: A header by which clients may say how urgent their requests are, ``normal`` or ``low``
            (anything else is answered with 400), e.g. ``"x-priority"``. None: no header says so.
        max_connections: How many connections of clients a server process has open at a time; others wait until one
            ends, for which those are closed that nobody uses. None means any number.

    Raises:
        errors.InvalidArgument: A field has the wrong type or value.
    """

    location: str | None = "HeadOnly"
    host: str | None = "127.0.0.1"
    port: int = 8000
    middlewares: Sequence[Any] = ()
    workers: int = 1
    max_body_bytes: int = 100 * 1024 * 1024
    max_bodies_bytes: int = 512 * 1024 * 1024
    request_timeout_s: float | None = None
    debug: bool = False
    stall_timeout_s: float | None = 60.0
    status_details: bool | None = None
    server_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    priority_header: str | None = None
    max_connections: int | None = 10_000

    def __post_init__(self) -> None:
        if self.location not in ("HeadOnly", "EveryNode", "NoServer", None):
            allowed = '"HeadOnly", "EveryNode", "NoServer" or None'
            raise InvalidArgument(f"http_options: location must be {allowed}, not {self.location!r}")
        if self.host is not None and (not isinstance(self.host, str) or not self.host):
            raise InvalidArgument(f"http_options: host must be an address, a host name or None, not {self.host!r}")
        _check_integer("http_options", "port", self.port, 0, most=65535)
        _check_integer("http_options", "workers", self.workers, 1)
        _check_integer("http_options", "max_body_bytes", self.max_body_bytes, 0)
        _check_integer("http_options", "max_bodies_bytes", self.max_bodies_bytes, 0)
        if self.max_connections is not None:
            _check_integer("http_options", "max_connections", self.max_connections, 1)
        if self.request_timeout_s is not None:
            _check_seconds("http_options", "request_timeout_s", self.request_timeout_s)
        _check_switch("http_options", "debug", self.debug)
        _check_limit("http_options", "stall_timeout_s", self.stall_timeout_s, endless=False)
        if self.status_details is not None:
            _check_switch("http_options", "status_details", self.status_details)
        header = self.priority_header
        if header is not None and (not isinstance(header, str) or not _HEADER_NAME.fullmatch(header)):
            raise InvalidArgument(f"http_options: priority_header must be the name of a header or None, not {header!r}")
        if isinstance(self.middlewares, (str, bytes)) or not isinstance(self.middlewares, Sequence):
            raise InvalidArgument(f"http_options: middlewares must be a list, not {self.middlewares!r}")
        for position, middleware in enumerate(self.middlewares):
            if not callable(middleware) and not hasattr(middleware, "cls"):
                raise InvalidArgument(
                    f"http_options: middlewares[{position}] must be a starlette Middleware or a callable that takes "
                    f"the application, not {middleware!r}"
                )

    @property
    def serves(self) -> bool:
        """Whether the engine runs HTTP servers of its own."""
        return self.location in ("HeadOnly", "EveryNode") and self.host is not None

    @property
    def tells_details(self) -> bool:
        """``status_details`` with its default filled in."""
        return _is_loopback(self.host) if self.status_details is None else self.status_details

    @classmethod
    def of(cls, value: HTTPOptions | Mapping[str, Any] | None) -> HTTPOptions:
        """Turn what a user passed as ``http_options`` into `HTTPOptions`.

        Keys that are not fields of this class are taken for settings of the server, which checks them.
        """
        if isinstance(value, HTTPOptions):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise InvalidArgument(f"http_options must be a dict or HTTPOptions, not {value!r}")
        fields = {field.name for field in dataclasses.fields(cls)}
        given = dict(value or {})
        server = given.pop("server_options", {})
        if not isinstance(server, Mapping):
            raise InvalidArgument(f"http_options: server_options must be a dict, not {server!r}")
        server = {**server, **{key: given.pop(key) for key in list(given) if key not in fields}}
        return cls(**given, server_options=server)


def _is_loopback(host: str | None) -> bool:
    if host is None:
        return False
    return host in ("localhost", "::1") or (host.startswith("127.") and host.replace(".", "").isdigit())


def _check_integer(
    where: str, name: str, value: object, least: int, *, most: int | None = None, optional: bool = False
) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        alternative = " or None" if optional else ""
        raise InvalidArgument(f"{where}: {name} must be an integer {bound}{alternative}, not {value!r}")


def _check_switch(where: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{where}: {name} must be True or False, not {value!r}")


def _check_share(where: str, name: str, value: object) -> None:
    if isinstance(value, str):
        digits = value[:-1]
        valid = value.endswith("%") and digits.isascii() and digits.isdigit() and int(digits) <= 100
    else:
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not valid:
        raise InvalidArgument(
            f'{where}: {name} must be a number of replicas of at least 0 or a percentage such as "25%", not {value!r}'
        )


def _check_megabytes(where: str, name: str, value: object) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
    ):
        raise InvalidArgument(f"{where}: {name} must be a number of megabytes above 0 or None, not {value!r}")


def _names_of_exceptions(where: str, name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, (str, type)):
        value = (value,)
    names = []
    for one in value if isinstance(value, Sequence) else (value,):
        if isinstance(one, type) and issubclass(one, BaseException):
            names.append(name_of_exception(one))
        elif isinstance(one, str) and all(part.isidentifier() or part == "<locals>" for part in one.split(".")):
            names.append(one if "." in one else f"builtins.{one}")
        else:
            raise InvalidArgument(
                f"{where}: {name} must be types of exceptions, or full names such as 'requests.ConnectionError', "
                f"not {one!r}"
            )
    return tuple(names)


def _check_seconds(where: str, name: str, value: object, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LONGEST_S:
        bound = "of at least 0 (and at most a year)" + (" or None" if optional else "")
        raise InvalidArgument(f"{where}: {name} must be a number of seconds {bound}, not {value!r}")


def _check_limit(where: str, name: str, value: object, *, endless: bool) -> None:
    if value is None or (endless and value == math.inf):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST_S:
        others = "math.inf or None" if endless else "or None"
        raise InvalidArgument(
            f"{where}: {name} must be a number of seconds above 0 (and at most a year), {others}, not {value!r}"
        )


def _known_fields(cls: Callable[..., Any], what: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"{what} must be a dict or {getattr(cls, '__name__', cls)}, not {given!r}")
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise InvalidArgument(f"{what}: unknown field {name!r}; the fields are {', '.join(known)}")
