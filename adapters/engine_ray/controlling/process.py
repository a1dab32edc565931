"""The process of a worker, looked at from outside: here if it is one of this machine, else by a task on its node.

A task is what Ray has to run something on another node. It takes milliseconds, or a second if a process has to be
started for it, and is only sent for workers that have said nothing for a while. Belongs to the controller's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Any

from engine.seam.adapter import Vitals
from engine.seam.log import Log
from engine_wire import SocketChannel, look_at, process_behind
from engine_wire.vitals import vitals_of

from ..link.connection import check_connected
from ..working.bodies import Hello

__all__ = ["Process", "process_of"]

_log = Log("engine.ray")
_TASK_PATIENCE_S = 8.0


class Process:
    """One process of the cluster.

    Args:
        node_id: Where it runs.
        pid: Its number there.
        here: Its number on this machine, if that is where it runs.
    """

    def __init__(self, node_id: str, pid: int, here: int | None) -> None:
        self._node_id = node_id
        self._pid = pid
        self._here = here
        self._stopped = False  # as of the last look
        self._killing: asyncio.Future[Any] | None = None

    async def vitals(self) -> Vitals | None:
        """Look at it; None if nothing can be learnt of it."""
        if self._here is not None:
            vitals = await look_at(self._here)
        else:
            vitals = await asyncio.to_thread(_ask_node, self._node_id, self._pid, False)
        self._stopped = vitals is not None and vitals.stopped
        return vitals

    def kill_if_stopped(self) -> None:
        """End it if it is stopped: Ray asks it to end, and takes 5 s to find that vain.

        On another node, the last look tells whether it is.
        """
        if self._here is not None:
            vitals = vitals_of(self._here)
            if vitals is not None and vitals.stopped:
                with contextlib.suppress(OSError):
                    os.kill(self._here, signal.SIGKILL)
        elif self._stopped and self._killing is None:
            self._killing = asyncio.get_running_loop().run_in_executor(None, _kill_on_node, self._node_id, self._pid)


def process_of(channel: SocketChannel, hello: Hello) -> Process | None:
    """That of a worker, by its control channel and its first word there."""
    here = process_behind(channel.sock)
    return Process(hello.node_id, hello.pid, here) if here or hello.pid else None


def _kill_on_node(node_id: str, pid: int) -> None:
    try:
        _ask_node(node_id, pid, True)
    except Exception as error:
        _log.info("process %d of node %s is left to Ray to end: %r", pid, node_id, error)


def _ask_node(node_id: str, pid: int, kill: bool) -> Vitals | None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(
        pid: int, kill: bool
    ) -> tuple[bool, float] | None:  # pickled by value: that node need not have this module
        import os

        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            if kill and fields[0] in "Tt":
                os.kill(pid, 9)
        except OSError:
            return None
        return fields[0] in "Tt", (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    check_connected()
    task = ray.remote(look).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )
    ref = task.remote(pid, kill)
    try:
        seen = ray.get(ref, timeout=_TASK_PATIENCE_S)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(ref)
        return None
    return None if seen is None else Vitals(*seen)
