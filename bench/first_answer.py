"""Time to the first answers on a running Ray cluster: `python -m bench.first_answer serve|ADAPTER ADDRESS`.

Prints, as JSON, the seconds until the first answer by handle and until the first over HTTP, and ends what it started.

Outside the figures, for both alike: the interpreter, importing the engine or `ray.serve`, and connecting to Ray.
Inside: everything from the first call that starts something of its own: for Ray Serve its controller, proxy and
replica, for the engine its controller, ingress and replica. Both start their HTTP server before the first answer by
handle.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from typing import Any

from bench.bare_http import BODY


def noop(request: Any) -> str:
    return BODY


def check(answer: str) -> None:
    if answer != BODY:
        raise RuntimeError(f"answered {answer!r}")


def check_http(url: str) -> None:
    with urllib.request.urlopen(url, timeout=30) as response:
        check(response.read().decode())


def of_serve() -> tuple[float, float]:
    from ray import serve

    from bench import serve_peer

    start = time.perf_counter()
    handle, port = serve_peer.deploy()
    if serve_peer.constants()["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"]:
        check(handle.remote(1).result())
    else:  # see serve_peer
        loop = serve_peer.Loop()

        async def first() -> str:
            answer: str = await serve.get_app_handle("noop").remote(1)
            return answer

        check(loop.run(first()))
    by_handle = time.perf_counter() - start
    check_http(f"http://127.0.0.1:{port}{serve_peer.ROUTE}")
    over_http = time.perf_counter() - start
    serve.shutdown()
    return by_handle, over_http


def of_engine(adapter: str) -> tuple[float, float]:
    from engine import Engine

    start = time.perf_counter()
    with Engine(backend=adapter, http_options={"host": "127.0.0.1", "port": 0, "workers": 1}) as engine:
        engine.create_backend("noop", noop)
        engine.create_endpoint("noop", backend="noop", route="/noop")
        check(engine.get_handle("noop").call(1))
        by_handle = time.perf_counter() - start
        check_http(f"{engine.http_url}/noop")
        return by_handle, time.perf_counter() - start


def main() -> None:
    system, address = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed

    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    by_handle, over_http = of_serve() if system == "serve" else of_engine(system)
    out.write(json.dumps({"handle": by_handle, "http": over_http}))
    out.close()


if __name__ == "__main__":
    main()
