"""Workers as actors on a cluster: the part of the adapter that goes with a controller, wherever that runs.

Ray places the workers, gives them their resources and tells of their ends. All else goes over channels of the engine's
own: each worker opens one to the controller, and every caller opens one straight to each replica it calls. Both ends of
every channel prove that they know the engine's secret, which only Ray's control plane carries.

Everything here belongs to the controller's loop; what may take long in Ray runs in threads. When a worker dies, its
control channel ends and Ray says why. When this process dies, the ends of those channels end the workers, and Ray ends
their actors with the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from engine.errors import EngineClosed, InvalidArgument
from engine.seam.adapter import AdapterEvents, Node, Vitals
from engine.seam.channel import Channel, ChannelListener
from engine.seam.control_messages import Subscribe
from engine.seam.log import Log
from engine.seam.messages import Control, Message
from engine.seam.worker import Listen, WorkerExit, WorkerSpec
from engine_wire import Acceptor, SocketChannel, StopWatch, notice_silence, process_behind
from engine_wire.secret import Secret
from engine_wire.tls import TLS

from ..calling.addresses import Address
from ..calling.courier import COURIER, end_courier
from ..calling.refs import RayCaller
from ..link import connection
from ..link.actors import kill_actor
from ..link.connection import check_connected
from ..link.registry import Entry, Registry
from ..link.sockets import listen_everywhere
from ..link.surroundings import Surroundings
from ..working.bodies import Hello
from ..working.order import Order
from .asking import Asking
from .leftovers import sweep_leftovers
from .nodes import NodeWatch
from .places import options_of, shortage
from .process import Process, process_of
from .public_ports import PublicPorts
from .strangers import Newcomer, Strangers
from .watched import WatchedWorker, described_death

__all__ = ["SECRET_BYTES", "ClusterAdapter"]

_log = Log("engine.ray")
SECRET_BYTES = 32
_STOP_PATIENCE_S = 5.0


class _Running(NamedTuple):
    """What `ClusterAdapter.start` took."""

    events: AdapterEvents
    loop: asyncio.AbstractEventLoop
    acceptor: Acceptor
    registry: Registry
    connected: bool  # whether the connection to Ray is to be left


class ClusterAdapter(RayCaller):
    """An `engine.seam.adapter.Adapter` whose workers are actors: what all controllers on Ray need, wherever they run.

    Args:
        address: The cluster to connect to, or None; see `engine_ray.adapter.RayAdapter`.
        runtime_env: Of every worker.
        init_kwargs: Further arguments of ``ray.init``.
        tls: Who the engine's parties are to each other, if they are to use TLS between nodes.
    """

    shares_process = False
    _outlives_process = False
    """Whether the engine goes on when this process dies."""

    def __init__(
        self,
        address: str | None,
        runtime_env: Mapping[str, Any],
        init_kwargs: Mapping[str, Any],
        tls: TLS | None = None,
    ) -> None:
        super().__init__(tls=tls)
        self._address = address
        self._runtime_env = dict(runtime_env)
        self._init_kwargs = dict(init_kwargs)
        self.engine_id = ""
        # Only the loop that `start` ran on touches what follows.
        self._running: _Running | None = None
        self._workers: dict[str, WatchedWorker] = {}
        self._deserted = asyncio.Event()  # set while there are no workers
        self._deserted.set()
        self._process = 0  # that `start` was called in
        self._nodes = NodeWatch(self.node_id, self._on_nodes)
        self._asking = Asking()
        self._ports = PublicPorts()
        self._ignored: set[str] = set()  # options that the log has mentioned
        self.heard_of: set[str] = set()  # ids of workers that ever said who they are
        self._strangers = Strangers()
        self._courier: StopWatch | None = None

    # -- engine.seam.adapter.Adapter ---------------------------------------------------------------------------------

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """See `engine.seam.adapter.Adapter.start`.

        Raises:
            engine.errors.InvalidArgument: There is no such cluster, or the adapter already serves an engine.
        """
        if self._running is not None or self._process:
            raise InvalidArgument("this adapter already serves an engine: give each engine one of its own")
        self._process = os.getpid()
        loop = asyncio.get_running_loop()
        self._asking = Asking()
        connected = await asyncio.to_thread(connection.join, self._address, self._init_kwargs)
        try:
            self.engine_id = engine_id
            self._secret = await asyncio.to_thread(self._make_secret)
            listening, sockets = listen_everywhere(f"engine-{engine_id}")
            acceptor = Acceptor(listening, self._welcome, loop, secret=self._secret, tls=self._tls)
            registry = Registry(engine_id)
            self._running = _Running(events, loop, acceptor, registry, connected)
            await self._nodes.look()
            address = Address(engine_id, self.node_id(), (*sockets, f"gcs:{connection.cluster()}"))
            self.control_address = await asyncio.to_thread(self._announce, registry, str(address))
            connection.announce(engine_id)
        except BaseException:
            if self._running is not None and not self._outlives_process:
                await self.stop()
            elif self._running is not None:  # the engine is not over: the next controller takes it up
                self._running.acceptor.close()
                self._running = None
            elif connected:
                connection.leave()
            raise

    async def start_worker(self, spec: WorkerSpec) -> None:
        """See `engine.seam.adapter.Adapter.start_worker`."""
        running = self._running
        check_connected()
        if running is None:
            raise EngineClosed("the Ray adapter is not running")
        if spec.worker_id in self._workers:
            raise InvalidArgument(f"there is a worker {spec.worker_id!r} already")
        options, ignored = options_of(spec, self._runtime_env)
        self._mention_ignored(ignored)
        listen, port = spec.listen, None
        if listen is not None:
            if spec.node_id is None:
                raise InvalidArgument("a worker with a public address needs a node_id")
            listen, port = await self._ports.place(listen, spec.node_id)
        import ray

        from ..working.worker import RayWorker

        try:
            actor = ray.remote(RayWorker).options(**options, **self._lasting(spec)).remote()
        except BaseException as error:
            if port is not None:
                port.cancel()  # for the next one on the node, which waits for it
            if not isinstance(error, (TypeError, ValueError)):
                raise
            raise InvalidArgument(f"ray_actor_options: Ray refused them: {error}") from error
        worker = self._watch(running, spec, actor)
        worker.port = port
        order = Order(
            engine_id=self.engine_id,
            worker_id=spec.worker_id,
            name=spec.name,
            entry=spec.entry,
            payload=spec.payload,
            control_address=self.control_address,
            secret=self.secret(),
            listen=listen,
            shared=listen is not None and port is None,
            surroundings=self._surroundings_now(),
            tls=self._tls,
        )
        ended = actor.run.remote(tuple(order)).future()
        ended.add_done_callback(lambda future: self._from_ray(worker.ray_ended, described_death(future.exception())))

    def tell(self, worker_id: str, body: Any) -> None:
        """See `engine.seam.adapter.Adapter.tell`."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.tell(body)

    def kill_worker(self, worker_id: str) -> None:
        """See `engine.seam.adapter.Adapter.kill_worker`."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.kill()

    async def vitals(self, worker_id: str) -> Vitals | None:
        """See `engine.seam.adapter.SeesProcesses.vitals`."""
        worker = self._workers.get(worker_id)
        return None if worker is None else await worker.vitals()

    def unplaced(self, worker_id: str) -> str | None:
        """See `engine.seam.adapter.FindsPlaces.unplaced`."""
        worker = self._workers.get(worker_id)
        return None if worker is None or worker.placed else shortage(worker.spec.resources)

    def bound(self, listen: Listen, node_id: str) -> Listen:
        """See `engine.seam.adapter.Adapter.bound`."""
        return self._ports.bound(listen, node_id)

    def nodes(self) -> tuple[Node, ...]:
        """See `engine.seam.adapter.Adapter.nodes`."""
        return self._nodes.nodes

    def watch_nodes(self) -> None:
        """See `engine.seam.adapter.WatchesNodes.watch_nodes`."""
        if self._running is not None:
            self._nodes.begin()

    async def stop(self) -> None:
        """See `engine.seam.adapter.Adapter.stop`."""
        running = self._running
        if running is None or self._process != os.getpid():
            return  # also in a fork of the engine's process: nothing of this is its own
        self._forget_courier()
        await self._nodes.end()
        await self._asking.end()
        for worker_id in list(self._workers):
            self.kill_worker(worker_id)
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(self._deserted.wait(), _STOP_PATIENCE_S)
        self._running = None
        with contextlib.suppress(Exception):  # the cluster is gone
            # Before anybody loses this process: who does looks there whether the engine goes on.
            await _aside(running.registry.clear)
        running.acceptor.close()
        await _aside(self._clean_up, running)
        self.control_address = ""

    # -- what is different where the controller is an actor ------------------------------------------------------------

    def _make_secret(self) -> bytes:
        return Secret(os.urandom(SECRET_BYTES))

    def _announce(self, registry: Registry, control_address: str) -> str:
        """Leave word of the engine with the cluster; returns the address that its parties are told."""
        import ray

        sweep_leftovers()
        registry.put(Entry(self.secret(), ray.get_runtime_context().get_job_id(), control_address, self._tls))
        return control_address

    def _surroundings_now(self) -> Surroundings:
        return Surroundings.here()

    def _lasting(self, spec: WorkerSpec) -> dict[str, Any]:
        """Options that let an actor live on without the controller's process."""
        return {}

    # -- starting ----------------------------------------------------------------------------------------------------

    def _watch(self, running: _Running, spec: WorkerSpec, actor: Any) -> WatchedWorker:
        worker = WatchedWorker(spec, actor, running.events.worker_said, self._on_bound, self._finish)
        self._workers[spec.worker_id] = worker
        self._deserted.clear()
        return worker

    def _clean_up(self, running: _Running) -> None:
        """End the courier and leave Ray. Runs in a thread."""
        import ray

        if ray.is_initialized():
            end_courier(self.engine_id)
            self._end_leftovers()
        if running.connected:
            connection.leave()

    def _end_leftovers(self) -> None:
        """End actors that outlive this process and that nobody knows any more."""

    def _on_bound(self, worker: WatchedWorker, port: int) -> None:
        spec = worker.spec
        assert spec.listen is not None and spec.node_id is not None
        self._ports.learn(spec.listen, spec.node_id, port)

    def _mention_ignored(self, ignored: list[str]) -> None:
        new = [name for name in ignored if name not in self._ignored]
        if new:
            self._ignored.update(new)
            _log.info("ray_actor_options: the engine itself decides on %s; ignored here", ", ".join(new))

    def _on_nodes(self) -> None:
        self._ports.keep_only({node.node_id for node in self._nodes.nodes})
        if self._running is not None:
            self._running.events.nodes_changed()

    # -- who connects --------------------------------------------------------------------------------------------------

    def _welcome(self, channel: Channel) -> ChannelListener:
        return Newcomer(self._introduced)

    def _introduced(self, channel: SocketChannel, first: Message) -> None:
        """A party that connected has said its first word: it is a worker, or a caller that wants snapshots."""
        notice_silence(channel.sock)
        running = self._running
        body = first.body if isinstance(first, Control) else None
        if running is None:
            channel.close()
        elif isinstance(body, Hello):
            self.heard_of.add(body.worker_id)
            worker = self._workers.get(body.worker_id)
            if worker is not None:
                self._introduce(worker, channel, process_of(channel, body, self._asking))
            elif not self._outlives_process:
                channel.close()  # it was given up; closing its control channel ends it
            else:
                self._strangers.take_in(body.worker_id, channel, process_of(channel, body, self._asking))
        else:
            pid = process_behind(channel.sock)
            if pid is not None and isinstance(body, Subscribe) and body.worker_id == COURIER:
                self._watch_courier(running, channel, pid)
            channel.listener = running.events.peer_connected(channel)
            channel.listener.received(channel, first)

    def _watch_courier(self, running: _Running, channel: SocketChannel, pid: int) -> None:
        """See to it that a courier which is stopped makes nobody wait: Ray starts another one."""

        def end() -> None:
            if channel.closed:  # it has died since: the number may be another one's
                self._forget_courier()
                return
            _log.warning("the courier of the engine (process %d) is stopped, and is killed", pid)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

        self._forget_courier()
        self._courier = StopWatch(pid, end, running.loop)

    def _forget_courier(self) -> None:
        if self._courier is not None:
            self._courier.end()

    @staticmethod
    def _introduce(worker: WatchedWorker, channel: SocketChannel, process: Process | None) -> None:
        channel.listener = worker
        worker.connected(channel, process)

    # -- how workers end -----------------------------------------------------------------------------------------------

    def _from_ray(self, function: Any, *args: Any) -> None:
        """Call a function on the controller's loop, from a thread of Ray's."""
        running = self._running
        if running is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                running.loop.call_soon_threadsafe(function, *args)

    def _finish(self, worker: WatchedWorker, reason: str) -> None:
        if self._workers.get(worker.worker_id) is not worker:
            return
        worker.finish()
        if self._workers.pop(worker.worker_id, None) is None:
            return  # `finish` brought the last word by itself
        if worker.killed:
            reason = "was killed by the engine"
        elif worker.exit_code is not None:
            reason = f"exited with code {worker.exit_code}" if worker.exit_code else "exited"
        kill_actor(worker.actor)
        if not self._workers:
            self._deserted.set()
        if self._running is not None:
            self._running.events.worker_exited(WorkerExit(worker.worker_id, reason))


async def _aside(function: Callable[..., Any], *args: Any) -> None:
    """Call a function in a thread; or here, at the end of the interpreter, which has no more threads to give."""
    try:
        done = asyncio.get_running_loop().run_in_executor(None, function, *args)
    except RuntimeError:
        function(*args)
    else:
        await done
