"""Fixtures that every test may use, and how tests are spread over processes (`python -m pytest -n auto`).

Those of the conformance suite are in `conformance/conftest.py`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from ray_cluster import RayCluster, why_not

from engine.testing import instruments
from engine.testing.conformance.fixtures import client, gate, leaves_nothing, opened_once_per_process

__all__ = ["client", "gate", "leaves_nothing", "opened_once_per_process", "ray_cluster"]


_MOST_PROCESSES = 4
_ON_RAY = frozenset({"test_docs", "test_examples", "test_ray_controller_parts", "test_ray_parts"})
_CLUSTERS_OF_THEIR_OWN = frozenset(
    {"test_ray_across_hosts", "test_ray_adapter", "test_ray_detached", "test_ray_forgotten", "test_ray_hosts"}
)


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it runs in the background with this signal ignored, and processes inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("dist", "no") == "load":  # as -n says by itself
        config.option.dist = "loadgroup"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What ``-n auto`` means: tests that start processes by the dozen gain nothing by more."""
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what needs the session's Ray cluster in one process, so that there is one; and all others in another."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        module = item.path.stem
        fixtures = set(getattr(item, "fixturenames", ()))
        if module in _CLUSTERS_OF_THEIR_OWN:
            item.add_marker(pytest.mark.xdist_group("clusters"))
        elif module in _ON_RAY or "ray_cluster" in fixtures or ("adapter" in fixtures and "[ray" in item.name):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray cluster for the whole run, which this process is connected to."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with RayCluster() as cluster:
        instruments.disown(cluster.pid)
        yield cluster
