"""Engines whose process is killed at any moment of their lives: nothing of them may be left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .outcome import Outcome

KILLS = 50
GONE_WITHIN_S = 2.0

_PROGRAM = """
import sys, time
from engine import Engine

print("up", flush=True)
with Engine(backend=sys.argv[1], http_options={"port": 0}) as engine:
    engine.create_backend("a", lambda request: time.sleep(0.01), config={"num_replicas": 2})
    engine.create_endpoint("a", backend="a", route="/a")
    handle = engine.get_handle("a")
    while True:
        handle.call()
"""


def endings(backend: str, seconds: float) -> Iterator[Outcome]:
    """Programs with an engine are killed (SIGKILL) at random moments, from their first line on."""
    count = max(1, int(KILLS * min(1.0, seconds / 60)))
    left: list[str] = []
    slowest_s = 0.0
    for _ in range(count):
        mark = f"chaos-{os.urandom(8).hex()}"
        program = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, backend],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "ENGINE_CHAOS": mark},
        )
        assert program.stdout is not None
        program.stdout.readline()
        time.sleep(random.uniform(0.0, 1.0 if backend == "local" else 8.0))
        program.send_signal(signal.SIGKILL)
        program.wait()
        program.stdout.close()
        killed = time.monotonic()
        while (found := _marked(mark)) and time.monotonic() < killed + 30:
            time.sleep(0.02)
        slowest_s = max(slowest_s, time.monotonic() - killed)
        left += found
    yield Outcome(
        f"{count} engines killed",
        f"nothing is left after {GONE_WITHIN_S:g} s",
        f"the slowest took {slowest_s:.2f} s; left: {left or 'nothing'}",
        not left and slowest_s <= GONE_WITHIN_S,
    )


def _marked(mark: str) -> list[str]:
    """Living processes that have inherited a mark in their environment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
    return found
