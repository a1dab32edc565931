"""N calls at once to N idle replicas: does each find one of its own?

A plain replica runs one call at a time, so two calls of a round that meet at one replica take twice as long while
another replica idles. A round is counted as doubled when it took half as long again as one call or more and two of its
answers came from one replica: each names its own. A busy machine alone slows rounds, too, but sends no call astray.
"Mixed" rounds come from three callers that know nothing of each other: threads, an event loop, and the ingress.
"""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from bench.report import Aim, Row
from engine import Engine, get_replica_context

CALL_S = 0.2
ROUNDS = 200
AIM = Aim("engine", "most", 1)


def nap(request: Any) -> str:
    time.sleep(CALL_S)
    return get_replica_context().replica_tag


class Callers:
    """Makes the calls of a round, all at once."""

    def __init__(self, engine: Engine, name: str, most: int) -> None:
        self.handle = engine.get_handle(name)
        self.async_handle = engine.get_handle(name, sync=False)
        self.loop = asyncio.new_event_loop()
        self.pool = ThreadPoolExecutor(most + 1)
        address = urlsplit(engine.http_url)
        self.route = f"/{name}"
        self.connections = [http.client.HTTPConnection(str(address.hostname), address.port) for _ in range(most)]

    def close(self) -> None:
        self.pool.shutdown()
        self.loop.close()
        for connection in self.connections:
            connection.close()

    def by_handle(self, count: int) -> list[str]:
        return list(self.pool.map(lambda _: self.handle.call(), range(count)))

    def by_async_handle(self, count: int) -> list[str]:
        async def calls() -> list[str]:
            return list(await asyncio.gather(*[self.async_handle.call() for _ in range(count)]))

        return self.loop.run_until_complete(calls())

    def by_http(self, count: int) -> list[str]:
        return list(self.pool.map(self._get, self.connections[:count]))

    def mixed(self, count: int) -> list[str]:
        third = -(-count // 3)
        looping = self.pool.submit(self.by_async_handle, min(third, count - third))
        http = self.pool.map(self._get, self.connections[: max(0, count - 2 * third)])
        return [*self.by_handle(third), *looping.result(), *http]

    def _get(self, connection: http.client.HTTPConnection) -> str:
        connection.request("GET", self.route)
        return connection.getresponse().read().decode()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(backend="local", http_options={"port": 0}) as engine:
        yield engine


@pytest.fixture(params=[2, 3, 8, 16])
def callers(request: pytest.FixtureRequest, engine: Engine) -> Iterator[tuple[Callers, int]]:
    count: int = request.param
    engine.create_backend("nap", nap, config={"num_replicas": count})
    engine.create_endpoint("nap", backend="nap", route="/nap")
    made = Callers(engine, "nap", count)
    yield made, count
    made.close()
    engine.delete_endpoint("nap")
    engine.delete_backend("nap")


@pytest.mark.parametrize("way", ["by_handle", "by_async_handle", "by_http", "mixed"])
def bench_spread(callers: tuple[Callers, int], way: str, record: Callable[[Row], None]) -> None:
    made, count = callers
    make = getattr(made, way)
    make(count)  # connections exist before anything is counted
    doubled = 0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        answers = make(count)
        took_s = time.perf_counter() - start
        assert len(answers) == count
        doubled += took_s > 1.5 * CALL_S and len(set(answers)) < count
    record(Row(f"rounds of {ROUNDS} that took twice as long, {count} replicas, {way}", "rounds", [doubled], aim=AIM))
