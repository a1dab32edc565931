"""Runs a measuring script of this package in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_script(name: str, *arguments: str, limit_s: float = 500.0) -> str:
    """The standard output of `python -m bench.<name>`.

    Raises:
        RuntimeError: it failed; its messages are part of the error.
        subprocess.TimeoutExpired: it took longer than `limit_s` seconds.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", *arguments],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"bench.{name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout
