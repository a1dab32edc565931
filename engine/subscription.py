"""A caller's channel to the controller of an engine that another process created."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .adapter import Channel, ChannelClosed
from .control import Applied, Publish, Subscribe
from .errors import EngineClosed
from .messages import Control, Message

if TYPE_CHECKING:
    from .client import Client

__all__ = ["Subscription"]


class Subscription:
    """Hears the controller, and lets each snapshot rule in this process's client.

    Attributes:
        first: Set once the first snapshot rules, or the controller is lost.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self.first = threading.Event()

    def begin(self, channel: Channel, *, ingress: bool, worker_id: str) -> None:
        """Ask for snapshots.

        Raises:
            ChannelClosed: The controller is gone.
        """
        channel.send(Control(Subscribe(ingress, worker_id)))
        channel.watch()

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.adapter.ChannelListener.received`."""
        if isinstance(message, Control) and isinstance(message.body, Publish):
            snapshot = message.body.snapshot
            self._client.apply(snapshot)
            self.first.set()
            try:
                channel.send(Control(Applied(snapshot.version)))
            except ChannelClosed as error:
                self.lost(channel, str(error))

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.adapter.ChannelListener.lost`: without its controller there is no engine."""
        self._client.close(EngineClosed(f"the engine is gone: {reason}"))
        self.first.set()
