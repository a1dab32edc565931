"""A worker that is a thread of the engine's own process."""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.seam.connector import Connector
from engine.seam.control_messages import Drain, Ready
from engine.seam.log import Log
from engine.seam.service import Service
from engine.seam.worker import WorkerSpec

from .channel import InlineChannel, Mailbox

if TYPE_CHECKING:
    import socket

__all__ = ["InlineHost"]

_logger = Log("engine.inline")


class InlineHost:
    """Runs a worker's entry on a daemon thread.

    Killing a thread is impossible: `kill` makes the worker deaf and lets its thread end when user code returns. Its
    callers learn of it at once.

    Args:
        spec: What to run.
        sockets: The bound sockets of ``spec.listen``.
        connector: Makes calls from here.
        said: Gets what the worker says.
        left: Told that its thread has ended, and how.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        sockets: list[socket.socket],
        connector: Connector,
        said: Callable[[InlineHost, Any], None],
        left: Callable[[InlineHost, str], None],
    ) -> None:
        self.worker_id = spec.worker_id
        self.service: Service | None = None
        self.mailbox = Mailbox()
        self.killed = False
        self._spec = spec
        self._sockets = sockets
        self._connector = connector
        self._said = said
        self._left = left
        self._lock = threading.Lock()  # guards the next four
        self._channels: list[InlineChannel] = []
        self._hung_up = False  # takes no more channels
        self._handler: Callable[[Any], None] | None = None
        self._unheard: deque[Any] = deque()
        self._changed: asyncio.Event | None = None
        self.thread = threading.Thread(target=self._run, name=f"engine-{spec.name}", daemon=True)

    # -- WorkerHost --------------------------------------------------------------------------------------------------

    def tell(self, body: Any) -> None:
        """See `engine.seam.worker.WorkerHost.tell`."""
        self._said(self, body)

    def connector(self) -> Connector:
        """See `engine.seam.worker.WorkerHost.connector`."""
        return self._connector

    def listen_sockets(self) -> list[Any]:
        """See `engine.seam.worker.WorkerHost.listen_sockets`."""
        return self._sockets

    def on_control(self, handler: Callable[[Any], None]) -> None:
        """See `engine.seam.worker.WorkerHost.on_control`; the handler runs on the controller's thread."""
        with self._lock:
            self._handler = handler
            unheard, self._unheard = self._unheard, deque()
        for body in unheard:
            handler(body)

    def serve(self, service: Service) -> None:
        """See `engine.seam.worker.WorkerHost.serve`."""
        self.service = service
        if service.event_loop is not None:
            service.event_loop.run_until_complete(self._serve_on_loop(service))
            return
        # Nobody looks later how long user code takes: whoever posts something meanwhile does.
        self.mailbox.meanwhile = service.delayed
        self.mailbox.take_turn()
        try:
            service.attach(self)
            self.tell(Ready(f"inline:{self.worker_id}"))
            while True:
                wait = service.run_next()
                if service.finished() or self.killed:
                    break
                self.mailbox.run_pending(wait)
        finally:
            self.mailbox.close()

    async def _serve_on_loop(self, service: Service) -> None:
        self._changed = asyncio.Event()
        self.mailbox.bind(asyncio.get_running_loop())
        service.attach(self)
        self.tell(Ready(f"inline:{self.worker_id}"))
        while not (service.finished() or self.killed):
            await self._changed.wait()
            self._changed.clear()

    # -- ServiceLoop -------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """See `engine.seam.service.ServiceLoop.wake`."""
        self.mailbox.post(self._changed.set if self._changed is not None else None)

    def poll(self, timeout_s: float | None) -> None:
        """See `engine.seam.service.ServiceLoop.poll`."""
        self.mailbox.run_pending(timeout_s)

    def step_out(self) -> None:
        """See `engine.seam.service.ServiceLoop.step_out`."""
        self.mailbox.step_out()

    def step_in(self) -> None:
        """See `engine.seam.service.ServiceLoop.step_in`."""
        self.mailbox.step_in()

    def open_channels(self) -> int:
        """See `engine.seam.service.ServiceLoop.open_channels`."""
        with self._lock:
            self._channels = [channel for channel in self._channels if not channel.closed]
            return len(self._channels)

    # -- the adapter's side ------------------------------------------------------------------------------------------

    def hear(self, body: Any) -> None:
        """Pass a control message to the worker."""
        with self._lock:
            handler = self._handler
            if handler is None:
                self._unheard.append(body)
                return
        handler(body)

    def add_channel(self, channel: InlineChannel) -> bool:
        """A caller connected; False if the worker has hung up already."""
        with self._lock:
            if not self._hung_up:
                self._channels.append(channel)
            return not self._hung_up

    def kill(self) -> None:
        """Make the worker deaf and let its thread end as soon as it can; its callers lose their channels now."""
        self.killed = True
        self._hang_up("was killed")
        self.hear(Drain(0.0))
        self.wake()

    def _hang_up(self, reason: str) -> None:
        with self._lock:
            self._hung_up = True
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.cut(reason)

    def _run(self) -> None:
        reason = "left"
        try:
            module, _, name = self._spec.entry.partition(":")
            getattr(importlib.import_module(module), name)(self, self._spec.payload)
        except BaseException as error:
            reason = f"failed with {type(error).__name__}: {error}"
            _logger.exception("%s failed", self._spec.name)
        self._hang_up(reason)
        self._left(self, reason)
