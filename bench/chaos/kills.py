"""Replicas that are killed, or that kill themselves over one input."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine import Engine, errors

from .outcome import Outcome
from .traffic import Account, Marks, Traffic, Watch, Worker, ready_pids

REPLICAS = 4
CALL_S = 0.005
POISON_EVERY = 100


def kills(backend: str, seconds: float) -> Iterator[Outcome]:
    """A replica of four is killed every second, while handles and HTTP clients call."""
    with tempfile.TemporaryDirectory() as directory, Engine(backend=backend, http_options={"port": 0}) as engine:
        path = Path(directory, "marks")
        marks = Marks(path)
        engine.create_backend("worker", Worker, str(path), CALL_S, config={"num_replicas": REPLICAS})
        engine.create_endpoint("worker", backend="worker", route="/worker", methods=["GET", "POST"])
        traffic = Traffic(engine, "worker", marks)
        once = [
            traffic.by_handle("handle", 8),
            traffic.by_ref("ref", 4),
            traffic.over_http("HTTP POST", 8, "/worker"),
        ]
        repeatable = [traffic.by_handle("handle, idempotent", 4, idempotent=True)]
        watch = Watch(engine, "worker")
        killed = 0
        end = time.monotonic() + seconds
        with traffic.going_on(), watch.going_on():
            while time.monotonic() < end:
                time.sleep(1.0)
                pids = list(ready_pids(engine, "worker").values())
                if pids:
                    os.kill(random.choice(pids), signal.SIGKILL)
                    killed += 1
    for account in once:
        yield from _of_calls_made_once(f"{killed} kills: {account.name}", account, killed)
    for account in repeatable:
        failed = account.sent - account.count("ok")
        yield Outcome(f"{killed} kills: {account.name}", "0 failures", str(account), not failed)
    yield Outcome(
        f"{killed} kills: no replica at all",
        "< 0.5 % of the time",
        f"{watch.share:.2%}",
        watch.share < 0.005,
        timed=True,
    )


def _of_calls_made_once(what: str, account: Account, killed: int) -> Iterator[Outcome]:
    died = account.count("ReplicaDied", "502")
    others = account.sent - account.count("ok") - died
    yield Outcome(
        what,
        "no call fails that had not begun; those that had end with ReplicaDied (502); none runs twice",
        f"{account}; {account.failed_unbegun} failed that had not begun, {account.began_twice} ran twice",
        # A kill may come after a call was noted as begun, and before the backend could note it itself.
        not (others or account.began_twice) and account.failed_unbegun <= 1 + killed // 50,
    )


class Fragile(Worker):
    """As `Worker`, but one input in a hundred ends its process."""

    def __call__(self, request: Any) -> str:
        number = super().__call__(request)
        if "poison" in request.query_params:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def poison(backend: str, seconds: float) -> Iterator[Outcome]:
    """100 calls a second, one in 100 of which kills the replica that runs it."""
    with tempfile.TemporaryDirectory() as directory, Engine(backend=backend, http_options={"location": None}) as engine:
        path = Path(directory, "marks")
        marks = Marks(path)
        engine.create_backend("fragile", Fragile, str(path), 0.0, config={"num_replicas": REPLICAS})
        engine.create_endpoint("fragile", backend="fragile")
        handle: Any = engine.get_handle("fragile")
        good, bad = Account("good", marks), Account("poison", marks)
        sent: list[tuple[Account, int, Any]] = []
        start = time.monotonic()
        for number in range(int(seconds * 100)):
            time.sleep(max(0.0, start + number / 100 - time.monotonic()))
            poisonous = number % POISON_EVERY == POISON_EVERY - 1
            ref = handle.remote(n=number, poison=1) if poisonous else handle.remote(n=number)
            sent.append((bad if poisonous else good, number, ref))
        for account, number, ref in sent:
            try:
                engine.get(ref, timeout=30)
                outcome = "ok"
            except errors.EngineError as error:
                outcome = type(error).__name__
            account.enter(number, outcome, 0.0)
    yield Outcome("one poison input in 100: the others", "0 failures", str(good), good.count("ok") == good.sent)
    yield Outcome(
        "one poison input in 100: the poison",
        "each ends with ReplicaDied",
        str(bad),
        bad.count("ReplicaDied") == bad.sent,
    )
