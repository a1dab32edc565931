"""Create, use and shut down an engine many times in one process; print, as JSON, what each cycle left and took."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from typing import Any

from bench import procs
from engine import BackendConfig, Engine


@dataclass(frozen=True)
class Left:
    """What there is in and below this process after a cycle."""

    fds: int
    threads: int
    children: int
    seconds: float


def noop(request: Any) -> str:
    return "ok"


def cycle() -> Left:
    start = time.perf_counter()
    with Engine(backend="local", http_options={"host": "127.0.0.1", "port": 0}) as engine:
        engine.create_backend("noop", noop, config=BackendConfig(num_replicas=2))
        engine.create_endpoint("noop", backend="noop", route="/noop")
        if engine.get_handle("noop").call(1) != "ok":
            raise RuntimeError("wrong answer by handle")
        with urllib.request.urlopen(f"{engine.http_url}/noop", timeout=10) as response:
            if response.read() != b"ok":
                raise RuntimeError("wrong answer over HTTP")
    seconds = time.perf_counter() - start
    return Left(procs.open_fds(), procs.threads(), len(procs.descendants()), seconds)


if __name__ == "__main__":
    print(json.dumps([asdict(cycle()) for _ in range(int(sys.argv[1]))]))
