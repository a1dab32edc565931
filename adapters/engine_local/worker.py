"""A worker process, from the fork to its exit.

Runs in the child of the fork server: takes on the engine's directories and environment, ties its standard streams and
its logging to the engine, starts the control thread (`engine_wire.child`) and calls the entry function on the main
thread. It leaves by `os._exit`, after all that an interpreter does at its exit (`engine_local.leaving`).

When the engine dies, the kernel kills this process along with the fork server (Linux), and the control thread ends it
when its socket reads end-of-file, whatever the main thread is doing.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
from typing import TYPE_CHECKING, NoReturn

from engine.errors import BackendStartError
from engine.seam.control_messages import StartFailed
from engine.seam.log import Log
from engine.seam.serialization import pack_exception_briefly
from engine_wire import ChildHost
from engine_wire.logs import LogToEngine

from .connector import LocalConnector
from .leaving import disinherit, finish_interpreter
from .printing import take_streams
from .process import name_process

if TYPE_CHECKING:
    from .orders import Spawn

__all__ = ["run_worker"]

_log = Log("engine.local")


def run_worker(order: Spawn, descriptors: list[int]) -> NoReturn:
    """Be the worker.

    Args:
        order: What to be.
        descriptors: Control socket, stdout, stderr, listening sockets and, if the order lacks it, the payload.
    """
    control, stdout, stderr, *others = descriptors
    _redirect(stdout, stderr)
    take_streams()
    payload = order.payload if order.payload is not None else _read_all(others.pop())
    host = ChildHost(order.worker_id, control, others, order.address, LocalConnector(order.control_address))
    host.log_name = "engine.local"
    code = 1
    try:
        host.start()
        _settle(order, host)
        module, _, function = order.entry.partition(":")
        getattr(importlib.import_module(module), function)(host, payload)
        code = 0
    except BaseException as error:
        code = _fail(host, error)
    finally:
        _leave(code)


def _redirect(stdout: int, stderr: int) -> None:
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)


def _read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def _settle(order: Spawn, host: ChildHost) -> None:
    import faulthandler
    import gc

    name_process(order.name)
    disinherit()
    faulthandler.enable()
    sys.argv[:] = order.argv
    os.chdir(order.cwd or "/")
    for name, value in order.extra_environ.items():
        os.environ[name] = value
    for finder in sys.path_importer_cache.values():
        # Modules written since the fork server looked must be found.
        forget = getattr(finder, "invalidate_caches", None)
        if forget is not None:
            forget()
    sys.modules["__main__"] = types.ModuleType("__main__")  # not the fork server's
    root = logging.getLogger()
    root.handlers[:] = [LogToEngine(host)]
    root.setLevel(order.log_level)
    _draw_new_seeds()
    if order.threads is not None:
        _limit_threads(order.threads)
    gc.enable()


def _draw_new_seeds() -> None:
    """Keep replicas from all drawing the same numbers; `random` sees to itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()


def _limit_threads(threads: int) -> None:
    """Tell libraries that were preloaded, and so read their environment variables before this worker had its own."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if "numpy" in sys.modules:
        try:
            limits = importlib.import_module("threadpoolctl")
        except ImportError:
            return
        limits.threadpool_limits(threads)


def _fail(host: ChildHost, error: BaseException) -> int:
    """Tell what ended the entry function; returns the exit code."""
    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if not host.settled:
        if not isinstance(error, Exception):
            # As it is, it would end whoever re-raises it in the engine's process.
            wrapped = BackendStartError(f"starting it raised {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        host.tell(StartFailed(pack_exception_briefly(error)))
    elif not isinstance(error, SystemExit):
        _log.error("the worker ends because of an error", exc_info=error)
    return code


def _leave(code: int) -> NoReturn:
    try:
        finish_interpreter()
    finally:
        os._exit(code)
