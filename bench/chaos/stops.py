"""Processes that are stopped (SIGSTOP) rather than ended: they hold their connections, and say nothing."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine import Engine

from .. import procs
from .outcome import Outcome
from .own_cluster import actors
from .traffic import Account, Marks, Traffic, Worker, ready_pids

NOTICED_WITHIN_S = 5.0
REPLICAS = 2
INGRESSES = 2
CALL_S = 0.005


def stops(backend: str, seconds: float) -> Iterator[Outcome]:
    """A replica, an ingress, the courier and the fork server are stopped in turn, while handles and HTTP clients call.

    The courier is Ray's, and the fork server the local adapter's.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "marks")
        with Engine(backend=backend, http_options={"port": 0, "workers": INGRESSES}) as engine:
            marks = Marks(path)
            engine.create_backend("worker", Worker, str(path), CALL_S, config={"num_replicas": REPLICAS})
            engine.create_endpoint("worker", backend="worker", route="/worker", methods=["GET", "POST"])
            victims: dict[str, Callable[[], int]] = {
                "a replica": lambda: next(iter(ready_pids(engine, "worker").values())),
                "an ingress": lambda: int(next(iter(engine.statistics()["ingresses"].values()))["pid"]),
            }
            if backend == "ray":
                victims["the courier"] = lambda: next(iter(actors("Courier")))
            for name, victim in victims.items():
                yield from _stop(engine, marks, name, victim(), seconds)
            if backend == "local":
                yield from _stop_fork_server(engine)


def _stop(engine: Engine, marks: Marks, name: str, pid: int, seconds: float) -> Iterator[Outcome]:
    traffic = Traffic(engine, "worker", marks)
    accounts = [traffic.by_handle("handle", 4), traffic.by_ref("ref", 2), traffic.over_http("HTTP", 4, "/worker")]
    with traffic.going_on():
        time.sleep(0.5)
        stopped = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        gone_s = _until_gone(pid)
        time.sleep(max(0.0, stopped + seconds - time.monotonic()))
    aim = f"ended within {NOTICED_WITHIN_S:g} s"
    yield Outcome(f"{name} is stopped", aim, f"after {gone_s:.1f} s", gone_s <= NOTICED_WITHIN_S, timed=True)
    for account in accounts:
        yield Outcome(
            f"{name} is stopped: {account.name}",
            "no call hangs; those it had not begun are answered",
            f"{account}; longest {max(account.latencies_s):.1f} s",
            _only_begun_ones_failed(account, name),
        )


def _only_begun_ones_failed(account: Account, stopped: str) -> bool:
    if stopped == "the courier":  # what it held may have begun, as far as the callers know
        return account.sent == account.count("ok", *(["ReplicaDied"] if account.name == "ref" else []))
    if stopped == "an ingress":  # what it held broke with its connection, and clients can repeat that
        broken = account.count("ConnectionResetError", "RemoteDisconnected", "BadStatusLine", "IncompleteRead")
        return account.sent == account.count("ok") + broken
    return account.sent == account.count("ok", "ReplicaDied", "502") and not account.failed_unbegun


def _stop_fork_server(engine: Engine) -> Iterator[Outcome]:
    _until_it_has_forked(engine)
    before = ready_pids(engine, "worker")
    forking = procs.parent(next(iter(before.values())))
    os.kill(forking, signal.SIGSTOP)
    began = time.monotonic()
    done = threading.Event()

    def scale() -> None:
        engine.update_backend_config("worker", {"num_replicas": REPLICAS + 1})
        done.set()

    thread = threading.Thread(target=scale)
    thread.start()
    done.wait(60)
    took_s = time.monotonic() - began
    thread.join()
    after = ready_pids(engine, "worker")
    kept = all(after.get(tag) == pid for tag, pid in before.items())
    yield Outcome(
        "the fork server is stopped",
        f"a replica starts within {NOTICED_WITHIN_S + 2:g} s all the same",
        f"{took_s:.1f} s",
        took_s <= NOTICED_WITHIN_S + 2,
        timed=True,
    )
    yield Outcome(
        "the fork server is stopped: replicas",
        "one more, and none is lost",
        "none lost" if kept else f"{before} became {after}",
        kept and len(after) == REPLICAS + 1,
    )


def _until_it_has_forked(engine: Engine, patience_s: float = 30.0) -> None:
    """Wait until nothing is being started: what follows is about a fork server that is stopped at rest."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        ingresses = engine.statistics()["ingresses"].values()
        if len(ingresses) == INGRESSES and all(one["state"] == "ready" for one in ingresses):
            break
        time.sleep(0.05)


def _until_gone(pid: int, patience_s: float = 60.0) -> float:
    began = time.monotonic()
    while time.monotonic() < began + patience_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            break
        if state == "Z":
            break
        time.sleep(0.01)
    return time.monotonic() - began
