"""A measured system in a process of its own that obeys one-line commands.

The conductor (`Peer`) writes a line such as `call 100` to the peer's standard input and reads one line of JSON from its
standard output. Every system is thus measured in a process that holds nothing else, by the same few lines, and the
conductor imports neither Ray nor the engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CLOSE_LIMIT_S = 60.0


class Peer:
    """The conductor's end: starts `python -m bench.<module> <arguments>` and waits until it is ready.

    Raises:
        RuntimeError: it ended before it was ready; its messages are part of the error.
    """

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._name = f"bench.{module}"
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._name, *arguments],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.pid = self._process.pid
        try:
            self._read()
        except RuntimeError:
            self.close()
            raise

    def ask(self, command: str) -> Any:
        """Have one command carried out and return what it answered.

        Raises:
            RuntimeError: the peer ended; its messages are part of the error.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reading end says more about it
        return self._read()

    def mean_us(self, command: str, calls: int) -> float:
        """The mean of a round of `calls` calls, each measured by the peer, in microseconds."""
        each = self.ask(f"{command} {calls}")
        assert len(each) == calls
        return sum(each) / calls

    def address(self) -> tuple[str, int]:
        """Where the system answers HTTP."""
        host, port = self.ask("http")
        return host, port

    def close(self) -> None:
        """Let it end; a peer that does not is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(CLOSE_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait(CLOSE_LIMIT_S)
            self._log.seek(0)
            raise RuntimeError(f"{self._name} ended with {status}:\n{self._log.read()[-4000:]}")
        return json.loads(line)


class Answers:
    """The peer's end of the conversation. Make it first: later, standard output belongs to whatever is printed."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def give(self, answer: Any) -> None:
        """Answer one command, or say that the peer is ready."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def obey(self, commands: Mapping[str, Callable[..., Any]]) -> None:
        """Carry out one command after the other until `quit` or the end of the input; arguments are whole numbers."""
        self.give("ready")
        for line in sys.stdin:
            name, *arguments = line.split()
            if name == "quit":
                return
            self.give(commands[name](*map(int, arguments)))


def each_us(call: Callable[[], Any], calls: int) -> list[float]:
    """Microseconds of each of so many calls, one after the other."""
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e6)
    return taken
