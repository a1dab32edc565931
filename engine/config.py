"""Options, validated once, at construction.

Every message names the field, the value and what is allowed. Nothing here reads the environment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InvalidArgument

__all__ = ["LONGEST_S", "BackendConfig", "HTTPOptions"]

_MAX_ASYNC_QUERIES = 1_000_000
_BLOCKING_QUERIES = 8
LONGEST_S = 366 * 86400.0
"""Longest time to wait for anything, in seconds. What the system's calls take overflows not far above it."""


@dataclass(frozen=True)
class BackendConfig:
    """How a backend is run.

    Attributes:
        num_replicas: Copies to run, at least 1.
        max_concurrent_queries: Calls one replica holds at once, queued and running. None means 8 for a sync callable
            (twice ``max_batch_size`` if that is set) and 1,000,000 for an async one.
        max_queued_requests: Calls each caller may queue once every replica is full; the next one fails with
            `errors.Overloaded` (HTTP 503). 0 rejects at once, None never does.
        max_batch_size: Calls passed together to a backend marked with `accept_batch`. None means 1.
        batch_wait_timeout: Seconds the first call of a batch waits for the others.
        user_config: Passed to the backend's ``reconfigure`` at construction and whenever it changes.
        graceful_shutdown_timeout_s: Seconds a replica that is to leave may take to finish what it holds.
        start_timeout_s: Seconds a replica may take to become ready.

    Raises:
        errors.InvalidArgument: A field has the wrong type or value.
    """

    num_replicas: int = 1
    max_concurrent_queries: int | None = None
    max_queued_requests: int | None = 1000
    max_batch_size: int | None = None
    batch_wait_timeout: float = 0.0
    user_config: Any = None
    graceful_shutdown_timeout_s: float = 20.0
    start_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        _integer(self, "num_replicas", 1)
        _integer(self, "max_concurrent_queries", 1, optional=True)
        _integer(self, "max_queued_requests", 0, optional=True)
        _integer(self, "max_batch_size", 1, optional=True)
        _seconds(self, "batch_wait_timeout")
        _seconds(self, "graceful_shutdown_timeout_s")
        _seconds(self, "start_timeout_s")

    @classmethod
    def of(cls, value: BackendConfig | Mapping[str, Any] | None) -> BackendConfig:
        """Turn what a user passed as ``config`` into a `BackendConfig`."""
        return cls().updated({} if value is None else value)

    def updated(self, changes: BackendConfig | Mapping[str, Any]) -> BackendConfig:
        """Return a copy with these fields changed, validated anew."""
        if isinstance(changes, BackendConfig):
            return changes
        _known_fields(type(self), "config", changes)
        return dataclasses.replace(self, **dict(changes))

    def concurrency(self, *, on_loop: bool) -> int:
        """``max_concurrent_queries`` with its default filled in for a sync or an async callable."""
        if self.max_concurrent_queries is not None:
            return self.max_concurrent_queries
        if on_loop:
            return _MAX_ASYNC_QUERIES
        return 2 * self.max_batch_size if self.max_batch_size is not None else _BLOCKING_QUERIES


@dataclass(frozen=True)
class HTTPOptions:
    """How the engine is reached over HTTP.

    Attributes:
        location: ``"HeadOnly"`` runs the ingress where the engine was created, ``"EveryNode"`` on every node;
            ``"NoServer"`` and None run none.
        host: Address to bind.
        port: Port to bind; 0 picks a free one.
        middlewares: ASGI middlewares, the first one outermost: `starlette.middleware.Middleware` objects, or
            callables that take the application and return one.
        workers: Ingress processes per node, sharing the port.
        max_body_bytes: Larger request bodies are answered with 413.
        request_timeout_s: Deadline of every HTTP request in seconds (then 504), or None.
        debug: Tell clients the traceback of a failed backend.
        server_options: Settings of the server by name (hypercorn's: ``certfile``, ``keyfile``, ``backlog``, ...);
            also accepted directly as keys of ``http_options``.

    Raises:
        errors.InvalidArgument: A field has the wrong type or value.
    """

    location: str | None = "HeadOnly"
    host: str = "127.0.0.1"
    port: int = 8000
    middlewares: Sequence[Any] = ()
    workers: int = 1
    max_body_bytes: int = 100 * 1024 * 1024
    request_timeout_s: float | None = None
    debug: bool = False
    server_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.location not in ("HeadOnly", "EveryNode", "NoServer", None):
            allowed = '"HeadOnly", "EveryNode", "NoServer" or None'
            raise InvalidArgument(f"http_options: location must be {allowed}, not {self.location!r}")
        if not isinstance(self.host, str) or not self.host:
            raise InvalidArgument(f"http_options: host must be an address or host name, not {self.host!r}")
        _integer(self, "port", 0, most=65535)
        _integer(self, "workers", 1)
        _integer(self, "max_body_bytes", 0)
        if self.request_timeout_s is not None:
            _seconds(self, "request_timeout_s")
        if not isinstance(self.debug, bool):
            raise InvalidArgument(f"http_options: debug must be True or False, not {self.debug!r}")
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
        return self.location in ("HeadOnly", "EveryNode")

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
        server = dict(given.pop("server_options", {}))
        server.update({key: given.pop(key) for key in list(given) if key not in fields})
        return cls(**given, server_options=server)


def _prefix(options: object) -> str:
    return "config" if isinstance(options, BackendConfig) else "http_options"


def _integer(options: object, name: str, least: int, *, most: int | None = None, optional: bool = False) -> None:
    value = getattr(options, name)
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        alternative = " or None" if optional else ""
        raise InvalidArgument(f"{_prefix(options)}: {name} must be an integer {bound}{alternative}, not {value!r}")


def _seconds(options: object, name: str) -> None:
    value = getattr(options, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LONGEST_S:
        raise InvalidArgument(
            f"{_prefix(options)}: {name} must be a number of seconds of at least 0 (and at most a year), not {value!r}"
        )


def _known_fields(cls: Callable[..., Any], what: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"{what} must be a dict or {getattr(cls, '__name__', cls)}, not {given!r}")
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise InvalidArgument(f"{what}: unknown field {name!r}; the fields are {', '.join(known)}")
