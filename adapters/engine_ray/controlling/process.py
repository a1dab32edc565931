"""The process of a worker, looked at from outside: here if it is one of this machine, else by asking its node.

Only workers that have said nothing for a while are looked at. Belongs to the controller's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from engine.seam.adapter import Vitals
from engine.seam.log import Log
from engine_wire import SocketChannel, look_at, process_behind
from engine_wire.vitals import vitals_of

from ..working.bodies import Hello
from .asking import Asking

__all__ = ["Process", "process_of"]

_log = Log("engine.ray")


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
