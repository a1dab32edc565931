"""The thread that an engine's controller runs in, and the way there from other threads.

asyncio and the controller are imported in that thread, while the application goes on and after the adapter was told
to get ready: what the adapter starts takes longer than these imports, and runs beside them.

Whoever has something done waits for it without a deadline of the runner's: what the controller does has deadlines of
its own, and ends with the thread at the latest. If whoever waits is interrupted, what it waited for is given up, and
the controller takes it back or, where that is impossible, sees it through. The thread itself survives whatever the
application's code does in it: exceptions, pickles, factories of log records. Handlers of logging run in another one.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from ..calling.client import Client
from ..config import HTTPOptions
from ..errors import EngineClosed, EngineError
from ..seam.adapter import Adapter, done_by
from ..seam.descriptors import telling_shortages
from ..seam.detached import store_of
from ..seam.may_block import check_not_own_thread, mark_own_thread, unmark_own_thread

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future

    from .controller import Controller
    from .operations import Operation

__all__ = ["Runner"]

T = TypeVar("T")

_SHUTDOWN_MARGIN_S = 30.0
"""What a shutdown may take beyond the time that calls in flight get, to start or to end what does not want to."""
_NOT_STARTED = "the engine was shut down before it had started"
_LAST_WORDS_S = 2.0
"""For handlers of logging to be done with what the engine had to say. Afterwards they go on by themselves."""
_LAST_S = 5.0
"""For the thread to end, once the controller has; and for a shutdown in a hurry."""


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
        self._starting: asyncio.Task[None] | None = None
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
        """Wait for the adapter, as long as its start takes; raises what kept it from starting."""
        if not self._ready.is_set():
            check_not_own_thread("waiting for the engine to start")
            self._ready.wait()
        if self._failure is not None:
            with telling_shortages():
                raise self._failure

    def run(self, operation: Operation[T]) -> T:
        """See `engine.control.operations.Runs.run`."""
        from concurrent.futures import Future

        return self.run_as(Future(), operation)

    def run_as(self, future: Future[T], operation: Operation[T]) -> T:
        """As `run`; whoever cancels the future meanwhile, from any thread, has the operation given up."""
        from concurrent.futures import CancelledError

        check_not_own_thread("a control call of the engine")
        try:  # the future is there before anything is begun: an interrupt finds it wherever it strikes
            with self._lock:
                if self._closed or self._loop is None:
                    raise EngineClosed("the engine was shut down")
                self._loop.call_soon_threadsafe(self._begin, future, operation)
            with telling_shortages():
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
        Whoever is interrupted while he waits, by a second Ctrl-C, leaves calls in flight no more time.

        Raises:
            errors.EngineError: Something does not want to end. It is left, and calls that wait for it fail.
        """
        check_not_own_thread("shutdown()")
        with self._stop_lock:
            if not self._stopped:
                self._stopped = True
                self._stop(grace_s)

    def hurry(self) -> None:
        """Leave calls in flight no more time: another thread is stopping the engine, or about to. Does not block."""
        loop, controller = self._loop, getattr(self, "controller", None)
        if loop is not None and controller is not None:
            try:
                loop.call_soon_threadsafe(controller.hurry)
            except RuntimeError:
                pass  # it has ended

    # -- inside --------------------------------------------------------------------------------------------------------

    def _begin(self, future: Future[Any], operation: Operation[Any]) -> None:
        """On the loop: do what a future stands for, unless it was given up before."""
        loop = self._loop
        assert loop is not None
        if future.cancelled():
            return
        task = loop.create_task(_perform(operation, self.controller))

        def give_up(future: Future[Any]) -> None:
            if future.cancelled():
                try:
                    loop.call_soon_threadsafe(task.cancel)
                except RuntimeError:
                    pass  # the loop has ended, and the task with it

        def settle(task: asyncio.Task[tuple[Any, BaseException | None]]) -> None:
            result, error = (None, None) if task.cancelled() else task.result()
            if task.cancelled():
                future.cancel()
            if not future.set_running_or_notify_cancel():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        task.add_done_callback(settle)
        future.add_done_callback(give_up)

    def _stop(self, grace_s: float) -> None:
        try:
            self._await_start(grace_s + _SHUTDOWN_MARGIN_S)
            if self._loop is not None:
                self._end(grace_s)
        finally:
            with self._lock:
                self._closed = True
                if self._loop is not None:
                    try:
                        self._loop.call_soon_threadsafe(self._stopping.set)
                    except RuntimeError:
                        pass  # it has ended by itself
            self._thread.join(_LAST_S)
            from ..seam.scribe import scribe

            scribe().flush(_LAST_WORDS_S)

    def _await_start(self, timeout_s: float) -> None:
        """Wait for the start, and end one that takes too long: the import of a module that is to be preloaded, say."""
        started = False
        try:
            started = self._ready.wait(timeout_s)
        finally:
            loop, starting = self._loop, self._starting
            if not started and loop is not None and starting is not None:
                loop.call_soon_threadsafe(starting.cancel)
                self._ready.wait(_LAST_S)

    def _end(self, grace_s: float) -> None:
        import asyncio
        from concurrent import futures

        loop = self._loop
        assert loop is not None
        ending = asyncio.run_coroutine_threadsafe(self._shut_down(grace_s), loop)
        timeout_s = grace_s + _SHUTDOWN_MARGIN_S
        try:
            ending.result(timeout_s)
        except (futures.TimeoutError, TimeoutError):
            raise EngineError(
                f"the engine has not ended within {timeout_s:g} s, and is left: a worker cannot be killed, or "
                f"the {self._adapter.name} adapter does not stop"
            ) from None
        except (KeyboardInterrupt, SystemExit):
            self.hurry()
            with contextlib.suppress(Exception):  # the interrupt says more
                ending.result(_LAST_S)
            raise

    async def _shut_down(self, grace_s: float) -> None:
        if self._failure is None:
            await self.controller.shutdown(grace_s)
        elif store_of(self._adapter) is not None:
            # What a former controller left there, workers included, is nobody else's to clear. An adapter without a
            # store has cleared up when it could not start, and may be another engine's.
            await done_by(self._adapter, "stop")
            self._adapter.close()

    def _main(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        mark_own_thread()
        try:
            self._run_loop(engine_id, adapter, client, http)
        finally:
            unmark_own_thread()

    def _run_loop(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        try:
            import asyncio

            loop = asyncio.new_event_loop()
            loop.set_exception_handler(_report)
            self._stopping = asyncio.Event()
            self._loop = loop
        except BaseException as error:  # for lack of descriptors, say
            client.close()
            self._failure = error
            self._ready.set()
            return
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._serve(engine_id, adapter, client, http))
        finally:
            with self._lock:
                self._closed = True
            pending = asyncio.all_tasks(loop)
            for task in pending:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            client.close()  # if that was not come to
            asyncio.set_event_loop(None)
            loop.close()

    async def _serve(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        import asyncio

        self._starting = asyncio.create_task(self._start(engine_id, adapter, client, http))
        await asyncio.wait([self._starting])
        if self._starting.cancelled():
            client.close()
            self._failure = EngineClosed(_NOT_STARTED)
        self._ready.set()
        await self._stopping.wait()

    async def _start(self, engine_id: str, adapter: Adapter, client: Client, http: HTTPOptions) -> None:
        from asyncio import CancelledError

        try:
            from .controller import Controller

            self.controller = Controller(engine_id, adapter, client, http)
            await self.controller.start()
        except BaseException as error:
            client.close()
            self._failure = EngineClosed(_NOT_STARTED) if isinstance(error, CancelledError) else error


async def _perform(operation: Operation[Any], controller: Controller) -> tuple[Any, BaseException | None]:
    """Do something on the controller's loop; what is raised is returned.

    Raised in a task, what is no `Exception` would end the loop: `SystemExit`, say, out of a user's ``__reduce__``.
    """
    from asyncio import CancelledError

    try:
        return await operation.perform(controller), None
    except CancelledError:
        raise
    except BaseException as error:
        return None, error


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What the loop does with an exception of a callback or a task that nobody waits for."""
    from ..seam.log import Log

    Log("engine.controller").error("%s", context["message"], exc_info=context.get("exception"))
