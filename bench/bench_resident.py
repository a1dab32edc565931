"""The memory of one more idle replica, beside that of one more interpreter that has imported nothing."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from bench import procs
from bench.report import Aim, Row
from bench.script import run_script

RUNS = 3


@pytest.mark.skipif(not procs.PROC.exists(), reason="needs /proc")
def bench_resident(record: Callable[[Row], None]) -> None:
    results = [json.loads(run_script("run_resident")) for _ in range(RUNS)]
    record(
        Row(
            "one more idle replica",
            "MB PSS",
            [result["replica_mb"] for result in results],
            [result["interpreter_mb"] for result in results],
            "one more idle interpreter",
            Aim("engine", "most", 12.0),
        )
    )
