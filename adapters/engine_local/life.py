"""The stages of a worker's life as the engine's process sees it, and why it ended. Pure.

Two things tell of a worker's death: its control channel ends, and its fork server reports its exit. Either may come
first, milliseconds before the other. If the fork server is dead or stuck, its report never comes.
"""

from __future__ import annotations

import enum
import os
import signal

from .orders import Exited, ForkFailed
from .process import describe_exit

__all__ = ["STUCK", "Stage", "describe_end"]

STUCK = "is stuck in an import"
"""The fork server: it takes no orders."""


class Stage(enum.Enum):
    """The stages of a worker."""

    ORDERED = "ordered"  # its fork server was told
    RUNNING = "running"  # its fork server says so
    SILENT = "silent"  # its control channel has ended: its exit should follow
    CUT_OFF = "cut off"  # that did not: the engine kills it, because nobody can speak with it any more
    ORPHANED = "orphaned"  # its fork server is gone, and the kernel kills it: the end of its control channel follows
    ENDED = "ended"

    def to(self, stage: Stage) -> Stage:
        """Return the next stage.

        Raises:
            RuntimeError: No worker can go from this stage to that one.
        """
        if stage not in _MOVES[self]:
            raise RuntimeError(f"a worker cannot go from {self.value} to {stage.value}")
        return stage


_MOVES = {
    Stage.ORDERED: {Stage.RUNNING, Stage.SILENT, Stage.ORPHANED, Stage.ENDED},
    Stage.RUNNING: {Stage.SILENT, Stage.ORPHANED, Stage.ENDED},
    Stage.SILENT: {Stage.CUT_OFF, Stage.ENDED},
    Stage.CUT_OFF: {Stage.ENDED},
    Stage.ORPHANED: {Stage.ENDED},
    Stage.ENDED: set[Stage](),
}


def describe_end(
    last: Stage, report: Exited | ForkFailed | None, server: str | None, *, doomed: bool, retired: str = ""
) -> str:
    """Say in words for people why a worker ended.

    Args:
        last: Its last stage before that.
        report: What its fork server said of its end; None if that is dead or stuck.
        server: How its fork server ended, if it did.
        doomed: The engine was ending it.
        retired: What keeps its fork server from saying anything, if something does.
    """
    if isinstance(report, ForkFailed):
        return report.reason
    if report is not None and os.waitstatus_to_exitcode(report.status) != -signal.SIGKILL:
        return describe_exit(report.status)
    if report is None and server is None:
        if last is Stage.ORDERED:
            return "was ended before it started: the import of a module took too long"
        return f"is gone; its fork server, which could say why, {retired or STUCK}"
    if doomed:
        return "was killed by the engine"
    if report is None:
        return f"ended with its fork server, which {server}"
    if last is Stage.CUT_OFF:
        return "was killed by the engine because it had closed its control channel"
    return describe_exit(report.status)
