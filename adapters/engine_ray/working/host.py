"""A worker's side of the adapter: the `engine.seam.worker.WorkerHost` of an actor's process.

Opens the worker's channel to the controller, read by a thread of its own, and the sockets on which it is called: a Unix
socket for callers on its node and TCP on the node's address for all others. When the controller is lost, the engine is
gone, and the process ends at once; unless the engine is detached: then the worker goes on, and looks for the next
controller until there is one, or the engine was shut down. A controller of that kind which is stopped, on the same
node, is killed by its workers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

from engine.errors import EngineClosed, InvalidArgument
from engine.seam.channel import ChannelClosed, ChannelListener
from engine.seam.connector import Connector
from engine.seam.control_messages import Ready, Started
from engine.seam.log import Log
from engine.seam.messages import Control
from engine.seam.service import Service
from engine_wire import SocketChannel, Undriven, WireWorkerHost, connect, notice_silence, process_behind
from engine_wire.listening import bind_shared
from engine_wire.vitals import LOOK_EVERY_S, STOPPED_S, vitals_of

from ..calling.addresses import Address, is_symbolic
from ..calling.carried import refuse_refs
from ..calling.refs import RayCaller
from ..link.sockets import listen_everywhere
from .bodies import Bound, Hello, Leaving
from .order import Order

__all__ = ["RayHost"]

_log = Log("engine.ray")
_RETRY_S = 0.2
"""Between looks for the next controller: Ray's store tells nobody of a changed row, so who waits for one asks again."""
_OPEN_WITHIN_S = 20.0
"""For a connection that TCP itself gives up after 11 s, and the handshake on it."""
_leave_process = os._exit  # user code's calls are heard of (`engine_ray.working.worker`); this one is none


class RayHost(WireWorkerHost):
    """What a worker's entry function gets.

    Args:
        order: What the worker is to be.

    Raises:
        engine.errors.EngineClosed: The controller is gone.
    """

    log_name = "engine.ray"

    def __init__(self, order: Order) -> None:
        refuse_refs()  # as results
        self._order = order
        self._why_lost = ""
        self._standing: dict[type, Any] = {}  # what every controller must know
        self._connector = RayCaller(order.control_address, order.secret, order.tls)
        super().__init__(order.worker_id, self._reach_controller)
        self.tell(self._hello())

    def _reach_controller(self, listener: ChannelListener) -> SocketChannel:
        try:
            address = self._connector.locate(self._order.control_address).seen_from(self._connector.node_id())
            channel = connect(
                address,
                listener,
                on_loop=False,
                poller=Undriven(),
                secret=self._order.secret,
                tls=self._order.tls,
            )
        except ChannelClosed as error:
            raise EngineClosed(f"the engine that started this worker is gone: {error}") from error
        channel.drive(lambda: channel.opened, _OPEN_WITHIN_S)
        if not channel.opened:
            channel.close()
            why = self._why_lost or f"no answer within {_OPEN_WITHIN_S:g} s"
            raise EngineClosed(
                f"the controller of the engine cannot be reached at {address} from this worker's node: {why}; are all "
                "TCP ports open between the nodes?"
            )
        notice_silence(channel.sock)
        return channel

    def _hello(self) -> Hello:
        return Hello(self.worker_id, self._connector.node_id(), os.getpid())

    def tell(self, body: Any) -> None:
        """See `engine.seam.worker.WorkerHost.tell`."""
        if isinstance(body, (Started, Ready, Bound)):
            self._standing[type(body)] = body
        super().tell(body)

    # -- engine.seam.worker.WorkerHost ------------------------------------------------------------------------------

    def connector(self) -> Connector:
        """See `engine.seam.worker.WorkerHost.connector`."""
        return self._connector

    def listen_sockets(self) -> list[Any]:
        """See `engine.seam.worker.WorkerHost.listen_sockets`.

        Raises:
            engine.errors.InvalidArgument: The address cannot be bound.
        """
        if self._order.listen is None:
            return []
        try:
            sock = bind_shared(self._order.listen, alone=not self._order.shared)
        except InvalidArgument as error:
            import ray

            raise InvalidArgument(f"on node {ray.util.get_node_ip_address()}: {error}") from error
        self.tell(Bound(sock.getsockname()[1]))
        return [sock]

    def serve(self, service: Service) -> None:
        """See `engine.seam.worker.WorkerHost.serve`."""
        order = self._order
        listening, sockets = listen_everywhere(f"engine-{order.engine_id}")
        address = str(Address(order.engine_id, self._connector.node_id(), sockets))
        self.serve_on(listening, address, service, secret=order.secret, tls=order.tls)

    # -- the end -------------------------------------------------------------------------------------------------------

    def leave(self, code: int) -> None:
        """Say that the process is about to exit."""
        self.tell(Leaving(code))

    def control_lost(self, reason: str) -> None:
        """The engine is gone, or has lost its controller: whoever reads the channel goes on with that."""
        self._why_lost = reason

    def _read(self) -> None:
        while True:
            killed = self._listen()
            if not self._rejoin():
                _leave_process(1)
            if killed:  # only the next one can be told
                _log.warning("the controller of the engine (process %d) was stopped, and has been killed", killed)

    def _listen(self) -> int:
        """Read until the controller is lost; returns its process if this worker has killed it, else 0.

        Nobody else watches a controller that is an actor. One of this machine that is stopped is ended, as a worker is:
        Ray starts an actor again that has died, and waits for one that is stopped.
        """
        killed = 0
        pid = process_behind(self._channel.sock) if is_symbolic(self._order.control_address) else None
        if pid is None:
            super()._read()
            return killed
        stopped_s = 0.0
        while not self._channel.closed:
            since = time.monotonic()
            self._channel.drive(lambda: False, LOOK_EVERY_S)
            vitals = vitals_of(pid)
            passed_s = min(time.monotonic() - since, LOOK_EVERY_S)  # else this process was stopped itself
            stopped_s = stopped_s + passed_s if vitals is not None and vitals.stopped else 0.0
            if stopped_s >= STOPPED_S and not self._channel.closed:
                with contextlib.suppress(OSError):  # another worker was faster
                    os.kill(pid, signal.SIGKILL)
                    killed = pid
        return killed

    def _rejoin(self) -> bool:
        """Find the next controller; false if there will be none."""
        while self._connector.returns(self._order.control_address):
            time.sleep(_RETRY_S)
            try:
                channel = self._reach_controller(self)
                for body in (self._hello(), *self._standing.values()):
                    channel.send(Control(body))
            except (EngineClosed, ChannelClosed):
                continue
            self._channel = channel  # only now: the first word must be who this is
            return True
        return False
