"""Stopping user code that runs: an exception raised in it, on the thread that runs it.

The thread on which plain callables run is the main one of its process, and Python runs signal handlers there: at the
next bytecode, or out of a system call that waits. So whoever hears that nobody wants a call any more sends that thread
a signal, and the handler raises, if what is to be stopped is still what runs. The signal is SIGURG: hardly any program
uses it, and one that comes when nobody expects it is ignored, be there a handler or not.

Nothing but user code is struck. Of engine code, only what a backend calls itself, such as handles, which bear that. Nor
is it struck where an exception would be lost or would leave something broken behind for good: in a finalizer, while a
module is imported, in logging, where `threading.Condition` takes or frees its lock, as queues do. It is tried again a
moment later then. An event loop that swallows exceptions has its tasks cancelled instead. But what was struck is not
struck again: it may clean up, for as long as it is given.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from ..config import LONGEST_S
from ..errors import CallCancelled

if TYPE_CHECKING:
    import asyncio

__all__ = ["Interrupter"]

_SIGNAL: int | None = getattr(signal, "SIGURG", None)
_SOON_S = 0.005
_SELDOM_S = 0.1
_BELOW_USER_CODE = f"{__package__}.blocking_replica"
_DELICATE = frozenset(
    {"_frozen_importlib", "_weakrefset", "importlib._bootstrap", "logging", "logging.handlers", "weakref"}
)
_LOCKING = frozenset({"__enter__", "__exit__"})


class Interrupter:
    """Interrupts the user code that one thread runs.

    Attributes:
        open: What user code runs for and may be struck in; else None. Set by that thread alone, right before it calls
            user code and right after, with no place in between where Python would run a signal handler.
    """

    def __init__(self) -> None:
        self.open: object = None
        self._thread: int | None = None
        self._strike: _Strike | None = None

    def take_process(self) -> None:
        """Make it work for this thread of a process that is the replica's own; before that, `interrupt` does nothing.

        Nothing is struck if this is not the main thread, or user code has a handler of its own for the signal. What
        lasts longer than it may is told all the same.
        """
        self._thread = threading.get_ident()
        if _SIGNAL is None or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(_SIGNAL) in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(_SIGNAL, self._on_signal)

    def interrupt(
        self, work: object, why: str, *, lasts: Callable[[], bool], grace_s: float | None, outlasted: Callable[[], None]
    ) -> None:
        """Raise `errors.CallCancelled` in user code, once (any thread).

        Args:
            work: What `open` is while the code to be struck runs, be it now or later.
            why: The message of the exception.
            lasts: Whether there still is anything to stop. Called on another thread, as is `outlasted`.
            grace_s: How long it may last, or None for ever.
            outlasted: Called once it has lasted longer.
        """
        earlier = self._strike
        if self._thread is None or (earlier is not None and earlier.work is work):
            return
        strike = self._strike = _Strike(work, why)
        arguments = strike, lasts, LONGEST_S if grace_s is None else grace_s, outlasted
        try:
            threading.Thread(target=self._carry_out, args=arguments, name="engine-interrupt", daemon=True).start()
        except RuntimeError:  # there are no more threads to be had
            self._signal()

    def _carry_out(
        self, strike: _Strike, lasts: Callable[[], bool], grace_s: float, outlasted: Callable[[], None]
    ) -> None:
        until = time.monotonic() + grace_s
        pause_s = _SOON_S
        while lasts():
            if not strike.done:
                self._signal()
            remaining_s = until - time.monotonic()
            if remaining_s <= 0:
                outlasted()
                return
            time.sleep(min(pause_s, remaining_s))
            pause_s = min(2 * pause_s, _SELDOM_S)
        strike.done = True
        strike.work = None

    def _signal(self) -> None:
        if _SIGNAL is not None and self._thread is not None and signal.getsignal(_SIGNAL) == self._on_signal:
            signal.pthread_kill(self._thread, _SIGNAL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        strike = self._strike
        if strike is None or strike.done or self.open is not strike.work or _is_delicate(frame):
            return
        strike.done = True
        loop = _swallowing_loop()
        if loop is None:
            raise CallCancelled(strike.why)
        loop.call_soon_threadsafe(_cancel_tasks, loop)


class _Strike:
    def __init__(self, work: object, why: str) -> None:
        self.work: object = work
        self.why = why
        self.done = False


def _swallowing_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that user code waits in here, if that logs what a handler raises and goes on: uvloop's."""
    if "asyncio" not in sys.modules:
        return None
    import asyncio

    loop = asyncio._get_running_loop()
    waits = loop is not None and asyncio.current_task(loop) is None
    return loop if waits and not isinstance(loop, asyncio.BaseEventLoop) else None


def _cancel_tasks(loop: asyncio.AbstractEventLoop) -> None:
    import asyncio

    for task in asyncio.all_tasks(loop):
        task.cancel()


def _is_delicate(frame: FrameType | None) -> bool:
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == _BELOW_USER_CODE:
            break
        name = frame.f_code.co_name
        if name == "__del__" or module in _DELICATE or (module == "threading" and name in _LOCKING):
            return True
        frame = frame.f_back
    return False
