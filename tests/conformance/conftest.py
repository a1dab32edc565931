"""The conformance suite, which is `engine.testing.conformance`, against the adapters of this repository.

Each module here takes over the tests and fixtures of the suite's module of the same name.
"""

from __future__ import annotations

import pytest
from factories import FACTORIES

from engine.testing.conformance.factory import AdapterFactory
from engine.testing.conformance.fixtures import (
    anyio_backend,
    engine,
    journal,
    own_engine,
    serve,
    serve_once,
    served_already,
)

__all__ = ["adapter", "anyio_backend", "engine", "journal", "own_engine", "serve", "serve_once", "served_already"]


@pytest.fixture(scope="session", params=FACTORIES)
def adapter(request: pytest.FixtureRequest) -> AdapterFactory:
    factory: AdapterFactory = request.param
    if factory.name == "ray":
        request.getfixturevalue("ray_cluster")
    return factory
