"""Print, as JSON, the memory that one more idle replica and one more bare interpreter take, in MB of PSS.

A script of its own, so that nothing but the engine lives in the process. This process is part of the sum: pages that
the replicas share with it would otherwise seem to be theirs alone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from typing import Any

from bench import procs
from engine import BackendConfig, Engine

FEW, MANY = 2, 6
WARM_CALLS = 200  # so that each replica has answered some
SETTLED_MB = 0.2
LIMIT_S = 20.0


def noop(request: Any) -> None:
    pass


def settled_pss_mb() -> float:
    """The sum for this process and all below, once it has stopped changing."""
    deadline = time.monotonic() + LIMIT_S
    last = float("inf")
    while True:
        gc.collect()
        now = procs.pss_mb([os.getpid(), *procs.descendants()])
        if abs(now - last) < SETTLED_MB or time.monotonic() > deadline:
            return now
        last = now
        time.sleep(0.3)  # between two readings: there is no event to wait for


def one_more_replica() -> tuple[float, int]:
    with Engine(backend="local", http_options={"location": "NoServer"}) as engine:
        engine.create_backend("noop", noop, config=BackendConfig(num_replicas=FEW))
        engine.create_endpoint("noop", backend="noop")
        handle = engine.get_handle("noop")
        for _ in range(WARM_CALLS):
            handle.call(1)
        before, processes = settled_pss_mb(), len(procs.descendants())
        engine.update_backend_config("noop", {"num_replicas": MANY})
        for _ in range(WARM_CALLS):
            handle.call(1)
        after = settled_pss_mb()
        added = len(procs.descendants()) - processes
    return (after - before) / (MANY - FEW), added


def one_more_interpreter() -> float:
    running: list[subprocess.Popen[bytes]] = []
    sums = []
    try:
        for wanted in (FEW, MANY):
            while len(running) < wanted:
                process = subprocess.Popen(
                    [sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                running.append(process)
                assert process.stdout is not None
                process.stdout.readline()
            sums.append(settled_pss_mb())
    finally:
        for process in running:
            process.communicate(b"\n")
    return (sums[1] - sums[0]) / (MANY - FEW)


if __name__ == "__main__":
    replica_mb, added = one_more_replica()
    if added != MANY - FEW:
        sys.exit(f"{MANY - FEW} more replicas were asked for and {added} more processes appeared")
    print(json.dumps({"replica_mb": replica_mb, "interpreter_mb": one_more_interpreter()}))
