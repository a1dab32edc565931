"""What the unit tests of the controller share: a backend as it is asked for, and its replicas on a fake adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from engine.config import BackendConfig
from engine.control.backend_plan import BackendPlan, pack_definition
from engine.control.backend_replicas import BackendReplicas
from engine.control.replica_pool import Means
from engine.control.workers import Workers
from engine.seam.resources import Resources
from engine.testing.fakes import FakeAdapter


def ok(request: object) -> str:
    """What is served."""
    return "ok"


def plan_of(count: int, **config: Any) -> BackendPlan:
    """Backend ``b`` with so many replicas."""
    return BackendPlan(
        tag="b",
        definition=pack_definition("b", ok, (), {}),
        config=BackendConfig(num_replicas=count, **config),
        resources=Resources(),
        on_loop=False,
        batches=False,
        reconfigurable=False,
    )


def replicas_of(
    adapter: FakeAdapter, workers: Workers, *, count: int, publish: Callable[[], int] = lambda: 1, **config: Any
) -> BackendReplicas:
    """Its replicas. What ``publish`` raises as `ConnectionError` keeps nothing from being announced."""

    def announce() -> None:
        with suppress(ConnectionError):
            publish()

    async def told() -> None:
        """Nobody needs to be."""

    means = Means("e", adapter, workers, debug=False, publish=publish, announce=announce, told=told)
    return BackendReplicas(means, plan_of(count, **config))
