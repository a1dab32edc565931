"""A no-op over HTTP at 32 keep-alive connections, beside a bare hypercorn that answers in its own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from bench import load
from bench.bare_http import BODY, BareServer
from bench.report import Aim, Row, in_turns
from engine import Engine

CONNECTIONS = 32
REQUESTS = 1000
ROUNDS = 20
LIMIT_S = 30.0
REFERENCE_IS = "hypercorn and Starlette in one process, uvloop, no second process behind it"


def noop(request: Any) -> str:
    return BODY


@pytest.fixture(scope="module")
def engine_address() -> Iterator[tuple[str, int]]:
    with Engine(backend="local", http_options={"host": "127.0.0.1", "port": 0, "workers": 1}) as engine:
        engine.create_backend("noop", noop)
        engine.create_endpoint("noop", backend="noop", route="/noop")
        url = urlsplit(engine.http_url)
        assert url.hostname is not None and url.port is not None
        yield url.hostname, url.port


@pytest.fixture(scope="module")
def bare_address() -> Iterator[tuple[str, int]]:
    server = BareServer()
    yield server.address
    server.close()


def bench_http(
    bare_address: tuple[str, int],
    engine_address: tuple[str, int],
    benchmark: Any,
    record: Callable[[Row], None],
) -> None:
    def measure(address: tuple[str, int]) -> load.Load:
        result = load.run(
            address,
            "/noop",
            requests=REQUESTS,
            connections=CONNECTIONS,
            limit_s=LIMIT_S,
            expect=BODY.encode(),
        )
        print(address, result)
        result.check()
        return result

    theirs, ours = in_turns(
        benchmark,
        lambda: measure(bare_address).per_second,
        lambda: measure(engine_address).per_second,
        rounds=ROUNDS,
    )
    record(Row("HTTP no-op, c=32", "req/s", ours, theirs, REFERENCE_IS, Aim("ratio", "least", 1.0)))
