"""How many examples a fuzzer of the suite tries: few, and always the same ones.

A fuzzer is a function ``test_...`` of a module ``test_fuzz_...``, with `fuzzed` and without fixtures, so that
`python -m bench.chaos fuzz` can run it as well, for long and with other examples.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

__all__ = ["examples", "fuzzed", "log_of"]

examples: dict[str, Any] = {"max_examples": 150, "derandomize": True}
"""Settings that a longer run replaces before it imports fuzzers."""


def fuzzed(**strategies: SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Run a function with examples of these strategies as its arguments."""

    def decorate(function: Callable[..., None]) -> Callable[[], None]:
        slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        choose = settings(**examples, database=None, deadline=None, suppress_health_check=slow)
        found: Callable[[], None] = choose(given(**strategies)(function))
        return found

    return decorate


@contextlib.contextmanager
def log_of(name: str) -> Iterator[list[str]]:
    """What a logger says while the block runs, as text with tracebacks: for fuzzers, which have no fixtures."""
    lines: list[str] = []
    handler = _Lines(lines)
    logger = logging.getLogger(name)
    propagate, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))
