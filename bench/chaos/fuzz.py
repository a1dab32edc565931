"""Bytes and values that nobody would send, with new examples each time: the fuzzers of `tests/`, run for long.

The suite runs the same ones with few examples, which are always the same. An example that breaks a promise is printed,
reduced to what matters.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .outcome import Outcome

TESTS = Path(__file__).parents[2] / "tests"


def fuzz(_: str, seconds: float) -> Iterator[Outcome]:
    """Run the fuzzers of each module for its share of the time, each until it has found something."""
    modules = list(_modules())
    for about, fuzzers in modules:
        for name, fuzzer in fuzzers:
            count, failed = _run(fuzzer, time.monotonic() + seconds / len(modules) / len(fuzzers))
            found = f"{count:,} examples" + (", one of them fails" if failed else "")
            yield Outcome(f"{about}: {name}", "no example that breaks it", found, not failed)


def _modules() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """What each is about, and its fuzzers by name."""
    sys.path.insert(0, str(TESTS))
    import fuzzing

    fuzzing.examples.update(max_examples=500, derandomize=False)
    for path in sorted(TESTS.glob("test_fuzz_*.py")):
        module = importlib.import_module(path.stem)
        yield (
            str(module.__doc__).partition(":")[0],
            [
                (name.removeprefix("test_").replace("_", " "), value)
                for name, value in vars(module).items()
                if name.startswith("test_") and hasattr(value, "hypothesis")
            ],
        )


def _run(fuzzer: Any, end: float) -> tuple[int, bool]:
    """How many examples were tried, and whether one failed."""
    count = 0
    inner: Callable[..., None] = fuzzer.hypothesis.inner_test

    @functools.wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        inner(*args, **kwargs)

    fuzzer.hypothesis.inner_test = counted
    while time.monotonic() < end:
        try:
            fuzzer()
        except Exception:
            traceback.print_exc()
            return count, True
    return count, False
