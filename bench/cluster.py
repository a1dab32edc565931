"""A Ray cluster of one node for a benchmark: its own directory, ports and token, and no process of it left afterwards.

`Cluster` starts this module as a script, the keeper, in a session of its own. The keeper is the subreaper of all that
Ray starts: a daemon whose parent has ended becomes the keeper's child, so that everything that belongs to the cluster
is a descendant of one process, whatever its title, group or parent was. When the keeper's standard input ends, by
`close` or because the benchmark died, it ends its descendants until there are none. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench import procs

PR_SET_CHILD_SUBREAPER = 36
START_LIMIT_S = 60.0
TERM_S = 5.0  # Ray's monitor sleeps through its SIGTERM for longer than anybody wants to wait
KILL_S = 10.0
OBJECT_STORE_BYTES = 100_000_000


class Cluster:
    """The running cluster and its keeper.

    Attributes:
        address: what `ray.init(address=...)` takes.
        environment: for processes that connect to it; Ray's and Ray Serve's other variables are left out of it.
        keeper: process id; all processes of the cluster are its descendants.

    Raises:
        RuntimeError: Ray did not start; its messages are part of the error.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        # short: HAProxy puts a socket into a directory named after the node, and takes 97 bytes for the whole path
        self._directory = Path(tempfile.mkdtemp(prefix="br."))
        haproxy = self._directory / "h"
        haproxy.mkdir()
        self.environment = {
            # settings for another cluster, or for another system in this run, must not reach this one
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            # Ray listens on every interface whatever the node's address; the token keeps others out, and it is what
            # `ray.init()` makes for a new cluster by itself. It costs Ray Serve's calls some percent at most
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # HAProxy of Ray Serve, if it is asked for: by default in one directory and on fixed ports of the machine
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            # 30 s by default between `serve.shutdown()` and the end of a replica with an HTTP port of its own
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            **(settings or {}),
        }
        with (self._directory / "keeper.log").open("w+") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.cluster", str(self._directory)],
                cwd=Path(__file__).parent.parent,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            self.keeper = self._process.pid
            assert self._process.stdout is not None
            answer = self._process.stdout.readline()
            if not answer:
                log.seek(0)
                messages = log.read()
                self.close()
                raise RuntimeError(f"the Ray cluster did not start:\n{messages}")
            self.address: str = json.loads(answer)["address"]

    def close(self) -> None:
        """Have the keeper end all processes of the cluster and remove its directory.

        Raises:
            RuntimeError: the keeper could not end all of them.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        status = self._process.wait(TERM_S + KILL_S + START_LIMIT_S)
        self._process.stdout.close()
        if status:
            raise RuntimeError(f"the keeper of the Ray cluster ended with {status}")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _start(directory: Path) -> str:
    """Start the head node and return its address."""
    options = {
        "node-ip-address": "127.0.0.1",
        "port": free_port(),
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        # by default from one fixed range, in which clusters on the same machine collide
        "min-worker-port": 0,
        "max-worker-port": 0,
        "include-dashboard": "false",
        "object-store-memory": OBJECT_STORE_BYTES,
        # slots, not CPUs: every system finds room for its actors without waiting
        "num-cpus": 8,
        "temp-dir": directory / "ray",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True, timeout=START_LIMIT_S)
    return (directory / "ray" / "ray_current_cluster").read_text().strip()


def _end_descendants() -> bool:
    """End all processes below this one; False if some are still there."""
    start = time.monotonic()
    while below := procs.descendants():
        waited = time.monotonic() - start
        if waited > TERM_S + KILL_S:
            return False
        for pid in below:
            try:
                os.kill(pid, signal.SIGTERM if waited < TERM_S else signal.SIGKILL)
            except ProcessLookupError:
                continue
        _reap()
        time.sleep(0.2)
    _reap()
    return True


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot become the subreaper of the cluster")
    try:
        print(json.dumps({"address": _start(Path(sys.argv[1]))}), flush=True)
        sys.stdin.buffer.read()
    finally:
        ended = _end_descendants()
        # here rather than in `close`: also when the benchmark was killed
        shutil.rmtree(sys.argv[1], ignore_errors=True)
    return 0 if ended else 1


if __name__ == "__main__":
    sys.exit(main())
