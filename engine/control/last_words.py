"""The last lines that a worker wrote to its standard error: they often say why it ended."""

from __future__ import annotations

from collections import deque

__all__ = ["LastWords"]

_MOST_LINES = 20
_MOST_CHARACTERS = 4096


class LastWords:
    """Keeps the last lines, so many and so long together. Of a longer one the end is kept, where its sense is."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._size = 0

    def add(self, line: str) -> None:
        """Another line, without its newline."""
        line = line[-_MOST_CHARACTERS:]
        self._lines.append(line)
        self._size += len(line)
        while len(self._lines) > _MOST_LINES or self._size > _MOST_CHARACTERS:
            self._size -= len(self._lines.popleft())

    def told(self) -> str:
        """The end of a sentence about the worker's end; empty if there are none."""
        return "; its last words:\n" + "\n".join(self._lines) if self._lines else ""
