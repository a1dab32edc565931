"""Who has connected to the controller and belongs to nobody yet. Only the controller's loop touches this.

A party that connects is a newcomer until its first word says what it is. A worker of a former controller usually comes
back before the new one asks for it: it waits as a stranger, and what it says is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from engine.seam.channel import Channel, ChannelClosed
from engine.seam.control_messages import Drain
from engine.seam.messages import Control, Message
from engine_wire import SocketChannel

from .process import Process

__all__ = ["Newcomer", "Stranger", "Strangers"]

_ADOPTED_WITHIN_S = 5.0
_DISMISSED_WITHIN_S = 20.0


class Newcomer:
    """Hears a party that has connected until it says what it is.

    Args:
        introduced: Gets its channel and its first word, and gives the channel its listener.
    """

    def __init__(self, introduced: Callable[[SocketChannel, Message], None]) -> None:
        self._introduced = introduced

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
        assert isinstance(channel, SocketChannel)
        if channel.listener is self:
            self._introduced(channel, message)
        elif channel.listener is not None:  # what came with the first word goes to whom that brought
            channel.listener.received(channel, message)

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`; nobody knew it."""


class Stranger:
    """A worker of a former controller that nobody has asked for yet; keeps what it says.

    Args:
        channel: Its control channel.
        process: That it runs in, if it has said so.
    """

    def __init__(self, channel: SocketChannel, process: Process | None) -> None:
        self.channel = channel
        self.process = process
        self.heard: list[Message] = []

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
        self.heard.append(message)

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`; should it be adopted yet, sending to it will tell."""


class Strangers:
    """The strangers, by worker id."""

    def __init__(self) -> None:
        self._waiting: dict[str, Stranger] = {}

    def take_in(self, worker_id: str, channel: SocketChannel, process: Process | None = None) -> None:
        """A worker has come back: hear it until it is asked for, and send it home if it never is."""
        stranger = channel.listener = self._waiting[worker_id] = Stranger(channel, process)
        asyncio.get_running_loop().call_later(_ADOPTED_WITHIN_S, self._dismiss, worker_id, stranger)

    def hand_over(self, worker_id: str) -> Stranger | None:
        """The worker, if it has come back and is still there; it is no stranger any more."""
        stranger = self._waiting.pop(worker_id, None)
        return None if stranger is None or stranger.channel.closed else stranger

    def _dismiss(self, worker_id: str, stranger: Stranger) -> None:
        """Let a worker go that a former controller started but never told the checkpoint of, or was ending."""
        if self._waiting.get(worker_id) is stranger:
            del self._waiting[worker_id]
            with contextlib.suppress(ChannelClosed):  # it has left
                stranger.channel.send(Control(Drain(_DISMISSED_WITHIN_S)))
