"""Fixtures that every test may use, and how tests are spread over processes (`python -m pytest -n auto`).

Those of the conformance suite are in `conformance/conftest.py`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import pytest
from ray_cluster import RayCluster, why_not

from engine.testing import instruments
from engine.testing.conformance.fixtures import client, gate, leaves_nothing, opened_once_per_process

__all__ = ["client", "gate", "leaves_nothing", "opened_once_per_process", "ray_cluster"]


_MOST_PROCESSES = 4
_SECOND_HALF = "test_hanging"
"""The first module of the conformance suite whose tests on Ray run beside those of the modules before it."""
_ON_RAY = frozenset({"test_docs", "test_examples", "test_ray_controller_parts", "test_ray_parts"})
_CLUSTERS_OF_THEIR_OWN = frozenset(
    {"test_ray_across_hosts", "test_ray_adapter", "test_ray_detached", "test_ray_forgotten", "test_ray_hosts"}
)


def pytest_configure() -> None:
    # A shell starts what it runs in the background with this signal ignored, and processes inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` means: one more than there are processors, as those with several hosts mostly wait.

    Tests that start processes by the dozen gain nothing by more.
    """
    return min(len(os.sched_getaffinity(0)) + 1, _MOST_PROCESSES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep what needs a Ray cluster together, so that a process has one at most, and what makes its own as well."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Scheduling(config, log)


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process. Most are a group each."""
    path, _, name = nodeid.partition("::")
    module = PurePath(path).stem
    if module in _CLUSTERS_OF_THEIR_OWN:
        return "clusters"
    if "conformance/" in path and "[ray" in name:
        return "one cluster" if module < _SECOND_HALF else "another cluster"
    return "one cluster" if module in _ON_RAY else nodeid


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray cluster for the whole run, which this process is connected to."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with RayCluster() as cluster:
        instruments.disown(cluster.pid)
        yield cluster
