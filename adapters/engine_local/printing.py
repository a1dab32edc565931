"""The standard streams of a worker, as its Python code sees them: they never keep it waiting for the engine.

What C code and child processes write to the descriptors themselves goes into the same pipe, and waits if that is full.
"""

from __future__ import annotations

import io
import os
import select
import sys
import threading
from typing import Any, TextIO

from engine_wire.outlet import Outlet

__all__ = ["take_streams"]


class _Pipe(io.RawIOBase):
    """Writes to a standard stream's descriptor, in parts that its pipe takes whole."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._outlet = Outlet()
        self._lock = threading.RLock()  # a signal handler may print, too
        self._torn = False  # what was written last is the beginning of a line
        self._dropped = 0  # lines
        os.register_at_fork(after_in_child=self._forked)

    def fileno(self) -> int:
        """See `io.RawIOBase.fileno`."""
        return self._descriptor

    def isatty(self) -> bool:
        """Never."""
        return False

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """See `io.RawIOBase.write`: takes all there is, for it to be read or to be dropped."""
        view = memoryview(data).cast("B")
        with self._lock:
            for start in range(0, len(view), select.PIPE_BUF):
                self.flush()
                if self._dropped or not self._outlet.takes(self._descriptor):
                    self._dropped += max(1, bytes(view[start:]).count(b"\n"))
                    break
                part = view[start : start + select.PIPE_BUF]
                os.write(self._descriptor, part)
                self._torn = part[-1] != ord("\n")
        return len(view)

    def flush(self) -> None:
        """See `io.RawIOBase.flush`."""
        with self._lock:
            if self._dropped and self._outlet.takes(self._descriptor):
                self._tell_dropped()

    def _forked(self) -> None:
        # A thread that there is not in this process may have been printing.
        self._lock = threading.RLock()
        self._dropped = 0  # of which the other process tells

    def _tell_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        what = f"[{dropped} lines were dropped here, because the engine's process did not read them]\n"
        os.write(self._descriptor, ("\n" * self._torn + what).encode())


def take_streams() -> None:
    """Have `sys.stdout` and `sys.stderr` write in this way. Those that were there stay open for whoever holds them."""
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout, sys.stderr = _stream(sys.stdout), _stream(sys.stderr)


def _stream(before: TextIO) -> TextIO:
    return io.TextIOWrapper(
        _Pipe(before.fileno()),  # type: ignore[type-var]
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=True,
    )
