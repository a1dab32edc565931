"""A controller in a process that outlives the application's: the part that any platform's way of running it wraps.

It owns a runner, and so a thread, an adapter and this process's client. Operations come from any number of
applications at a time; they and their outcomes are pickled, and an error travels as itself. When the process dies, the
platform starts it again and the controller takes over what it finds in the adapter's store.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any

from ..calling.client import Client
from ..calling.connectors import register_connector
from ..config import HTTPOptions
from ..errors import EngineError
from ..seam.adapter import Adapter
from ..seam.serialization import dumps, loads, pack_exception
from .operations import GiveUp, Keyed, Operation, Stop
from .runner import Runner

__all__ = ["DetachedController"]

_KEPT_KEYS = 100
"""Operations that were given up lately: more than are on their way at a time."""


class DetachedController:
    """Runs one engine's controller.

    Args:
        engine_id: The engine.
        adapter: Runs its workers; has a store.
        http: How the engine is reached over HTTP.
    """

    def __init__(self, engine_id: str, adapter: Adapter, http: HTTPOptions) -> None:
        register_connector(engine_id, adapter)
        self._client = Client(engine_id, adapter)
        self._client.register()
        self._runner = Runner(engine_id, adapter, self._client, http)
        self._futures: dict[str, Future[Any]] = {}  # of what is being done, by key
        self._given_up: deque[str] = deque(maxlen=_KEPT_KEYS)  # that word may come before what it is about

    def wait_started(self) -> None:
        """Wait for the controller; raises what kept it from starting.

        Then only `Stop` works, which has the adapter clear what a former controller left. Whoever runs this may
        also let the process end, for the platform to start it again.
        """
        self._runner.wait_started()

    def run(self, packed: bytes) -> bytes:
        """Do something and wait for it, from any thread.

        Args:
            packed: A pickled `engine.control.operations.Operation`, `Keyed` or not; `GiveUp`, or `Stop`.

        Returns:
            The pickled ``(result, packed exception or None, version)``. The version is that of the snapshot that rules
            now: a caller that has applied it sees what the operation changed.
        """
        try:
            result = self._do(loads(packed))
            return dumps((result, None, self._client.snapshot.version), "the result")
        except BaseException as error:
            return dumps((None, pack_exception(error), 0), "the error")

    def _do(self, operation: Keyed | GiveUp | Operation[Any] | Stop) -> Any:
        if isinstance(operation, Keyed):
            return self._do_keyed(operation.key, operation.operation)
        if isinstance(operation, GiveUp):
            self._given_up.append(operation.key)
            future = self._futures.get(operation.key)
            return future is not None and future.cancel()
        if isinstance(operation, Stop):  # also an engine whose controller cannot start can be shut down
            return self._runner.stop(operation.grace_s)
        self._runner.wait_started()
        return self._runner.run(operation)

    def _do_keyed(self, key: str, operation: Operation[Any]) -> Any:
        self._runner.wait_started()
        future = self._futures[key] = Future()
        try:
            if key in self._given_up:
                raise EngineError("this was given up")
            return self._runner.run_as(future, operation)
        finally:
            del self._futures[key]
