"""A worker's side of the adapter: the `engine.seam.worker.WorkerHost` of a process.

The control socket is read by a thread of its own (`engine_wire.worker_host`). When it reads end-of-file the engine is
gone, and the thread ends the process at once.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from engine.seam.connector import Connector
from engine.seam.service import Service
from engine_wire import SocketChannel, Undriven, WireWorkerHost, listen_unix

if TYPE_CHECKING:
    from .connector import LocalConnector

__all__ = ["LocalHost"]


class LocalHost(WireWorkerHost):
    """What a worker's entry function gets.

    Args:
        worker_id: Of this worker.
        control: Descriptor of the control socket.
        listening: Descriptors of the bound sockets of `engine.seam.worker.WorkerSpec.listen`.
        path: Where `serve` opens the worker's Unix socket.
        control_address: Where the controller hears this worker's handles.
    """

    log_name = "engine.local"

    def __init__(self, worker_id: str, control: int, listening: list[int], path: str, control_address: str) -> None:
        super().__init__(
            worker_id, lambda host: SocketChannel(socket.socket(fileno=control), host, Undriven(), greet=False)
        )
        self._path = path
        self._control_address = control_address
        self._connector: LocalConnector | None = None
        self._sockets = [socket.socket(fileno=descriptor) for descriptor in listening]

    def control_lost(self, reason: str) -> None:
        """End the process: its engine is gone. See `engine_wire.WireWorkerHost.control_lost`."""
        os._exit(1)

    # -- engine.seam.worker.WorkerHost ------------------------------------------------------------------------------

    def connector(self) -> Connector:
        """See `engine.seam.worker.WorkerHost.connector`."""
        if self._connector is None:
            from .connector import LocalConnector

            self._connector = LocalConnector(self._control_address)
        return self._connector

    def listen_sockets(self) -> list[Any]:
        """See `engine.seam.worker.WorkerHost.listen_sockets`."""
        return list(self._sockets)

    def serve(self, service: Service) -> None:
        """See `engine.seam.worker.WorkerHost.serve`."""
        self.serve_on([listen_unix(self._path)], f"unix:{self._path}", service)
