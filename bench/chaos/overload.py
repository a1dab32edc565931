"""Ten times as many calls as can be served: the rest is refused at once, and what is accepted is answered soon."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from engine import Engine, errors

from .. import procs
from .outcome import Outcome

REPLICAS = 2
CALL_S = 0.02
CAPACITY = REPLICAS / CALL_S
OVERLOAD = 10
CONNECTIONS = 400
MAX_QUEUE_WAIT_S = 0.1
PATIENCE_S = 30.0
_NOT_SENT = "not sent: no connection free"
_REFUSALS = ("Overloaded", "503", "DeadlineExceeded", "504")


@dataclass
class Run:
    """What came of calls that were made at a steady rate, whether or not earlier ones had been answered."""

    seconds: float
    outcomes: Counter[str] = field(default_factory=Counter)
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)

    def enter(self, outcome: str, took_s: float) -> None:
        """Note what became of one call."""
        self.outcomes[outcome] += 1
        if outcome == "ok":
            self.answered_s.append(took_s)
        elif outcome in ("Overloaded", "503"):
            self.refused_s.append(took_s)

    @property
    def goodput(self) -> float:
        """Answers per second."""
        return self.outcomes["ok"] / self.seconds


def _p99(latencies_s: list[float]) -> float:
    return statistics.quantiles(latencies_s, n=100)[98] if len(latencies_s) > 1 else 0.0


def overload(backend: str, seconds: float) -> Iterator[Outcome]:
    """By handle and over HTTP, with and without a deadline of one second."""
    for timeout_s in (None, 1.0):
        http: dict[str, Any] = {"port": 0, "request_timeout_s": timeout_s}
        with Engine(backend=backend, http_options=http) as engine:
            config = {"num_replicas": REPLICAS, "max_concurrent_queries": 1, "max_queue_wait_s": MAX_QUEUE_WAIT_S}
            engine.create_backend("slow", _slow, config=config)
            engine.create_endpoint("slow", backend="slow", route="/slow")
            address = str(engine.http_url).removeprefix("http://").split(":")
            handle: Any = engine.get_handle("slow", sync=False).options(timeout_s=timeout_s or PATIENCE_S)
            deadline = "no deadline" if timeout_s is None else f"deadline {timeout_s:g} s"
            ways: dict[str, Callable[[Run, float | None], Run]] = {
                "handle": lambda run, rate, handle=handle: _run(_by_handle, run, rate, handle),
                "HTTP": lambda run, rate, address=address: _elsewhere(run, rate, address[0], int(address[1])),
            }
            pids = procs.descendants()
            for name, way in ways.items():
                most = way(Run(min(seconds, 5.0)), None).goodput
                usual = way(Run(min(seconds, 10.0)), CAPACITY * 0.9)
                before = procs.rss_mb() + sum(map(procs.rss_mb, pids))
                flood = way(Run(seconds), CAPACITY * OVERLOAD)
                grown_mb = procs.rss_mb() + sum(map(procs.rss_mb, pids)) - before
                yield from _outcomes(f"{OVERLOAD}x load, {name}, {deadline}", most, usual, flood, grown_mb)


def _outcomes(what: str, most: float, usual: Run, flood: Run, grown_mb: float) -> Iterator[Outcome]:
    others = {name: count for name, count in flood.outcomes.items() if name not in ("ok", "Overloaded", "503")}
    share = flood.goodput / most
    found = f"{flood.goodput:.0f}/s of {most:.0f}/s, {share:.0%}; refused {len(flood.refused_s):,}"
    found += f"; others {others or 'none'}"
    yield Outcome(f"{what}: goodput", ">= 90 % of capacity", found, share >= 0.9, timed=True)
    known = set(flood.outcomes) <= {"ok", _NOT_SENT, *_REFUSALS}
    yield Outcome(f"{what}: all others", "are refused, or late", ", ".join(sorted(flood.outcomes)), known)
    refused_s = _p99(flood.refused_s)
    yield Outcome(f"{what}: refusals, p99", "< 100 ms", f"{refused_s * 1e3:.0f} ms", refused_s < 0.1, timed=True)
    usual_s, flood_s = _p99(usual.answered_s), _p99(flood.answered_s)
    found = f"{flood_s * 1e3:.0f} ms, at 90 % of capacity {usual_s * 1e3:.0f} ms"
    yield Outcome(f"{what}: answers, p99", "<= twice that at capacity", found, flood_s <= 2 * usual_s, timed=True)
    yield Outcome(f"{what}: memory", "grows by < 20 MB", f"{grown_mb:.1f} MB", grown_mb < 20, timed=True)


def _run(way: Callable[..., Awaitable[None]], run: Run, rate: float | None, *args: Any) -> Run:
    async def go_on() -> None:
        await way(run, rate, *args)

    asyncio.run(go_on())
    return run


def _elsewhere(run: Run, rate: float | None, host: str, port: int) -> Run:
    """Over HTTP from a process of its own, so that the engine's does not share its time with the clients."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (_over_http, run, rate, host, port))


def _slow(request: Any) -> str:
    time.sleep(CALL_S)
    return "ok"


async def _keep_on(seconds: float, call: Callable[[], Awaitable[None]]) -> None:
    """Make the next call when one has ended, so that replicas always have one and none is refused."""
    end = time.monotonic() + seconds

    async def go_on() -> None:
        while time.monotonic() < end:
            await call()

    await asyncio.gather(*(go_on() for _ in range(2 * REPLICAS)))


async def _steadily(rate: float | None, seconds: float, call: Callable[[], Awaitable[None]]) -> None:
    """Begin calls at a rate, never waiting for one of them, and let all end. No rate: as fast as they are served."""
    if rate is None:
        await _keep_on(seconds, call)
        return
    running: set[asyncio.Task[None]] = set()
    start = time.monotonic()
    for number in range(int(rate * seconds)):
        ahead_s = start + number / rate - time.monotonic()
        if ahead_s > 0 or number % 50 == 0:
            await asyncio.sleep(max(0.0, ahead_s))
        task = asyncio.ensure_future(call())
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.wait(running, timeout=PATIENCE_S)


async def _by_handle(run: Run, rate: float | None, handle: Any) -> None:
    async def call() -> None:
        began = time.monotonic()
        try:
            await handle.call()
            outcome = "ok"
        except errors.EngineError as error:
            outcome = type(error).__name__
        run.enter(outcome, time.monotonic() - began)

    await _steadily(rate, run.seconds, call)


async def _over_http(run: Run, rate: float | None, host: str, port: int) -> None:
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    room = asyncio.Semaphore(CONNECTIONS)

    async def call() -> None:
        if room.locked():
            run.outcomes[_NOT_SENT] += 1
            return
        async with room:
            began = time.monotonic()
            reader, writer = idle.pop() if idle else await asyncio.open_connection(host, port)
            writer.write(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            status = head[9:12].decode()
            run.enter("ok" if status == "200" else status, time.monotonic() - began)
            idle.append((reader, writer))

    await _steadily(rate, run.seconds, call)
    for _, writer in idle:
        writer.close()
