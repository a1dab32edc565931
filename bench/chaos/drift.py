"""What grows with time: descriptors, threads and memory, over many calls and over the lives of many engines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from engine import Engine

from .. import procs
from ..report import RESULTS
from .outcome import Outcome

CALLS = 1_000_000
CYCLES = 500
SAMPLES = 40
FEW_CYCLES = 12
MAY_GROW_MB = 5.0


class Sample(NamedTuple):
    """What this process and, within an engine's life, its workers hold."""

    done: int
    fds: int
    threads: int
    own_mb: float
    workers_mb: float


def _sample(done: int) -> Sample:
    below = procs.descendants()
    return Sample(done, procs.open_fds(), procs.threads(), procs.rss_mb(), sum(procs.rss_mb(pid) for pid in below))


def calls(backend: str, seconds: float) -> Iterator[Outcome]:
    """One engine, a million calls."""
    count = max(SAMPLES, int(CALLS * min(1.0, seconds / 300)))
    samples = []
    with Engine(backend=backend, http_options={"location": None}) as engine:
        engine.create_backend("echo", _echo, config={"num_replicas": 2})
        engine.create_endpoint("echo", backend="echo")
        handle: Any = engine.get_handle("echo")
        for _ in range(SAMPLES):
            for _ in range(count // SAMPLES):
                handle.call("x")
            samples.append(_sample(len(samples) * (count // SAMPLES)))
    yield from _outcomes(f"{count:,} calls", samples)


def cycles(backend: str, seconds: float) -> Iterator[Outcome]:
    """Engines that are made, called by handle, and shut down, one after the other."""
    end = time.monotonic() + seconds
    least = SAMPLES if seconds >= SAMPLES else FEW_CYCLES
    samples: list[Sample] = []
    while len(samples) < CYCLES and (time.monotonic() < end or len(samples) < least):
        with Engine(backend=backend, http_options={"location": None}) as engine:
            engine.create_backend("echo", _echo)
            engine.create_endpoint("echo", backend="echo")
            assert engine.get_handle("echo").call("x") == "x"
        samples.append(_sample(len(samples)))
    yield from _outcomes(f"{len(samples)} engines, one after the other", samples)


def _echo(request: Any) -> Any:
    return request.data


def _outcomes(what: str, samples: list[Sample]) -> Iterator[Outcome]:
    RESULTS.parent.mkdir(exist_ok=True)
    plot = RESULTS.parent / f"drift-{what.split()[-1]}.csv"
    plot.write_text("\n".join([",".join(Sample._fields), *(",".join(map(str, one)) for one in samples)]) + "\n")
    warm = samples[len(samples) // 4 :]  # what is imported and cached first is no leak
    yield _compared(what, "descriptors and threads stay", warm, {"fds": 0.0, "threads": 0.0})
    yield _compared(what, "memory stays", warm, {"own_mb": MAY_GROW_MB, "workers_mb": MAY_GROW_MB}, timed=True)


def _compared(what: str, aim: str, samples: list[Sample], allowed: dict[str, float], *, timed: bool = False) -> Outcome:
    third = max(1, len(samples) // 3)
    found, held = [], True
    for name, most in allowed.items():
        first, last = (
            statistics.median(getattr(one, name) for one in part) for part in (samples[:third], samples[-third:])
        )
        found.append(f"{name} {first:.1f} -> {last:.1f}")
        held = held and last - first <= most
    return Outcome(what, aim, ", ".join(found), held, timed)
