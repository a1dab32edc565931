"""The application's side of a controller that lives in another process (`engine.control.detached`)."""

from __future__ import annotations

import threading
from typing import Any

from ..calling.client import Client
from ..config import HTTPOptions
from ..errors import EngineClosed, RetryLater
from ..seam.adapter import RemoteController
from ..seam.serialization import dumps, loads, unpack_exception

__all__ = ["RemoteRunner"]

_APPLIED_TIMEOUT_S = 10.0
_RETRY_S = 0.2
"""Between tries while there is no controller: it takes seconds to start again, and each try costs the platform."""
_LET_GO = "this program has let go of the detached engine, which goes on: take it over again with Engine.connect"
_REPEATABLE = frozenset(
    {
        "get_backend_config",
        "http_options",
        "http_url",
        "list_backends",
        "list_endpoints",
        "set_traffic",
        "shadow_traffic",
        "statistics",
        "stop",
    }
)
"""Operations that may be done again if the controller died and nobody knows whether it had done them."""


class RemoteRunner:
    """As `engine.control.runner.Runner`, by way of messages.

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

    def run(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Have the controller do something and wait for it; this process then sees what it changed.

        Raises:
            errors.EngineClosed: The engine was shut down, or let go of meanwhile.
            errors.RetryLater: The controller died meanwhile, and may or may not have done it.
            BaseException: What the operation raised.
        """
        arguments = dumps((args, kwargs), f"the arguments of {operation}")
        while True:
            try:
                outcome = self._controller.run(operation, arguments)
                break
            except RetryLater:
                if operation not in _REPEATABLE:
                    raise
                if self._left.wait(_RETRY_S):
                    raise EngineClosed("the engine was let go while its controller was away") from None
        result, error, version = loads(outcome)
        if error is not None:
            raise unpack_exception(error)
        self._client.wait_applied(version, _APPLIED_TIMEOUT_S)
        return result

    def http_url(self) -> str | None:
        """The ingress's base URL, once it runs."""
        url: str | None = self.run("http_url")
        return url

    def http_options(self) -> HTTPOptions:
        """How the engine was created to be reached over HTTP."""
        options: HTTPOptions = self.run("http_options")
        return options

    def stop(self, grace_s: float) -> None:
        """Shut the engine down."""
        try:
            self.run("stop", grace_s)
        except EngineClosed:
            pass  # somebody else was faster
        finally:
            self.leave(ended=True)

    def leave(self, *, ended: bool = False) -> None:
        """Let go of the engine, which goes on unless it has ended."""
        self._left.set()
        self._client.close(None if ended else EngineClosed(_LET_GO))
        self._controller.leave(ended=ended)
