"""What processes of the local adapter ask of the operating system, and how their ends are told to people.

Needs nothing but ctypes, so that a new process can tie its life to its parent's before it imports anything heavy.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

__all__ = [
    "adopt_orphans",
    "describe_exit",
    "die_with_parent",
    "end_group",
    "flush_c_streams",
    "kill_group",
    "name_process",
    "short_name",
]

_SIGKILL = 9
_SIGTERM = 15
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_NAME_SIZE = 15  # bytes that the kernel keeps
_TIDYING_S = 0.2
_LOOK_S = 0.002


def die_with_parent(parent: int, by: int = _SIGKILL) -> None:
    """Have the kernel end this process as soon as its parent dies (Linux); end now if it already has.

    The kernel watches the parent's *thread* that started this process: it must be one that lives as long as the parent.
    Elsewhere only the end-of-file on the sockets from the parent tells, which the process reads while it is idle.

    Args:
        parent: Process id the parent is known to have.
        by: The signal that it is to get.
    """
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Be the parent of all that descends from this process and loses its own (Linux), instead of the init process."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_group(pid: int) -> None:
    """End a worker and what it has started, or what is left of that if the worker is gone."""
    try:
        os.killpg(pid, _SIGKILL)
    except OSError:
        pass  # nobody is left, or all have taken on another user's rights


def end_group(pid: int) -> None:
    """End what is left of a worker that is gone; it gets a moment to tidy up, and is waited for.

    The resource tracker of `multiprocessing`, for one, removes the shared memory that the worker had. It takes no
    notice of the first signal, and ends by itself.
    """
    try:
        os.killpg(pid, _SIGTERM)
        until = time.monotonic() + _TIDYING_S
        while time.monotonic() < until:
            with contextlib.suppress(ChildProcessError):  # they are children of this process if it adopts orphans
                os.waitpid(-pid, os.WNOHANG)
            os.killpg(pid, 0)
            time.sleep(_LOOK_S)
    except OSError:
        return  # nobody is left, or all have taken on another user's rights
    kill_group(pid)


def name_process(name: str) -> None:
    """Show ``name`` in ``ps`` and ``top``: 15 bytes of it (Linux), and where `setproctitle` was imported, all of it."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_NAME, short_name(name), 0, 0, 0)
    if "setproctitle" in sys.modules:
        sys.modules["setproctitle"].setproctitle(f"engine: {name}")


def short_name(name: str) -> bytes:
    """Of a name like ``replica.TAG.NUMBER`` the 15 bytes that best tell it from others: no kind, but the number."""
    short = name.encode()
    if len(short) > _NAME_SIZE:
        short = short.partition(b".")[2] or short
    if len(short) > _NAME_SIZE:
        head, dot, number = short.rpartition(b".")
        tail = dot + number if head and len(number) < _NAME_SIZE // 2 else b""
        short = short[: _NAME_SIZE - len(tail)].decode(errors="ignore").encode() + tail  # not half a character
    return short


def flush_c_streams() -> None:
    """Write out what C code printed and its library still holds: `os._exit` would drop it."""
    _libc().fflush(None)


def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None)


def describe_exit(status: int) -> str:
    """Say in words for people what a wait status means."""
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "exited"
    if code > 0:
        return f"exited with code {code}"
    return f"was killed by {_signal_name(-code)}{_LIKELY_CAUSES.get(-code, '')}"


def _signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_LIKELY_CAUSES = {
    4: " (an illegal instruction in native code)",
    6: " (native code gave up; see its standard error)",
    7: " (a memory error in native code, or a full /dev/shm)",
    8: " (an arithmetic error in native code)",
    _SIGKILL: " (out of memory, or someone killed it)",
    11: " (a crash in native code)",
    15: " (someone asked it to end)",
}
