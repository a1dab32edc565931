"""A controller in a process that outlives the application's: the part that any platform's way of running it wraps.

It owns a runner, and so a thread, an adapter and this process's client. Operations come from any number of
applications at a time; they and their outcomes are pickled, and an error travels as itself. When the process dies, the
platform starts it again and the controller takes over what it finds in the adapter's store.
"""

from __future__ import annotations

from typing import Any

from ..calling.client import Client
from ..calling.connectors import register_connector
from ..config import HTTPOptions
from ..seam.adapter import Adapter
from ..seam.serialization import dumps, loads, pack_exception
from .operations import Operation, Stop
from .runner import Runner

__all__ = ["DetachedController"]


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

    def wait_started(self) -> None:
        """Wait for the controller; raises what kept it from starting.

        Then only `Stop` works, which has the adapter clear what a former controller left. Whoever runs this may
        also let the process end, for the platform to start it again.
        """
        self._runner.wait_started()

    def run(self, packed: bytes) -> bytes:
        """Do something and wait for it, from any thread.

        Args:
            packed: The pickled `engine.control.operations.Operation`, or `engine.control.operations.Stop`.

        Returns:
            The pickled ``(result, packed exception or None, version)``. The version is that of the snapshot that rules
            now: a caller that has applied it sees what the operation changed.
        """
        try:
            result = self._do(loads(packed))
            return dumps((result, None, self._client.snapshot.version), "the result")
        except BaseException as error:
            return dumps((None, pack_exception(error), 0), "the error")

    def _do(self, operation: Operation[Any] | Stop) -> Any:
        if isinstance(operation, Stop):  # also an engine whose controller cannot start can be shut down
            return self._runner.stop(operation.grace_s)
        self._runner.wait_started()
        return self._runner.run(operation)
