"""The engine with the no-op of the benchmarks: `python -m bench.engine_peer ADAPTER [--address HOST:PORT]`, a peer.

Commands: `call N` (`handle.call`), `ref N` (`handle.remote` and waiting for its ref), `actor N` (the same no-op as a
bare async Ray actor, if connected to a cluster): microseconds of each of N round trips; `http` (host, port); `quit`.
"""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import urlsplit

from bench.bare_http import BODY
from bench.peer import Answers, each_us

WARM_UP = 200


def noop(request: Any) -> str:
    return BODY


def bare_actor() -> Any:
    """A Ray actor that does the no-op and nothing else."""
    import ray

    @ray.remote(num_cpus=0)
    class Bare:
        async def noop(self, request: Any) -> str:
            return BODY

    return Bare.remote()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("adapter")
    parser.add_argument("--address", help="of a Ray cluster to connect to first")
    args = parser.parse_args()
    answers = Answers()

    from engine import Engine

    commands: dict[str, Any] = {}
    if args.address:
        import ray

        ray.init(address=args.address, log_to_driver=False, logging_level="ERROR")
        actor = bare_actor()
        commands["actor"] = lambda calls: each_us(lambda: ray.get(actor.noop.remote(1)), calls)

    with Engine(backend=args.adapter, http_options={"host": "127.0.0.1", "port": 0, "workers": 1}) as engine:
        engine.create_backend("noop", noop)
        engine.create_endpoint("noop", backend="noop", route="/noop")
        handle = engine.get_handle("noop")
        wait = ray.get if args.address and isinstance(handle.remote(1), ray.ObjectRef) else engine.get
        commands["call"] = lambda calls: each_us(lambda: handle.call(1), calls)
        commands["ref"] = lambda calls: each_us(lambda: wait(handle.remote(1)), calls)
        for command in commands.values():
            command(WARM_UP)
        url = urlsplit(engine.http_url)
        commands["http"] = lambda: (url.hostname, url.port)
        answers.obey(commands)


if __name__ == "__main__":
    main()
