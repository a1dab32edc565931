"""Clients that send much, stop in the middle, or take nothing: what they hold is bounded, and others are served."""

from __future__ import annotations

import http.client
import select
import selectors
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import Engine

from .. import procs
from .outcome import Outcome
from .traffic import Marks, Traffic, Worker, ready_pids

BODY_MB = 50
STALL_TIMEOUT_S = 3.0
KEPT_MB = 20
SETTLED_S = 10.0


@dataclass(frozen=True)
class Crowd:
    """How much there is of everything.

    Attributes:
        clients: That send a body of `BODY_MB` each.
        budget_mb: What bodies may take in the ingress together.
        readers: That take nothing.
        stalled: Uploads that stop in the middle.
    """

    clients: int
    budget_mb: int
    readers: int
    stalled: int


FULL = Crowd(clients=100, budget_mb=512, readers=200, stalled=100)
SMALL = Crowd(clients=12, budget_mb=150, readers=20, stalled=10)


def bodies(backend: str, seconds: float) -> Iterator[Outcome]:
    """Large bodies all at once; readers that take nothing of an endless answer; uploads that stop in the middle."""
    crowd = FULL if seconds >= 60 else SMALL
    options = {"port": 0, "stall_timeout_s": STALL_TIMEOUT_S, "max_bodies_bytes": crowd.budget_mb << 20}
    with tempfile.TemporaryDirectory() as directory, Engine(backend=backend, http_options=options) as engine:
        path = Path(directory, "marks")
        engine.create_backend("worker", Worker, str(path), 0.0)
        engine.create_endpoint("worker", backend="worker", route="/worker")
        engine.create_backend("length", _length)
        engine.create_endpoint("length", backend="length", route="/length", methods=["POST"])
        engine.create_backend("endless", _endless)
        engine.create_endpoint("endless", backend="endless", route="/endless")
        host, _, port = str(engine.http_url).removeprefix("http://").partition(":")
        address = (host, int(port))
        _post(address, b"warm")
        ingress = next(iter(engine.statistics()["ingresses"].values()))["pid"]
        watched = {"ingress": ingress, "replica": ready_pids(engine, "length")["length#1"]}
        watched["streaming replica"] = ready_pids(engine, "endless")["endless#1"]
        before = {name: procs.rss_mb(pid) for name, pid in watched.items()}
        traffic = Traffic(engine, "worker", Marks(path))
        others = traffic.over_http("others", 1, "/worker", "GET")
        with traffic.going_on(), _Peak(watched) as peak:
            statuses = _large_bodies(address, crowd.clients)
            taken_s = _readers(address, crowd.readers)
            stalled = _stalled_uploads(address, crowd.stalled)
        _post(address, b"after")
        after = _settled(watched, before)
    grown = {name: peak.mb[name] - before[name] for name in watched}
    allowed = {"ingress": 3.0 * crowd.budget_mb, "replica": 16.0 * BODY_MB, "streaming replica": 1.5 * crowd.readers}
    yield Outcome(
        f"{crowd.clients} clients with {BODY_MB} MB each",
        f"the ingress takes at most 3 times max_bodies_bytes ({crowd.budget_mb} MB), a replica what 8 calls take, "
        "one that streams 1.5 MB for each reader",
        ", ".join(f"{name} +{grown[name]:.0f} MB" for name in watched) + f"; {dict(statuses)}",
        all(grown[name] <= allowed[name] + KEPT_MB for name in watched) and set(statuses) <= {"200", "408", "503"},
    )
    yield Outcome(
        f"{crowd.readers} readers that take nothing",
        "all are let go",
        f"after {taken_s:.1f} s",
        taken_s < 10 * STALL_TIMEOUT_S,
    )
    yield Outcome(f"{crowd.stalled} stalled uploads", "each is told 408", str(dict(stalled)), set(stalled) == {"408"})
    yield Outcome("meanwhile: others", "0 failures", str(others), others.count("ok") == others.sent > 0)
    yield Outcome(
        "afterwards",
        f"memory is back within {SETTLED_S:g} s, but for {KEPT_MB} MB",
        ", ".join(f"{name} {before[name]:.0f} -> {after[name]:.0f} MB" for name in watched),
        all(after[name] - before[name] <= KEPT_MB for name in watched),
        timed=True,
    )


def _length(request: Any) -> str:
    return "done"


async def _endless(request: Any) -> Any:
    async def parts() -> Any:
        while True:
            yield b"x" * 65536

    return parts()


def _post(address: tuple[str, int], body: bytes) -> str:
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request("POST", "/length", body)
        response = connection.getresponse()
        response.read()
        return str(response.status)
    except OSError as error:  # refused before it was sent: an answer may be lost with the connection's end
        return "503" if isinstance(error, (BrokenPipeError, ConnectionResetError)) else type(error).__name__
    finally:
        connection.close()


def _settled(watched: dict[str, int], before: dict[str, float]) -> dict[str, float]:
    """What processes have in memory once it is what they had before, or when they have had the time for that."""
    end = time.monotonic() + SETTLED_S
    while True:
        after = {name: procs.rss_mb(pid) for name, pid in watched.items()}
        if time.monotonic() > end or all(after[name] - before[name] <= KEPT_MB for name in watched):
            return after
        time.sleep(0.1)


def _large_bodies(address: tuple[str, int], count: int) -> Counter[str]:
    body = b"x" * (BODY_MB << 20)
    statuses: Counter[str] = Counter()
    threads = [threading.Thread(target=lambda: statuses.update([_post(address, body)])) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def _readers(address: tuple[str, int], count: int) -> float:
    """Seconds until the server has broken all of them off."""
    with ExitStack() as stack:
        readers = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(address)
            sock.sendall(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
            readers.append(sock)
        began = time.monotonic()
        waiting = select.poll()
        for sock in readers:
            waiting.register(sock, select.POLLRDHUP)  # set with POLLHUP and POLLERR, never by what there is to read
        left = len(readers)
        while left and time.monotonic() < began + 20 * STALL_TIMEOUT_S:
            for descriptor, _ in waiting.poll(1000):
                waiting.unregister(descriptor)
                left -= 1
        return time.monotonic() - began


def _stalled_uploads(address: tuple[str, int], count: int) -> Counter[str]:
    statuses: Counter[str] = Counter()
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(address))
            sock.sendall(b"POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 1000)
            selector.register(sock, selectors.EVENT_READ)
        end = time.monotonic() + 10 * STALL_TIMEOUT_S
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(1.0):
                sock = key.fileobj  # type: ignore[assignment]
                statuses[sock.recv(65536)[9:12].decode() or "closed"] += 1
                selector.unregister(sock)
        statuses["nothing"] += len(selector.get_map())
    return +statuses


class _Peak:
    """The most memory that processes had while the block ran."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.mb = dict.fromkeys(pids, 0.0)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            for name, pid in self._pids.items():
                self.mb[name] = max(self.mb[name], procs.rss_mb(pid))
