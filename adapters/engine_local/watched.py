"""A worker as the engine's process sees it: its life, its control channel and its standard streams.

Only the controller's loop touches it. Whatever tells of its death comes here: its channel, its fork server, a timer
where one of them is late. All that it managed to say is delivered before its end is told, which is told once.
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

from engine.seam.control_messages import LogLine, Started
from engine_wire import ControlChannel
from engine_wire.vitals import vitals_of

from .launcher import Launcher
from .life import STUCK, Stage, describe_end
from .orders import Exited, Forked, ForkFailed
from .output import LineReader
from .process import kill_group

__all__ = ["WatchedWorker"]

_STUCK_AFTER_S = 5.0
"""A fork server that keeps an order waiting for longer is importing something that may never end."""
_KILL_PATIENCE_S = 0.5
"""One that is importing does not read the order to kill a worker, either. That need not wait."""
_EXIT_PATIENCE_S = 1.0
"""Between the end of a worker's control channel and its exit, or the other way round, are milliseconds."""


class WatchedWorker:
    """One worker, from before its fork to its exit.

    Attributes:
        pid: Its process, once its fork server has told, or it itself.

    Args:
        worker_id: Unique within the engine.
        launcher: Of the fork server that forks it.
        path: Of the socket it may open.
        said: Gets what it says (`engine.seam.adapter.AdapterEvents.worker_said`).
        ended: Told once, with a phrase for people, that it has ended.
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
        ended: Callable[[WatchedWorker, str], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.worker_id = worker_id
        self.launcher = launcher
        self.stage = Stage.ORDERED
        self.pid: int | None = None
        self._doomed = False  # the engine ends it
        self._ordered_at = loop.time()
        self._timer: asyncio.TimerHandle | None = None  # until what should follow is not waited for any longer
        self._path = path
        self._said = said
        self._ended = ended
        self._loop = loop
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
        self._channel = ControlChannel(ours, self._heard, self._lost, loop)

    def __repr__(self) -> str:
        return f"<WatchedWorker {self.worker_id} {self.stage.value} pid={self.pid} {self._channel}>"

    def tell(self, body: Any) -> None:
        """Send a control body; does nothing when the worker is gone."""
        self._channel.tell(body)

    # -- its life ----------------------------------------------------------------------------------------------------

    def doom(self) -> None:
        """The engine is about to end it, by ending its fork server; nothing happens if it is dying already."""
        if self.stage not in (Stage.ORPHANED, Stage.ENDED):
            self._doomed = True

    def kill(self) -> None:
        """End it at once; nothing happens if it is dying already.

        One that its fork server has not got round to for long is not waited for, and others are forked elsewhere.
        """
        if self.stage in (Stage.ORPHANED, Stage.ENDED):
            return
        self._doomed = True
        self.launcher.kill_worker(self.worker_id, self.pid)
        if self.stage is Stage.ORDERED:
            self._expect_within(self._ordered_at + _STUCK_AFTER_S - self._loop.time(), self._give_up)
        elif self.stage is Stage.RUNNING:
            self._expect_within(_KILL_PATIENCE_S, self._kill_here)

    def reported(self, report: Forked | ForkFailed | Exited) -> None:
        """Its fork server says what became of it."""
        if not isinstance(report, Forked):
            self._end(report)
            return
        self.pid = report.pid
        if self.stage is Stage.ORDERED:  # else its channel has ended before this was read
            self.stage = self.stage.to(Stage.RUNNING)

    def orphaned(self) -> None:
        """Its fork server is gone."""
        if self.stage in (Stage.SILENT, Stage.CUT_OFF):
            self._end()
        else:
            self.stage = self.stage.to(Stage.ORPHANED)
            self._expect_within(_EXIT_PATIENCE_S, self._end)

    @property
    def awaited(self) -> bool:
        """It is not known to have begun to live, and nobody wants it not to: another fork server may make it."""
        # The end of a fork server that has its order is the end of its control channel, too.
        return self.pid is None and not self._doomed and self.stage in (Stage.ORDERED, Stage.SILENT)

    def abandon(self) -> None:
        """Its fork server will not make it, or only later: then it is to find nobody. Nobody is told."""
        self.stage = self.stage.to(Stage.ENDED)
        self._release()

    def left_alone(self) -> None:
        """Its fork server takes no orders and tells nothing any more."""
        if self.stage is Stage.CUT_OFF:
            self.launcher.kill_worker(self.worker_id, self.pid)
            self._end()
        elif self._doomed:  # the order to kill it was not read, and never will be
            self.launcher.kill_worker(self.worker_id, self.pid)

    def _expect_within(self, patience_s: float, otherwise: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(patience_s, otherwise)

    def _give_up(self) -> None:
        if self.stage is Stage.ORDERED:
            self._end()
            self.launcher.retire(STUCK)

    def _kill_here(self) -> None:
        if self.stage is Stage.RUNNING and self.pid is not None:  # its channel stands: the number still is its own
            kill_group(self.pid)
            self._expect_within(_EXIT_PATIENCE_S, self._end_unheard)

    def _end_unheard(self) -> None:
        """Its fork server tells nothing, and if it was stopped in the fork, it holds the channel open, too."""
        if self.stage is Stage.RUNNING and self.pid is not None:
            vitals = vitals_of(self.pid)
            if vitals is None or vitals.ended:
                self._end()
            else:
                self._expect_within(_EXIT_PATIENCE_S, self._end_unheard)

    def _cut_off(self) -> None:
        self.stage = self.stage.to(Stage.CUT_OFF)
        self.launcher.kill_worker(self.worker_id, self.pid)
        if self.launcher.retired:
            self._end()

    def _end(self, report: ForkFailed | Exited | None = None) -> None:
        server = self.launcher.gone.result() if self.launcher.gone.done() else None
        reason = describe_end(self.stage, report, server, doomed=self._doomed, retired=self.launcher.retired)
        self.stage = self.stage.to(Stage.ENDED)
        self._channel.read_rest()
        self._release()
        if server is not None and self.pid is not None:
            kill_group(self.pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)  # it has become this process's child if that adopts orphans
        self._ended(self, reason)

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._stdout.finish()
        self._stderr.finish()
        self._channel.close()
        self._path.unlink(missing_ok=True)

    def _heard(self, body: Any) -> None:
        if isinstance(body, Started) and self.stage is Stage.ORDERED:  # its fork server was stopped in between
            self.pid = body.pid
            self.stage = self.stage.to(Stage.RUNNING)
        self._said(self.worker_id, body)

    def _lost(self, reason: str) -> None:
        """Its control channel has ended."""
        if self.stage is Stage.ORPHANED:
            self._end()
        elif self.stage is not Stage.ENDED:  # else this is the rest of what it said
            self.stage = self.stage.to(Stage.SILENT)
            self._expect_within(_EXIT_PATIENCE_S, self._cut_off)

    def _print(self, level: int, stream: str, line: str) -> None:
        self._said(self.worker_id, LogLine(level, stream, line))
