"""A worker's side of any adapter whose controller it hears through a socket.

Owns the control channel, read by a thread of its own, so that health, drain and logging work while user code has the
main thread. Bodies reach the handler one at a time and in the order they were sent; those that came before there was a
handler are kept for it. What the end of the channel means is for the adapter to say (`WireWorkerHost.control_lost`).

A process that user code forks off the worker is not the worker: it lets go of the channel and speaks for nobody.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.seam.channel import Channel, ChannelClosed, ChannelListener
from engine.seam.control_messages import LogLine, Ping, Ready, StartFailed
from engine.seam.messages import Control, Message
from engine.seam.service import Service

from .channel import SocketChannel
from .outlet import Outlet
from .spare_memory import SpareMemory

if TYPE_CHECKING:
    from .tls import TLS

__all__ = ["WireWorkerHost"]

_DROPPED = "lines of this worker were dropped here, because the engine's process did not read them"


class WireWorkerHost:
    """The part of an `engine.seam.worker.WorkerHost` that all socket-based adapters share.

    Args:
        worker_id: Of this worker.
        control: Makes the channel to the controller for its listener, to be driven by the control thread.

    Attributes:
        settled: Whether the controller knows if this worker could start.
        is_copy: Whether this is a process that user code forked off the worker.
    """

    log_name = "engine.wire"
    """Of the logger that hears of handlers that failed."""

    def __init__(self, worker_id: str, control: Callable[[ChannelListener], SocketChannel]) -> None:
        self.worker_id = worker_id
        self.settled = False
        self.is_copy = False
        self._lock = threading.RLock()  # guards the next two; held while a handler runs, so that order is kept
        self._handler: Callable[[Any], None] | None = None
        self._early: deque[Any] = deque()
        self._say_lock = threading.RLock()  # guards the next two; a signal handler may log, too
        self._outlet = Outlet()
        self._unsaid = 0  # lines that were dropped since the last that was not
        self._spare_memory = SpareMemory()
        self._channel = control(self)

    def start(self) -> None:
        """Start the control thread."""
        # A child that user code forks is not this worker: it must neither keep the socket open nor speak for it.
        os.register_at_fork(after_in_child=self._disown)
        threading.Thread(target=self._read, name="engine-control", daemon=True).start()

    def control_lost(self, reason: str) -> None:
        """The controller is gone, or the way to it. Called once, on the control thread, which then ends."""
        raise NotImplementedError

    # -- engine.seam.worker.WorkerHost ------------------------------------------------------------------------------

    def tell(self, body: Any) -> None:
        """See `engine.seam.worker.WorkerHost.tell`."""
        if isinstance(body, (Ready, StartFailed)):
            self.settled = True
        if self.is_copy:
            return
        try:
            self._channel.send(Control(body))
        except ChannelClosed:
            pass  # as the control thread finds, and `control_lost` hears

    def say(self, line: LogLine) -> None:
        """As `tell`, for what user code prints and logs: it is dropped if the engine does not read it in time."""
        if self.is_copy:
            return
        with self._say_lock:
            if not self._outlet.takes(self._channel.fd):
                self._unsaid += 1
                return
            unsaid, self._unsaid = self._unsaid, 0
            if unsaid:
                self.tell(LogLine(logging.WARNING, self.log_name, f"{unsaid} {_DROPPED}"))
            self.tell(line)

    def on_control(self, handler: Callable[[Any], None]) -> None:
        """See `engine.seam.worker.WorkerHost.on_control`."""
        with self._lock:
            self._handler = handler
            if self._early:
                threading.Thread(target=self._catch_up, name="engine-control-early", daemon=True).start()

    def serve_on(
        self,
        listening: Sequence[socket.socket],
        address: str,
        service: Service,
        *,
        secret: bytes | None = None,
        tls: TLS | None = None,
    ) -> None:
        """Tell the controller the worker's address and run the service on the calling thread until it is finished.

        Args:
            listening: Where callers connect; closed at the end.
            address: That leads there.
            service: That it runs.
            secret: What callers must prove to know.
            tls: With a secret: who this side is towards callers that come over TCP, who then have to use TLS.
        """
        from .service_loops import AsyncServiceLoop, BlockingServiceLoop

        try:
            self.tell(Ready(address))
            kind = BlockingServiceLoop if service.event_loop is None else AsyncServiceLoop
            kind(listening, service, secret=secret, tls=tls).run()
        finally:
            for sock in listening:
                sock.close()

    # -- the control thread ------------------------------------------------------------------------------------------

    def received(self, channel: Channel, message: Message) -> None:
        """Pass a control body on. See `engine.seam.channel.ChannelListener.received`."""
        if isinstance(message, Control):
            with self._lock:
                self._early.append(message.body)
                self._deliver()
            if isinstance(message.body, Ping):
                self._spare_memory.look()

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`."""
        self.control_lost(reason)

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
                from engine.seam.log import Log

                Log(self.log_name).exception("a control message could not be handled")

    # -- after a fork by user code -----------------------------------------------------------------------------------

    def _disown(self) -> None:
        self.is_copy = True
        self._channel.sock.close()
