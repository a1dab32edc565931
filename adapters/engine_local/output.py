"""Turns a standard stream of a worker or a fork server into lines.

Reads the engine's end of a pipe on the controller's loop; whoever writes faster than that waits. A line that
grows too long is cut; what is left without a newline is passed on at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

__all__ = ["LineReader"]

_READ_SIZE = 1 << 16
_MAX_LINE_BYTES = 1 << 16
_MAX_DRAINED_BYTES = 1 << 22
"""More than any pipe holds, unless a stranger who inherited the other end keeps writing."""


class LineReader:
    """Reads one pipe until it is closed.

    Args:
        descriptor: The reading end; owned from now on.
        on_line: Gets each line without its newline, on the loop.
        loop: Reads the pipe.
    """

    def __init__(self, descriptor: int, on_line: Callable[[str], None], loop: asyncio.AbstractEventLoop) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._on_line = on_line
        self._loop = loop
        self._tail = b""
        self._closed = False
        loop.add_reader(descriptor, self._read)

    def finish(self) -> None:
        """Pass on what the pipe still holds, and close it (idempotent)."""
        drained = 0
        while not self._closed and drained < _MAX_DRAINED_BYTES and (count := self._read()):
            drained += count
        self._close()

    def _read(self) -> int:
        try:
            data = os.read(self._descriptor, _READ_SIZE)
        except BlockingIOError:
            return 0
        if not data:
            self._close()
            return 0
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            self._say(line)
        while len(self._tail) >= _MAX_LINE_BYTES:
            self._say(self._tail[:_MAX_LINE_BYTES])
            self._tail = self._tail[_MAX_LINE_BYTES:]
        return len(data)

    def _say(self, line: bytes) -> None:
        self._on_line(line.removesuffix(b"\r").decode(errors="replace"))

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        if self._tail:
            self._say(self._tail)
            self._tail = b""
