"""Engines whose process is killed at any moment of their lives: nothing of them may be left."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine import Engine

from .outcome import Outcome
from .own_cluster import actors

KILLS = 50
KILLS_WITH_RAY = 8
"""Of programs that start a Ray of their own, which takes seconds."""
GONE_WITHIN_S = 2.0
_GIVEN_UP_S = 30.0
_RAYS_GONE_WITHIN_S = 90.0
_RAYS = re.compile(
    r"ray::(IDLE|(Dashboard|RuntimeEnv)Agent)|/(dashboard/agent|runtime_env/agent/main|default_worker)\.py"
)
"""What a Ray starts that nobody has given anything to do."""

_PROGRAM = """
import sys, time
from engine import Engine

print("up", flush=True)
if sys.argv[1] == "a Ray of its own":
    from engine_ray import RayAdapter

    backend = RayAdapter(address="local")
else:
    backend = sys.argv[1]
with Engine(backend=backend, http_options={"port": 0}) as engine:
    engine.create_backend("a", lambda request: time.sleep(0.01), config={"num_replicas": 2})
    engine.create_endpoint("a", backend="a", route="/a")
    handle = engine.get_handle("a")
    while True:
        handle.call()
        engine.get(handle.remote())
"""


def endings(backend: str, seconds: float) -> Iterator[Outcome]:
    """Programs with an engine are killed (SIGKILL) at random moments, from their first line on."""
    share = min(1.0, seconds / 60)
    if backend == "local":
        yield from _endings("engines", backend, max(1, int(KILLS * share)), 1.0, _marked)
        return
    # Ray's workers do not inherit from the program: but nobody else has any here
    yield from _endings("engines on a Ray that runs", backend, max(1, int(KILLS * share)), 6.0, lambda _: _titles())
    yield _left_with_ray()
    own = max(1, int(KILLS_WITH_RAY * share))
    marks: list[str] = []

    def left_of(mark: str) -> list[str]:
        marks.append(mark)
        return [title for title in _marked(mark) if not _RAYS.search(title)]

    yield from _endings("engines with a Ray of their own", "a Ray of its own", own, 12.0, left_of)
    yield _rays_left(set(marks))


def _rays_left(marks: set[str]) -> Outcome:
    """What Ray was starting as its raylet died looks for the head, in vain, before it notices."""
    began = time.monotonic()
    left = several = len([title for mark in marks for title in _marked(mark)])
    while left and time.monotonic() < began + _RAYS_GONE_WITHIN_S:
        time.sleep(0.2)
        left = len([title for mark in marks for title in _marked(mark)])
    return Outcome(
        "what Ray itself was starting when they were killed",
        f"ends by itself within {_RAYS_GONE_WITHIN_S:g} s",
        f"{several} were there, {left} are left after {time.monotonic() - began:.0f} s",
        not left,
    )


def _endings(
    who: str, backend: str, count: int, life_s: float, left_of: Callable[[str], list[str]]
) -> Iterator[Outcome]:
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
        time.sleep(random.uniform(0.0, life_s))
        program.send_signal(signal.SIGKILL)
        program.wait()
        program.stdout.close()
        killed = time.monotonic()
        while (found := left_of(mark)) and time.monotonic() < killed + _GIVEN_UP_S:
            time.sleep(0.02)
        slowest_s = max(slowest_s, time.monotonic() - killed)
        left += found
    yield Outcome(
        f"{count} {who} killed",
        "nothing is left",
        str(left or "nothing"),
        not left,
    )
    yield Outcome(
        f"{count} {who} killed: the slowest",
        f"is gone after {GONE_WITHIN_S:g} s",
        f"{slowest_s:.2f} s",
        slowest_s <= GONE_WITHIN_S,
        timed=True,
    )


def _titles() -> list[str]:
    return list(actors().values())


def _left_with_ray() -> Outcome:
    """What dead engines have left with Ray's control plane is swept by the next one."""
    from engine_ray.link.registry import Registry

    known: list[object] = []
    with Engine(backend="ray", http_options={"location": None}):
        Registry.sweep(lambda entry: bool(known.append(entry)))  # type: ignore[func-returns-value]
    return Outcome(
        "what they left with Ray's control plane",
        "is swept by the next engine",
        f"{len(known) - 1} entries besides its own",
        len(known) == 1,
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
