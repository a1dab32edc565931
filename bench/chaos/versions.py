"""New code for a backend that is being called, some of which does not start; and replicas that are recycled."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine import Engine

from .outcome import Outcome
from .traffic import Marks, Traffic, Worker

UPDATES = 20
BROKEN = 7
"""Which of the updates does not start."""


class Version(Worker):
    """As `Worker`; a version may fail to start."""

    def __init__(self, marks: str, seconds: float, version: int) -> None:
        super().__init__(marks, seconds)
        if version == BROKEN:
            raise RuntimeError("this version does not start")
        self._version = version

    def version(self) -> int:
        """Which one this is."""
        return self._version


def versions(backend: str, seconds: float) -> Iterator[Outcome]:
    """20 updates of the code, one of them broken, then rolling recycling; calls go on all the while."""
    updates = UPDATES if seconds >= 10 else BROKEN + 1
    with tempfile.TemporaryDirectory() as directory, Engine(backend=backend, http_options={"port": 0}) as engine:
        path = Path(directory, "marks")
        marks = Marks(path)
        engine.create_backend("worker", Version, str(path), 0.005, 0, config={"num_replicas": 2})
        engine.create_endpoint("worker", backend="worker", route="/worker", methods=["GET", "POST"])
        which: Any = engine.get_handle("worker").options(method_name="version")
        traffic = Traffic(engine, "worker", marks)
        accounts = [traffic.by_handle("handle", 4), traffic.over_http("HTTP", 4, "/worker")]
        wrong: list[str] = []
        refused = 0
        with traffic.going_on():
            for version in range(1, updates + 1):
                try:
                    engine.update_backend("worker", Version, str(path), 0.005, version)
                except RuntimeError:
                    refused += 1
                expected = version - 1 if version == BROKEN else version
                found = {which.call() for _ in range(10)}
                if found != {expected}:
                    wrong.append(f"{found} rather than {expected}")
        yield Outcome(
            f"{updates} updates",
            "calls that follow get the new code, or the former one if the new one does not start",
            f"{refused} refused, wrong: {wrong or 'none'}",
            refused == 1 and not wrong,
        )
        for account in accounts:
            yield Outcome(
                f"{updates} updates: {account.name}", "0 failures", str(account), account.count("ok") == account.sent
            )
        engine.update_backend_config("worker", {"max_calls_per_replica": 200})
        traffic = Traffic(engine, "worker", marks)
        accounts = [traffic.by_handle("handle", 4), traffic.over_http("HTTP", 4, "/worker")]
        started = _last_replica(engine)
        with traffic.going_on():
            time.sleep(seconds)
        recycled = _last_replica(engine) - started
        for account in accounts:
            yield Outcome(
                f"{recycled} replicas recycled: {account.name}",
                "0 failures",
                str(account),
                recycled > 0 and account.count("ok") == account.sent,
            )


def _last_replica(engine: Engine) -> int:
    return max(int(tag.rpartition("#")[2]) for tag in engine.statistics()["backends"]["worker"]["details"])
