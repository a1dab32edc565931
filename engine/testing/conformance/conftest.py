"""The suite's fixtures, those of `engine.testing.conformance.fixtures`, and the adapter that it runs against."""

from __future__ import annotations

import pytest

from engine.testing.conformance.factory import AdapterFactory
from engine.testing.conformance.fixtures import (
    anyio_backend,
    client,
    engine,
    gate,
    journal,
    leaves_nothing,
    opened_once_per_process,
    own_engine,
    serve,
    serve_once,
    served_already,
)
from engine.testing.conformance.plugin import factories_of

__all__ = [
    "adapter",
    "anyio_backend",
    "client",
    "engine",
    "gate",
    "journal",
    "leaves_nothing",
    "opened_once_per_process",
    "own_engine",
    "pytest_generate_tests",
    "serve",
    "serve_once",
    "served_already",
]


@pytest.hookimpl(tryfirst=True)  # so that the ids of tests begin with the adapter
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that concerns adapters against each one given."""
    if "adapter" in metafunc.fixturenames:
        factories = factories_of(metafunc.config)
        names = [factory.name for factory in factories]
        metafunc.parametrize("adapter", factories, ids=names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def adapter(request: pytest.FixtureRequest) -> AdapterFactory:
    """An adapter that the suite runs against."""
    factory: AdapterFactory = request.param
    return factory
