"""A call on its way from one caller: where its answer is waited for, and how far it has come."""

from __future__ import annotations

from typing import Any, Final, Protocol

from ..errors import EngineError
from ..seam.channel import Channel
from ..seam.messages import Call, End, Failure, Item, Reply
from .retries import Past

__all__ = ["NO_CALL", "Queue", "Slot", "Submitter"]

NO_CALL: Final = Call(0, 0, "", None, "", b"", b"")
"""Also in the place of a call that was given up: its arguments may be large, and its answer may take long."""


class Queue(Protocol):
    """Where a call waits (`engine.calling.line.Line`)."""

    def discard(self, slot: Slot) -> None:
        """Take a call out that is given up (idempotent)."""


class Slot:
    """Waits for the answer to one call. Subclasses say what happens when it comes (`engine.calling.answers`).

    Each slot gets either one `Reply`, `Failure` or error, or any number of `Item` and one `End`; then nothing more.
    Meanwhile its call goes these ways, which only its caller takes it:

        submitted ──► wait_in(queue) ──► (a target) ──► send_on(channel) ──► answered
                          ▲                                   │
                          └──────────── come_back ◄───────────┘  (refused, or never received)

    At any point it can be `give_up`: from then on the slot stands for the answer that is still due, and hears nothing.

    Args:
        endpoint: The name of the endpoint that is called.
        call: The call; its ``id`` is not looked at.
        shard_key: Calls with equal keys go to the same backend.
    """

    __slots__ = (
        "bytes",
        "call",
        "call_id",
        "channel",
        "endpoint",
        "given_up",
        "past",
        "queue",
        "shard_key",
        "since",
        "spoken",
        "target",
        "waited",
    )

    past: Past
    """What has become of the call so far: only there once something has."""
    spoken: bool
    """Something of a stream was delivered: only there once it was."""
    bytes: int
    """How much its call takes in a queue: only there once it was in one."""
    drives = False
    """Whether the thread that submits the call will drive its channel itself."""

    def __init__(self, endpoint: str = "", call: Call = NO_CALL, shard_key: str | None = None) -> None:
        self.endpoint = endpoint
        self.call = call
        self.shard_key = shard_key
        self.given_up = False
        self.since = 0.0  # when its call was placed or queued first: its place among others
        # Where the call is now. Only the caller touches these: the queue under its lock.
        self.call_id = 0
        self.queue: Queue | None = None
        self.waited = False  # in a queue, ever: whoever takes it from there sends it
        self.target: Any = None  # the `engine.calling.replica_set.Target` it was placed on last
        self.channel: Channel | None = None

    # -- the way of its call -------------------------------------------------------------------------------------------

    def wait_in(self, queue: Queue) -> None:
        """Note the queue that the call was put into."""
        self.queue = queue

    def leave_queue(self) -> None:
        """The call was taken out of its queue, and goes nowhere yet."""
        self.queue = None

    def send_on(self, channel: Channel) -> None:
        """The call is about to be sent."""
        self.channel = channel

    def come_back(self) -> None:
        """The replica did not take the call."""
        self.channel = None

    def give_up(self) -> None:
        """Nobody waits for the answer any more."""
        self.given_up = True
        self.call = NO_CALL
        if self.queue is not None:
            self.queue.discard(self)
            self.queue = None

    def remember(self) -> Past:
        """What has become of the call so far, to be added to."""
        try:
            return self.past
        except AttributeError:
            self.past = Past()
            return self.past

    # -- the answer ----------------------------------------------------------------------------------------------------

    def deliver(self, message: Reply | Failure | Item | End) -> None:
        """Take a message. Must not block and must not raise."""
        raise NotImplementedError

    def fail(self, error: EngineError) -> None:
        """Take the news that no answer will come. Must not block and must not raise."""
        raise NotImplementedError


class Submitter(Protocol):
    """What those who wait for answers need of a caller (`engine.calling.caller.Caller`)."""

    def submit(self, slot: Slot) -> None:
        """Route a slot's call; problems go to ``slot.fail``."""

    def cancel(self, slot: Slot) -> None:
        """Give a call up: its slot hears nothing any more (idempotent)."""

    def credit(self, slot: Slot, amount: int) -> None:
        """Make room for more items of a stream."""
