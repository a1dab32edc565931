"""Programs that use the engine on the test run's Ray cluster, in processes of their own; and what runs there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ray_cluster import ENVIRONMENT

from engine.testing.instruments import is_running

__all__ = ["Actor", "Driver", "actors", "keys", "program_of"]

_PRELUDE = f"""
import json, os, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from engine import Engine, errors
from engine_ray import RayAdapter
from harness import take_stdout
from engine.testing.instruments import eventually

answers = take_stdout()

def say(value):
    answers.write(json.dumps(value) + "\\n")

def hear():
    return json.loads(sys.stdin.readline())

def pid(request):
    return os.getpid()

HTTP = {{"port": 0}}
NO_HTTP = {{"location": None}}
ADDRESS = sys.argv[1] or None
"""


def program_of(program: str, address: str = "") -> list[str]:
    """The command that runs a program: it has ``say`` and ``hear``, and ``ADDRESS`` of the cluster to connect to."""
    return [sys.executable, "-c", _PRELUDE + textwrap.dedent(program), address]


class Driver(subprocess.Popen[str]):
    """A program (see `program_of`) that talks in lines of JSON.

    The end of a `with` ends its standard input and waits for it; an error kills it.
    """

    def __init__(self, program: str, address: str = "", **environment: str) -> None:
        super().__init__(
            program_of(program, address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, **environment},
        )

    def hear(self) -> Any:
        """What it says next."""
        assert self.stdout is not None
        line = self.stdout.readline()
        if not line:
            raise AssertionError(f"the program ended with exit code {self.wait()}")
        return json.loads(line)

    def tell(self, value: Any) -> None:
        """Let it hear this."""
        assert self.stdin is not None
        self.stdin.write(json.dumps(value) + "\n")
        self.stdin.flush()

    def ended(self) -> int:
        """Its exit code, after the end of its input."""
        assert self.stdin is not None
        self.stdin.close()
        return self.wait()

    def kill_now(self) -> None:
        """SIGKILL, and its end."""
        self.kill()
        self.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, traceback)


class Actor(NamedTuple):
    """One of Ray's actors that is not dead."""

    actor_id: str
    kind: str
    pid: int

    def kill(self) -> None:
        """SIGKILL its process."""
        os.kill(self.pid, signal.SIGKILL)

    def gone(self) -> bool:
        return not is_running(self.pid)


def actors(kind: str | None = None) -> set[Actor]:
    """The cluster's actors, of this class."""
    import ray

    return {
        Actor(actor_id, entry["ActorClassName"], entry["Pid"])
        for actor_id, entry in ray._private.state.actors().items()
        if entry["State"] != "DEAD" and kind in (None, entry["ActorClassName"])
    }


def keys() -> set[bytes]:
    """What engines keep in the cluster's key-value store."""
    from ray.experimental import internal_kv

    return set(internal_kv._internal_kv_list(b"", namespace=b"engineroom"))
