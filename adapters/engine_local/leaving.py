"""What an interpreter does at its exit, for a worker: it was forked, and leaves by `os._exit`.

A worker must do at its end what any interpreter does, and nothing that is the fork server's to do. Both have the same
modules, some of which were imported, and registered what is to be done at the exit, before the worker was forked.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from engine.seam.log import Log

from .process import flush_c_streams

__all__ = ["disinherit", "finish_interpreter"]

_log = Log("engine.local")
_PATIENCE_S = 1.0
"""After which a worker says which threads it waits for."""


def disinherit() -> None:
    """Drop what the fork server's modules are to do at its exit; what they do at everybody's, keep."""
    atexit._clear()
    finalize: Any = weakref.finalize
    for info in getattr(finalize, "_registry", {}).values():
        info.atexit = False  # it tidies up after an object of the fork server
    finalize._registered_with_atexit = False  # to be done anew by the first one that is made here
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        # As in any process that multiprocessing forks; but there the queues' threads and the children end otherwise.
        process: Any = sys.modules["multiprocessing.process"]
        util._finalizer_registry.clear()
        process._children = set()
        process._process_counter = itertools.count(1)
        atexit.register(util._exit_function)


def finish_interpreter() -> None:
    """End threads, do what was registered for the exit, and write out what is buffered: in the interpreter's order.

    It takes as long as user code makes it take; the engine kills a worker that stays too long.
    """
    _tell_what_is_waited_for()
    steps: list[Callable[[], object]] = [
        threading._shutdown,  # type: ignore[attr-defined]  # ends the pools of concurrent.futures, and waits for threads that are no daemons
        atexit._run_exitfuncs,
        logging.shutdown,
        sys.stdout.flush,
        sys.stderr.flush,
        flush_c_streams,
    ]
    for step in steps:
        try:
            step()
        except BaseException:
            sys.excepthook(*sys.exc_info())


def _tell_what_is_waited_for() -> None:
    """Have it said in the log if threads keep this process for long."""
    waited_for = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    if waited_for:
        threading.Thread(target=_watch, args=(waited_for,), name="engine-leaving", daemon=True).start()


def _watch(threads: list[threading.Thread]) -> None:
    threading.Event().wait(_PATIENCE_S)
    left = [one.name for one in threads if one.is_alive()]
    if left:
        _log.warning("the worker waits for threads that are no daemons: %s", ", ".join(left))
