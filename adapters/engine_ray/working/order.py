"""What a worker is told when its actor starts: the argument of `engine_ray.working.worker.RayWorker.run`."""

from __future__ import annotations

import logging
import os
import sys
from typing import NamedTuple

from engine.seam.worker import Listen

__all__ = ["Order", "Surroundings", "extend_path"]


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


class Order(NamedTuple):
    """Be this worker.

    Attributes:
        engine_id: The engine.
        worker_id: Unique within the engine.
        name: For people.
        entry: ``"module:function"``.
        payload: For the entry function.
        control_address: Where the controller is reached.
        secret: Proves that the worker belongs to the engine.
        listen: The public address to serve, with the real port where that is known already.
        shared: Whether other workers of this engine listen there already.
        surroundings: Of the application.
    """

    engine_id: str
    worker_id: str
    name: str
    entry: str
    payload: bytes
    control_address: str
    secret: bytes
    listen: Listen | None
    shared: bool
    surroundings: Surroundings
