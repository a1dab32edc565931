"""The thread that an engine's controller runs in, and the way there from other threads.

asyncio and the controller are imported in that thread, while the application goes on and after the adapter was told
to get ready: what the adapter starts takes longer than these imports, and runs beside them.
"""

from __future__ import annotations

import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from .adapter import Adapter
from .client import Client
from .config import HTTPOptions

if TYPE_CHECKING:
    import asyncio

    from .controller import Controller

__all__ = ["Runner"]

_T = TypeVar("_T")
_SHUTDOWN_MARGIN_S = 30.0


class Runner:
    """Starts the thread and the adapter at once, without waiting for either."""

    def __init__(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        self.controller: Controller
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event
        # The thread must outlive every worker: a child's death signal is bound to the thread that started it.
        self._thread = threading.Thread(
            target=self._main, args=(engine_id, adapter, client, http), name=f"engine-{engine_id}", daemon=True
        )
        self._thread.start()

    @property
    def started(self) -> bool:
        """Whether the adapter is ready."""
        return self._ready.is_set() and self._failure is None

    def wait_started(self) -> None:
        """Wait for the adapter; raises what kept it from starting."""
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def run(self, operation: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the controller's loop and wait for it."""
        import asyncio

        future = asyncio.run_coroutine_threadsafe(operation, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self, grace_s: float) -> None:
        """Shut the controller down and end the thread."""
        import asyncio

        self._ready.wait()
        try:
            if self._failure is None:
                future = asyncio.run_coroutine_threadsafe(self.controller.shutdown(grace_s), self._loop)
                future.result(grace_s + _SHUTDOWN_MARGIN_S)
        finally:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def _main(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        import asyncio

        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(engine_id, adapter, client, http))
        finally:
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            asyncio.set_event_loop(None)
            self._loop.close()

    async def _serve(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        import asyncio

        self._stopping = asyncio.Event()
        try:
            from .controller import Controller

            self.controller = Controller(engine_id, adapter, client, http)
            await self.controller.start()
        except BaseException as error:
            client.close()
            self._failure = error
        self._ready.set()
        await self._stopping.wait()
