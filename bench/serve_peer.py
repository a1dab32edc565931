"""Ray Serve with the no-op of the benchmarks: `python -m bench.serve_peer --address HOST:PORT`, a peer.

It deploys the no-op, or with `--attach` uses what another peer has deployed. Commands: `sync N` and `async N` (N handle
round trips one after the other: microseconds of each), `http` (host, port), `effect` (what the settings came to in
controller, proxy, replica and this process), `quit`.

Settings are environment variables that Ray Serve reads at import, in every process for itself. Controller, proxy and
replicas are actors whose environment comes from the raylet, so the variables have to be set when the cluster starts,
and here once more for the handle. `SETTINGS` holds them, `bench.cluster.Cluster` passes them to both.

What they do, after `ray/serve/_private/constants.py` of Ray 2.60:

RAY_SERVE_THROUGHPUT_OPTIMIZED=1
    User code and router run on the replica's main event loop instead of loops (threads) of their own, request logs are
    buffered, nothing is logged to stderr, handles use gRPC, the garbage collector is frozen, and each replica of the
    application's ingress deployment listens for HTTP itself ("direct ingress").
RAY_SERVE_USE_GRPC_BY_DEFAULT=1
    Calls travel by gRPC straight to the replica instead of as Ray actor calls. The variable above sets it as well, but
    after RAY_SERVE_PROXY_USE_GRPC was derived from it: without this one the proxy goes on with actor calls.
RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP
    0 by the first variable, and faster so in the proxy and in a handle that is awaited. But the handle then works in a
    running event loop only: `handle.remote(x).result()` needs 1 in the process that calls, and there alone: `SYNC`.
RAY_SERVE_ENABLE_HA_PROXY=1
    Ray's guide to high throughput sets it beside the first: HAProxy, in C, takes the place of Ray Serve's proxy and
    passes requests to the replica's own HTTP port. Handles are the same as without. Ray Serve's own proxy goes on idly.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from bench.bare_http import BODY
from bench.cluster import free_port
from bench.peer import Answers, each_us

T = TypeVar("T")

OPTIMISED = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "optimised": OPTIMISED,
    "HAProxy": {**OPTIMISED, "RAY_SERVE_ENABLE_HA_PROXY": "1"},
}
SYNC = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}
WATCHED = (
    "RAY_SERVE_THROUGHPUT_OPTIMIZED",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT",
    "RAY_SERVE_PROXY_USE_GRPC",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS",
    "RAY_SERVE_ENABLE_HA_PROXY",
)
WARM_UP = 200
MAX_ONGOING = 1000
ROUTE = "/noop"


def expected(setting: str) -> dict[str, Any]:
    """What `effect` has to report under a setting, by process, when this one runs with `SYNC`."""
    fast = setting != "default"
    everywhere = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": fast,
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": fast,
        "RAY_SERVE_PROXY_USE_GRPC": fast,
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": not fast,
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": not fast,
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": fast,
        "RAY_SERVE_ENABLE_HA_PROXY": setting == "HAProxy",
    }
    return {
        **dict.fromkeys(("controller", "replica"), everywhere),
        "proxy": [everywhere] * (2 if setting == "HAProxy" else 1),
        "driver": {**everywhere, "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": True},
    }


def constants() -> dict[str, bool]:
    """The watched settings as the process that runs this has understood them."""
    from ray.serve._private import constants as known

    return {name: bool(getattr(known, name)) for name in WATCHED}


def application() -> Any:
    """The no-op: `async def` is what Ray Serve's guides advise, and runs without a thread in either setting."""
    from ray import serve

    @serve.deployment(num_replicas=1, max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})
    class Noop:
        async def __call__(self, request: Any) -> str:
            return BODY

        async def constants(self) -> dict[str, bool]:
            return constants()

    return Noop.bind()


def deploy() -> tuple[Any, int]:
    """Start Ray Serve on the cluster that this process is connected to; returns its handle and its port."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    port = free_port()
    # a line of log for each request is the default; a public option spares Ray Serve at its best what the engine spares
    optimised = constants()["RAY_SERVE_THROUGHPUT_OPTIMIZED"]
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        logging_config={"enable_access_log": False} if optimised else None,
    )
    return serve.run(application(), name="noop", route_prefix=ROUTE), port


class Loop:
    """An event loop that runs for as long as the process: Ray Serve's router needs the loop it was made on to go on."""

    def __init__(self) -> None:
        import uvloop

        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait, asleep, until the coroutine has ended on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--address", required=True, help="of the Ray cluster")
    parser.add_argument("--attach", action="store_true", help="deploy nothing")
    args = parser.parse_args()
    answers = Answers()

    import ray
    from ray import serve

    ray.init(address=args.address, log_to_driver=False, logging_level="ERROR")
    handle, port = (serve.get_app_handle("noop"), None) if args.attach else deploy()
    loop = Loop()

    async def async_round(calls: int) -> list[float]:
        taken = []
        for _ in range(calls):
            start = time.perf_counter()
            await handle.remote(1)
            taken.append((time.perf_counter() - start) * 1e6)
        return taken

    def sync_round(calls: int) -> list[float]:
        return each_us(lambda: handle.remote(1).result(), calls)

    async def replica_constants() -> Any:
        return await handle.constants.remote()

    def effect() -> dict[str, Any]:
        def of_actor(actor: Any) -> Any:
            return ray.get(actor.__ray_call__.remote(lambda _self: constants()))

        actors = {
            entry["name"]: ray.get_actor(entry["name"], namespace="serve")
            for entry in ray.util.list_named_actors(all_namespaces=True)
            if entry["namespace"] == "serve"
        }
        return {
            "controller": of_actor(actors["SERVE_CONTROLLER_ACTOR"]),
            # with HAProxy two: its manager, and Ray Serve's own proxy for requests that no replica can take
            "proxy": [of_actor(actor) for name, actor in sorted(actors.items()) if "PROXY" in name],
            "replica": loop.run(replica_constants()),
            "driver": constants(),
            "handle": {"by_reference": handle.handle_options._by_reference, "router": type(handle._router).__name__},
            "actors": sorted(actors),
        }

    commands: dict[str, Any] = {"async": lambda calls: loop.run(async_round(calls))}
    if constants()["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"]:
        commands["sync"] = sync_round
    for command in commands.values():
        command(WARM_UP)
    answers.obey({**commands, "http": lambda: ("127.0.0.1", port), "effect": effect})
    # no `serve.shutdown()`: the cluster ends with all that runs on it, and that is faster and more certain


if __name__ == "__main__":
    main()
