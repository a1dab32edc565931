"""Stand-ins for both seams of the core: channels, adapters and hosts that do nothing but what a test tells them.

They remember what was asked of them in plain lists, so that a test reads like a transcript.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import eventually

from engine.calling.slot import Slot
from engine.seam.adapter import Node
from engine.seam.channel import Channel, ChannelClosed, ChannelListener
from engine.seam.messages import HTTP, PYTHON, Call, Failure, Message, Reply
from engine.seam.serialization import dumps, loads, unpack_exception
from engine.seam.snapshot import BackendEntry, EndpointEntry, ReplicaEntry, RoutingSnapshot
from engine.seam.worker import Listen, WorkerSpec

# -- what crosses the seams ------------------------------------------------------------------------------------------


def a_call(*args: Any, method: str = "__call__", **kwargs: Any) -> Call:
    """A Python call that no replica was chosen for yet."""
    return Call(0, PYTHON, method, None, "", b"", dumps((args, kwargs), "the argument"))


def backend_entry(
    tag: str,
    replicas: Sequence[str],
    *,
    limit: int = 1,
    max_queued: int | None = None,
    expecting: bool = True,
    failures: int = 0,
    dead: Sequence[str] = (),
) -> BackendEntry:
    """A backend whose replicas live at ``fake:ID``."""
    entries = tuple(ReplicaEntry(replica, f"fake:{replica}") for replica in replicas)
    return BackendEntry(tag, entries, limit, max_queued, expecting, failures, tuple(dead))


def snapshot(
    version: int,
    *backends: BackendEntry,
    endpoints: Mapping[str, Mapping[str, float]] | None = None,
    shadows: tuple[tuple[str, float], ...] = (),
) -> RoutingSnapshot:
    """A picture of these backends; by default the endpoint "e" sends everything to the first of them."""
    if endpoints is None:
        endpoints = {"e": {backends[0].tag: 1.0}} if backends else {}
    return RoutingSnapshot(
        version,
        {
            name: EndpointEntry(name, None, ("GET",), tuple(sorted(weights.items())), shadows)
            for name, weights in endpoints.items()
        },
        {entry.tag: entry for entry in backends},
    )


# -- waiting places --------------------------------------------------------------------------------------------------


class FakeSlot(Slot):
    """Keeps what it hears."""

    __slots__ = ("error", "heard", "name", "settled")

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.heard: list[Any] = []
        self.error: BaseException | None = None
        self.settled = 0  # how many times it was told an end

    def __repr__(self) -> str:
        return f"<FakeSlot {self.name}>"

    def deliver(self, message: Any) -> None:
        self.heard.append(message)
        self.settled += 1

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.settled += 1


# -- channels --------------------------------------------------------------------------------------------------------


class FakeChannel:
    """One end of a channel without another end: remembers what was sent, and breaks on demand."""

    def __init__(self, address: str = "", listener: ChannelListener | None = None, *, on_loop: bool = False) -> None:
        self.address = address
        self.listener = listener
        self.on_loop = on_loop
        self.sent: list[Any] = []
        self.watched = 0
        self.opened = True
        self.closed = False
        self.raises: Exception | None = None  # what the next `send` raises
        self.on_send: Callable[[Any], None] | None = None

    def __repr__(self) -> str:
        return f"<FakeChannel to {self.address}>"

    def send(self, message: Message) -> None:
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        if self.closed:
            raise ChannelClosed("the channel is closed")
        self.sent.append(message)
        if self.on_send is not None:
            self.on_send(message)

    def watch(self) -> None:
        self.watched += 1

    def drive(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    # what a test makes the peer do

    def answer(self, message: Message) -> None:
        """Let the peer say something."""
        assert self.listener is not None
        self.listener.received(self, message)

    def break_off(self, reason: str = "the peer closed the connection") -> None:
        """Let the peer die."""
        assert self.listener is not None
        self.closed = True
        self.listener.lost(self, reason)

    def of_type(self, kind: type[Any]) -> list[Any]:
        """What was sent of one type, in order."""
        return [message for message in self.sent if type(message) is kind]


class FakeListener:
    """Keeps what a channel delivers; `lost` sets an event."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.reason: str | None = None
        self.losses = 0
        self.gone = threading.Event()

    def received(self, channel: Channel, message: Message) -> None:
        self.heard.append(message)

    def lost(self, channel: Channel, reason: str) -> None:
        self.reason = reason
        self.losses += 1
        self.gone.set()


class FakeHome:
    """Timers that only go off when the test says so."""

    def __init__(self, *, on_loop: bool = False) -> None:
        self.on_loop = on_loop
        self.timers: list[tuple[float, Callable[..., object], tuple[Any, ...]]] = []
        self.closed = False

    def call_later(self, delay_s: float, function: Callable[..., object], *args: Any) -> Any:
        entry = (delay_s, function, args)
        self.timers.append(entry)
        return self

    def cancel(self) -> None: ...

    def fire(self) -> None:
        """Let every timer that was set so far go off."""
        due, self.timers = self.timers, []
        for _, function, args in due:
            function(*args)

    def close(self) -> None:
        self.closed = True


class FakeStore:
    """A `engine.seam.detached.StateStore` in memory; `log` says in which order rows were written.

    It is away from rows whose names begin with one of `away`, and takes those of `mute` without being able to say so.
    """

    def __init__(self) -> None:
        self.rows: dict[str, bytes] = {}
        self.log: list[str] = []
        self.away: tuple[str, ...] = ()
        self.mute: tuple[str, ...] = ()

    def save(self, name: str, state: bytes) -> None:
        self._check(name, self.away)
        self.rows[name] = state
        self.log.append(name)
        self._check(name, self.mute)

    def remove(self, name: str) -> None:
        self._check(name, self.away)
        self.rows.pop(name, None)
        self.log.append(f"-{name}")
        self._check(name, self.mute)

    def _check(self, name: str, prefixes: tuple[str, ...]) -> None:
        if name.startswith(prefixes):
            raise ConnectionError("the control plane is away")

    def load(self) -> dict[str, bytes]:
        return dict(self.rows)


# -- adapters and hosts ----------------------------------------------------------------------------------------------


@dataclass
class FakeAdapter:
    """Starts nothing and connects to nobody; says so when asked."""

    name: str = "fake"
    shares_process: bool = False
    refs: Any = None
    store: Any = None
    control_address: str = "fake:controller"
    channels: list[FakeChannel] = field(default_factory=list)
    unreachable: set[str] = field(default_factory=set)  # replica ids
    started: list[WorkerSpec] = field(default_factory=list)
    adopted: list[WorkerSpec] = field(default_factory=list)
    told: list[tuple[str, Any]] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    refuses: BaseException | None = None  # what `start_worker` raises
    on_start: Callable[[WorkerSpec], None] | None = None
    on_adopt: Callable[[WorkerSpec], None] | None = None
    on_tell: Callable[[str, Any], None] | None = None
    on_kill: Callable[[str], None] | None = None

    async def start(self, engine_id: str, events: Any) -> None: ...

    def returns(self, control_address: str) -> bool:
        return False

    def detach(self, name: str, http: Any) -> Any:
        raise NotImplementedError

    async def adopt_worker(self, spec: WorkerSpec) -> None:
        self.adopted.append(spec)
        if self.on_adopt is not None:
            self.on_adopt(spec)

    async def start_worker(self, spec: WorkerSpec) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.started.append(spec)
        if self.on_start is not None:
            self.on_start(spec)

    def tell(self, worker_id: str, body: Any) -> None:
        self.told.append((worker_id, body))
        if self.on_tell is not None:
            self.on_tell(worker_id, body)

    def kill_worker(self, worker_id: str) -> None:
        self.killed.append(worker_id)
        if self.on_kill is not None:
            self.on_kill(worker_id)

    def unplaced(self, worker_id: str) -> str | None:
        return None

    def bound(self, listen: Listen, node_id: str) -> Listen:
        return listen

    def nodes(self) -> tuple[Node, ...]:
        return (Node("here", "127.0.0.1"),)

    def watch_nodes(self) -> None: ...

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> FakeChannel:
        if address.removeprefix("fake:") in self.unreachable:
            raise ChannelClosed(f"nobody answers at {address}")
        channel = FakeChannel(address, listener, on_loop=on_loop)
        self.channels.append(channel)
        return channel

    def close(self) -> None: ...

    async def stop(self) -> None: ...

    def channel(self, replica_tag: str) -> FakeChannel:
        """The newest channel to a replica."""
        return next(one for one in reversed(self.channels) if one.address == f"fake:{replica_tag}")


class FakeServiceLoop:
    """What runs a replica, with its thread replaced by the test."""

    def __init__(self) -> None:
        self.wakes = 0
        self.channels = 0  # how many callers are connected
        self.steps: list[str] = []  # "out" and "in", around user code
        self.script: list[Callable[[], object]] = []  # what happens in the next polls
        self.polls: list[float | None] = []

    def wake(self) -> None:
        self.wakes += 1

    def poll(self, timeout_s: float | None) -> None:
        self.polls.append(timeout_s)
        if self.script:
            self.script.pop(0)()
        else:
            assert timeout_s is not None, "nothing more will come, and the replica waits for ever"

    def step_out(self) -> None:
        self.steps.append("out")

    def step_in(self) -> None:
        self.steps.append("in")

    def open_channels(self) -> int:
        return self.channels


async def until(condition: Callable[[], object]) -> None:
    """`harness.eventually` for coroutines."""
    await asyncio.to_thread(eventually, condition)


# -- what replicas are asked -----------------------------------------------------------------------------------------

_SCOPE = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}


def python_call(
    number: int, *args: Any, method: str = "__call__", deadline: float | None = None, **kwargs: Any
) -> Call:
    """A handle's call, as a replica gets it."""
    return Call(number, PYTHON, method, deadline, "", b"", dumps((args, kwargs), "the argument"))


def http_call(number: int, body: bytes = b"", *, method: str = "__call__") -> Call:
    """An HTTP request, as a replica gets it."""
    return Call(number, HTTP, method, None, f"request-{number}", pickle.dumps(_SCOPE), body)


def outcome(message: Any) -> Any:
    """What the caller makes of a replica's answer: the result, or the exception."""
    assert isinstance(message, (Reply, Failure))
    return loads(message.payload) if isinstance(message, Reply) else unpack_exception(message.payload)
