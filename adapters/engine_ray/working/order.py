"""What a worker is told when its actor starts: the argument of `engine_ray.working.worker.RayWorker.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from engine.seam.worker import Listen

from ..link.surroundings import Surroundings

if TYPE_CHECKING:
    from engine_wire.tls import TLS

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
        surroundings: Of the application.
        tls: Who the worker is to other nodes, if the engine uses TLS between them.
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
    tls: TLS | None = None
