"""What a worker prints: passed on to the engine line by line, and to Ray's own log files as ever."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["LineWriter"]

_MAX_LINE = 1 << 16  # characters; a longer line is cut


class LineWriter(io.TextIOBase):
    """Stands in for a standard stream of the worker; any thread may write.

    Args:
        stream: The stream itself.
        on_line: Gets each line without its newline.
    """

    def __init__(self, stream: Any, on_line: Callable[[str], None]) -> None:
        super().__init__()
        self._stream = stream
        self._on_line = on_line
        self._lock = threading.RLock()  # guards `_tail`; a signal handler may print, too
        self._tail = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream itself."""
        return str(getattr(self._stream, "encoding", "utf-8"))

    def fileno(self) -> int:
        """Of the stream itself: what C code prints goes there only."""
        number: int = self._stream.fileno()
        return number

    def isatty(self) -> bool:
        """Never."""
        return False

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`."""
        self._stream.write(text)
        with self._lock:
            *lines, tail = (self._tail + text).split("\n")
            if len(tail) > _MAX_LINE:
                lines.append(tail)
                tail = ""
            self._tail = tail
        for line in lines:
            self._on_line(line.removesuffix("\r"))
        return len(text)

    def flush(self) -> None:
        """See `io.TextIOBase.flush`; also called when this is collected, and the stream perhaps closed already."""
        if not self._stream.closed:
            self._stream.flush()

    def finish(self) -> None:
        """Pass on a last line that has no newline."""
        with self._lock:
            tail, self._tail = self._tail, ""
        if tail:
            self._on_line(tail)
