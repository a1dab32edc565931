"""From nothing to the first answer, and what an import costs, beside an interpreter that only prints."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.report import Aim, Row, in_turns

ROUNDS = 10
LIMIT_S = 60.0
BARE = "print('here', flush=True)"
IMPORT = "import engine; print('here', flush=True)"
FIRST_ANSWER = """
from engine import Engine

def double(request):
    return request.data * 2

with Engine(backend="local") as engine:
    engine.create_backend("double", double)
    engine.create_endpoint("double", backend="double")
    assert engine.get_handle("double").call(21) == 42
    print("here", flush=True)
"""
REFERENCE_IS = "an interpreter that prints one line"


def bench_import(benchmark: Any, record: Callable[[Row], None], tmp_path: Path) -> None:
    theirs, ours = in_turns(
        benchmark, lambda: until_line(BARE, tmp_path)[0], lambda: until_line(IMPORT, tmp_path)[0], rounds=ROUNDS
    )
    record(Row("import engine", "s", ours, theirs, REFERENCE_IS, Aim("excess", "most", 0.1)))


def bench_first_answer(benchmark: Any, record: Callable[[Row], None], tmp_path: Path) -> None:
    ends: dict[str, list[float]] = {BARE: [], FIRST_ANSWER: []}

    def measure(code: str) -> float:
        to_line, to_end = until_line(code, tmp_path)
        ends[code].append(to_end)
        return to_line

    theirs, ours = in_turns(benchmark, lambda: measure(BARE), lambda: measure(FIRST_ANSWER), rounds=ROUNDS)
    record(Row("cold process to first answer", "s", ours, theirs, REFERENCE_IS, Aim("engine", "most", 0.5)))
    counted = len(ours)
    theirs, ours = ends[BARE][-counted:], ends[FIRST_ANSWER][-counted:]
    record(Row("cold process to its end", "s", ours, theirs, "the same, to its end"))


def until_line(code: str, directory: Path) -> tuple[float, float]:
    """Seconds from starting an interpreter until its first line of output, and until it has ended.

    It runs away from the source tree, so that what is measured is the installed package.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        to_line = time.perf_counter() - start
        process.wait(LIMIT_S)
        to_end = time.perf_counter() - start
    assert line == b"here\n" and process.returncode == 0, f"{line!r}, exit code {process.returncode}"
    return to_line, to_end
