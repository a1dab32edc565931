"""A Ray cluster of one node for a whole test run, in a process of its own, so that it is nobody's leftover.

As a script it starts the cluster, prints its address and ends it when its standard input does: also when the test run
was killed. `RayCluster` is the test run's side.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from types import TracebackType

from harness import take_stdout

__all__ = ["ENVIRONMENT", "RayCluster", "why_not"]

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
"""Of clusters for tests: a token would be kept in the user's home."""
_STOP_S = 30.0


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    from importlib.util import find_spec

    return None if find_spec("ray") is not None else 'Ray is not installed: pip install "engineroom[ray]"'


class RayCluster:
    """Starts the cluster, and connects this process to it.

    Attributes:
        address: Of the cluster's head.
        pid: Of the process that everything of the cluster descends from.
    """

    def __init__(self) -> None:
        # Not below the test run's own directory: Ray puts Unix sockets there, whose paths must be short.
        self._directory = tempfile.mkdtemp(prefix="ray-")
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            self._end()
            raise RuntimeError("the Ray cluster for the tests did not start")

    def __enter__(self) -> RayCluster:
        import ray

        try:
            ray.init(address=self.address, log_to_driver=False, configure_logging=False)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()
        self._end()

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def main() -> None:
    """Be the cluster."""
    import ray

    answers = take_stdout()
    os.setpgid(0, 0)  # a terminal's Ctrl-C is for the test run to handle
    ray.init(
        address="local",
        num_cpus=8,  # they are only counted
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 1024 * 1024,
        _temp_dir=sys.argv[1],
    )
    answers.write(f"{ray.get_runtime_context().gcs_address}\n")
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
