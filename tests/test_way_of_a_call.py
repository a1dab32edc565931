"""Through how many functions a call by handle passes: that is what it costs, as code that runs once in a while is cold.

Clocks say little on a machine with other work; this number is the same each time. Whoever makes it grow finds it here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from types import FrameType
from typing import Any

from engine import Engine

AT_CALLER = 28
AT_REPLICA = 24  # the user's included
CALLS = 5


class Passed:
    """The functions that this thread enters, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(self) -> None:
        sys.setprofile(self._note)

    def end(self) -> list[str]:
        sys.setprofile(None)
        return self.names

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.names.append(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}")


class Noop:
    passed = Passed()

    def __call__(self, request: Any) -> None:
        pass

    def begin(self) -> None:
        self.passed.begin()

    def end(self) -> list[str]:
        return self.passed.end()


def way_at_caller(call: Callable[[], object]) -> list[str]:
    passed = Passed()
    passed.begin()
    try:
        call()
    finally:
        names = passed.end()
    return names[:-1]  # without `end` itself


def test_a_call_passes_through_few_functions() -> None:
    with Engine(backend="local", http_options={"location": None}) as engine:
        engine.create_backend("noop", Noop)
        engine.create_endpoint("noop", backend="noop")
        handle = engine.get_handle("noop")
        for _ in range(CALLS):
            handle.call()
        # The shortest: others may have had something to clean up, say.
        there = min((way_at_caller(handle.call) for _ in range(CALLS)), key=len)
        handle.options(method_name="begin").call()
        for _ in range(CALLS):
            handle.call()
        names = handle.options(method_name="end").call()
    turns = [number for number, name in enumerate(names) if name == f"{__file__.rpartition('/')[2]}:__call__"]
    back = min((names[one:other] for one, other in pairwise(turns)), key=len)
    assert len(there) <= AT_CALLER, there
    assert len(back) <= AT_REPLICA, back
