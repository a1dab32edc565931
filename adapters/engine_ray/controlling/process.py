"""The process of a worker, looked at from outside: here if it is one of this machine, else by a task on its node.

A task is what Ray has to run something on another node. It takes milliseconds, or a second if a process has to be
started for it, and is only sent for workers that have said nothing for a while. Belongs to the controller's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time

from engine.seam.adapter import Vitals
from engine.seam.log import Log
from engine_wire import SocketChannel, look_at, process_behind
from engine_wire.vitals import vitals_of

from ..link.connection import check_connected
from ..working.bodies import Hello

__all__ = ["Asking", "Process", "process_of"]

_log = Log("engine.ray")
_TASK_PATIENCE_S = 8.0
_TASK_LOOK_S = 0.2


class Asking:
    """Asks other nodes about processes, until it ends: Ray ends a program that uses it after it was disconnected."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._asked: set[asyncio.Future[Vitals | None]] = set()

    async def ask(self, node_id: str, pid: int, *, kill: bool = False) -> Vitals | None:
        """Look at a process there, and end it if that is asked for and it is stopped; None if nothing can be learnt."""
        if self._over.is_set():
            return None
        asked = asyncio.get_running_loop().run_in_executor(None, _ask_node, node_id, pid, kill, self._over)
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)
        return await asyncio.shield(asked)  # whoever is cancelled ends no thread

    async def end(self) -> None:
        """Ask no more; returns once nobody does (idempotent)."""
        self._over.set()
        if self._asked:
            await asyncio.wait(self._asked, timeout=_TASK_PATIENCE_S)


class Process:
    """One process of the cluster.

    Args:
        asking: Where there are other nodes to ask.
        node_id: Where it runs.
        pid: Its number there.
        here: Its number on this machine, if that is where it runs.
    """

    def __init__(self, asking: Asking, node_id: str, pid: int, here: int | None) -> None:
        self._asking = asking
        self._node_id = node_id
        self._pid = pid
        self._here = here
        self._stopped = False  # as of the last look
        self._killing: asyncio.Task[None] | None = None

    async def vitals(self) -> Vitals | None:
        """Look at it; None if nothing can be learnt of it."""
        if self._here is not None:
            vitals = await look_at(self._here)
        else:
            vitals = await self._asking.ask(self._node_id, self._pid)
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
            self._killing = asyncio.get_running_loop().create_task(self._kill_there())

    async def _kill_there(self) -> None:
        try:
            await self._asking.ask(self._node_id, self._pid, kill=True)
        except Exception as error:
            _log.info("process %d of node %s is left to Ray to end: %r", self._pid, self._node_id, error)


def process_of(channel: SocketChannel, hello: Hello, asking: Asking) -> Process | None:
    """That of a worker, by its control channel and its first word there."""
    here = process_behind(channel.sock)
    return Process(asking, hello.node_id, hello.pid, here) if here or hello.pid else None


def _ask_node(node_id: str, pid: int, kill: bool, over: threading.Event) -> Vitals | None:
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
    until = time.monotonic() + _TASK_PATIENCE_S
    while not ray.wait([ref], timeout=_TASK_LOOK_S)[0]:
        if over.is_set() or time.monotonic() > until:
            ray.cancel(ref)
            return None
    seen = ray.get(ref)
    return None if seen is None else Vitals(*seen)
