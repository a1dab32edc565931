"""Threads that call all the while something happens: what tests of calls under load have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ..instruments import PATIENCE_S

__all__ = ["Load"]


class Load:
    """Some threads call again and again while the ``with`` block runs; each stops at its first failure.

    Args:
        call: Makes one call and returns its answer.

    Attributes:
        answers: What all of them were answered so far, in order.
        failures: What was raised instead.
        THREADS: How many there are, each with one call at a time.
    """

    THREADS = 3

    def __init__(self, call: Callable[[], Any]) -> None:
        self.answers: list[Any] = []
        self.failures: list[BaseException] = []
        self._call = call
        self._stop = threading.Event()
        # Daemons: a call that hangs fails its test, and must not keep the interpreter from ending.
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(self.THREADS)]

    def __enter__(self) -> Load:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the last calls.

        Raises:
            AssertionError: They hang.
        """
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S if error is None else 1.0)
        assert error is not None or not any(thread.is_alive() for thread in self._threads), "a call hangs"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self._call())
            except BaseException as failure:
                self.failures.append(failure)
                return
