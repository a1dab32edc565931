"""A worker as an actor: `RayWorker.run` is the worker's whole life.

It runs on the main thread of the actor's process, and so does user code. The actor is called once and never again: what
the controller has to say comes by channel, so that it is heard while user code runs. When the worker is done, it leaves
by Ray's own way out, which runs what user code registered with `atexit`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from typing import Any

from engine.seam.control_messages import LogLine, StartFailed
from engine.seam.log import Log
from engine.seam.serialization import pack_exception_briefly
from engine.seam.workplace import enter_worker
from engine_wire.logs import LogToEngine

from ..link.surroundings import extend_path
from .host import RayHost
from .order import Order
from .output import LineWriter

__all__ = ["RayWorker"]

_log = Log("engine.ray")


class RayWorker:
    """The actor."""

    def run(self, order: tuple[Any, ...]) -> None:
        """Be a worker until it is done; does not return.

        Args:
            order: An `Order`.
        """
        import ray

        _live(Order(*order))
        ray.actor.exit_actor()


def _live(order: Order) -> None:
    enter_worker()
    host = RayHost(order)
    _tell_exits(host)
    host.start()
    streams = _settle(order, host)
    code = 0
    try:
        module, _, function = order.entry.partition(":")
        getattr(importlib.import_module(module), function)(host, order.payload)
    except Exception as error:
        code = 1
        if host.settled:
            _log.error("the worker ends because of an error", exc_info=error)
        else:
            host.tell(StartFailed(pack_exception_briefly(error)))
    finally:
        for stream in streams:
            stream.finish()
        host.leave(code)


def _tell_exits(host: RayHost) -> None:
    """Let the controller know with which code user code ends the process: Ray sees only that it is gone."""
    leave = os._exit

    def exit_and_tell(status: int) -> None:
        host.leave(status)
        leave(status)

    os._exit = exit_and_tell  # type: ignore[assignment]


def _settle(order: Order, host: RayHost) -> list[LineWriter]:
    """Take on what the application's process has, and tie logging and standard streams to the engine."""
    paths, cwd, argv, log_level = order.surroundings
    sys.argv[:] = argv
    extend_path(paths)
    if cwd is not None:
        with contextlib.suppress(OSError):  # this node has no such directory
            os.chdir(cwd)
    out = LineWriter(sys.stdout, lambda line: host.say(LogLine(logging.INFO, "stdout", line)))
    err = LineWriter(sys.stderr, lambda line: host.say(LogLine(logging.WARNING, "stderr", line)))
    sys.stdout, sys.stderr = out, err
    root = logging.getLogger()
    root.handlers[:] = [LogToEngine(host)]
    root.setLevel(log_level)
    return [out, err]
