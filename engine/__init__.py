"""An embeddable multiprocessing engine: functions and classes as replicas, called through handles or over HTTP.

>>> from engine import Engine
>>> with Engine() as engine:
...     engine.create_backend("double", lambda request: 2 * request.data)
...     engine.create_endpoint("double", backend="double")
...     engine.get_handle("double").call(21)
42

Names are imported when they are first used: a worker that only runs a function need not load all that an application
needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from .config import BackendConfig, HTTPOptions
    from .context import ReplicaContext, get_replica_context
    from .engine import Engine
    from .handle import AsyncHandle, Handle
    from .ref import Ref
    from .request import ServeRequest
    from .user_callable import accept_batch

__all__ = [
    "AsyncHandle",
    "BackendConfig",
    "Engine",
    "HTTPOptions",
    "Handle",
    "Ref",
    "ReplicaContext",
    "ServeRequest",
    "accept_batch",
    "errors",
    "get_replica_context",
]

_HOMES = {
    "AsyncHandle": "handle",
    "BackendConfig": "config",
    "Engine": "engine",
    "HTTPOptions": "config",
    "Handle": "handle",
    "Ref": "ref",
    "ReplicaContext": "context",
    "ServeRequest": "request",
    "accept_batch": "user_callable",
    "get_replica_context": "context",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "errors":
        return import_module("engine.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"engine.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
