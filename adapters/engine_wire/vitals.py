"""What the machine knows of a process that says nothing itself (`engine.seam.adapter.SeesProcesses`).

Linux tells in ``/proc``, which takes some microseconds; elsewhere ``ps`` is asked, in a thread.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from engine.seam.adapter import Vitals

__all__ = ["look_at", "vitals_of"]

_STOPPED = "Tt"  # by a signal, by a debugger
_PS_PATIENCE_S = 5.0


async def look_at(pid: int) -> Vitals | None:
    """Look at a process of this machine; None if it is not there, or cannot be looked at."""
    return vitals_of(pid) if sys.platform == "linux" else await asyncio.to_thread(_asked_of_ps, pid)


def vitals_of(pid: int) -> Vitals | None:
    """As `look_at`, without waiting for anything; None where there is no ``/proc``."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return Vitals(fields[0] in _STOPPED, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    except (OSError, IndexError, ValueError):
        return None


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
        return Vitals(state[0] in _STOPPED, int(days or 0) * 86400 + seconds)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
