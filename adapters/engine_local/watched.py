"""A started worker as the engine's process sees it: control channel, standard streams, and how it is to end.

Only the controller's loop touches it. `WatchedWorker.finish` delivers everything the worker managed to say, so that the
report of its exit can be the last word about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.seam.adapter import Channel, ChannelClosed
from engine.seam.control_messages import LogLine
from engine.seam.messages import Control, Message
from engine_wire import LoopDriver, SocketChannel

from .launcher import Launcher
from .output import LineReader

__all__ = ["WatchedWorker"]


class WatchedWorker:
    """One worker, from before its fork to its exit.

    Args:
        worker_id: Unique within the engine.
        launcher: Of the fork server that forks it.
        path: Of the socket it may open.
        said: Gets what it says (`engine.seam.adapter.AdapterEvents.worker_said`).
        lost: Told when its control channel has ended.
        loop: Runs all this.

    Raises:
        OSError: There are no descriptors left; nothing is kept open.
    """

    def __init__(
        self,
        worker_id: str,
        launcher: Launcher,
        path: Path,
        said: Callable[[str, Any], None],
        lost: Callable[[WatchedWorker], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.worker_id = worker_id
        self.launcher = launcher
        self.path = path
        self.started_at = loop.time()
        self.pid: int | None = None
        self.killed = False  # by the engine
        self.cut_off = False  # killed by the engine because its channel had ended
        self.last_words: str | None = None  # the reason of its exit, once it is known but its channel is still open
        self.deadline: asyncio.TimerHandle | None = None
        self._said = said
        self._lost = lost
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            undo.callback(theirs.close)
            pipes = []
            for _ in range(2):
                pipe = os.pipe()
                pipes.append(pipe)
                undo.callback(os.close, pipe[0])
                undo.callback(os.close, pipe[1])
            undo.pop_all()
        # The worker's ends. Whoever sends them closes them.
        self.descriptors = [theirs.detach(), pipes[0][1], pipes[1][1]]
        self._stdout = LineReader(pipes[0][0], lambda line: self._print(logging.INFO, "stdout", line), loop)
        self._stderr = LineReader(pipes[1][0], lambda line: self._print(logging.WARNING, "stderr", line), loop)
        self._channel = SocketChannel(ours, self, LoopDriver(loop), greet=False)
        self._channel.watch()

    def __repr__(self) -> str:
        return f"<WatchedWorker {self.worker_id} pid={self.pid} killed={self.killed} {self._channel}>"

    @property
    def connected(self) -> bool:
        """Whether its control channel is open."""
        return not self._channel.closed

    def tell(self, body: Any) -> None:
        """Send a control body; does nothing when the worker is gone."""
        with contextlib.suppress(ChannelClosed):
            self._channel.send(Control(body))

    def finish(self) -> None:
        """Deliver the rest of what it said and release everything."""
        if self.deadline is not None:
            self.deadline.cancel()
        self._channel.read_rest()
        self._stdout.finish()
        self._stderr.finish()
        self._channel.close()
        self.path.unlink(missing_ok=True)

    # -- engine.seam.adapter.ChannelListener -------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.adapter.ChannelListener.received`."""
        if isinstance(message, Control):
            self._said(self.worker_id, message.body)

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.adapter.ChannelListener.lost`."""
        self._lost(self)

    def _print(self, level: int, stream: str, line: str) -> None:
        self._said(self.worker_id, LogLine(level, stream, line))
