"""A no-op call by handle, beside two processes that do nothing but exchange pickles over a socket.

Where the scheduler puts the two ends decides more than anything the code does: a peer on the same CPU answers several
times as fast as one that has to be woken on another. Both sides of a comparison are therefore held in the same
placement, and both placements are measured.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench import procs
from bench.pingpong import PingPong
from bench.report import Aim, Row, in_turns
from engine import Engine

CALLS = 100  # a round: short enough that both sides of a pair meet the same machine
ROUNDS = 80
REFERENCE_IS = "blocking Unix socket and pickle each way between two processes"
AIM = Aim("ratio", "most", 2.0)

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs control over the CPUs it runs on")


def noop(request: Any) -> None:
    pass


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(backend="local", http_options={"location": "NoServer"}) as engine:
        engine.create_backend("noop", noop)
        engine.create_endpoint("noop", backend="noop")
        yield engine


@pytest.fixture(scope="module")
def pingpong() -> Iterator[PingPong]:
    peer = PingPong()
    yield peer
    peer.close()


@pytest.fixture(params=["one CPU", "two CPUs"])
def placement(request: pytest.FixtureRequest) -> tuple[str, int, int]:
    """Its name, the CPU of the caller, and that of everybody else."""
    cpus = sorted(os.sched_getaffinity(0))
    if request.param == "two CPUs" and len(cpus) < 2:
        pytest.skip("this machine has one CPU")
    return request.param, cpus[0], cpus[0] if request.param == "one CPU" else cpus[1]


def blocking_round(call: Callable[[Any], Any]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            call(1)
        return (time.perf_counter() - start) / CALLS * 1e6

    return measure


def bench_sync(
    placement: tuple[str, int, int],
    engine: Engine,
    pingpong: PingPong,
    benchmark: Any,
    record: Callable[[Row], None],
) -> None:
    where, caller, others = placement
    handle = engine.get_handle("noop")
    handle.call(1)  # connections and threads exist before anything is pinned
    with procs.placed(caller, others):
        theirs, ours = in_turns(benchmark, blocking_round(pingpong.call), blocking_round(handle.call), rounds=ROUNDS)
    record(Row(f"handle.call, sync, {where}", "us", ours, theirs, REFERENCE_IS, AIM))


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def bench_async(
    kind: str,
    placement: tuple[str, int, int],
    engine: Engine,
    pingpong: PingPong,
    benchmark: Any,
    record: Callable[[Row], None],
) -> None:
    where, caller, others = placement
    loop = new_loop(kind)

    async def first_call() -> Any:
        handle = engine.get_handle("noop", sync=False)
        await handle.call(1)
        return handle

    async def calls(handle: Any) -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            await handle.call(1)
        return (time.perf_counter() - start) / CALLS * 1e6

    try:
        handle = loop.run_until_complete(first_call())
        with procs.placed(caller, others):
            theirs, ours = in_turns(
                benchmark,
                blocking_round(pingpong.call),
                lambda: loop.run_until_complete(calls(handle)),
                rounds=ROUNDS,
            )
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    record(Row(f"handle.call, async, {kind}, {where}", "us", ours, theirs, REFERENCE_IS, AIM))


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    if kind == "asyncio":
        return asyncio.new_event_loop()
    uvloop = pytest.importorskip("uvloop")
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
