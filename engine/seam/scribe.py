"""Hands log records of the engine's own threads to the application's handlers, on a thread of its own.

Handlers may take long, or wait for ever: for a disk, a network, a lock. The thread that runs the controller, and those
that read everybody's answers, must not wait for them. So what is logged there goes into a queue that never makes anyone
wait: what finds no room is dropped, and a line tells how much that was as soon as the handlers are done with something.
Lines of replicas get less room, so that they cannot keep out what the engine itself has to say.

There is one scribe for each process, and its thread lives from the first record until nothing has come for a while, or
until `flush`, when the last one is out. A process that is forked off has a scribe of its own, with an empty queue.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from .error_text import traceback_of

__all__ = ["Scribe", "report", "scribe"]

_MOST_RECORDS = 10_000
_MOST_CHARACTERS = 16 * 1024 * 1024
_SHARE_OF_LINES = 0.9
_IDLE_S = 1.0
_TELL_EVERY_S = 1.0
_logger = logging.getLogger("engine.log")


class Scribe:
    """A bounded queue of records, and the thread that empties it."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[logging.LogRecord, int] | SimpleQueue[bool]] = SimpleQueue()
        # Guards the rest; what runs under it is nobody's else. A finalizer may log there, in the same thread.
        self._lock = threading.RLock()
        self._held = 0  # records in the queue, or being handled
        self._characters = 0
        self._dropped = 0
        self._told_at = 0.0
        self._thread: threading.Thread | None = None

    def has_room(self, *, line: bool) -> bool:
        """Whether another record would be taken; if not, it is counted as dropped.

        Args:
            line: It comes from a worker.
        """
        share = _SHARE_OF_LINES if line else 1.0
        if self._held < share * _MOST_RECORDS and self._characters < share * _MOST_CHARACTERS:
            return True
        with self._lock:
            self._dropped += 1
        return False

    def put(self, record: logging.LogRecord) -> None:
        """Have a record handled, soon. Does not block."""
        size = len(str(record.msg)) + sum(len(one) for one in record.args or () if isinstance(one, str))
        with self._lock:
            self._held += 1
            self._characters += size
            self._queue.put((record, size))
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="engine-log", daemon=True)
            try:
                self._thread.start()
                return
            except RuntimeError:  # there are no threads to be had, as at the end of the interpreter
                self._thread = None
        self._work_off()

    def flush(self, timeout_s: float) -> None:
        """Wait until what is queued now has been handled, but no longer than so many seconds; not in a handler.

        Afterwards the thread is gone, unless there is more to do.
        """
        done: SimpleQueue[bool] = SimpleQueue()
        until = time.monotonic() + timeout_s
        with self._lock:
            thread = self._thread
            if thread is None or thread is threading.current_thread():
                return
            self._queue.put(done)
        try:
            ends = done.get(timeout=timeout_s)
        except Empty:
            return
        if ends:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=_IDLE_S)
            except Empty:
                if self._rests():
                    return
                continue
            if isinstance(item, SimpleQueue):
                ends = self._rests()
                item.put(ends)
                if ends:
                    return
            else:
                self._handle(*item)
            del item  # what it holds is not kept until the next one comes

    def _rests(self) -> bool:
        """Whether there is nothing to do; then the thread ends."""
        with self._lock:  # without which nothing is put into the queue
            if not self._queue.empty():
                return False
            self._tell_dropped()
            self._thread = None
            return True

    def _work_off(self) -> None:
        while True:
            try:
                item = self._queue.get_nowait()
            except Empty:
                return
            if isinstance(item, SimpleQueue):
                item.put(False)
            else:
                self._handle(*item)

    def _handle(self, record: logging.LogRecord, size: int) -> None:
        _guarded(logging.getLogger(record.name).handle, record)
        with self._lock:
            self._held -= 1
            self._characters -= size
        if self._dropped and (not self._held or time.monotonic() - self._told_at > _TELL_EVERY_S):
            self._tell_dropped()

    def _tell_dropped(self) -> None:
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._told_at = time.monotonic()
            what = "%d log records were dropped here: handlers of logging take longer than what is logged allows"
            _guarded(_logger.warning, what, dropped)


def _guarded(function: Callable[..., object], *args: Any) -> None:
    try:
        function(*args)
    except BaseException as error:
        report(error)


def report(error: BaseException) -> None:
    """Say what a handler raised where `logging` itself says that."""
    if logging.raiseExceptions and sys.stderr is not None:
        try:
            sys.stderr.write(f"--- Logging error ---\n{traceback_of(error)}")
        except Exception:
            pass  # as logging does: there is nobody left to tell


_scribes: dict[int, Scribe] = {}  # by process id: a lock that was held when this process was forked off stays so


def scribe() -> Scribe:
    """This process's."""
    pid = os.getpid()
    return _scribes.get(pid) or _scribes.setdefault(pid, Scribe())
