"""The outward seam: where workers run.

An adapter starts workers, says when and why they died, tells them things, kills them, lists nodes and opens channels.
It knows nothing of backends, endpoints or routing; the core knows nothing of processes, sockets or clusters. Only ids,
bytes, frozen dataclasses and deadlines cross. What only some adapters can do are protocols of their own, which the core
asks for by type: `WatchesNodes`, `FindsPlaces`, `KeepsPorts` and `SeesProcesses` here, `HasRefs` and `MayReturn` in
`engine.seam.connector`, `Detachable` and `KeepsState` in `engine.seam.detached`. An adapter that passes on to another
one does so by methods of its own: what only `__getattr__` finds counts as there or not depending on the version of
Python.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..errors import InvalidArgument
from .channel import Channel, ChannelListener
from .connector import Connector
from .worker import Listen, WorkerExit, WorkerSpec

__all__ = [
    "Adapter",
    "AdapterBase",
    "AdapterEvents",
    "FindsPlaces",
    "KeepsPorts",
    "Node",
    "SeesProcesses",
    "Vitals",
    "WatchesNodes",
    "done_by",
    "lacking",
]


@dataclass(frozen=True)
class Node:
    """A machine that workers can run on."""

    node_id: str
    address: str


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


class Adapter(Connector, Protocol):
    """Where workers run. The coroutine methods run on the controller's asyncio loop."""

    shares_process: bool
    """Whether workers live in the engine's own process."""

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """Get ready to start workers."""

    async def start_worker(self, spec: WorkerSpec) -> None:
        """Start a worker; returns as soon as its death would be reported.

        Raises:
            engine.errors.ResourcesUnavailable: The resources are not free, and waiting would not help.
            engine.errors.InvalidArgument: ``spec.listen`` cannot be bound.
        """

    def tell(self, worker_id: str, body: Any) -> None:
        """Send a `Control` body to a worker; does nothing when it is gone."""

    def kill_worker(self, worker_id: str) -> None:
        """End a worker at once; `AdapterEvents.worker_exited` follows. Does nothing when it is gone."""

    def bound(self, listen: Listen, node_id: str) -> Listen:
        """The address that ``listen`` came to on a node, with the real port.

        Raises:
            KeyError: No worker was started there with it.
        """

    def nodes(self) -> tuple[Node, ...]:
        """The nodes workers can run on now; the first one is where the engine was created."""

    async def stop(self) -> None:
        """Kill what still runs, reap it and release everything `start` took (idempotent).

        With a store (`KeepsState`), it is called after a failed `start`, too, and ends what a former controller left.
        """


class AdapterBase:
    """What most adapters would say, to build on: workers are processes of their own, all on one node."""

    shares_process = False
    control_address = ""

    def nodes(self) -> tuple[Node, ...]:
        """See `Adapter.nodes`: this machine."""
        return (Node("local", "127.0.0.1"),)


async def done_by(adapter: Adapter, method: str, *args: Any) -> None:
    """Have an adapter do something that its protocol makes a coroutine of.

    Raises:
        InvalidArgument: Its method is none.
    """
    doing = getattr(adapter, method)(*args)
    if not inspect.isawaitable(doing):
        raise InvalidArgument(
            f"{type(adapter).__name__} of adapter {adapter.name!r}: its method {method} must be written with "
            f"`async def`, and returned {doing!r}"
        )
    await doing


def lacking(adapter: Any) -> list[str]:
    """What an object lacks of an `Adapter`: names of attributes and methods, sorted; nothing if it is one."""
    members = {
        name
        for seam in (Connector, Adapter)
        for name in (*seam.__annotations__, *vars(seam))
        if not name.startswith("_")
    }
    return sorted(member for member in members if not hasattr(adapter, member))


@runtime_checkable
class WatchesNodes(Protocol):
    """An adapter whose nodes come and go."""

    def watch_nodes(self) -> None:
        """Report from now on when nodes come and go (`AdapterEvents.nodes_changed`; idempotent)."""


@runtime_checkable
class FindsPlaces(Protocol):
    """An adapter on which a worker that was started may have to wait for a place to run."""

    def unplaced(self, worker_id: str) -> str | None:
        """Why a worker that was started has no place to run on yet: what it asked for and what there is.

        Returns:
            A phrase for people, or None when it has a place.
        """


@runtime_checkable
class KeepsPorts(Protocol):
    """An adapter that keeps public addresses open itself, also while no worker accepts connections there."""

    def close_ports(self) -> None:
        """Close them for good: the engine ends, and the workers that accepted connections are gone (idempotent)."""


class Vitals(NamedTuple):
    """What the machine knows of a worker's process, which need not do anything for that.

    Attributes:
        stopped: It runs no more until somebody continues it: by a signal such as SIGSTOP, or in a debugger.
        cpu_s: Seconds of CPU that it has used so far.
        held_up: It would run, but for a CPU or a disk that it waits for. What runs just then is held up, too.
        ended: It runs no more at all. Its parent, who could tell, has not taken notice.
    """

    stopped: bool
    cpu_s: float
    held_up: bool = False
    ended: bool = False


@runtime_checkable
class SeesProcesses(Protocol):
    """An adapter that can look at the processes of its workers from outside.

    The core asks for that when a worker does not answer. Without it, such a worker is left alone as long as its control
    channel stands.
    """

    async def vitals(self, worker_id: str) -> Vitals | None:
        """Look at a worker's process.

        Returns:
            None if it is gone, or nothing can be learnt of it now.
        """
