"""This process's side of one engine: the routing snapshot that rules here, and the callers that use it.

The process that created the engine has its client from the controller directly. Any other process (a replica that uses
handles, an ingress, a program that was sent a handle) attaches: it opens a channel to the engine's control address,
subscribes, and from then on gets every new snapshot pushed.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import EngineClosed, EngineError
from ..seam.channel import ChannelClosed
from ..seam.connector import Connector, may_return, refs_of
from ..seam.may_block import running_asyncio_loop
from ..seam.patched import check_unpatched
from ..seam.snapshot import RoutingSnapshot
from ..seam.workplace import works_for
from .bell import Bell
from .caller import Caller
from .home import Home, LoopHome, ThreadHome

if TYPE_CHECKING:
    import asyncio

    from ..seam.control_messages import Subscribe
    from .subscription import Subscription

__all__ = ["Client"]

_ATTACH_TIMEOUT_S = 10.0
_RETURN_TIMEOUT_S = 30.0
"""The same while the controller is being started again, which first waits for its workers to come back to it."""

_SHUT_DOWN = "the engine was shut down"
_SHUTTING_DOWN = "the engine is being shut down"

_lock = threading.Lock()  # guards the next two, which map engine ids: engines do not see each other
_clients: dict[str, Client] = {}
_coming: dict[str, _Coming] = {}


class Client:
    """Holds the ruling snapshot and one caller per event loop, plus one for threads.

    Args:
        engine_id: The engine.
        connector: Opens channels from this process.

    Attributes:
        threads: The caller of all threads, once there is one (`thread_caller`).
    """

    def __init__(self, engine_id: str, connector: Connector) -> None:
        self.engine_id = engine_id
        self.pid = os.getpid()
        self.snapshot = RoutingSnapshot(version=-1)
        self.refs = refs_of(connector)
        self._connector = connector
        self._lock = threading.Lock()  # guards the callers
        self.threads: Caller | None = None
        self._loops: dict[asyncio.AbstractEventLoop, Caller] = {}
        self._draining = False  # takes no new calls, but from workers of the engine
        self._carries: Callable[[], bool] | None = None  # see `subscribe`
        self._standing: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()  # loops that nobody waits for
        self._why_closed = ""  # as long as it is open
        self._owns_connector = False
        self._subscription: Subscription | None = None  # to a controller in another process
        self._moved = Bell()  # rings whenever a snapshot came to rule

    def register(self) -> None:
        """Let `find` find it, now that a snapshot rules."""
        with _lock:
            _clients[self.engine_id] = self

    @staticmethod
    def find(engine_id: str) -> Client | None:
        """This process's client of an engine, if it has one."""
        with _lock:
            client = _clients.get(engine_id)
        return client if client is not None and client.pid == os.getpid() else None

    @classmethod
    def attach(cls, engine_id: str, subscribe: Callable[[], Client], timeout_s: float | None = None) -> Client | None:
        """This process's client of an engine that another process created; all who need it wait for the same.

        Args:
            engine_id: The engine.
            subscribe: Makes the client (`subscribe`), if there is none yet. It runs in a thread of its own, so that
                whoever is in a hurry can leave it alone: who comes later finds it done.
            timeout_s: Seconds to wait, or None for as long as it takes, which `subscribe` bounds.

        Returns:
            The client, or None if there was none in time.

        Raises:
            errors.EngineClosed: The engine cannot be reached.
            errors.InvalidArgument: gevent or eventlet has patched this process.
        """
        coming: _Coming | None = None
        begins = False
        try:
            with _lock:
                known, coming = _clients.get(engine_id), _coming.get(engine_id)
                if known is not None and known.pid == os.getpid():
                    return known
                begins = coming is None or coming.pid != os.getpid()
                if begins:
                    coming = _coming[engine_id] = _Coming(engine_id, subscribe)
            assert coming is not None
            if begins:
                coming.begin()
            return coming.wait(timeout_s)
        except BaseException:
            if begins and coming is not None and not coming.over:
                coming.begin()  # an interrupt, perhaps before it began: others wait for it, too
            raise

    @classmethod
    def subscribe(
        cls,
        engine_id: str,
        connector: Connector,
        control_address: str,
        request: Subscribe | None = None,
        *,
        owns_connector: bool = False,
        carries: Callable[[], bool] | None = None,
    ) -> Client:
        """A client of such an engine, with a life of its own.

        Args:
            engine_id: The engine.
            connector: Opens channels from this process.
            control_address: Where the controller is.
            request: What the controller is asked for; by default snapshots, for a caller that is no ingress.
            owns_connector: Close the connector with the client.
            carries: For whom it carries calls of others: whether it holds any.

        Raises:
            errors.EngineClosed: The engine cannot be reached.
            errors.InvalidArgument: gevent or eventlet has patched this process.
            errors.ResourcesUnavailable: There are no descriptors left to reach it with.
        """
        from ..seam.control_messages import Subscribe
        from .subscription import Subscription

        check_unpatched()
        client = cls(engine_id, connector)
        client._owns_connector = owns_connector
        client._carries = carries
        subscription = client._subscription = Subscription(
            client, connector, control_address, request or Subscribe(ingress=False)
        )
        try:
            subscription.begin()
        except ChannelClosed as error:
            if not may_return(connector, control_address):
                client.close()
                raise EngineClosed(
                    f"the engine of this handle was shut down, or cannot be reached from here: {error}"
                ) from error
            subscription.seek(str(error))
        except BaseException:  # no descriptor is left for a channel, or the secret is of no use
            client.close()
            raise
        in_time = subscription.first.wait(_ATTACH_TIMEOUT_S) or (
            may_return(connector, control_address) and subscription.first.wait(_RETURN_TIMEOUT_S - _ATTACH_TIMEOUT_S)
        )
        if not in_time or client.closed:
            client.close()
            raise EngineClosed("the engine of this handle did not answer, or was shut down meanwhile")
        client.register()
        return client

    @property
    def closed(self) -> bool:
        """Whether no call can be made through it any more."""
        return bool(self._why_closed)

    # -- callers ---------------------------------------------------------------------------------------------------

    def thread_caller(self) -> Caller:
        """The caller of all threads."""
        caller = self.threads
        if caller is None or self.pid != os.getpid():
            with self._lock:
                self.check_open()
                if self.threads is None:
                    self.threads = self._new_caller(ThreadHome())
                caller = self.threads
        return caller

    def loop_caller(self, loop: asyncio.AbstractEventLoop | None = None) -> Caller:
        """The caller of the asyncio loop that runs in this thread. Whoever knows that loop already says so."""
        if loop is None:
            import asyncio

            loop = asyncio.get_running_loop()
        caller = self._loops.get(loop)
        if caller is None or self.pid != os.getpid():
            self._drop_closed_loops()
            with self._lock:
                self.check_open()
                caller = self._loops[loop] = self._new_caller(LoopHome(loop))
        return caller

    # -- snapshots -------------------------------------------------------------------------------------------------

    def apply(self, snapshot: RoutingSnapshot) -> None:
        """Let this snapshot rule; every call submitted after this returns is routed by it."""
        if snapshot.version <= self.snapshot.version:
            return
        self.snapshot = snapshot
        if snapshot.draining:
            self.begin_drain()
        self._drop_closed_loops()
        with self._lock:
            threads, loops = self.threads, list(self._loops.items())
        if threads is not None:
            threads.apply(snapshot)
        for loop, caller in loops:
            _on_loop(loop, caller.apply, snapshot)
        self._moved.ring()

    def wait_applied(self, version: int, timeout_s: float) -> bool:
        """Wait until a snapshot of at least this version rules; False if it takes too long."""
        return self._moved.wait_for(lambda: self.snapshot.version >= version or self.closed, timeout_s)

    def statistics(self) -> list[dict[str, Any]]:
        """What the callers of this process counted, and those that make its calls for refs of the platform."""
        self._drop_closed_loops()
        with self._lock:
            callers = list(self._loops.values()) + ([self.threads] if self.threads else [])
        elsewhere = self.refs.statistics() if self.refs is not None else []
        return [caller.statistics() for caller in callers] + elsewhere

    def stands_still(self, loop: asyncio.AbstractEventLoop) -> None:
        """This loop is about to wait for the engine's end: its calls cannot go on, and are not waited for."""
        self._standing.add(loop)

    def begin_drain(self) -> None:
        """Take no more calls, but from the engine's own workers; what was taken goes on.

        Who carries calls of others takes them all: those do not make any more by themselves.
        """
        if self._carries is not None:
            return
        with self._lock:
            self._draining = True
            callers = self._callers()
        for caller in callers:
            caller.begin_drain(EngineClosed(_SHUTTING_DOWN), self._may_call)

    def at_rest(self) -> bool:
        """Whether an engine that drains need not wait for this process; for its workers, it waits in another way."""
        carries = self._carries
        return works_for(self.engine_id) or not ((carries is not None and carries()) or self.held())

    def held(self, *, nameless: bool = False) -> set[str]:
        """The backends that calls of this process wait for, or are with: see `Caller.held`.

        Those of loops that do not run now are not counted: they may never run again.
        """
        with self._lock:
            callers = self._callers(moving=True)
        return {tag for caller in callers for tag in caller.held(nameless=nameless)}

    def begin_close(self) -> None:
        """Take no more calls and fail those that wait for a replica; what is in flight goes on."""
        error = EngineClosed(_SHUT_DOWN)
        with self._lock:
            self._why_closed = self._why_closed or _SHUT_DOWN
            threads, loops = self.threads, list(self._loops.items())
        if threads is not None:
            threads.begin_close(error)
        for loop, caller in loops:
            _on_loop(loop, caller.begin_close, error)

    def close(self, error: EngineError | None = None) -> None:
        """Fail what is in flight and close all channels (idempotent).

        Args:
            error: What calls raise from now on; by default that the engine was shut down.
        """
        with self._lock:
            self._why_closed = self._why_closed or (str(error) if error is not None else _SHUT_DOWN)
            threads, loops = self.threads, list(self._loops.items())
        self._moved.ring()  # nothing will come any more
        with _lock:
            if _clients.get(self.engine_id) is self:
                del _clients[self.engine_id]
        if self._subscription is not None:
            self._subscription.end()
        if threads is not None:
            threads.close(error)
        for loop, caller in loops:
            # A loop that does not run now may never run again.
            if not (loop.is_running() and _on_loop(loop, caller.close, error)):
                caller.close(error)
        if self._owns_connector:
            self._connector.close()

    def _drop_closed_loops(self) -> None:
        """Hang up for loops that ended: nobody calls from there any more, and nobody waits for what they called."""
        with self._lock:
            ended = [self._loops.pop(loop) for loop in list(self._loops) if loop.is_closed()]
        for caller in ended:
            caller.close()

    def _callers(self, *, moving: bool = False) -> list[Caller]:
        """All of them, or those whose calls go on by themselves; to be called under the lock."""
        loops = [
            caller
            for loop, caller in self._loops.items()
            if not moving or (loop.is_running() and loop not in self._standing)
        ]
        return loops + ([self.threads] if self.threads is not None else [])

    def _new_caller(self, home: Home) -> Caller:
        caller = Caller(self._connector, home, self)
        if self._draining:
            caller.begin_drain(EngineClosed(_SHUTTING_DOWN), self._may_call)
        return caller

    def _may_call(self) -> bool:
        return works_for(self.engine_id)

    def check_open(self) -> None:
        """Raise `errors.EngineClosed` if no call can be made through it."""
        if self.pid != os.getpid():
            raise EngineClosed("this engine belongs to the process that this one was forked from; create one here")
        if self._why_closed:
            raise EngineClosed(self._why_closed)
        if self._draining and not self._may_call():
            raise EngineClosed(_SHUTTING_DOWN)


class _Coming:
    """The way to an engine that is new to this process. A stopped one delays nobody who wants another one."""

    def __init__(self, engine_id: str, subscribe: Callable[[], Client]) -> None:
        self.pid = os.getpid()
        self._engine_id = engine_id
        self._subscribe = subscribe
        self._client: Client | None = None
        self._error: BaseException | None = None
        self._begun = threading.Lock()
        self._bell = Bell()
        self.over = False

    def begin(self) -> None:
        """Go, in a thread of its own; does nothing if that was begun."""
        thread = threading.Thread(target=self._run, name="engine-attach", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # at the end of the interpreter, which has no more threads to give
            self._run()

    def wait(self, timeout_s: float | None) -> Client | None:
        self._bell.wait_for(lambda: self.over, timeout_s)
        if self._error is not None:
            raise self._error
        return self._client

    def _run(self) -> None:
        if not self._begun.acquire(False):
            return
        try:
            self._client = self._subscribe()
        except BaseException as error:
            self._error = error
        finally:
            with _lock:
                if _coming.get(self._engine_id) is self:
                    del _coming[self._engine_id]
            self.over = True
            self._bell.ring()


def _on_loop(loop: asyncio.AbstractEventLoop, function: Any, argument: Any) -> bool:
    """Run a function on a loop: at once if it is this thread's, else soon. False if the loop is closed."""
    if running_asyncio_loop() is loop:
        function(argument)
        return True
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        return False
    return True
