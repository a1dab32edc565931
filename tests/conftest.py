"""Fixtures that every test may use. Those of the conformance suite are in `conformance/conftest.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import harness
import httpx
import pytest
from harness import Footprint, Gate
from ray_cluster import RayCluster, why_not


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
    with httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        yield client


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray cluster for the whole run, which this process is connected to."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with RayCluster() as cluster:
        harness.disown(cluster.pid)
        yield cluster


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
