"""Which Python runs the fork server, and how it is started. Pure functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from engine.errors import InvalidArgument

__all__ = ["command", "home_of"]

_CURE = (
    "name one of this version, with engineroom and your modules installed, by LocalAdapter(python='/path/to/python')"
)


def home_of(module: ModuleType) -> str:
    """Where a package is found that a module stands directly in: a directory, or a zip archive."""
    return str(Path(str(module.__file__)).parent.parent)


def command(python: str | None, flags: Sequence[str], script: ModuleType, descriptor: int) -> list[str]:
    """What starts a fork server.

    Args:
        python: The user's choice of an interpreter, which then finds this package by itself; or None.
        flags: For the interpreter: as strict about warnings, as isolated and as optimised as this process is.
        script: `engine_local.boot`.
        descriptor: The fork server's socket.

    Raises:
        engine.errors.InvalidArgument: There is no interpreter.
    """
    if python is None and os.path.isfile(str(script.__file__)):
        return [_own_interpreter(), *flags, str(script.__file__), str(descriptor)]
    # Without the working directory, where anything may lie about; in a zip archive there are no files to name.
    path = "[path for path in sys.path if path]" if python is not None else f"[{home_of(script)!r}, *sys.path]"
    code = f"import sys; sys.path[:] = {path}; from engine_local.boot import main; main()"
    return [python if python is not None else _own_interpreter(), *flags, "-c", code, str(descriptor)]


def _own_interpreter() -> str:
    """The interpreter that runs this process.

    Raises:
        engine.errors.InvalidArgument: It cannot be started: what would start is the application.
    """
    if getattr(sys, "frozen", False):
        raise InvalidArgument(
            f"this application is frozen: {sys.executable!r} starts the application again, not a Python interpreter "
            f"for replicas; {_CURE}"
        )
    if not sys.executable:
        raise InvalidArgument(
            f"sys.executable is {sys.executable!r}: this process does not know its Python interpreter; {_CURE}"
        )
    return sys.executable
