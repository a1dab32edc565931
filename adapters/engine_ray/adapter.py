"""The Ray adapter: workers as actors on a cluster.

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
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from engine.adapter import AdapterEvents, Channel, ChannelListener, Listen, Node, WorkerExit, WorkerSpec
from engine.errors import EngineClosed, InvalidArgument
from engine.messages import Control, Message
from engine_wire import Acceptor

from . import connection
from .addresses import Address
from .bodies import Hello
from .connector import RayConnector
from .courier import NAMESPACE, courier_name
from .order import Order
from .places import listen_everywhere, options_of, shortage
from .registry import Entry, Registry
from .watched import WatchedWorker, described_death

__all__ = ["RayAdapter"]

_log = logging.getLogger("engine.ray")
_SECRET_BYTES = 32
_REASON_PATIENCE_S = 1.0
"""Ray knows of the end of an actor some 10 ms after its channel has ended."""
_STOP_PATIENCE_S = 5.0
_COURIER_PATIENCE_S = 3.0
_NODES_EVERY_S = 1.0
"""How often to ask for the cluster's nodes, if somebody wants to know: Ray announces them to nobody but itself."""


class _Running(NamedTuple):
    """What `RayAdapter.start` took."""

    engine_id: str
    events: AdapterEvents
    loop: asyncio.AbstractEventLoop
    acceptor: Acceptor
    registry: Registry
    connected: bool  # whether the connection to Ray is to be left


class RayAdapter(RayConnector):
    """Runs replicas as actors on a Ray cluster: ``Engine(backend="ray")``.

    Args:
        address: The cluster to connect to, as ``"host:port"``. By default the one this process is connected to; or else
            the one that runs on this machine or that ``RAY_ADDRESS`` names; or else a new one on this machine, which is
            stopped when the last engine of this process shuts down. Other clusters are left as they are.
        namespace: Ray's namespace of this process, if it is the engine that connects it.
        runtime_env: Of every worker; that of ``ray_actor_options`` is laid over it key by key.
        init_kwargs: Further arguments of ``ray.init``, if it is the engine that connects.

    Raises:
        engine.errors.InvalidArgument: Ray is not installed, or an argument has a wrong type.
    """

    def __init__(
        self,
        address: str | None = None,
        namespace: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        **init_kwargs: Any,
    ) -> None:
        super().__init__()
        if find_spec("ray") is None:
            raise InvalidArgument('backend="ray" needs Ray, which is not installed: pip install "mpengine[ray]"')
        for name, value in (("address", address), ("namespace", namespace)):
            if value is not None and (not isinstance(value, str) or not value):
                raise InvalidArgument(f"RayAdapter: {name} must be a str or None, not {value!r}")
        if address is not None and address.startswith("ray://"):
            raise InvalidArgument(
                f"RayAdapter: address={address!r} is that of a Ray client server, which channels cannot pass: run the "
                "application on a node of the cluster and give the address of its head, as in '10.0.0.5:6379'"
            )
        if runtime_env is not None and not isinstance(runtime_env, Mapping):
            raise InvalidArgument(f"RayAdapter: runtime_env must be a dict or None, not {runtime_env!r}")
        self._address = address
        self._runtime_env = dict(runtime_env or {})
        self._init_kwargs = {**init_kwargs, **({"namespace": namespace} if namespace is not None else {})}
        # Only the loop that `start` ran on touches what follows.
        self._running: _Running | None = None
        self._workers: dict[str, WatchedWorker] = {}
        self._deserted = asyncio.Event()  # set while there are no workers
        self._deserted.set()
        self._process = 0  # that `start` was called in
        self._nodes: tuple[Node, ...] = ()
        self._node_watch: asyncio.Task[None] | None = None
        self._ports: dict[tuple[Listen, str], asyncio.Future[int]] = {}
        self._ignored: set[str] = set()  # options that the log has mentioned

    # -- engine.adapter.Adapter --------------------------------------------------------------------------------------

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """See `engine.adapter.Adapter.start`.

        Raises:
            engine.errors.InvalidArgument: There is no such cluster, or the adapter already serves an engine.
        """
        if self._running is not None or self._process:
            raise InvalidArgument("this RayAdapter already serves an engine: give each engine one of its own")
        self._process = os.getpid()
        loop = asyncio.get_running_loop()
        connected = await asyncio.to_thread(connection.join, self._address, self._init_kwargs)
        try:
            self._secret = os.urandom(_SECRET_BYTES)
            listening, sockets = listen_everywhere(f"engine-{engine_id}")
            acceptor = Acceptor(listening, self._welcome, loop, secret=self._secret)
            self.control_address = str(Address(engine_id, self.node_id(), sockets))
            registry = Registry(engine_id)
            self._running = _Running(engine_id, events, loop, acceptor, registry, connected)
            self._nodes = await asyncio.to_thread(self._look_for_nodes)
            await asyncio.to_thread(self._register, registry)
        except BaseException:
            if self._running is not None:
                await self.stop()
            elif connected:
                connection.leave()
            raise

    async def start_worker(self, spec: WorkerSpec) -> None:
        """See `engine.adapter.Adapter.start_worker`."""
        running = self._running
        if running is None:
            raise EngineClosed("the Ray adapter is not running")
        if spec.worker_id in self._workers:
            raise InvalidArgument(f"there is a worker {spec.worker_id!r} already")
        listen, port = spec.listen, None
        if listen is not None:
            if spec.node_id is None:
                raise InvalidArgument("a worker with a public address needs a node_id")
            listen, port = await self._public_address(listen, spec.node_id)
        import ray

        from .worker import RayWorker

        options, ignored = options_of(spec, self._runtime_env)
        self._mention_ignored(ignored)
        try:
            actor = ray.remote(RayWorker).options(**options).remote()
        except (TypeError, ValueError) as error:
            if port is not None:
                port.cancel()
            raise InvalidArgument(f"ray_actor_options: Ray refused them: {error}") from error
        worker = WatchedWorker(spec, actor, running.events.worker_said, self._on_lost)
        worker.port = port
        self._workers[spec.worker_id] = worker
        self._deserted.clear()
        order = Order(
            engine_id=running.engine_id,
            worker_id=spec.worker_id,
            name=spec.name,
            entry=spec.entry,
            payload=spec.payload,
            control_address=self.control_address,
            secret=self.secret(),
            listen=listen,
            shared=listen is not None and port is None,
            sys_path=[path for path in sys.path if isinstance(path, str)],
            cwd=_working_directory(),
            argv=list(getattr(sys, "argv", [""])),
            log_level=logging.getLogger().getEffectiveLevel(),
        )
        ended = actor.run.remote(tuple(order)).future()
        ended.add_done_callback(lambda future: self._from_ray(self._on_ended, worker, future))

    def tell(self, worker_id: str, body: Any) -> None:
        """See `engine.adapter.Adapter.tell`."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.tell(body)

    def kill_worker(self, worker_id: str) -> None:
        """See `engine.adapter.Adapter.kill_worker`."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.killed = True
            _kill(worker.actor)

    def unplaced(self, worker_id: str) -> str | None:
        """See `engine.adapter.Adapter.unplaced`."""
        worker = self._workers.get(worker_id)
        return None if worker is None or worker.placed else shortage(worker.spec.resources)

    def bound(self, listen: Listen) -> Listen:
        """See `engine.adapter.Adapter.bound`: the address on the node where the engine was created."""
        return dataclasses.replace(listen, port=self._ports[listen, self._nodes[0].node_id].result())

    def nodes(self) -> tuple[Node, ...]:
        """See `engine.adapter.Adapter.nodes`."""
        return self._nodes

    def watch_nodes(self) -> None:
        """See `engine.adapter.Adapter.watch_nodes`."""
        if self._node_watch is None and self._running is not None:
            self._node_watch = self._running.loop.create_task(self._watch_nodes(self._running.events))

    async def stop(self) -> None:
        """See `engine.adapter.Adapter.stop`."""
        running = self._running
        if running is None or self._process != os.getpid():
            return  # also in a fork of the engine's process: nothing of this is its own
        if self._node_watch is not None:
            self._node_watch.cancel()
            await asyncio.gather(self._node_watch, return_exceptions=True)
        for worker_id in list(self._workers):
            self.kill_worker(worker_id)
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(self._deserted.wait(), _STOP_PATIENCE_S)
        self._running = None
        running.acceptor.close()
        await asyncio.to_thread(self._clean_up, running)
        self.control_address = ""

    # -- starting ----------------------------------------------------------------------------------------------------

    def _register(self, registry: Registry) -> None:
        import ray

        registry.put(Entry(self.secret(), ray.get_runtime_context().get_job_id(), self.control_address))

    def _clean_up(self, running: _Running) -> None:
        """End the courier and leave Ray. Runs in a thread."""
        import ray

        self.refs.close()
        with contextlib.suppress(ValueError):  # there is none
            courier = ray.get_actor(courier_name(running.engine_id), namespace=NAMESPACE)
            with contextlib.suppress(Exception):  # it is gone, or takes too long: either way it has to go
                ray.get(courier.leave.remote(), timeout=_COURIER_PATIENCE_S)
            _kill(courier)
        running.registry.remove()
        if running.connected:
            connection.leave()

    async def _public_address(self, listen: Listen, node_id: str) -> tuple[Listen, asyncio.Future[int] | None]:
        """Where a worker is to listen; and, if it is the first there, what it is to tell the others."""
        while True:
            known = self._ports.get((listen, node_id))
            if known is None or known.cancelled():
                mine = self._ports[listen, node_id] = asyncio.get_running_loop().create_future()
                return listen, mine
            await asyncio.wait([known])
            if not known.cancelled():
                return dataclasses.replace(listen, port=known.result()), None

    def _mention_ignored(self, ignored: list[str]) -> None:
        new = [name for name in ignored if name not in self._ignored]
        if new:
            self._ignored.update(new)
            _log.info("ray_actor_options: the engine itself decides on %s; ignored here", ", ".join(new))

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _look_for_nodes(self) -> tuple[Node, ...]:
        import ray

        own = self.node_id()
        alive = [Node(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
        return tuple(sorted(alive, key=lambda node: (node.node_id != own, node.node_id)))

    async def _watch_nodes(self, events: AdapterEvents) -> None:
        while True:
            await asyncio.sleep(_NODES_EVERY_S)
            try:
                nodes = await asyncio.to_thread(self._look_for_nodes)
            except Exception as error:
                _log.warning("cannot ask Ray for the cluster's nodes: %s", error)
                continue
            if nodes != self._nodes:
                self._nodes = nodes
                for key in [key for key in self._ports if key[1] not in {node.node_id for node in nodes}]:
                    del self._ports[key]
                events.nodes_changed()

    # -- who connects --------------------------------------------------------------------------------------------------

    def _welcome(self, channel: Channel) -> ChannelListener:
        return _Newcomer(self)

    def introduced(self, channel: Any, first: Message) -> None:
        """A party that connected has said its first word: it is a worker, or a caller that wants snapshots."""
        running = self._running
        body = first.body if isinstance(first, Control) else None
        if running is None:
            channel.close()
        elif isinstance(body, Hello):
            worker = self._workers.get(body.worker_id)
            if worker is None:
                channel.close()  # it was given up; closing its control channel ends it
            else:
                channel.listener = worker
                worker.connected(channel)
        else:
            channel.listener = running.events.peer_connected(channel)
            channel.listener.received(channel, first)

    # -- how workers end -----------------------------------------------------------------------------------------------

    def _from_ray(self, function: Any, *args: Any) -> None:
        """Call a function on the controller's loop, from a thread of Ray's."""
        running = self._running
        if running is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                running.loop.call_soon_threadsafe(function, *args)

    def _on_ended(self, worker: WatchedWorker, future: Any) -> None:
        self._finish(worker, described_death(future.exception()))

    def _on_lost(self, worker: WatchedWorker) -> None:
        if worker.exit_code is not None:
            self._finish(worker, "exited")
        elif worker.deadline is None and self._running is not None:
            # Ray knows better why; and if it does not know at all, the worker can no longer be spoken with.
            worker.deadline = self._running.loop.call_later(
                _REASON_PATIENCE_S, self._finish, worker, "lost its connection to the engine"
            )

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
        _kill(worker.actor)
        if not self._workers:
            self._deserted.set()
        if self._running is not None:
            self._running.events.worker_exited(WorkerExit(worker.worker_id, reason))


class _Newcomer:
    """Hears a party that has connected until it says what it is."""

    def __init__(self, adapter: RayAdapter) -> None:
        self._adapter = adapter

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.adapter.ChannelListener.received`."""
        self._adapter.introduced(channel, message)

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.adapter.ChannelListener.lost`; nobody knew it."""


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(Exception):  # it is gone, or Ray is
        ray.kill(actor)


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None  # it was removed
