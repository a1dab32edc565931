"""What a worker is told when its actor starts: the argument of `engine_ray.worker.RayWorker.run`."""

from __future__ import annotations

from typing import NamedTuple

from engine.adapter import Listen

__all__ = ["Order"]


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
        sys_path: The engine's; what this node has of it is appended to the worker's own.
        cwd: The engine's working directory, taken on where this node has it; None to stay.
        argv: The engine's ``sys.argv``.
        log_level: Of the root logger.
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
    sys_path: list[str]
    cwd: str | None
    argv: list[str]
    log_level: int
