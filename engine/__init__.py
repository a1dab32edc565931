"""An embeddable multiprocessing engine: functions and classes as replicas, called through handles or over HTTP.

>>> from engine import Engine
>>> with Engine() as engine:
...     engine.create_backend("double", lambda request: 2 * request.data)
...     engine.create_endpoint("double", backend="double")
...     engine.get_handle("double").call(21)
42

Names are imported when they are first used: a worker that only runs a function need not load all that an application
needs. ``engine.__version__`` is that of the installed distribution, ``engineroom``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from . import errors
    from .calling.budget import remaining_s
    from .calling.handle import AsyncHandle, Handle
    from .calling.ref import Ref
    from .config import BackendConfig, HTTPOptions
    from .engine import Engine
    from .request import ServeRequest
    from .serving.context import ReplicaContext, get_replica_context
    from .serving.user_callable import accept_batch

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
    "remaining_s",
]

_HOMES = {
    "AsyncHandle": "calling.handle",
    "BackendConfig": "config",
    "Engine": "engine",
    "HTTPOptions": "config",
    "Handle": "calling.handle",
    "Ref": "calling.ref",
    "ReplicaContext": "serving.context",
    "ServeRequest": "request",
    "accept_batch": "serving.user_callable",
    "get_replica_context": "serving.context",
    "remaining_s": "calling.budget",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "errors":
        return import_module("engine.errors")
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            globals()[name] = version("engineroom")
        except PackageNotFoundError:  # a copy of the sources that nobody installed
            globals()[name] = "0+unknown"
        return globals()[name]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"engine.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
