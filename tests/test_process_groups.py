"""How the local adapter ends what a worker has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import pytest

from engine.testing.instruments import PATIENCE_S
from engine_local import process
from engine_local.forkserver import ForkServer
from engine_local.orders import Kill

TIDIES_UP = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
pathlib.Path(sys.argv[1]).touch()
"""


@pytest.fixture
def member(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Leads a group and takes no notice of SIGTERM; when its input ends, it tidies up and leaves."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", TIDIES_UP, str(tmp_path / "tidy")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as member:
        cast("IO[bytes]", member.stdout).readline()
        yield member
        member.kill()


def test_what_tidies_up_after_a_worker_is_waited_for(
    member: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_TIDYING_S", PATIENCE_S)
    cast("IO[bytes]", member.stdin).close()
    process.end_group(member.pid)
    assert (tmp_path / "tidy").exists()
    process.end_group(member.pid)  # nobody is left


def test_what_stays_is_killed(member: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_TIDYING_S", 0.01)
    process.end_group(member.pid)
    assert member.wait(PATIENCE_S) == -signal.SIGKILL
    assert not (tmp_path / "tidy").exists()


def test_a_worker_is_killed_before_what_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """That tidies up after it."""
    signals: list[tuple[str, int, int]] = []
    for name in ("kill", "killpg"):
        monkeypatch.setattr(os, name, lambda pid, number, name=name: signals.append((name, pid, number)))
    server = ForkServer.__new__(ForkServer)
    server._pids = {"w#1": 12345}
    server._obey(Kill("w#1"))
    server._obey(Kill("w#2"))
    assert signals == [("kill", 12345, signal.SIGKILL)]
