"""The entry of an ingress worker: serves the ingress on its sockets until it is drained.

The main thread runs one asyncio loop (uvloop where it is installed; it is this worker's own, so no application's loop
changes). The worker's control thread only passes messages on to it. Nothing else here outlives `main`; whoever started
the worker sees to it that it dies with its engine.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..calling.client import Client
from ..config import HTTPOptions
from ..seam.control_messages import Drain, Drained, Ping, Pong, Ready, Started, StartFailed, Subscribe
from ..seam.event_loop import close_event_loop, new_event_loop
from ..seam.ingress_server import load_server
from ..seam.log import Log
from ..seam.serialization import pack_exception_briefly
from ..seam.workplace import Surrounding, enter_engine, enter_engine_here, is_worker
from .guard import wrap_middlewares
from .ingress import Ingress

if TYPE_CHECKING:
    from ..seam.worker import WorkerHost

__all__ = ["IngressSpec", "main"]

log = Log("engine.http")


@dataclass(frozen=True)
class IngressSpec:
    """Everything an ingress worker is made of.

    Attributes:
        engine_id: The engine.
        adapter_name: Where it runs.
        control_address: Where its controller is reached.
        options: How it serves.
        worker_id: Its own id.
        server: The name of an entry point in ``engine.ingress_servers``.
    """

    engine_id: str
    adapter_name: str
    control_address: str
    options: HTTPOptions
    worker_id: str
    server: str = "hypercorn"


def main(host: WorkerHost, payload: bytes) -> None:
    """Serve until drained (`engine.seam.worker.WorkerSpec.entry`).

    Args:
        host: The worker's side of the adapter.
        payload: A pickled `IngressSpec`.
    """
    host.tell(Started(os.getpid()))
    loop = new_event_loop()
    loop.set_exception_handler(_on_loop_error)
    worker: _Worker | None = None
    try:
        spec: IngressSpec = pickle.loads(payload)
        if is_worker():
            enter_engine(Surrounding(spec.engine_id, spec.adapter_name, spec.control_address))
        else:
            enter_engine_here(spec.engine_id)
        worker = _Worker(host, spec, loop)
        loop.run_until_complete(worker.run())
    except Exception as error:
        if worker is not None and worker.started:
            log.exception("an ingress worker failed")
            raise
        host.tell(StartFailed(pack_exception_briefly(error)))
        return
    finally:
        close_event_loop(loop)
    host.tell(Drained())


class _Worker:
    """One life of an ingress worker."""

    def __init__(self, host: WorkerHost, spec: IngressSpec, loop: asyncio.AbstractEventLoop) -> None:
        self.started = False
        self._host = host
        self._spec = spec
        self._loop = loop
        self._ingress: Ingress | None = None
        self._drain_within_s = 0.0
        self._draining = asyncio.Event()  # only the loop's thread touches it

    async def run(self) -> None:
        """Start, serve, drain."""
        spec = self._spec
        server = load_server(spec.server)
        request = Subscribe(ingress=True, worker_id=spec.worker_id)
        # It blocks this loop, which serves nobody yet.
        client = Client.find(spec.engine_id) or Client.subscribe(  # inline, the engine's own
            spec.engine_id, self._host.connector(), spec.control_address, request
        )
        options = spec.options
        self._ingress = Ingress(
            client,
            max_body_bytes=options.max_body_bytes,
            max_bodies_bytes=options.max_bodies_bytes,
            request_timeout_s=options.request_timeout_s,
            stall_timeout_s=options.stall_timeout_s,
            debug=options.debug,
            tells_details=options.tells_details,
            priority_header=options.priority_header,
        )
        app = wrap_middlewares(self._ingress, options.middlewares, debug=options.debug)
        self._host.on_control(self._control)
        serving = asyncio.ensure_future(
            server.serve(app, self._host.listen_sockets(), options, started=self._has_started, stopping=self._stopping)
        )
        draining = asyncio.ensure_future(self._draining.wait())
        await asyncio.wait([serving, draining], return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        if not serving.done():
            await asyncio.wait([serving], timeout=self._drain_within_s)
            if not serving.done():
                left = self._ingress.in_flight
                log.warning("%d HTTP requests did not end within %g s and were broken off", left, self._drain_within_s)
                serving.cancel()
                await asyncio.wait([serving])
        if not serving.cancelled():
            serving.result()

    def _has_started(self) -> None:
        self.started = True
        self._host.tell(Ready(""))

    async def _stopping(self) -> bool:
        await self._draining.wait()
        # An engine drains its ingresses when it ends, and only then. One that is killed in a thread may be replaced.
        return self._drain_within_s > 0

    def _control(self, body: Any) -> None:
        # on the worker's control thread
        try:
            if isinstance(body, Ping):  # one whose loop does not turn serves nobody
                self._loop.call_soon_threadsafe(self._answer, body.token)
            elif isinstance(body, Drain):
                self._loop.call_soon_threadsafe(self._drain, body.timeout_s)
        except RuntimeError:
            pass  # the loop is closed: the worker is leaving already

    def _answer(self, token: int) -> None:
        self._host.tell(Pong(token, self._ingress.in_flight if self._ingress is not None else 0))

    def _drain(self, timeout_s: float) -> None:
        if not self._draining.is_set():
            self._drain_within_s = timeout_s
            if self._ingress is not None:
                self._ingress.begin_drain()
            self._draining.set()


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(error, (ssl.SSLError, ConnectionError)):
        log.debug("a client's connection failed: %s", error)  # a port scan, a client that distrusts the certificate
    else:
        loop.default_exception_handler(context)
