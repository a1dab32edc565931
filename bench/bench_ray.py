"""The engine on local processes and on Ray beside Ray Serve: the same no-op, by handle and over HTTP, and the start.

Each system lives in a process of its own (see `bench.peer`), and takes its turn: Ray Serve, the engine on Ray, the
engine on local processes, and again. Idle systems are not alike, though. Ray Serve's controller wakes ten times a
second and its proxy and replica poll it, and that processor time is missing to the others on a small machine; the
engine waits for events. What is done about it:

- One setting of Ray Serve at a time, on a cluster started for it: no setting pays for another's polling.
- Within it, Ray Serve and both engines stay alive and take turns, so that a machine that drifts moves all alike. Ray
  Serve pays for its own polling, as it does anywhere, and the engines pay for it, too; in turn Ray Serve pays for the
  idle engine on Ray, which takes less than half as much.
- `bench_idle` measures what that is, and `bench_ref` and "no Ray Serve beside it" run without any Ray Serve.
- Stopping Ray Serve's processes during the engine's turns (SIGSTOP) would make its next turn start with missed health
  checks and timeouts; starting it anew for each turn would put minutes of drift between the two halves of a pair.

Nobody is pinned: a call of Ray Serve passes through more processes and threads than there are places to choose.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from bench import load, procs
from bench.bare_http import BODY
from bench.cluster import Cluster
from bench.peer import Peer
from bench.report import Aim, Row, all_in_turns, in_turns
from bench.serve_peer import SETTINGS, SYNC, expected

ON_RAY = "ray"  # the adapter beside "local"; another's name tries the benchmark out without this one
CALLS = 100
HANDLE_ROUNDS = 30
REF_ROUNDS = 60
CONNECTIONS = 32
REQUESTS = 1000
HTTP_ROUNDS = 15
LIMIT_S = 30.0
START_ROUNDS = 5
START_LIMIT_S = 120.0
IDLE_ROUNDS = 5
IDLE_S = 2.0
QUIET_LIMIT_S = 15.0
QUIET = 0.15  # of one CPU
OWNERS = {"await serve": "serve"}
SERVE_TITLE = re.compile("^ray::(Serve|Proxy|HAProxy)|haproxy")
RAY_TITLE = re.compile("ray::(IDLE|DashboardAgent|RuntimeEnvAgent)")

CALL_AIM = Aim("ratio", "most", 0.15)
HTTP_AIM = Aim("ratio", "least", 6.0)
REF_AIM = Aim("ratio", "most", 1.3)
START_AIM = Aim("ratio", "most", 0.5)


@functools.cache
def why_not() -> str:
    """The reason why nothing here can run, or nothing."""
    if not sys.platform.startswith("linux"):
        return "needs what Linux says about processes"
    if importlib.util.find_spec("ray") is None:
        return "ray is not installed: pip install 'engineroom[bench]'"
    if ON_RAY not in {entry.name for entry in metadata.entry_points(group="engine.adapters")}:
        return f"the engine has no adapter {ON_RAY!r} in this installation"
    # in another process: what Ray does to the importing one must not reach these measurements
    done = subprocess.run([sys.executable, "-c", "import ray.serve"], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines() or ["?"]
    return f"ray.serve cannot be imported ({lines[-1]}): pip install 'engineroom[bench]'" if done.returncode else ""


@dataclass
class Systems:
    """A cluster and what runs on and beside it: everything ("default", ...), the engines, or nothing yet ("bare")."""

    setting: str
    cluster: Cluster
    peers: dict[str, Peer] = field(default_factory=dict)

    def pids(self) -> dict[str, list[int]]:
        """All processes that are alive now, by what they belong to; actors are known by their titles."""
        groups: dict[str, list[int]] = {"cluster": [], "local": [], "ray": [], "serve": []}
        for name, peer in self.peers.items():
            groups[OWNERS.get(name, name)] += [peer.pid, *procs.descendants(peer.pid)]
        for pid in procs.descendants(self.cluster.keeper):
            title = procs.title(pid)
            if SERVE_TITLE.search(title):
                groups["serve"].append(pid)
            elif title.startswith("ray::") and not RAY_TITLE.match(title):
                groups["ray"].append(pid)
            else:
                groups["cluster"].append(pid)
        return groups


def usage(groups: Mapping[str, list[int]], seconds: float) -> dict[str, float]:
    """How much of one CPU each group of processes uses during so many seconds from now."""
    before = {name: procs.cpu_s(pids) for name, pids in groups.items()}
    start = time.perf_counter()
    time.sleep(seconds)
    taken = time.perf_counter() - start
    after = {name: procs.cpu_s(pids) for name, pids in groups.items()}
    return {name: sum(after[name][pid] - before[name].get(pid, 0.0) for pid in after[name]) / taken for name in groups}


def quiet(cluster: Cluster) -> None:
    """Wait until the cluster has done what follows the start or the end of something on it."""
    deadline = time.monotonic() + QUIET_LIMIT_S
    while time.monotonic() < deadline:
        if usage({"all": procs.descendants(cluster.keeper)}, 0.5)["all"] < QUIET:
            return


@pytest.fixture(scope="module")
def systems(request: pytest.FixtureRequest) -> Iterator[Systems]:
    if reason := why_not():
        pytest.skip(reason)
    setting: str = request.param
    with ExitStack() as stack:
        cluster = Cluster(SETTINGS.get(setting))
        stack.callback(cluster.close)
        systems = Systems(setting, cluster)

        def start(name: str, module: str, *arguments: str, settings: Mapping[str, str] | None = None) -> None:
            peer = Peer(module, *arguments, environment={**cluster.environment, **(settings or {})})
            stack.callback(peer.close)
            systems.peers[name] = peer

        if setting != "bare":
            start("local", "engine_peer", "local")
            start("ray", "engine_peer", ON_RAY, "--address", cluster.address)
        if setting in SETTINGS:
            start("serve", "serve_peer", "--address", cluster.address, settings=SYNC)
            effect = systems.peers["serve"].ask("effect")
            print(setting, json.dumps(effect, indent=1))
            for process, wanted in expected(setting).items():
                if effect[process] != wanted:
                    raise RuntimeError(f"{setting}: the {process} of Ray Serve runs with {effect[process]}")
            start("await serve", "serve_peer", "--address", cluster.address, "--attach")
        yield systems


every_setting = pytest.mark.parametrize("systems", list(SETTINGS), indirect=True, scope="module")
without_serve = pytest.mark.parametrize("systems", ["engines"], indirect=True, scope="module")
bare_cluster = pytest.mark.parametrize("systems", ["bare"], indirect=True, scope="module")


@every_setting
def bench_call(systems: Systems, benchmark: Any, record: Callable[[Row], None]) -> None:
    """Ray Serve's handle is asked in both ways; the reference is the one that was faster over the whole run."""
    serve, await_serve, on_ray, local = (systems.peers[name] for name in ("serve", "await serve", "ray", "local"))
    by_kind = {}
    by_kind["sync"], by_kind["async"], ours, ours_local = all_in_turns(
        benchmark,
        lambda: serve.mean_us("sync", CALLS),
        lambda: await_serve.mean_us("async", CALLS),
        lambda: on_ray.mean_us("call", CALLS),
        lambda: local.mean_us("call", CALLS),
        rounds=HANDLE_ROUNDS,
    )
    print({kind: statistics.median(figures) for kind, figures in by_kind.items()})
    best = min(by_kind, key=lambda kind: statistics.median(by_kind[kind]))
    how = {"sync": "handle.remote(x).result()", "async": "await handle.remote(x), uvloop"}[best]
    is_what = f"Ray Serve, {systems.setting}: {how}"
    for adapter, figures in ((ON_RAY, ours), ("local", ours_local)):
        name = f"handle.call, sync, {adapter}, by Serve {systems.setting}"
        record(Row(name, "us", figures, by_kind[best], is_what, CALL_AIM))


@every_setting
def bench_http(systems: Systems, benchmark: Any, record: Callable[[Row], None]) -> None:
    serve, on_ray, local = (systems.peers[name].address() for name in ("serve", "ray", "local"))
    theirs, ours, ours_local = all_in_turns(
        benchmark, *(functools.partial(per_second, address) for address in (serve, on_ray, local)), rounds=HTTP_ROUNDS
    )
    for adapter, figures in ((ON_RAY, ours), ("local", ours_local)):
        name = f"HTTP no-op, c={CONNECTIONS}, {adapter}, by Serve {systems.setting}"
        record(Row(name, "req/s", figures, theirs, f"Ray Serve, {systems.setting}", HTTP_AIM))


@every_setting
def bench_idle(systems: Systems, record: Callable[[Row], None]) -> None:
    """The processor time that each system takes while nobody calls; the cluster's own processes belong to none."""
    quiet(systems.cluster)
    groups = systems.pids()
    rounds = [usage(groups, IDLE_S) for _ in range(IDLE_ROUNDS)]
    figures = {name: [100 * taken[name] for taken in rounds] for name in groups}
    print({name: [procs.title(pid)[:60] for pid in pids] for name, pids in groups.items()})
    print({name: statistics.median(taken) for name, taken in figures.items()})
    is_what = f"Ray Serve, {systems.setting}: controller, proxy, replica and two callers"
    for adapter, taken in ((ON_RAY, figures["ray"]), ("local", figures["local"])):
        name = f"idle, {adapter}, by Serve {systems.setting}"
        record(Row(name, "% of a CPU", taken, figures["serve"], is_what))


@without_serve
def bench_ref(systems: Systems, benchmark: Any, record: Callable[[Row], None]) -> None:
    peer = systems.peers["ray"]
    theirs, ours = in_turns(
        benchmark, lambda: peer.mean_us("actor", CALLS), lambda: peer.mean_us("ref", CALLS), rounds=REF_ROUNDS
    )
    is_what = "ray.get(actor.noop.remote(1)), a bare async Ray actor, in the same process"
    record(Row(f"handle.remote + ray.get, {ON_RAY}", "us", ours, theirs, is_what, REF_AIM))


@without_serve
def bench_alone(systems: Systems, benchmark: Any, record: Callable[[Row], None]) -> None:
    """The engines' figures of the tables above without Ray Serve's polling beside them."""
    on_ray, local = systems.peers["ray"], systems.peers["local"]
    calls_local, calls, http_local, http = all_in_turns(
        benchmark,
        lambda: local.mean_us("call", CALLS),
        lambda: on_ray.mean_us("call", CALLS),
        functools.partial(per_second, local.address()),
        functools.partial(per_second, on_ray.address()),
        rounds=HTTP_ROUNDS,
    )
    is_what = "the engine on local processes"
    record(Row(f"handle.call, sync, {ON_RAY}, no Ray Serve beside it", "us", calls, calls_local, is_what))
    record(Row(f"HTTP no-op, c={CONNECTIONS}, {ON_RAY}, no Ray Serve beside it", "req/s", http, http_local, is_what))


@bare_cluster
def bench_first_answer(systems: Systems, benchmark: Any, record: Callable[[Row], None]) -> None:
    """See `bench.first_answer` for what is inside the figures."""
    over_http: dict[str, list[float]] = {}

    def measure(system: str) -> float:
        quiet(systems.cluster)
        done = subprocess.run(
            [sys.executable, "-m", "bench.first_answer", system, systems.cluster.address],
            cwd=Path(__file__).parent.parent,
            env=systems.cluster.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_LIMIT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{system} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        taken = json.loads(done.stdout)
        over_http.setdefault(system, []).append(taken["http"])
        by_handle: float = taken["handle"]
        return by_handle

    theirs, ours = in_turns(benchmark, lambda: measure("serve"), lambda: measure(ON_RAY), rounds=START_ROUNDS)
    is_what = "Ray Serve, default: serve.start and serve.run, Ray connected and Serve imported before"
    name = f"Engine(backend={ON_RAY!r}) to first answer on a running cluster"
    record(Row(name, "s", ours, theirs, is_what, START_AIM))
    theirs, ours = (over_http[system][-len(ours) :] for system in ("serve", ON_RAY))
    record(Row(f"{name}, over HTTP", "s", ours, theirs, "the same, to its first HTTP answer"))


def per_second(address: tuple[str, int]) -> float:
    result = load.run(
        address, "/noop", requests=REQUESTS, connections=CONNECTIONS, limit_s=LIMIT_S, expect=BODY.encode()
    )
    print(address, result)
    result.check()
    return result.per_second
