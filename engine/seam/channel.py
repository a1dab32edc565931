"""Channels: ordered, multiplexed, two-way streams of messages between two parties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .messages import Message

__all__ = ["Channel", "ChannelClosed", "ChannelListener"]


class ChannelClosed(Exception):
    """The channel can take no more messages."""


class ChannelListener(Protocol):
    """The party a channel delivers to."""

    def received(self, channel: Channel, message: Message) -> None:
        """Take one message. Must not block and must not raise.

        A signal handler may raise here all the same. An answer (`Reply`, `Failure` or `End`) then comes once more; with
        any other message nobody can tell whether it was taken, and the channel is lost.
        """

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
            ChannelClosed: The channel is closed, or the peer is gone. The listener of a channel that nobody has closed
                is told, now or when it has heard the peer's last words, if somebody watches or drives the channel.
            engine.errors.InvalidArgument: The message is larger than the channel's frame limit.
        """

    def awaits(self, call_id: int) -> bool:
        """Whether it has taken this call, to send it, and not delivered the answer yet.

        It is how whoever was interrupted in `send`, by an exception that a signal handler raised, learns what became
        of the call.
        """

    def begin(self, call_id: int) -> bool:
        """Note that user code is about to see a call of the peer's, so that the peer can know should this side die.

        Called for every call, by whoever runs it, on the thread that takes messages; so it must cost next to nothing.

        Returns:
            False if the channel is closed, so that the peer takes the call elsewhere: it must not be run then.
        """

    def may_have_begun(self, call_id: int) -> bool:
        """Of a call that was sent on a channel which is lost now: whether user code of the peer can have seen it.

        False is a promise, so True is the answer wherever that is not known.
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
