"""Whether blocking here would stop an event loop: an async backend's, the engine's own, or the one of this thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import WouldBlock

if TYPE_CHECKING:
    import asyncio

__all__ = [
    "awaited_thread",
    "check_may_block",
    "check_may_wait",
    "check_not_own_thread",
    "is_awaited_thread",
    "mark_busy_thread",
    "mark_loop_thread",
    "mark_own_thread",
    "may_block_loop",
    "running_asyncio_loop",
    "unmark_busy_thread",
    "unmark_loop_thread",
    "unmark_own_thread",
    "warn_if_on_loop",
]

_loop_threads: set[int] = set()  # threads that run the event loop of an async backend, or foreign code on an own thread
_OURS = ("engine.seam.", "engine.calling.", "engine.engine")
_NOTEBOOKS = ("ipykernel", "marimo")
_warned = False  # see `warn_if_on_loop`
_calm_threads: set[int] = set()  # see `may_block_loop`
_own_threads: set[int] = set()  # threads that run the controller of an engine
_awaited_threads: set[int] = set()  # these, and others of the engine's that do something for everybody


def mark_loop_thread() -> None:
    """Declare that this thread runs the event loop of an async backend."""
    _loop_threads.add(threading.get_ident())


def unmark_loop_thread() -> None:
    """Take `mark_loop_thread` back."""
    _loop_threads.discard(threading.get_ident())


def mark_own_thread() -> None:
    """Declare that this thread runs the controller of an engine."""
    _own_threads.add(threading.get_ident())
    _awaited_threads.add(threading.get_ident())


def unmark_own_thread() -> None:
    """Take `mark_own_thread` back."""
    _own_threads.discard(threading.get_ident())
    _awaited_threads.discard(threading.get_ident())


@contextmanager
def awaited_thread() -> Iterator[None]:
    """This thread does something for everybody, so that nothing of the application's should hold it up needlessly."""
    _awaited_threads.add(threading.get_ident())
    try:
        yield
    finally:
        _awaited_threads.discard(threading.get_ident())


def is_awaited_thread() -> bool:
    """Whether this is such a thread, or runs the controller of an engine."""
    return threading.get_ident() in _awaited_threads


def mark_busy_thread() -> bool:
    """Declare that foreign code is about to run in this thread, if it is the engine's own: it must not block.

    Only for as long, because it costs all other threads something on each call.

    Returns:
        Whether it was declared, and so is to be taken back by `unmark_busy_thread`.
    """
    thread = threading.get_ident()
    if thread not in _own_threads or thread in _loop_threads:
        return False
    _loop_threads.add(thread)
    return True


def unmark_busy_thread() -> None:
    """Take `mark_busy_thread` back."""
    _loop_threads.discard(threading.get_ident())


def check_may_block(what: str) -> None:
    """Refuse to block the event loop that an async backend, or the engine itself, runs on.

    Raises:
        errors.WouldBlock: This thread runs such a loop.
    """
    if _loop_threads and threading.get_ident() in _loop_threads:
        check_not_own_thread(what)
        raise WouldBlock(
            f"{what} would block the event loop of this async backend: get the handle with "
            "get_handle(name, sync=False) and await it, or await the ref"
        )


def check_may_wait(what: str) -> None:
    """`check_may_block` and `warn_if_on_loop`, in one for what is done often."""
    if _loop_threads:
        check_may_block(what)
    events = sys.modules.get("asyncio.events")
    if events is not None and not _warned and events._get_running_loop() is not None:
        _warn(what)


def check_not_own_thread(what: str) -> None:
    """Refuse to wait for the engine in the thread that would have to do it.

    Raises:
        errors.WouldBlock: This is such a thread.
    """
    if threading.get_ident() in _own_threads:
        raise WouldBlock(
            f"{what} would block the engine's own thread, in which callbacks run and factories of log records: do it "
            "in another one"
        )


@contextmanager
def may_block_loop() -> Iterator[None]:
    """The loop of this thread has nothing else to do meanwhile."""
    thread = threading.get_ident()
    _calm_threads.add(thread)
    try:
        yield
    finally:
        _calm_threads.discard(thread)


def warn_if_on_loop(what: str) -> None:
    """Tell the application, once, that it blocks an asyncio loop of its own. Notebooks run one where all cells wait."""
    events = sys.modules.get("asyncio.events")
    if events is not None and not _warned and events._get_running_loop() is not None:
        _warn(what)


def _warn(what: str) -> None:
    global _warned
    if threading.get_ident() in _calm_threads:
        return
    _warned = True
    if any(notebook in sys.modules for notebook in _NOTEBOOKS):
        return
    import warnings

    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{what} blocks the event loop that runs in this thread, and with it all of its tasks: get the handle with "
        "get_handle(name, sync=False) and await its calls and refs (this is said once)",
        RuntimeWarning,
        stacklevel=level,
    )


def running_asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The asyncio loop that runs in this thread, if any."""
    events = sys.modules.get("asyncio.events")
    return None if events is None else events._get_running_loop()
