"""The application of `bench.chaos.network`: an engine on a Ray cluster of several hosts, with callers on one of them.

As a script it takes the address of the cluster, the path of the marks and the names of two resources: one is the host
to which nothing will happen, of the other each replica takes one. It prints a line of JSON when it calls, goes on until
it is told a line, and then prints what became of the calls.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from engine import Engine

from .traffic import Marks, Traffic, Worker

REPLICAS = 4
CALL_S = 0.005


def main() -> None:
    """Serve, and call."""
    from engine_ray import RayAdapter

    address, path, safe, seat = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Ray prints
    with Engine(backend=RayAdapter(address=address), http_options={"port": 0}) as engine:
        # takes half of the seats of one host until the others are taken: Ray would be free to use one host alone
        filler: dict[str, Any] = {seat: 1, safe: 1}
        engine.create_backend(
            "filler", Worker, path, 0, config={"num_replicas": REPLICAS // 2}, ray_actor_options={"resources": filler}
        )
        config = {"num_replicas": REPLICAS, "max_retries": 3}  # over HTTP that goes for GET
        engine.create_backend("worker", Worker, path, CALL_S, config=config, ray_actor_options={"resources": {seat: 1}})
        engine.delete_backend("filler")
        engine.create_endpoint("worker", backend="worker", route="/worker", methods=["GET", "POST"])
        traffic = Traffic(engine, "worker", Marks(Path(path)))
        traffic.by_handle("handle", 4, idempotent=False)
        traffic.by_ref("ref", 2, idempotent=False)
        traffic.over_http("HTTP POST", 4, "/worker")
        traffic.by_handle("handle, idempotent", 4, idempotent=True)
        traffic.over_http("HTTP GET", 4, "/worker", "GET")
        with traffic.going_on():
            answers.write(json.dumps("calling") + "\n")
            sys.stdin.readline()
        answers.write(json.dumps([account.as_dict() for account in traffic.accounts]) + "\n")


if __name__ == "__main__":
    main()
