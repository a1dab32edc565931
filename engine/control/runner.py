"""The thread that an engine's controller runs in, and the way there from other threads.

asyncio and the controller are imported in that thread, while the application goes on and after the adapter was told
to get ready: what the adapter starts takes longer than these imports, and runs beside them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

from ..calling.client import Client
from ..config import HTTPOptions
from ..errors import EngineClosed
from ..seam.adapter import Adapter
from ..seam.detached import store_of

if TYPE_CHECKING:
    import asyncio

    from .controller import Controller
    from .operations import Operation

__all__ = ["Runner"]

T = TypeVar("T")

_SHUTDOWN_MARGIN_S = 30.0


class Runner:
    """Has a controller in this process do things: see `engine.control.operations.Runs`.

    Starts the thread and the adapter at once, without waiting for either.
    """

    def __init__(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        self.controller: Controller
        self._adapter = adapter
        self._ready = threading.Event()
        self._lock = threading.Lock()  # guards `_closed`, so that nothing is handed to a loop that ends
        self._closed = False
        self._stop_lock = threading.RLock()  # held by who stops; a signal handler may stop what its thread is stopping
        self._stopped = False  # or about to be: only who holds the lock touches it
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event
        # The thread must outlive every worker: a child's death signal is bound to the thread that started it.
        self._thread = threading.Thread(
            target=self._main, args=(engine_id, adapter, client, http), name=f"engine-{engine_id}", daemon=True
        )
        self._thread.start()

    def http_url(self) -> str | None:
        """The ingress's base URL, once it runs."""
        started = self._ready.is_set() and self._failure is None
        return self.controller.http_url() if started else None

    def wait_started(self) -> None:
        """Wait for the adapter; raises what kept it from starting."""
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def run(self, operation: Operation[T]) -> T:
        """See `engine.control.operations.Runs.run`."""
        import asyncio
        from concurrent.futures import CancelledError

        with self._lock:
            if self._closed or self._loop is None:
                raise EngineClosed("the engine was shut down")
            future = asyncio.run_coroutine_threadsafe(operation.perform(self.controller), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise EngineClosed("the engine was shut down") from None
        except BaseException:
            future.cancel()
            raise

    def leave(self, grace_s: float) -> None:
        """See `engine.control.operations.Runs.leave`: the engine ends with its creator."""
        self.stop(grace_s)

    def stop(self, grace_s: float) -> None:
        """Shut the controller down and end the thread (idempotent). If it could not start, what it found is cleared up.

        Who comes while another thread does it waits for that; within itself, as in a signal handler, it does nothing.
        """
        self._ready.wait()
        with self._stop_lock:
            if not self._stopped:
                self._stopped = True
                self._stop(grace_s)

    def _stop(self, grace_s: float) -> None:
        import asyncio

        loop = self._loop
        if loop is None:
            self._thread.join()
            return
        try:
            future = asyncio.run_coroutine_threadsafe(self._shut_down(grace_s), loop)
            future.result(grace_s + _SHUTDOWN_MARGIN_S)
        finally:
            with self._lock:
                self._closed = True
                loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    async def _shut_down(self, grace_s: float) -> None:
        if self._failure is None:
            await self.controller.shutdown(grace_s)
        elif store_of(self._adapter) is not None:
            # What a former controller left there, workers included, is nobody else's to clear. An adapter without a
            # store has cleared up when it could not start, and may be another engine's.
            await self._adapter.stop()
            self._adapter.close()

    def _main(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        try:
            import asyncio

            loop = self._loop = asyncio.new_event_loop()
        except BaseException as error:  # for lack of descriptors, say
            client.close()
            self._failure = error
            self._ready.set()
            return
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._serve(engine_id, adapter, client, http))
        finally:
            pending = asyncio.all_tasks(loop)
            for task in pending:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            asyncio.set_event_loop(None)
            loop.close()

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
