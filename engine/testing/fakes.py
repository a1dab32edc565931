"""Fakes for either side of the seams: channels, adapters and their like that do nothing but what a test tells them.

They remember what was asked of them in plain lists, so that a test reads like a transcript. None of them is safe to use
from several threads at once, but `FakeListener`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ..calling.slot import Slot
from ..seam.adapter import Node
from ..seam.channel import Channel, ChannelClosed, ChannelListener
from ..seam.control_messages import Ping
from ..seam.messages import Call, End, Failure, Message, Reply
from ..seam.worker import Listen, WorkerSpec

if TYPE_CHECKING:
    from ..calling.home import Home
    from ..seam.adapter import Adapter, AdapterEvents
    from ..seam.detached import KeepsState, StateStore

__all__ = ["FakeAdapter", "FakeChannel", "FakeHome", "FakeListener", "FakeSlot", "FakeStore", "FakeTimer"]

_Kind = TypeVar("_Kind")


class FakeSlot(Slot):
    """A call that waits for its answer, and keeps what it hears.

    Args:
        name: Shown by ``repr``.

    Attributes:
        heard: What was delivered, in order.
        error: What it failed with, if it did.
        settled: How many times it was told an end.
    """

    __slots__ = ("error", "heard", "name", "settled")

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.heard: list[Any] = []
        self.error: BaseException | None = None
        self.settled = 0

    def __repr__(self) -> str:
        return f"<FakeSlot {self.name}>"

    def deliver(self, message: Any) -> None:
        """See `engine.calling.slot.Slot.deliver`."""
        self.heard.append(message)
        self.settled += 1

    def fail(self, error: BaseException) -> None:
        """See `engine.calling.slot.Slot.fail`."""
        self.error = error
        self.settled += 1


class FakeChannel:
    """One end of a channel without another end: remembers what was sent, and breaks on demand.

    Args:
        address: Where it would lead.
        listener: Who hears it; needed for `answer` and `break_off` alone.
        on_loop: As `engine.seam.connector.Connector.open_channel` was told.

    Attributes:
        sent: What was sent, in order.
        unanswered: Numbers of the calls among that which `answer` has not answered.
        watched: How many times `watch` was called.
        opened: See `engine.seam.channel.Channel.opened`; to be set by the test.
        closed: Whether it takes no more messages.
        began: Numbers of the calls that this end was told have begun, in order.
        begun: The highest number of a call that has begun at the peer, as it is known once that is dead; None if
            nobody knows.
        raises: What the next `send` raises, once.
        on_send: Called with each message after it was sent, say to answer it.
    """

    def __init__(self, address: str = "", listener: ChannelListener | None = None, *, on_loop: bool = False) -> None:
        self.address = address
        self.listener = listener
        self.on_loop = on_loop
        self.sent: list[Any] = []
        self.unanswered: dict[int, None] = {}
        self.watched = 0
        self.opened = True
        self.closed = False
        self.began: list[int] = []
        self.begun: int | None = None
        self.raises: Exception | None = None
        self.on_send: Callable[[Any], None] | None = None
        self._died_of: str | None = None
        self._told = False

    def __repr__(self) -> str:
        return f"<FakeChannel to {self.address}>"

    def send(self, message: Message) -> None:
        """See `engine.seam.channel.Channel.send`."""
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        if self.closed or self._died_of is not None:
            raise ChannelClosed("the channel is closed")
        if isinstance(message, Call):
            self.unanswered[message.id] = None
        self.sent += (message,)  # with no call in between, at which a signal handler could strike
        if self.on_send is not None:
            self.on_send(message)

    def awaits(self, call_id: int) -> bool:
        """See `engine.seam.channel.Channel.awaits`."""
        return call_id in self.unanswered and not self.closed

    def begin(self, call_id: int) -> bool:
        """See `engine.seam.channel.Channel.begin`; keeps it in `began`."""
        self.began.append(call_id)
        return not self.closed

    def may_have_begun(self, call_id: int) -> bool:
        """See `engine.seam.channel.Channel.may_have_begun`."""
        return self.begun is None or call_id <= self.begun

    def watch(self) -> None:
        """See `engine.seam.channel.Channel.watch`; finds at once that the peer has died."""
        self.watched += 1
        if self._died_of is not None:
            self.break_off(self._died_of)

    def drive(self, done: Callable[[], bool], timeout_s: float | None) -> bool:
        """See `engine.seam.channel.Channel.drive`: nobody can drive it."""
        return False

    def close(self) -> None:
        """See `engine.seam.channel.Channel.close`."""
        self.closed = True

    # -- what a test makes the peer do ---------------------------------------------------------------------------------

    def answer(self, message: Message) -> None:
        """Let the peer say something."""
        assert self.listener is not None
        self.listener.received(self, message)
        if isinstance(message, (Reply, Failure, End)):
            self.unanswered.pop(message.id, None)

    def die(self, reason: str = "the peer closed the connection") -> None:
        """Let the peer die, which nobody has noticed before somebody watches the channel."""
        self._died_of = reason

    def break_off(self, reason: str = "the peer closed the connection") -> None:
        """Let the peer die, and tell the listener."""
        assert self.listener is not None
        self._died_of = reason
        self.closed = True
        if not self._told:
            self.listener.lost(self, reason)
            self._told = True

    def of_type(self, kind: type[_Kind]) -> list[_Kind]:
        """What was sent of one type, in order."""
        return [message for message in self.sent if type(message) is kind]


class FakeListener:
    """Keeps what a channel delivers, from whichever thread.

    Attributes:
        heard: What was delivered, in order.
        reason: Why the channel was lost, if it was.
        losses: How many times it was told so.
        gone: Set when the channel is lost.
    """

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.reason: str | None = None
        self.losses = 0
        self.gone = threading.Event()

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
        self.heard.append(message)

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`."""
        self.reason = reason
        self.losses += 1
        self.gone.set()


@dataclass
class FakeTimer:
    """What `FakeHome.call_later` was asked for.

    Attributes:
        delay_s: Seconds that it was asked to wait.
        function: To be called.
        args: With these.
        cancelled: How many times it was cancelled.
    """

    delay_s: float
    function: Callable[..., object]
    args: tuple[Any, ...]
    cancelled: int = 0

    def cancel(self) -> None:
        """See `engine.calling.home.Timer.cancel`."""
        self.cancelled += 1


class FakeHome:
    """A clock that stands still: timers only go off when the test says so.

    Args:
        on_loop: Whether the caller that lives here belongs to an event loop.

    Attributes:
        timers: Those that have not gone off, cancelled ones included.
        closed: Whether `close` was called.
    """

    def __init__(self, *, on_loop: bool = False) -> None:
        self.on_loop = on_loop
        self.timers: list[FakeTimer] = []
        self.closed = False

    def runs_here(self) -> bool:
        """See `engine.calling.home.Home.runs_here`."""
        return False

    def call_later(self, delay_s: float, function: Callable[..., object], *args: Any) -> FakeTimer:
        """See `engine.calling.home.Home.call_later`."""
        timer = FakeTimer(delay_s, function, args)
        self.timers.append(timer)
        return timer

    def fire(self) -> None:
        """Let every timer that was set so far go off, unless it was cancelled."""
        due, self.timers = self.timers, []
        for timer in due:
            if not timer.cancelled:
                timer.function(*timer.args)

    def close(self) -> None:
        """See `engine.calling.home.Home.close`."""
        self.closed = True


class FakeStore:
    """A `engine.seam.detached.StateStore` in memory.

    Attributes:
        rows: What it keeps.
        log: In which order rows were written: their names, with a dash before those that were removed.
        away: It cannot be reached for rows whose names begin with one of these.
        mute: It takes rows whose names begin with one of these, but cannot say so.
    """

    def __init__(self) -> None:
        self.rows: dict[str, bytes] = {}
        self.log: list[str] = []
        self.away: tuple[str, ...] = ()
        self.mute: tuple[str, ...] = ()

    def save(self, name: str, state: bytes) -> None:
        """See `engine.seam.detached.StateStore.save`."""
        self._check(name, self.away)
        self.rows[name] = state
        self.log.append(name)
        self._check(name, self.mute)

    def remove(self, name: str) -> None:
        """See `engine.seam.detached.StateStore.remove`."""
        self._check(name, self.away)
        self.rows.pop(name, None)
        self.log.append(f"-{name}")
        self._check(name, self.mute)

    def load(self) -> dict[str, bytes]:
        """See `engine.seam.detached.StateStore.load`."""
        return dict(self.rows)

    def _check(self, name: str, prefixes: tuple[str, ...]) -> None:
        if name.startswith(prefixes):
            raise ConnectionError("the control plane is away")


@dataclass
class FakeAdapter:
    """Starts nothing and connects to nobody, but remembers having been asked.

    Every replica it knows has the address ``fake:REPLICA_TAG``.

    Attributes:
        name: See `engine.seam.connector.Connector.name`.
        shares_process: See `engine.seam.adapter.Adapter.shares_process`.
        refs: See `engine.seam.connector.HasRefs`; None where the platform has none.
        store: See `engine.seam.detached.KeepsState`; None where the engine ends with its process.
        control_address: See `engine.seam.connector.Connector.control_address`.
        channels: Those that were opened, in order.
        unreachable: Tags of replicas to which no channel can be opened; also ``"controller"``.
        started: What it was asked to start, in order.
        adopted: What it was asked to adopt, in order.
        told: Worker ids and bodies, in order, but for `Ping`.
        asked: Ids of the workers that were sent a `Ping`, in order.
        killed: Worker ids, in order.
        events: Who hears what it reports, once it was started.
        refuses: What `start_worker` raises.
        on_start: Called with what was started, say to report that it is ready.
        on_adopt: Called with what was adopted.
        on_tell: Called with what was told.
        on_kill: Called with what was killed.
    """

    name: str = "fake"
    shares_process: bool = False
    refs: Any = None
    store: Any = None
    control_address: str = "fake:controller"
    channels: list[FakeChannel] = field(default_factory=list)
    unreachable: set[str] = field(default_factory=set)
    started: list[WorkerSpec] = field(default_factory=list)
    adopted: list[WorkerSpec] = field(default_factory=list)
    told: list[tuple[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    events: AdapterEvents | None = None
    refuses: BaseException | None = None
    on_start: Callable[[WorkerSpec], None] | None = None
    on_adopt: Callable[[WorkerSpec], None] | None = None
    on_tell: Callable[[str, Any], None] | None = None
    on_kill: Callable[[str], None] | None = None

    async def start(self, engine_id: str, events: AdapterEvents) -> None:
        """See `engine.seam.adapter.Adapter.start`."""
        self.events = events

    async def start_worker(self, spec: WorkerSpec) -> None:
        """See `engine.seam.adapter.Adapter.start_worker`."""
        if self.refuses is not None:
            raise self.refuses
        self.started.append(spec)
        if self.on_start is not None:
            self.on_start(spec)

    async def adopt_worker(self, spec: WorkerSpec) -> None:
        """See `engine.seam.detached.KeepsState.adopt_worker`."""
        self.adopted.append(spec)
        if self.on_adopt is not None:
            self.on_adopt(spec)

    def tell(self, worker_id: str, body: Any) -> None:
        """See `engine.seam.adapter.Adapter.tell`."""
        if isinstance(body, Ping):
            self.asked.append(worker_id)
            return
        self.told.append((worker_id, body))
        if self.on_tell is not None:
            self.on_tell(worker_id, body)

    def kill_worker(self, worker_id: str) -> None:
        """See `engine.seam.adapter.Adapter.kill_worker`."""
        self.killed.append(worker_id)
        if self.on_kill is not None:
            self.on_kill(worker_id)

    def bound(self, listen: Listen, node_id: str) -> Listen:
        """See `engine.seam.adapter.Adapter.bound`."""
        return listen

    def nodes(self) -> tuple[Node, ...]:
        """See `engine.seam.adapter.Adapter.nodes`."""
        return (Node("here", "127.0.0.1"),)

    def open_channel(self, address: str, listener: ChannelListener, *, on_loop: bool) -> FakeChannel:
        """See `engine.seam.connector.Connector.open_channel`."""
        if address.removeprefix("fake:") in self.unreachable:
            raise ChannelClosed(f"nobody answers at {address}")
        channel = FakeChannel(address, listener, on_loop=on_loop)
        self.channels.append(channel)
        return channel

    def channel(self, replica_tag: str) -> FakeChannel:
        """The newest channel to a replica."""
        return next(one for one in reversed(self.channels) if one.address == f"fake:{replica_tag}")

    def close(self) -> None:
        """See `engine.seam.connector.Connector.close`."""

    async def stop(self) -> None:
        """See `engine.seam.adapter.Adapter.stop`."""


if TYPE_CHECKING:
    # what type checkers are to find out: each fake is what it stands in for
    _adapter: Adapter = FakeAdapter()
    _keeps_state: KeepsState = FakeAdapter()
    _channel: Channel = FakeChannel()
    _listener: ChannelListener = FakeListener()
    _home: Home = FakeHome()
    _store: StateStore = FakeStore()
