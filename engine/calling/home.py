"""Where a caller lives: on an event loop, or among threads. It says how its channels are read and runs its timers."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ..seam.may_block import awaited_thread, running_asyncio_loop

if TYPE_CHECKING:
    import asyncio

__all__ = ["Home", "LoopHome", "ThreadHome", "Timer"]

_SWEEP_FROM = 64
_JOIN_S = 2.0
"""How long closing waits for the thread: a user's callback that hangs in it must not keep the engine from ending."""


class Timer(Protocol):
    """Something that will happen."""

    def cancel(self) -> None:
        """Make it not happen (idempotent)."""


class Home(Protocol):
    """Where a caller's channels are read and its timers run."""

    on_loop: bool

    def runs_here(self) -> bool:
        """Whether waiting in this thread would keep the answers from being read."""

    def call_later(self, delay_s: float, function: Callable[..., object], *args: Any) -> Timer:
        """Call a function that neither blocks nor raises after this many seconds."""

    def close(self) -> None:
        """Drop the timers."""


class LoopHome:
    """A caller used by the tasks of one asyncio loop, on its thread."""

    on_loop = True

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def runs_here(self) -> bool:
        """See `Home.runs_here`."""
        return running_asyncio_loop() is self._loop

    def call_later(self, delay_s: float, function: Callable[..., object], *args: Any) -> Timer:
        """See `Home.call_later`."""
        return self._loop.call_later(delay_s, function, *args)

    def close(self) -> None:
        """Nothing to do: the timers go with the loop."""


class _Entry:
    __slots__ = ("args", "function")

    def __init__(self, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.function: Callable[..., object] | None = function
        self.args = args

    def cancel(self) -> None:
        self.function = None


class ThreadHome:
    """A caller used by any number of threads. Its timers run on one daemon thread that starts with the first."""

    on_loop = False

    def __init__(self, name: str = "engine-timers") -> None:
        self._name = name
        self._lock = threading.Lock()  # guards the rest
        # Not a condition: a signal handler that raises in one, which is made in Python, can leave its lock locked.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._heap: list[tuple[float, int, _Entry]] = []
        self._order = itertools.count()
        self._sweep_at = _SWEEP_FROM  # entries: then the cancelled ones are dropped
        self._thread: threading.Thread | None = None
        self._closed = False

    def runs_here(self) -> bool:
        """See `Home.runs_here`."""
        return False

    def call_later(self, delay_s: float, function: Callable[..., object], *args: Any) -> Timer:
        """See `Home.call_later`."""
        entry = _Entry(function, args)
        try:
            with self._lock:
                if self._closed:
                    return entry
                if len(self._heap) >= self._sweep_at:
                    self._heap = [item for item in self._heap if item[2].function is not None]
                    heapq.heapify(self._heap)
                    self._sweep_at = max(_SWEEP_FROM, 2 * len(self._heap))
                heapq.heappush(self._heap, (time.monotonic() + delay_s, next(self._order), entry))
                first = self._heap[0][2] is entry
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    thread.start()
                    self._thread = thread
            if first:
                self._wakes.put(None)
        except BaseException:
            self._wakes.put(None)
            raise
        return entry

    def close(self) -> None:
        """End the thread; no timer fires any more (idempotent)."""
        with self._lock:
            self._closed = True
            self._heap.clear()
            thread = self._thread
        self._wakes.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def _run(self) -> None:
        with awaited_thread():
            self._run_timers()

    def _run_timers(self) -> None:
        while True:
            entry: _Entry | None = None
            wait_s: float | None = None
            with self._lock:
                if self._closed:
                    self._wakes.put(None)  # for another one, if a signal handler struck while this one was started
                    return
                if self._heap:
                    wait_s = self._heap[0][0] - time.monotonic()
                    if wait_s <= 0:
                        _, _, entry = heapq.heappop(self._heap)
            if entry is None:
                with contextlib.suppress(queue.Empty):
                    self._wakes.get(timeout=wait_s)
                continue
            function = entry.function
            if function is not None:
                try:
                    function(*entry.args)
                except BaseException:  # a user's callback, perhaps: the other timers are to go off all the same
                    from ..seam.log import Log

                    Log("engine.calling").exception("a timer failed")
                function = None
            del entry  # what it holds is not kept until the next one is due
