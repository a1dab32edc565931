"""Pushes routing snapshots to every caller: this process's client and all who subscribed.

Runs on the controller's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from ..calling.client import Client
from ..seam.channel import Channel, ChannelClosed
from ..seam.control_messages import Applied, AtRest, Publish, Subscribe
from ..seam.messages import Control, Message
from ..seam.snapshot import BackendEntry, EndpointEntry, RoutingSnapshot

__all__ = ["Publisher"]


class _Subscriber:
    def __init__(self) -> None:
        self.ingress = False
        self.worker_id = ""
        self.subscribed = False
        self.version = -1
        self.at_rest = -1  # as of this version of a snapshot that drains


class Publisher:
    """Owns the ruling snapshot and knows which subscriber has applied which version.

    Args:
        client: Of the engine's own process; it applies a snapshot before `publish` returns.
        silent: Tell subscribers nothing before `publish`: there may be a former controller, whose last picture rules
            until then, and whoever has none yet must not take the empty one for it.
    """

    def __init__(self, client: Client, *, silent: bool = False) -> None:
        self._client = client
        self._silent = silent
        self._base = 0  # the version that a former controller had come to
        self._snapshot = RoutingSnapshot()
        self._subscribers: dict[Channel, _Subscriber] = {}
        self._expected: set[str] = set()
        self._moved = asyncio.Event()  # replaced whenever a subscriber applied something or left
        client.apply(self._snapshot)

    @property
    def snapshot(self) -> RoutingSnapshot:
        """What rules now."""
        return self._snapshot

    @property
    def version(self) -> int:
        """Of what rules now."""
        return max(self._base, self._snapshot.version)

    def resume(self, version: int) -> None:
        """Count on from the version that a former controller had come to. Its last picture rules until `publish`."""
        self._base = version

    def publish(self, endpoints: dict[str, EndpointEntry], backends: dict[str, BackendEntry]) -> int:
        """Let this picture rule; returns its version.

        Callers go on to drain, if they do, and after `publish_end` no picture rules any more: what was being changed
        when the engine began to shut down may come to this later.
        """
        if self._snapshot.closing:
            return self.version
        draining = self._snapshot.draining
        return self._rule(RoutingSnapshot(self.version + 1, endpoints, backends, draining=draining))

    def publish_drain(self) -> int:
        """Let the picture that rules go on to rule, but for new calls; returns its version."""
        return self._rule(replace(self._snapshot, version=self.version + 1, draining=True))

    def at_rest(self, version: int) -> bool:
        """Whether all subscribers that have taken this version, which drains, hold no calls any more."""
        return all(one.at_rest >= version for one in self._subscribers.values() if one.version >= version)

    def publish_end(self) -> None:
        """Let an empty picture rule, from which callers learn that the engine is shutting down."""
        self._rule(RoutingSnapshot(self.version + 1, closing=True))

    def _rule(self, snapshot: RoutingSnapshot) -> int:
        self._silent = False
        self._snapshot = snapshot
        self._client.apply(self._snapshot)
        for channel, subscriber in list(self._subscribers.items()):
            if subscriber.subscribed:
                self._push(channel)
        return self._snapshot.version

    async def applied(self, version: int, timeout_s: float, *, ingress_only: bool) -> bool:
        """Wait until every ingress (or every subscriber) has applied this version; False if it takes too long."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._behind(version, ingress_only=ingress_only):
            moved = self._moved
            try:
                await asyncio.wait_for(moved.wait(), deadline - asyncio.get_running_loop().time())
            except (asyncio.TimeoutError, TimeoutError):
                return False
        return True

    def expect(self, ingresses: Iterable[str]) -> None:
        """Wait for these workers, too, until each has subscribed or is given up: they serve, and come back themselves.

        Their workers were taken over from a former controller, which says nothing of the routes they have.
        """
        self._expected = set(ingresses) - {subscriber.worker_id for subscriber in self._subscribers.values()}

    def give_up(self, ingress: str) -> None:
        """This worker is gone."""
        self._expected.discard(ingress)
        self._signal()

    # -- subscribers -------------------------------------------------------------------------------------------------

    def connected(self, channel: Channel) -> Publisher:
        """A new party opened a channel to the control address."""
        self._subscribers[channel] = _Subscriber()
        return self

    def received(self, channel: Channel, message: Message) -> None:
        """See `engine.seam.channel.ChannelListener.received`."""
        subscriber = self._subscribers.get(channel)
        if subscriber is None or not isinstance(message, Control):
            return
        if isinstance(message.body, Subscribe):
            subscriber.subscribed = True
            subscriber.ingress = message.body.ingress
            subscriber.worker_id = message.body.worker_id
            self._expected.discard(subscriber.worker_id)
            if not self._silent:
                self._push(channel)
        elif isinstance(message.body, Applied):
            subscriber.version = message.body.version
            self._signal()
        elif isinstance(message.body, AtRest):
            subscriber.at_rest = message.body.version

    def lost(self, channel: Channel, reason: str) -> None:
        """See `engine.seam.channel.ChannelListener.lost`."""
        self._subscribers.pop(channel, None)
        self._signal()

    def _push(self, channel: Channel) -> None:
        try:
            channel.send(Control(Publish(self._snapshot)))
        except ChannelClosed as error:
            self.lost(channel, str(error))

    def _behind(self, version: int, *, ingress_only: bool) -> bool:
        return bool(self._expected) or any(
            subscriber.version < version
            for subscriber in self._subscribers.values()
            if subscriber.ingress or (subscriber.subscribed and not ingress_only)
        )

    def _signal(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
