"""Fixtures that every test may use. Those of the conformance suite are in `conformance/conftest.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray_cluster import RayCluster, why_not

from engine.testing import instruments
from engine.testing.conformance.fixtures import client, gate, leaves_nothing, opened_once_per_process

__all__ = ["client", "gate", "leaves_nothing", "opened_once_per_process", "ray_cluster"]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray cluster for the whole run, which this process is connected to."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with RayCluster() as cluster:
        instruments.disown(cluster.pid)
        yield cluster
