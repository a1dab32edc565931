"""A caller's channel to the controller of an engine that another process created.

When the controller is lost, its engine is, too: every call fails. Only the controller of a detached engine comes back;
the last picture then rules until it does. A thread that lives as long as that takes finds out which it is and opens the
channel again.
"""

from __future__ import annotations

import threading
from typing import Protocol

from ..errors import EngineClosed, EngineError
from ..seam.channel import Channel, ChannelClosed
from ..seam.connector import Connector, may_return
from ..seam.control_messages import Applied, AtRest, Publish, Subscribe
from ..seam.messages import Control, Message
from ..seam.snapshot import RoutingSnapshot

__all__ = ["Subscription"]

_RETRY_S = 0.2
_LOOK_S = 0.01
"""Between looks at whether calls are left. They tell nobody: that would cost each call something."""


class Subscriber(Protocol):
    """Whom the snapshots are for: this process's client."""

    def apply(self, snapshot: RoutingSnapshot) -> None:
        """Let this snapshot rule."""

    def at_rest(self) -> bool:
        """Whether there are no calls that an engine which drains should wait for."""

    def close(self, error: EngineError | None = None) -> None:
        """No snapshot will come any more: the engine is gone, for this reason."""


class Subscription:
    """Hears the controller, and lets each snapshot rule in this process's client.

    Args:
        client: Of this process.
        connector: Opens the channel.
        control_address: Where the controller is.
        request: What the controller is asked for.

    Attributes:
        first: Set once the first snapshot rules, or the controller is lost.
    """

    def __init__(self, client: Subscriber, connector: Connector, control_address: str, request: Subscribe) -> None:
        self._client = client
        self._connector = connector
        self._control_address = control_address
        self._request = Control(request)
        self._lock = threading.Lock()  # guards the next two, and that nothing is opened once `_ended` is set
        self._channel: Channel | None = None  # the one that stands, as far as is known
        self._seeking = False  # a thread looks for the next controller
        self._ended = threading.Event()
        self.first = threading.Event()

    def begin(self) -> None:
        """Ask for snapshots.

        Raises:
            ChannelClosed: The controller is gone.
        """
        channel = self._connector.open_channel(self._control_address, self, on_loop=False)
        with self._lock:
            ended = self._ended.is_set()
            if not ended:
                self._channel = channel
        try:
            if ended:
                raise ChannelClosed("the client was closed")
            channel.send(self._request)
        except ChannelClosed:
            self._forget(channel)
            channel.close()
            raise
        channel.watch()

    def end(self) -> None:
        """Hang up, for good."""
        self._ended.set()
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
        if isinstance(message, Control) and isinstance(message.body, Publish):
            snapshot = message.body.snapshot
            self._client.apply(snapshot)
            self.first.set()
            self._say(channel, Applied(snapshot.version))
            if snapshot.draining:
                self._tell_when_at_rest(channel, snapshot.version)

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`: without its controller there is no engine."""
        if self._forget(channel):
            self.seek(reason)

    def seek(self, reason: str) -> None:
        """Look for the next controller; does nothing if that is being done, or one was found already. Does not block.

        Args:
            reason: Why there is none, for those whose calls fail if there will be no other.
        """
        with self._lock:
            if self._seeking or self._channel is not None:
                return
            self._seeking = True
        # Also whether there will be one at all is found out there: that may take seconds, and whoever
        # calls this reads the channels of all replicas as well, which go on answering.
        seeker = threading.Thread(target=self._begin_again, args=(reason,), name="engine-subscribe", daemon=True)
        try:
            seeker.start()
        except RuntimeError:  # at the end of the interpreter, which has no more threads to give
            self._give_up(reason)

    def _tell_when_at_rest(self, channel: Channel, version: int) -> None:
        if self._client.at_rest():
            self._say(channel, AtRest(version))
            return

        def tell() -> None:
            while not self._client.at_rest():
                if self._ended.wait(_LOOK_S):
                    return
            self._say(channel, AtRest(version))

        try:
            threading.Thread(target=tell, name="engine-drain", daemon=True).start()
        except RuntimeError:  # at the end of the interpreter, which has no more threads to give
            self._say(channel, AtRest(version))

    def _say(self, channel: Channel, body: Applied | AtRest) -> None:
        try:
            channel.send(Control(body))
        except ChannelClosed:
            pass  # whoever reads the channel will find that, and say so

    def _forget(self, channel: Channel) -> bool:
        """Let go of a channel that broke; False if it is not the one that stands, so that it is nobody's loss."""
        with self._lock:
            stood = self._channel is channel
            if stood:
                self._channel = None
        return stood

    def _begin_again(self, reason: str) -> None:
        while self._returns() and not self._ended.wait(_RETRY_S):
            try:
                self.begin()
            except ChannelClosed:
                pass
            with self._lock:
                if self._channel is not None:  # else it was lost again meanwhile, and left to this thread
                    self._seeking = False
                    return
        self._give_up(reason)

    def _returns(self) -> bool:
        return not self._ended.is_set() and may_return(self._connector, self._control_address)

    def _give_up(self, reason: str) -> None:
        self._client.close(EngineClosed(f"the engine is gone: {reason}"))
        self.first.set()
