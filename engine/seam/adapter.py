"""The outward seam: where workers run and how their addresses are reached.

An adapter starts, watches and kills workers and opens channels. It knows nothing of backends, endpoints or routing;
the core knows nothing of processes, sockets or clusters. Only ids, bytes, frozen dataclasses and deadlines cross.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .messages import Message

if TYPE_CHECKING:
    from ..calling.slot import Outgoing
    from ..config import HTTPOptions

__all__ = [
    "Adapter",
    "AdapterEvents",
    "Channel",
    "ChannelClosed",
    "ChannelListener",
    "Listen",
    "Node",
    "PlatformRefs",
    "RemoteController",
    "Resources",
    "Service",
    "ServiceHost",
    "StateStore",
    "WorkerExit",
    "WorkerHost",
    "WorkerSpec",
]


class ChannelClosed(Exception):
    """The channel can take no more messages."""


class ChannelListener(Protocol):
    """The party a channel delivers to."""

    def received(self, channel: Channel, message: Message) -> None:
        """Take one message. Must not block and must not raise."""

    def lost(self, channel: Channel, reason: str) -> None:
        """The peer is gone or broke the protocol. Called once, after the last message, and not after `close`."""


class Channel(Protocol):
    """An ordered, multiplexed, two-way message stream."""

    @property
    def opened(self) -> bool:
        """Whether the peer can have received anything. Messages of a channel that was lost before are unsent."""

    def send(self, message: Message) -> None:
        """Queue a message for the peer, from any thread, without blocking.

        Raises:
            ChannelClosed: The channel is closed or lost.
            engine.errors.InvalidArgument: The message is larger than the channel's frame limit.
        """

    def watch(self) -> None:
        """Deliver messages from now on without anybody calling `drive` (idempotent)."""

    def drive(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        """Deliver messages from the calling thread until ``done()`` is true or the time is up.

        Spares a caller that has nothing else to do the hop through another thread.

        Returns:
            False at once when this channel cannot be driven by this thread now; the caller then waits otherwise.
        """

    def close(self) -> None:
        """Close without telling the own listener (idempotent)."""


@dataclass(frozen=True)
class Resources:
    """What a worker needs: the fields of ``ray_actor_options``.

    Attributes:
        num_cpus: Logical processors, or None for the adapter's default.
        num_gpus: Accelerators; fractions share one.
        env_vars: ``runtime_env["env_vars"]``.
        other: Every other option as given; an adapter that cannot honour one says so in its log.
    """

    num_cpus: float | None = None
    num_gpus: float = 0.0
    env_vars: dict[str, str] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Listen:
    """A public address that a group of workers shares.

    Attributes:
        host: A name or address of this machine.
        port: 0 picks a free port.
        backlog: Connections the kernel holds until a worker accepts them.
    """

    host: str
    port: int
    backlog: int = 1024


@dataclass(frozen=True)
class WorkerSpec:
    """Everything an adapter must know to start a worker.

    Attributes:
        worker_id: Unique within the engine.
        name: For people: log records, process titles.
        entry: ``"module:function"``, called in the worker as ``function(host, payload)`` with a `WorkerHost`.
        payload: Opaque to the adapter.
        preload: Modules worth importing before the worker exists, where the adapter can share them between workers.
        resources: What the worker needs.
        node_id: The node to start on, or None for any.
        listen: The public address the worker serves, if it does. Equal values share one bound address.
    """

    worker_id: str
    name: str
    entry: str
    payload: bytes
    preload: tuple[str, ...] = ()
    resources: Resources = Resources()
    node_id: str | None = None
    listen: Listen | None = None


@dataclass(frozen=True)
class WorkerExit:
    """The death of a worker. ``reason`` is a phrase for people, e.g. "was killed by SIGKILL"."""

    worker_id: str
    reason: str


@dataclass(frozen=True)
class Node:
    """A machine that workers can run on."""

    node_id: str
    address: str


class PlatformRefs(Protocol):
    """Refs that are the platform's own, where it has some that its users know how to pass on and to wait for.

    Calls that are started here take their way through the same routers as all others. Any thread may use it.
    """

    def is_ref(self, value: Any) -> bool:
        """Whether this is a ref of the platform."""

    def lift(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """Take the refs out of a call's arguments; before the callee runs, their results take their places."""

    def start(self, endpoint: str, outgoing: Outgoing, lifted: list[Any], timeout_s: float | None) -> Any:
        """Start a call without waiting for it.

        Args:
            endpoint: Its name.
            outgoing: The call; its ``deadline`` is not looked at.
            lifted: The refs taken out of its arguments, waited for first.
            timeout_s: Seconds until the call fails with `engine.errors.DeadlineExceeded`, or None.

        Returns:
            The platform's ref. Every error arrives through it.
        """

    def results(self, refs: list[Any], timeout_s: float | None) -> list[Any]:
        """Wait for the results of refs.

        Raises:
            engine.errors.DeadlineExceeded: They did not come within ``timeout_s`` seconds; the calls go on.
            BaseException: What a call raised, as its own type.
        """

    async def result(self, ref: Any) -> Any:
        """As `results`, for one ref, without blocking the running asyncio or trio loop."""

    def wait(self, refs: list[Any], num_returns: int, timeout_s: float | None) -> tuple[list[Any], list[Any]]:
        """Wait until some have settled: those, at most ``num_returns``, and the others, in the order given."""

    def statistics(self) -> list[dict[str, Any]]:
        """What the callers counted and hold that make these calls, as `Caller.statistics` says it.

        Empty while there are none, or they cannot be asked.
        """


class StateStore(Protocol):
    """Where the state of a controller outlives the controller: rows of bytes under names."""

    def save(self, name: str, state: bytes) -> None:
        """Keep a row, in the place of the one of this name."""

    def remove(self, name: str) -> None:
        """Drop a row (idempotent)."""

    def load(self) -> dict[str, bytes]:
        """Every row."""


class RemoteController(Protocol):
    """The controller of a detached engine, as another process reaches it."""

    engine_id: str
    control_address: str

    def run(self, operation: str, arguments: bytes) -> bytes:
        """Pass on to `engine.control.detached.DetachedController.run`, and wait.

        Raises:
            engine.errors.EngineClosed: The engine was shut down.
            engine.errors.RetryLater: The controller died meanwhile.
        """

    def leave(self, *, ended: bool) -> None:
        """Release what reaching it took; remove the controller's process if the engine has ended."""


class AdapterEvents(Protocol):
    """What an adapter reports to the controller, always on the event loop that `Adapter.start` ran on."""

    def worker_said(self, worker_id: str, body: Any) -> None:
        """A worker sent a `Control` body."""

    def worker_exited(self, exit: WorkerExit) -> None:
        """A worker is gone, whatever the reason. Said exactly once per started worker."""

    def peer_connected(self, channel: Channel) -> ChannelListener:
        """Somebody opened a channel to `Adapter.control_address`; returns who hears it."""

    def nodes_changed(self) -> None:
        """`Adapter.nodes` has others than before. Said only after `Adapter.watch_nodes`."""


class Adapter(Protocol):
    """Where workers run.

    The coroutine methods run on the controller's asyncio loop. `open_channel` may be called in any thread of any
    process that holds the adapter's connector.
    """

    name: str
    """What ``Engine(backend=...)`` calls it."""
    shares_process: bool
    """Whether workers live in the engine's own process."""
    control_address: str
    """Where other processes reach the controller, valid after `start`."""

    @property
    def refs(self) -> PlatformRefs | None:
        """The platform's own refs, valid wherever `open_channel` is; None where refs are the engine's own."""

    @property
    def store(self) -> StateStore | None:
        """Where the controller in this process is to keep its state; None if its engine ends with the process."""

    def detach(self, name: str, http: HTTPOptions | None) -> RemoteController:
        """Reach the controller of a detached engine.

        Args:
            name: The engine's.
            http: How a new engine is reached over HTTP; None to find one that is there.

        Raises:
            engine.errors.InvalidArgument: The name is taken, or unknown; or nothing outlives its creator here.
        """

    def returns(self, control_address: str) -> bool:
        """Whether a controller that cannot be reached there will be again, at the same address."""

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """Get ready to start workers."""

    async def start_worker(self, spec: WorkerSpec) -> None:
        """Start a worker; returns as soon as its death would be reported.

        Raises:
            engine.errors.ResourcesUnavailable: The resources are not free, and waiting would not help.
            engine.errors.InvalidArgument: ``spec.listen`` cannot be bound.
        """

    async def adopt_worker(self, spec: WorkerSpec) -> None:
        """Watch a worker that a former controller of the engine started.

        It says again what it said when it was ready; or its exit is reported. ``spec.payload`` is not needed.
        """

    def tell(self, worker_id: str, body: Any) -> None:
        """Send a `Control` body to a worker; does nothing when it is gone."""

    def kill_worker(self, worker_id: str) -> None:
        """End a worker at once; `AdapterEvents.worker_exited` follows. Does nothing when it is gone."""

    def unplaced(self, worker_id: str) -> str | None:
        """Why a worker that was started has no place to run on yet: what it asked for and what there is.

        Returns:
            A phrase for people, or None when it has a place.
        """

    def bound(self, listen: Listen, node_id: str) -> Listen:
        """The address that ``listen`` came to on a node, with the real port.

        Raises:
            KeyError: No worker was started there with it.
        """

    def nodes(self) -> tuple[Node, ...]:
        """The nodes workers can run on now; the first one is where the engine was created."""

    def watch_nodes(self) -> None:
        """Report from now on when nodes come and go (`AdapterEvents.nodes_changed`; idempotent)."""

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> Channel:
        """Open a channel to a worker's address, or to a `control_address`.

        Args:
            address: What the worker announced.
            listener: Who hears the channel.
            on_loop: True to deliver on the asyncio loop running in this thread, False to deliver from a thread of
                the adapter's or from `Channel.drive`.

        Never blocks for long: messages sent before the connection stands are kept.

        Raises:
            ChannelClosed: Nobody is at that address.
        """

    def close(self) -> None:
        """Release what `open_channel` needs in this process (threads, wake-up descriptors)."""

    async def stop(self) -> None:
        """Kill what still runs, reap it and release everything `start` took (idempotent).

        With a store, it is called after a failed `start`, too, and ends what a former controller of the engine left.
        """


class WorkerHost(Protocol):
    """What a worker's entry function gets: its side of the adapter."""

    worker_id: str

    def tell(self, body: Any) -> None:
        """Send a `Control` body to the controller, from any thread."""

    def adapter(self) -> Adapter:
        """An adapter that can `open_channel` from here; nothing else of it works in a worker."""

    def listen_sockets(self) -> list[Any]:
        """The bound sockets of `WorkerSpec.listen`."""

    def on_control(self, handler: Callable[[Any], None]) -> None:
        """Pass every `Control` body from the controller to ``handler``, on the worker's control thread.

        Bodies that came before are kept for it.
        """

    def serve(self, service: Service) -> None:
        """Open the worker's address, tell the controller `Ready`, and run the service on the calling thread.

        Returns when the service is done (`Service.finished`).
        """


class ServiceHost(Protocol):
    """What runs a service, as the service sees it."""

    def wake(self) -> None:
        """From any thread: call `Service.run_next` and look at `Service.finished` soon."""

    def poll(self, timeout_s: float | None) -> None:
        """Blocking services only, from within `Service.run_next`: read what comes within this time."""

    def step_out(self) -> None:
        """Blocking services only: the service's thread is about to run user code.

        Until `step_in`, another thread may deliver messages to the service, so that calls are refused and
        cancellations heard while user code takes long.
        """

    def step_in(self) -> None:
        """Blocking services only: user code returned; no other thread touches the service any more."""

    def open_channels(self) -> int:
        """How many callers are connected."""


class Service(ChannelListener, Protocol):
    """What a worker that takes calls runs: a replica. It hears every channel opened to the worker's address."""

    on_loop: bool
    """True to be run on an asyncio loop, False to be run by `run_next` on a blocking loop."""

    def attach(self, host: ServiceHost) -> None:
        """Take the host; called once, on the thread (and loop) that will run the service, before anything else."""

    def run_next(self) -> float | None:
        """Blocking services only: do one piece of work, then say for how many seconds there is nothing to do.

        0 means there is more to do at once, None means nothing until a message comes.
        """

    def finished(self) -> bool:
        """Whether the host should stop."""
