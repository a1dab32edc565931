"""A worker's side of the adapter: the `engine.adapter.WorkerHost` of a process.

Owns the control socket, read by a thread of its own, so that health, drain and logging work while user code has the
main thread. When the socket reads end-of-file the engine is gone, and the thread ends the process at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.adapter import Adapter, Channel, ChannelClosed, Service
from engine.control import Ready, StartFailed
from engine.messages import Control, Message
from engine_wire import SocketChannel, Undriven, listen_unix

if TYPE_CHECKING:
    from .connector import LocalConnector

__all__ = ["LocalHost"]


class LocalHost:
    """What a worker's entry function gets.

    Args:
        worker_id: Of this worker.
        control: Descriptor of the control socket.
        listening: Descriptors of the bound sockets of `engine.adapter.WorkerSpec.listen`.
        path: Where `serve` opens the worker's Unix socket.
        control_address: Where the controller hears this worker's handles.
    """

    def __init__(self, worker_id: str, control: int, listening: list[int], path: str, control_address: str) -> None:
        self.worker_id = worker_id
        self.settled = False  # whether the controller knows if this worker could start
        self.is_copy = False  # whether this is a process that user code forked off the worker
        self._path = path
        self._control_address = control_address
        self._connector: LocalConnector | None = None
        self._sockets = [socket.socket(fileno=descriptor) for descriptor in listening]
        self._lock = threading.RLock()  # guards the next two; held while a handler runs, so that order is kept
        self._handler: Callable[[Any], None] | None = None
        self._early: deque[Any] = deque()
        self._channel = SocketChannel(socket.socket(fileno=control), self, Undriven(), greet=False)

    def start(self) -> None:
        """Start the control thread."""
        # A child that user code forks is not this worker: it must neither keep the socket open nor speak for it.
        os.register_at_fork(after_in_child=self._disown)
        threading.Thread(target=self._read, name="engine-control", daemon=True).start()

    # -- engine.adapter.WorkerHost -----------------------------------------------------------------------------------

    def tell(self, body: Any) -> None:
        """See `engine.adapter.WorkerHost.tell`."""
        if isinstance(body, (Ready, StartFailed)):
            self.settled = True
        if self.is_copy:
            return
        try:
            self._channel.send(Control(body))
        except ChannelClosed:
            pass  # the engine is gone, and this process about to follow

    def adapter(self) -> Adapter:
        """See `engine.adapter.WorkerHost.adapter`."""
        if self._connector is None:
            from .connector import LocalConnector

            self._connector = LocalConnector(self._control_address)
        return self._connector

    def listen_sockets(self) -> list[Any]:
        """See `engine.adapter.WorkerHost.listen_sockets`."""
        return list(self._sockets)

    def on_control(self, handler: Callable[[Any], None]) -> None:
        """See `engine.adapter.WorkerHost.on_control`."""
        with self._lock:
            self._handler = handler
            if self._early:
                threading.Thread(target=self._catch_up, name="engine-control-early", daemon=True).start()

    def serve(self, service: Service) -> None:
        """See `engine.adapter.WorkerHost.serve`."""
        from engine_wire import BlockingHost, LoopHost

        if service.on_loop:
            with contextlib.suppress(ImportError):
                import uvloop  # noqa: F401 - before callers come, so that the first one does not wait for it
        listening = listen_unix(self._path)
        try:
            self.tell(Ready(f"unix:{self._path}"))
            (LoopHost if service.on_loop else BlockingHost)([listening], service).run()
        finally:
            listening.close()

    # -- the control thread ------------------------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """Pass a control body on. See `engine.adapter.ChannelListener.received`."""
        if isinstance(message, Control):
            with self._lock:
                self._early.append(message.body)
                self._deliver()

    def lost(self, channel: Channel, reason: str) -> None:
        """End the process: its engine is gone. See `engine.adapter.ChannelListener.lost`."""
        os._exit(1)

    def _read(self) -> None:
        self._channel.drive(lambda: False, None)

    def _catch_up(self) -> None:
        with self._lock:
            self._deliver()

    def _deliver(self) -> None:
        while self._handler is not None and self._early:
            try:
                self._handler(self._early.popleft())
            except Exception:
                import logging

                logging.getLogger("engine.local").exception("a control message could not be handled")

    # -- after a fork by user code -----------------------------------------------------------------------------------

    def _disown(self) -> None:
        self.is_copy = True
        self._channel.sock.close()
