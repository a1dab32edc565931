"""Logging from threads and loops that must go on, whatever handlers and filters do.

Those are the application's own code. What they raise would end the thread that happened to log: the one that runs the
controller, or the one that reads everybody's answers. So it goes where `logging` itself sends what a handler's ``emit``
raises: to ``sys.stderr``, unless `logging.raiseExceptions` is off.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

from .error_text import traceback_of
from .may_block import mark_busy_thread, unmark_busy_thread

__all__ = ["Log", "must_go_on"]

_FRAMES = 3  # between who logs and the logger


class Log:
    """A logger of `logging` whose methods do not raise.

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
        """See `logging.Logger.error`; returns whether nothing raised."""
        return self._log(logging.ERROR, message, args, exc_info=exc_info)

    def exception(self, message: str, *args: Any) -> None:
        """See `logging.Logger.exception`."""
        self._log(logging.ERROR, message, args, exc_info=True)

    def log(self, level: int, message: str, *args: Any, extra: dict[str, Any] | None = None) -> None:
        """See `logging.Logger.log`."""
        self._log(level, message, args, extra=extra)

    def _log(self, level: int, message: str, args: tuple[Any, ...], **options: Any) -> bool:
        marked = mark_busy_thread()
        try:
            self._logger.log(level, message, *args, stacklevel=_FRAMES, **options)
        except BaseException as error:
            if not must_go_on(error):
                raise
            _report(error)
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


def _report(error: BaseException) -> None:
    if logging.raiseExceptions and sys.stderr is not None:
        try:
            sys.stderr.write(f"--- Logging error ---\n{traceback_of(error)}")
        except Exception:
            pass  # as logging does: there is nobody left to tell
