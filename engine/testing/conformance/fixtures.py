"""The suite's fixtures: an engine that most tests share, `serve`, and what keeps them honest.

They ask for the fixture ``adapter``, an `engine.testing.conformance.factory.AdapterFactory`, which whoever runs the
suite provides.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from ... import Engine
from ..instruments import Footprint, Gate, Journal, eventually
from .factory import AdapterFactory

__all__ = [
    "Served",
    "anyio_backend",
    "client",
    "engine",
    "gate",
    "journal",
    "leaves_nothing",
    "opened_once_per_process",
    "own_engine",
    "serve",
]

_numbers = itertools.count(1)


class _PoolPerThread(httpx.BaseTransport):
    """Gives each thread a pool of connections of its own, none of which is kept alive.

    A pool that threads share may give one of them a connection that another one's answer is about to close: the
    request fails with a bad file descriptor, whatever the server does.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._context = httpx.create_ssl_context()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        pool: httpx.HTTPTransport | None = getattr(self._local, "pool", None)
        if pool is None:
            limits = httpx.Limits(max_keepalive_connections=0)
            pool = self._local.pool = httpx.HTTPTransport(verify=self._context, limits=limits)
        return pool.handle_request(request)


class Served:
    """A backend under a name and a route of its own, with every way to call it.

    Args:
        engine: That serves it.
        name: Of the backend and of its endpoint.
        route: Of the endpoint, if it has one.
        client: Makes the HTTP requests.
    """

    def __init__(self, engine: Engine, name: str, route: str | None, client: httpx.Client) -> None:
        self.engine = engine
        self.name = name
        self.tag = name
        self.route = route
        self.client = client

    @cached_property
    def handle(self) -> Any:
        """A sync handle."""
        return self.engine.get_handle(self.name)

    @cached_property
    def ahandle(self) -> Any:
        """An async handle."""
        return self.engine.get_handle(self.name, sync=False)

    @property
    def url(self) -> str:
        """Where HTTP clients find it."""
        assert self.route is not None
        return f"{self.engine.http_url}{self.route}"

    def call(self, *arguments: Any, **options: Any) -> Any:
        """Call by handle, ``options`` being those of ``handle.options``."""
        return self.handle.options(**options).call(*arguments)

    def http(self, method: str = "GET", suffix: str = "", **options: Any) -> httpx.Response:
        """Call over HTTP, ``options`` being those of `httpx.Client.request`."""
        return self.client.request(method, self.url + suffix, **options)

    def http_text(self, method: str = "GET", suffix: str = "", **options: Any) -> str:
        """As `http`: the text of an answer that must be 200."""
        response = self.http(method, suffix, **options)
        assert response.status_code == 200, (response.status_code, response.text)
        return response.text

    def http_json(self, method: str = "GET", suffix: str = "", **options: Any) -> Any:
        """As `http_text`, read as JSON."""
        return json.loads(self.http_text(method, suffix, **options))


@pytest.fixture(scope="session", autouse=True)
def opened_once_per_process() -> None:
    """Let libuv open the pipe that it keeps for as long as the process lives, so that it is nobody's leftover."""
    try:
        import uvloop
    except ImportError:
        return
    uvloop.new_event_loop().close()


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    """An HTTP client without connections of yesterday: engines come and go, their ports may come back."""
    with httpx.Client(timeout=30, transport=_PoolPerThread()) as client:
        yield client


@pytest.fixture(scope="session")
def engine(adapter: AdapterFactory, client: httpx.Client) -> Iterator[Engine]:
    """The engine that most tests share. At its end nothing may be left of it."""
    before = Footprint.now()
    with adapter.shared_engine() as engine:
        yield engine
    before.check_unchanged()


@pytest.fixture
def own_engine(adapter: AdapterFactory) -> Iterator[Callable[..., Engine]]:
    """Makes engines for one test, with HTTP options of its own."""
    engines: list[Engine] = []

    def make(**http_options: Any) -> Engine:
        engines.append(adapter.engine(**http_options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


@pytest.fixture
def serve(engine: Engine, client: httpx.Client, request: pytest.FixtureRequest) -> Iterator[Callable[..., Served]]:
    """Serves a backend under a fresh name until the end of the test. No call may be left of it then.

    ``serve(func_or_class, *init_args, config=None, route="/fresh", methods=("GET", "POST"), **init_kwargs)``
    """
    serving = _Serving(engine, client, request.node.name)
    yield serving.serve
    serving.check_rest(serving.all)
    serving.end()


@pytest.fixture(scope="module")
def served_already(engine: Engine, client: httpx.Client) -> Iterator[tuple[_Serving, dict[Any, Served]]]:
    """What `serve_once` has served for a module's tests."""
    serving = _Serving(engine, client, "shared")
    yield serving, {}
    serving.end()


@pytest.fixture
def serve_once(served_already: tuple[_Serving, dict[Any, Served]]) -> Iterator[Callable[..., Served]]:
    """As `serve`, but one backend for all tests of a module that ask for the same: one that keeps no state.

    Starting a replica is what most tests take longest for. No call may be left of it at the end of each.
    """
    serving, known = served_already
    asked: list[Served] = []

    def serve_once(func_or_class: Callable[..., Any], *init_args: Any, **options: Any) -> Served:
        key = func_or_class, repr((init_args, options))
        if key not in known:
            known[key] = serving.serve(func_or_class, *init_args, **options)
        asked.append(known[key])
        return known[key]

    yield serve_once
    serving.check_rest(asked)


class _Serving:
    """Backends of an engine, each with an endpoint of its name."""

    def __init__(self, engine: Engine, client: httpx.Client, purpose: str) -> None:
        self.all: list[Served] = []
        self._engine = engine
        self._client = client
        self._purpose = re.sub(r"\W+", "-", purpose).strip("-")

    def serve(
        self,
        func_or_class: Callable[..., Any],
        *init_args: Any,
        config: Any = None,
        route: str | None = "/fresh",
        methods: Sequence[str] = ("GET", "POST"),
        **init_kwargs: Any,
    ) -> Served:
        name = f"{self._purpose}-{next(_numbers)}"
        served = Served(self._engine, name, f"/{name}" if route == "/fresh" else route, self._client)
        self._engine.create_backend(name, func_or_class, *init_args, config=config, **init_kwargs)
        self.all.append(served)
        self._engine.create_endpoint(name, backend=name, route=served.route, methods=list(methods))
        return served

    def check_rest(self, all_served: Sequence[Served]) -> None:
        """Wait until no call is left of these."""
        for served in all_served:
            if served.tag in self._engine.list_backends():
                eventually(partial(_rests, self._engine, served.tag))

    def end(self) -> None:
        """Delete all."""
        for served in self.all:
            if served.name in self._engine.list_endpoints():
                self._engine.delete_endpoint(served.name)
        for served in self.all:
            if served.tag in self._engine.list_backends():
                self._engine.delete_backend(served.tag, force=True)


def _rests(engine: Engine, tag: str) -> bool:
    """Whether this process's calls to a backend have all ended."""
    counted = engine.statistics()["backends"][tag]
    return not (counted["in_flight"] or counted["queued"] or counted["queued_bytes"])


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """An empty journal."""
    return Journal(tmp_path / "journal")


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio unless their module says otherwise."""
    return "asyncio"


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A closed gate; it opens at the end of the test, so that no call outlives it."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@pytest.fixture
def leaves_nothing() -> Iterator[Footprint]:
    """Fails the test if it leaves a child, a thread or a descriptor behind."""
    before = Footprint.now()
    yield before
    before.check_unchanged()
