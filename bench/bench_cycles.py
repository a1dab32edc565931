"""A hundred engines with two replicas and HTTP, one after the other in one process: nothing may pile up."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from bench import procs
from bench.report import Aim, Row
from bench.script import run_script

CYCLES = 100
# what is made once and kept on purpose (caches, lazily opened devices) is there after the first few
SETTLED = 3


@pytest.mark.skipif(not procs.PROC.exists(), reason="needs /proc")
def bench_cycles(record: Callable[[Row], None]) -> None:
    left = json.loads(run_script("run_cycles", str(CYCLES)))
    record(Row("create, use, shut down", "s", [cycle["seconds"] for cycle in left]))
    for what in ("fds", "threads", "children"):
        settled, last = left[SETTLED - 1][what], left[-1][what]
        aim = Aim("ratio", "most", 1.0) if settled else Aim("engine", "most", 0.0)
        record(Row(f"{what} left after cycle {CYCLES}", what, [last], [settled], f"after cycle {SETTLED}", aim))
    for what in ("fds", "threads", "children"):
        counts = [cycle[what] for cycle in left]
        assert counts[-1] <= counts[SETTLED - 1], f"{what} grow from cycle to cycle: {counts}"
    assert left[-1]["children"] == 0, "children outlived their engine"
