"""A small HTTP/1.1 load generator: keep-alive connections, a bounded number of requests within a bounded time.

One thread, non-blocking sockets and a selector. It has to cost little, because on a small machine it shares the CPUs
with the server it measures: a request is sent as one prepared block, and of a response only its status, length and
connection header are looked at. `Load.client_cpu_us` says what a request cost on this side.

As a script: `python -m bench.load http://127.0.0.1:8000/noop --requests 5000`; loopback addresses only.
"""

from __future__ import annotations

import argparse
import ipaddress
import selectors
import socket
import statistics
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

MAX_CONSECUTIVE_FAILURES = 100


@dataclass
class Load:
    """What came of a run.

    Attributes:
        seconds: from the first request sent to the last response received.
        answered: responses with status 200 and the expected body.
        errors: other statuses, other bodies, and connections that broke before their response was complete.
        reconnects: orderly ends of a connection by the server between two requests.
        unfinished: requests without an answer when the time was up, or never sent.
        latencies_s: of the answered requests.
        client_cpu_us: processor time of this process per answered request.
    """

    seconds: float = 0.0
    answered: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    reconnects: int = 0
    unfinished: int = 0
    latencies_s: list[float] = field(default_factory=list)
    client_cpu_us: float = 0.0

    @property
    def per_second(self) -> float:
        """Answered requests per second."""
        return self.answered / self.seconds if self.seconds else 0.0

    def fault(self, kind: str) -> None:
        """Count one error."""
        self.errors[kind] = self.errors.get(kind, 0) + 1

    def check(self) -> None:
        """Refuse to take a figure from a run that went wrong.

        Raises:
            RuntimeError: requests failed or stayed unanswered.
        """
        if self.errors or self.unfinished:
            raise RuntimeError(f"{self.answered} answered, {self.unfinished} unfinished, errors: {self.errors}")

    def __str__(self) -> str:
        cuts = statistics.quantiles(self.latencies_s, n=100) if len(self.latencies_s) > 1 else [0.0] * 99
        return (
            f"{self.per_second:,.0f} req/s, {self.answered} answered in {self.seconds:.2f} s, "
            f"p50 {cuts[49] * 1e3:.2f} ms, p99 {cuts[98] * 1e3:.2f} ms, errors {self.errors or 0}, "
            f"unfinished {self.unfinished}, reconnects {self.reconnects}, client {self.client_cpu_us:.0f} us/request"
        )


class _Connection:
    __slots__ = ("buffer", "sent_at", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.sent_at = 0.0


def run(
    address: tuple[str, int],
    path: str,
    *,
    requests: int,
    connections: int = 32,
    limit_s: float = 30.0,
    expect: bytes | None = None,
) -> Load:
    """Send `requests` GET requests over `connections` keep-alive connections, each with one request in flight.

    Args:
        address: host (a loopback address) and port.
        path: what to ask for.
        requests: how many in all.
        connections: how many at a time.
        limit_s: seconds after which the run ends even if answers are missing.
        expect: the body that counts as an answer; None takes any.

    Raises:
        ValueError: the address is not of this machine.
        OSError: the first connections cannot be made.
    """
    host, port = address
    if not (host == "localhost" or ipaddress.ip_address(host).is_loopback):
        raise ValueError(f"load is for servers on this machine, not {host!r}")
    block = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode("ascii")
    load = Load()
    selector = selectors.DefaultSelector()
    to_send = requests
    in_flight = 0
    failures = 0

    def open_connection() -> _Connection:
        sock = socket.create_connection(address, timeout=5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        connection = _Connection(sock)
        selector.register(sock, selectors.EVENT_READ, connection)
        return connection

    def close(connection: _Connection) -> None:
        selector.unregister(connection.sock)
        connection.sock.close()

    def ask(connection: _Connection) -> None:
        nonlocal to_send, in_flight
        to_send -= 1
        in_flight += 1
        connection.sent_at = time.perf_counter()
        connection.sock.send(block)

    def again() -> None:
        """Replace a connection that ended."""
        if to_send:
            ask(open_connection())

    cpu = time.process_time()
    try:
        ready = [open_connection() for _ in range(min(connections, requests))]
        start = time.perf_counter()
        for connection in ready:
            ask(connection)
        while in_flight and failures < MAX_CONSECUTIVE_FAILURES:
            left = start + limit_s - time.perf_counter()
            if left <= 0:
                break
            for key, _ in selector.select(left):
                connection = key.data
                try:
                    data = connection.sock.recv(65536)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    in_flight -= 1
                    failures += 1
                    load.fault("connection lost")
                    close(connection)
                    again()
                    continue
                connection.buffer = connection.buffer + data if connection.buffer else data
                response = _parse(connection.buffer)
                if response is None:
                    continue
                status, body, keep_alive = response
                in_flight -= 1
                now = time.perf_counter()
                if status != 200:
                    failures += 1
                    load.fault(f"status {status}")
                elif expect is not None and body != expect:
                    failures += 1
                    load.fault("other body")
                else:
                    failures = 0
                    load.answered += 1
                    load.latencies_s.append(now - connection.sent_at)
                connection.buffer = b""
                if not keep_alive:
                    load.reconnects += 1
                    close(connection)
                    again()
                elif to_send:
                    ask(connection)
        load.seconds = time.perf_counter() - start
    finally:
        for key in list(selector.get_map().values()):
            close(key.data)
        selector.close()
    load.unfinished = in_flight + to_send
    load.client_cpu_us = (time.process_time() - cpu) / load.answered * 1e6 if load.answered else 0.0
    return load


def _parse(data: bytes) -> tuple[int, bytes, bool] | None:
    """Status, body and whether the connection stays, or None while the response is incomplete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end].lower()
    body = data[end + 4 :]
    keep_alive = b"\r\nconnection: close" not in head
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        line = head.find(b"\r\n", at + 2)
        length = int(head[at + 17 : line if line >= 0 else None])
        if len(body) < length:
            return None
        body = body[:length]
    elif b"\r\ntransfer-encoding: chunked" in head:
        if not body.endswith(b"0\r\n\r\n"):
            return None
        body = _join_chunks(body)
    return int(head[9:12]), body, keep_alive


def _join_chunks(body: bytes) -> bytes:
    parts = []
    while True:
        size, _, rest = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if not length:
            return b"".join(parts)
        parts.append(rest[:length])
        body = rest[length + 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a server on this machine and print what it answered.")
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--limit-s", type=float, default=30.0)
    args = parser.parse_args()
    url = urlsplit(args.url)
    result = run(
        (url.hostname or "127.0.0.1", url.port or 80),
        url.path or "/",
        requests=args.requests,
        connections=args.connections,
        limit_s=args.limit_s,
    )
    print(result)


if __name__ == "__main__":
    main()
