"""Instruments of this repository's own tests, beside those that any test of an engine may use."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TextIO

__all__ = ["run_python", "take_stdout"]


def take_stdout() -> TextIO:
    """This program's standard output, for its own lines alone: what anybody else prints goes to standard error now.

    A library that prints from a thread writes a line and its end separately, and what the program says in between would
    be lost to whoever reads line by line.
    """
    own = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return own


def run_python(*arguments: str, stdin: str = "", timeout_s: float = 50, **options: object) -> str:
    """Run a Python of its own to its end and return what it printed.

    Raises:
        AssertionError: It failed; the message has its standard error.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return str(done.stdout)
