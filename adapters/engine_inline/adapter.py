"""Replicas inside the calling process: the reference adapter, for unit tests and debugging.

Every worker is a daemon thread. Arguments and results are pickled as for any other adapter, so that a test that passes
here passes with processes. What a thread cannot have (its own processors, devices or environment) is refused by name
in one log line.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from engine.seam.adapter import AdapterBase, AdapterEvents, Node
from engine.seam.channel import Channel, ChannelClosed, ChannelListener
from engine.seam.log import Log
from engine.seam.worker import Listen, WorkerExit, WorkerSpec
from engine_wire.listening import ListeningSockets

from .channel import connect
from .host import InlineHost

__all__ = ["InlineAdapter"]

_logger = Log("engine.inline")
_LOOK_S = 0.002
_JOIN_S = 2.0
"""How long `stop` waits for threads to end. One that is deep in user code is left behind: it cannot be killed."""


class InlineAdapter(AdapterBase):
    """Runs workers as threads of this process."""

    name = "inline"
    shares_process = True

    def __init__(self) -> None:
        self.control_address = "inline:controller"
        self._hosts: dict[str, InlineHost] = {}  # the controller's loop adds and removes; others only look up
        self._threads: list[threading.Thread] = []  # also of workers that count as gone; only the loop touches it
        self._sockets = ListeningSockets()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: AdapterEvents | None = None

    # -- workers -----------------------------------------------------------------------------------------------------

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """See `engine.seam.adapter.Adapter.start`."""
        self._loop = asyncio.get_running_loop()
        self._events = events

    async def start_worker(self, spec: WorkerSpec) -> None:
        """See `engine.seam.adapter.Adapter.start_worker`."""
        needs = spec.resources
        ignored = [name for name, given in (("num_gpus", needs.num_gpus), ("env_vars", needs.env_vars)) if given]
        if ignored or needs.other:
            _logger.info("%s: the inline adapter ignores %s", spec.name, ", ".join([*ignored, *needs.other]))
        sockets = [self._sockets.get(spec.listen)] if spec.listen is not None else []
        host = self._hosts[spec.worker_id] = InlineHost(spec, sockets, self, self._worker_said, self._worker_left)
        host.thread.start()
        self._threads = [thread for thread in self._threads if thread.is_alive()] + [host.thread]

    def tell(self, worker_id: str, body: Any) -> None:
        """See `engine.seam.adapter.Adapter.tell`."""
        host = self._hosts.get(worker_id)
        if host is not None:
            host.hear(body)

    def kill_worker(self, worker_id: str) -> None:
        """See `engine.seam.adapter.Adapter.kill_worker`: the worker counts as gone now, its thread ends when it can."""
        host = self._hosts.get(worker_id)
        if host is not None:
            host.kill()
            self._worker_left(host, "was killed")

    def bound(self, listen: Listen, node_id: str) -> Listen:
        """See `engine.seam.adapter.Adapter.bound`."""
        return self._sockets.bound(listen)

    def nodes(self) -> tuple[Node, ...]:
        """See `engine.seam.adapter.Adapter.nodes`."""
        return (Node(f"process-{os.getpid()}", "127.0.0.1"),)

    async def stop(self) -> None:
        """See `engine.seam.adapter.Adapter.stop`."""
        for host in list(self._hosts.values()):
            host.kill()
        self._hosts.clear()
        deadline = time.monotonic() + _JOIN_S
        # They are looked at again and again: at the end of the interpreter there are no threads to wait for them.
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        self._threads.clear()
        self._sockets.close()

    # -- channels ----------------------------------------------------------------------------------------------------

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> Channel:
        """See `engine.seam.connector.Connector.open_channel`."""
        host = self._hosts.get(address.removeprefix("inline:"))
        if host is None or host.killed or host.service is None:
            raise ChannelClosed(f"nobody answers at {address}")
        deliver = _deliver_on(asyncio.get_running_loop()) if on_loop else _deliver_here
        channel, far = connect(listener, deliver, host.service, host.mailbox)
        if not host.add_channel(far):
            raise ChannelClosed(f"nobody answers at {address}")
        return channel

    def close(self) -> None:
        """See `engine.seam.connector.Connector.close`: nothing to release."""

    # -- what the workers say, on their threads ------------------------------------------------------------------------

    def _worker_said(self, host: InlineHost, body: Any) -> None:
        """Pass a worker's message to the controller."""
        if not host.killed:
            self._report(lambda events: events.worker_said(host.worker_id, body))

    def _worker_left(self, host: InlineHost, reason: str) -> None:
        """A worker's thread ended, or the worker was killed."""

        def report(events: AdapterEvents) -> None:
            if self._hosts.get(host.worker_id) is host:
                del self._hosts[host.worker_id]
                events.worker_exited(WorkerExit(host.worker_id, reason))

        self._report(report)

    def _report(self, say: Callable[[AdapterEvents], None]) -> None:
        assert self._loop is not None and self._events is not None
        try:
            self._loop.call_soon_threadsafe(say, self._events)
        except RuntimeError:
            pass  # the engine is closed


def _deliver_here(function: Callable[[], object]) -> None:
    function()


def _deliver_on(loop: asyncio.AbstractEventLoop) -> Callable[[Callable[[], object]], None]:
    home = threading.get_ident()

    def deliver(function: Callable[[], object]) -> None:
        try:
            if threading.get_ident() == home:
                loop.call_soon(function)
            else:
                loop.call_soon_threadsafe(function)
        except RuntimeError:
            pass  # the caller's loop is closed: nobody listens

    return deliver
