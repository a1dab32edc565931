"""An embeddable multiprocessing engine: functions and classes as replicas, called through handles or over HTTP.

>>> from engine import Engine
>>> with Engine() as engine:
...     engine.create_backend("double", lambda request: 2 * request.data)
...     engine.create_endpoint("double", backend="double")
...     engine.get_handle("double").call(21)
42
"""

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
