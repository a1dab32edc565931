"""An engine that runs nothing here, because it stands for one that runs elsewhere (`engine.seam.workplace`)."""

from __future__ import annotations

from typing import Any

from ..config import BackendConfig, HTTPOptions
from ..errors import EngineError
from ..seam.workplace import check_idle
from .operations import CreateEndpoint, GetBackendConfig, ListBackends, ListEndpoints, Statistics

__all__ = ["InertRunner"]


class InertRunner:
    """Does nothing while the module that asks for it is imported, and refuses afterwards: see `operations.Runs`.

    Args:
        why: Why the engine is inert: a phrase that goes on after "this engine".
        http: How the engine would be reached.
    """

    def __init__(self, why: str, http: HTTPOptions) -> None:
        self._why = why
        self._http = http
        self._url: str | None = None

    def wait_started(self) -> None:
        """Nothing was started."""

    def skip(self) -> None:
        """Pretend that something was done.

        Raises:
            errors.EngineError: The module has been imported.
        """
        check_idle(self._why)

    def run(self, operation: Any) -> Any:
        """As `skip`; gives what an engine that runs nothing would."""
        self.skip()
        if isinstance(operation, CreateEndpoint) and operation.entry.route is not None and self._http.serves:
            self._url = f"http://{self._http.host}:{self._http.port}"
        if isinstance(operation, GetBackendConfig):
            return BackendConfig()
        if isinstance(operation, (ListBackends, ListEndpoints)):
            return {}
        if isinstance(operation, Statistics):
            return {"backends": {}, "endpoints": {}, "ingresses": {}}
        return None

    def http_url(self) -> str | None:
        """What the module would have been told; not where another process's ingress really listens."""
        return self._url

    def stop(self, grace_s: float) -> None:
        """There is nothing to stop."""

    def hurry(self) -> None:
        """There is nothing to hurry."""

    def leave(self, grace_s: float) -> None:
        """There is nothing to leave."""

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        """Stands for the ingress, to be mounted but not called.

        Raises:
            errors.EngineError: It is called.
        """
        raise EngineError(f"this engine {self._why}: it serves nothing here")
