"""What the machine knows of a process that says nothing itself (`engine.seam.adapter.SeesProcesses`).

Linux tells in ``/proc``, which takes some microseconds; elsewhere ``ps`` is asked, in a thread.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from engine.seam.adapter import Vitals

__all__ = ["StopWatch", "look_at", "vitals_of"]

LOOK_EVERY_S = 0.8
STOPPED_S = 4.0
"""For so long a process may be stopped: see `engine.control.pulse`."""

_STOPPED = "Tt"  # by a signal, by a debugger
_ENDED = "Z"
_HELD_UP = "RDU"  # wants a CPU, or has one; waits for a disk, as Linux and as others have it
_PS_PATIENCE_S = 5.0


async def look_at(pid: int) -> Vitals | None:
    """Look at a process of this machine; None if it is not there, or cannot be looked at."""
    return vitals_of(pid, threads=True) if sys.platform == "linux" else await asyncio.to_thread(_asked_of_ps, pid)


def vitals_of(pid: int, *, threads: bool = False) -> Vitals | None:
    """As `look_at`, without waiting for anything; None where there is no ``/proc``.

    Args:
        pid: The process.
        threads: Look at each of its threads, too, whether it is held up.
    """
    try:
        fields = _stat(Path(f"/proc/{pid}/stat"))
        held_up = threads and any(_stat(one / "stat")[0] in _HELD_UP for one in Path(f"/proc/{pid}/task").iterdir())
        cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return Vitals(fields[0] in _STOPPED, cpu_s, held_up, fields[0] in _ENDED)
    except (OSError, IndexError, ValueError):
        return None


def _stat(path: Path) -> list[str]:
    return path.read_text(errors="replace").rpartition(")")[2].split()


class StopWatch:
    """Looks again and again whether a process of this machine is stopped, which takes microseconds (on Linux).

    For processes that cannot be asked whether they are there. Only time counts in which this process runs itself.

    Args:
        pid: Of a process that is not reaped before `end`, or of one whose end is not missed.
        found: Called when it has been stopped for longer than a moment, and then again.
        loop: On which that happens.
    """

    def __init__(self, pid: int, found: Callable[[], object], loop: asyncio.AbstractEventLoop) -> None:
        self._pid = pid
        self._found = found
        self._loop = loop
        self._looked_at = loop.time()
        self.stopped_s = 0.0
        self._timer = loop.call_later(LOOK_EVERY_S, self._look)

    def end(self) -> None:
        """Look no more (idempotent)."""
        self._timer.cancel()

    def is_stopped(self) -> bool:
        """Whether it is, now, as far as can be seen."""
        vitals = vitals_of(self._pid)
        return vitals is not None and vitals.stopped

    def _look(self) -> None:
        now = self._loop.time()
        passed_s, self._looked_at = min(now - self._looked_at, LOOK_EVERY_S), now
        self._timer = self._loop.call_later(LOOK_EVERY_S, self._look)
        self.stopped_s = self.stopped_s + passed_s if self.is_stopped() else 0.0
        if self.stopped_s >= STOPPED_S:
            self._found()


def _asked_of_ps(pid: int) -> Vitals | None:
    try:
        told = subprocess.run(
            ["ps", "-o", "state=,time=", "-p", str(pid)], capture_output=True, text=True, timeout=_PS_PATIENCE_S
        )
        state, time = told.stdout.split()
        days, _, rest = time.rpartition("-")
        seconds = 0.0
        for part in rest.split(":"):  # of [[days-]hours:]minutes:seconds
            seconds = seconds * 60 + float(part.replace(",", "."))
        cpu_s = int(days or 0) * 86400 + seconds
        return Vitals(state[0] in _STOPPED, cpu_s, state[0] in _HELD_UP, state[0] in _ENDED)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
