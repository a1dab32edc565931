"""The application's side of a controller that lives in another process (`engine.control.detached`)."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from typing import Any, TypeVar

from ..calling.client import Client
from ..errors import EngineClosed, RetryLater
from ..seam.detached import RemoteController
from ..seam.serialization import dumps, loads, unpack_exception
from .operations import REPEATABLE, GetURL, GiveUp, Keyed, Operation, Stop

__all__ = ["RemoteRunner"]

_APPLIED_TIMEOUT_S = 10.0
_RETRY_S = 0.2
"""Between tries while there is no controller: it takes seconds to start again, and each try costs the platform."""
_LET_GO = "this program has let go of the detached engine, which goes on: take it over again with Engine.connect"

T = TypeVar("T")


class RemoteRunner:
    """Has a controller elsewhere do things: see `engine.control.operations.Runs`.

    Args:
        controller: Reaches the controller.
        client: Of this process, subscribed to the controller.
    """

    def __init__(self, controller: RemoteController, client: Client) -> None:
        self._controller = controller
        self._client = client
        self._left = threading.Event()

    def wait_started(self) -> None:
        """Nothing to wait for: the controller was there before."""

    def run(self, operation: Operation[T]) -> T:
        """See `engine.control.operations.Runs.run`."""
        result: T = self._run(operation)
        return result

    def http_url(self) -> str | None:
        """See `engine.control.operations.Runs.http_url`."""
        return self.run(GetURL())

    def stop(self, grace_s: float) -> None:
        """See `engine.control.operations.Runs.stop`."""
        try:
            self._run(Stop(grace_s))
        except EngineClosed:
            pass  # somebody else was faster
        finally:
            self._let_go(ended=True)

    def hurry(self) -> None:
        """See `engine.control.operations.Runs.hurry`: there is nothing that this process could hurry."""

    def leave(self, grace_s: float = 0.0) -> None:
        """See `engine.control.operations.Runs.leave`: the engine goes on."""
        self._let_go(ended=False)

    def _let_go(self, *, ended: bool) -> None:
        self._left.set()
        self._client.close(None if ended else EngineClosed(_LET_GO))
        self._controller.leave(ended=ended)

    def _run(self, operation: Operation[Any] | Stop) -> Any:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(operation).__name__).lower()
        key = os.urandom(8).hex()
        keyed = operation if isinstance(operation, Stop) else Keyed(key, operation)
        packed = dumps(keyed, f"the arguments of {name}")
        while True:
            try:
                outcome = self._run_once(name, key, packed)
                break
            except RetryLater:
                if not isinstance(operation, REPEATABLE):
                    raise
                if self._left.wait(_RETRY_S):
                    raise EngineClosed("the engine was let go while its controller was away") from None
        result, error, version = loads(outcome)
        if error is not None:
            raise unpack_exception(error)
        self._client.wait_applied(version, _APPLIED_TIMEOUT_S)
        return result

    def _run_once(self, name: str, key: str, packed: bytes) -> bytes:
        try:
            return self._controller.run(name, packed)
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt: of what was asked nobody would learn any more
                with contextlib.suppress(Exception):
                    self._controller.run("give_up", dumps(GiveUp(key), "the key"))
            raise
