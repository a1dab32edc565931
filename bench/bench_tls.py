"""Echoes between two processes by channels over TCP: with TLS, beside plain ones.

Not by an engine: TLS costs the same whatever a channel is used for, and that is best seen by itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from bench import procs
from bench.echo_peer import EchoPeer
from bench.report import Row, in_turns
from engine_wire.tls import make_tls

REFERENCE_IS = "the same without TLS"
ROUNDS = 40
SIZES = {"1 KiB": (1 << 10, 100), "16 MiB": (1 << 24, 2)}
"""Of an echo, and how many are a round."""

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs control over the CPUs it runs on")


@pytest.fixture(scope="module")
def peers() -> Iterator[tuple[EchoPeer, EchoPeer]]:
    with closing(EchoPeer(None)) as plain, closing(EchoPeer(make_tls())) as secure:
        yield plain, secure


@pytest.mark.parametrize("size", SIZES)
def bench_echo(size: str, peers: tuple[EchoPeer, EchoPeer], benchmark: Any, record: Callable[[Row], None]) -> None:
    payload, count = os.urandom(SIZES[size][0]), SIZES[size][1]

    def round_of(peer: EchoPeer) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            for _ in range(count):
                peer.call(payload)
            return (time.perf_counter() - start) / count * 1e6

        return measure

    cpu = min(os.sched_getaffinity(0))  # one for all: what has to be done counts, not who is woken where
    with procs.placed(cpu, cpu):
        theirs, ours = in_turns(benchmark, *map(round_of, peers), rounds=ROUNDS)
    record(Row(f"echo of {size} by TLS, one CPU", "us", ours, theirs, REFERENCE_IS))
