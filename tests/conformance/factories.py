"""The adapters of this repository that the suite runs against, and what it must know about each."""

from __future__ import annotations

import pytest

from engine.testing.conformance.factory import AdapterFactory
from engine_local import LocalAdapter

IMPORTED_BY_TESTS = [
    "fastapi",
    "httpx",
    "numpy",
    "pydantic",
    "pytest",
    "starlette.responses",
    "engine",
    "engine.testing.instruments",
]
"""By modules of the suite, which replicas import: they start fast where they share these."""

FACTORIES = [
    pytest.param(AdapterFactory("inline", lambda: "inline", processes=False, own_refs=True), id="inline"),
    pytest.param(
        AdapterFactory(
            "local",
            lambda: "local",
            processes=True,
            own_refs=True,
            sees_processes=True,
            shared=lambda: LocalAdapter(preload=IMPORTED_BY_TESTS),
        ),
        id="local",
    ),
    pytest.param(
        AdapterFactory("ray", lambda: "ray", processes=True, own_refs=False, sees_processes=True),
        id="ray",
    ),
]
