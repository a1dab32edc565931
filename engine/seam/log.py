"""Logging from threads and loops that must go on, whatever handlers and filters do.

Those are the application's own code, which may raise and may take long. What is logged by a thread that everybody waits
for, as the one that runs the controller and those that read everybody's answers (`engine.seam.may_block`), is
handed over to another one (`engine.seam.scribe`). Elsewhere it is handled at once, and what is raised goes where
`logging` itself sends what a handler's ``emit`` raises: to ``sys.stderr``, unless `logging.raiseExceptions` is off.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from .may_block import is_awaited_thread, mark_busy_thread, unmark_busy_thread
from .scribe import report, scribe

__all__ = ["Log", "must_go_on"]

_FRAMES = 3  # between who logs and the logger
_twins: dict[type[logging.Logger], type[logging.Logger]] = {}  # by class of loggers: see `_handing_over`


class Log:
    """A logger of `logging` whose methods do not raise, and do not block where everybody waits.

    Args:
        name: The logger's.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, *args: Any, exc_info: Any = None) -> None:
        """See `logging.Logger.debug`."""
        self._log(logging.DEBUG, message, args, exc_info=exc_info)

    def info(self, message: str, *args: Any) -> None:
        """See `logging.Logger.info`."""
        self._log(logging.INFO, message, args)

    def warning(self, message: str, *args: Any, exc_info: Any = None) -> None:
        """See `logging.Logger.warning`."""
        self._log(logging.WARNING, message, args, exc_info=exc_info)

    def error(self, message: str, *args: Any, exc_info: Any = None) -> bool:
        """See `logging.Logger.error`; returns whether nothing raised, as far as that is known already."""
        return self._log(logging.ERROR, message, args, exc_info=exc_info)

    def exception(self, message: str, *args: Any) -> None:
        """See `logging.Logger.exception`."""
        self._log(logging.ERROR, message, args, exc_info=True)

    def log(self, level: int, message: str, *args: Any, extra: dict[str, Any] | None = None) -> None:
        """See `logging.Logger.log`; for what workers say."""
        self._log(level, message, args, extra=extra)

    def _log(self, level: int, message: str, args: tuple[Any, ...], **options: Any) -> bool:
        marked = mark_busy_thread()
        try:
            logger = self._logger
            if is_awaited_thread():
                if not logger.isEnabledFor(level) or not scribe().has_room(line="extra" in options):
                    return True
                logger = _handing_over(logger)
            logger.log(level, message, *args, stacklevel=_FRAMES, **options)
        except BaseException as error:
            if not must_go_on(error):
                raise
            report(error)
            return False
        else:
            return True
        finally:
            if marked:
                unmark_busy_thread()


def must_go_on(error: BaseException) -> bool:
    """Whether the thread that ran foreign code is to go on although that raised this.

    Always, but for the main thread: what is no `Exception` may be there because of a signal, and means the program.
    """
    return isinstance(error, Exception) or threading.current_thread() is not threading.main_thread()


def _handing_over(logger: logging.Logger) -> logging.Logger:
    """The same logger, of the application's own class perhaps: it makes its records, but handles none."""
    kind = type(logger)
    if kind not in _twins:
        _twins[kind] = type(kind.__name__, (kind,), {"handle": _handle})
    twin: logging.Logger = object.__new__(_twins[kind])
    twin.__dict__ = logger.__dict__
    return twin


def _handle(self: logging.Logger, record: logging.LogRecord) -> None:
    scribe().put(record)
