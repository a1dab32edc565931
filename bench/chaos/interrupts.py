"""Ctrl-C, again and again, in a program whose threads call."""

from __future__ import annotations

import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine import Engine

from .outcome import Outcome
from .traffic import Marks, Traffic, Worker

INTERRUPTS = 2000


def _rested(engine: Engine, patience_s: float = 10.0) -> dict[str, Any]:
    """What the backend holds, once that is nothing or takes too long: replicas still answer what was given up."""
    end = time.monotonic() + patience_s
    while True:
        state: dict[str, Any] = engine.statistics()["backends"]["worker"]
        if not (state["in_flight"] or state["queued"]) or time.monotonic() > end:
            return state


def interrupts(backend: str, seconds: float) -> Iterator[Outcome]:
    """The main thread calls and is interrupted at random moments; eight other threads call, and notice nothing."""
    with tempfile.TemporaryDirectory() as directory, Engine(backend=backend, http_options={"location": None}) as engine:
        path = Path(directory, "marks")
        engine.create_backend("worker", Worker, str(path), 0.0, config={"num_replicas": 2})
        engine.create_endpoint("worker", backend="worker")
        traffic = Traffic(engine, "worker", Marks(path))
        account = traffic.by_handle("others", 8)
        handle: Any = engine.get_handle("worker").options(timeout_s=30)
        count = max(1, int(INTERRUPTS * min(1.0, seconds / 60)))
        struck = answered = 0
        main = threading.main_thread().ident
        assert main is not None
        over = threading.Event()
        armed = False

        def on_interrupt(*_: object) -> None:
            nonlocal armed
            if armed:  # else it would strike what counts the strikes
                armed = False
                raise KeyboardInterrupt

        def strike() -> None:
            for _ in range(count):
                time.sleep(random.uniform(0.001, 0.02))
                signal.pthread_kill(main, signal.SIGINT)
            over.set()

        before = signal.signal(signal.SIGINT, on_interrupt)
        with traffic.going_on():
            striker = threading.Thread(target=strike)
            striker.start()
            while not over.is_set():
                try:
                    armed = True
                    while not over.is_set():
                        handle.call(n=0)
                        answered += 1
                    armed = False
                except KeyboardInterrupt:
                    struck += 1
            striker.join()
        signal.signal(signal.SIGINT, before)
        state = _rested(engine)
        yield Outcome(
            f"{struck} interrupts of the main thread, which had {answered:,} answers",
            "no call of another thread is hurt",
            str(account),
            account.count("ok") == account.sent,
        )
        left = f"in flight {state['in_flight']}, queued {state['queued']}"
        yield Outcome("after the interrupts", "nothing in flight", left, left == "in flight 0, queued 0")
