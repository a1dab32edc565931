"""The logging of a worker, sent to the engine's process."""

from __future__ import annotations

import logging
import sys

from engine.seam.control_messages import LogLine
from engine.seam.error_text import shortened

from .worker_host import WireWorkerHost

__all__ = ["LogToEngine"]

_LONGEST_LINE = 1 << 20


class LogToEngine(logging.Handler):
    """Sends log records to the engine's process, where they appear on the worker's logger."""

    def __init__(self, host: WireWorkerHost) -> None:
        super().__init__()
        self._host = host

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        try:
            text = shortened(self.format(record), _LONGEST_LINE)
            if self._host.is_copy:
                sys.stderr.write(f"{record.name}: {text}\n")
            else:
                self._host.say(LogLine(record.levelno, record.name, text))
        except Exception:
            self.handleError(record)
