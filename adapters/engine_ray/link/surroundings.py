"""What processes of an engine take on of the application's process."""

from __future__ import annotations

import logging
import os
import sys
from typing import NamedTuple

__all__ = ["Surroundings", "extend_path"]


class Surroundings(NamedTuple):
    """What a worker takes on of the process of the application.

    Attributes:
        sys_path: What the worker's node has of it is appended to the worker's own.
        cwd: The working directory, taken on where the worker's node has it; None to stay.
        argv: ``sys.argv``.
        log_level: Of the root logger.
    """

    sys_path: list[str]
    cwd: str | None
    argv: list[str]
    log_level: int

    @classmethod
    def here(cls) -> Surroundings:
        """Those of this process, now."""
        try:
            cwd: str | None = os.getcwd()
        except OSError:
            cwd = None  # it was removed
        paths = [path for path in sys.path if isinstance(path, str)]
        return cls(paths, cwd, list(getattr(sys, "argv", [""])), logging.getLogger().getEffectiveLevel())


def extend_path(paths: list[str]) -> None:
    """Let this process find modules where another one does, as far as this node has those places."""
    sys.path += [path for path in paths if path not in sys.path and os.path.exists(path)]
