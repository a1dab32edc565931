"""What a caller hands to the router with a call, and who waits for its answer.

An `Outgoing` is the call before a replica is chosen. A `Slot` is its waiting place: it hears every message that answers
the call, in whichever thread or loop delivers the caller's channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..seam.messages import End, Failure, Item, Reply

if TYPE_CHECKING:
    from ..errors import EngineError
    from ..seam.adapter import Channel

__all__ = ["Outgoing", "Slot"]


class Outgoing(NamedTuple):
    """A call that no replica was chosen for yet; the fields are those of `engine.seam.messages.Call`."""

    kind: int
    method: str
    deadline: float | None
    request_id: str
    head: bytes
    payload: bytes
    shard_key: str | None = None


class Slot:
    """Waits for the answer to one call. Subclasses say what happens when it comes.

    Each slot gets either one `Reply`, `Failure` or error, or any number of `Item` and one `End`; then nothing more.
    """

    __slots__ = ("call_id", "channel", "endpoint", "outgoing", "pool", "replica")

    drives = False
    """Whether the thread that submits the call will drive its channel itself."""

    def __init__(self) -> None:
        # Only the caller touches these, under its lock.
        self.call_id = 0
        self.channel: Channel | None = None
        self.endpoint: Any = None
        self.outgoing: Outgoing | None = None
        self.pool: Any = None
        self.replica: Any = None

    def deliver(self, message: Reply | Failure | Item | End) -> None:
        """Take a message. Must not block and must not raise."""
        raise NotImplementedError

    def fail(self, error: EngineError) -> None:
        """Take the news that no answer will come. Must not block and must not raise."""
        raise NotImplementedError
