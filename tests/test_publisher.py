"""Pushing snapshots to every caller, and knowing who has taken them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fakes import backend_entry

from engine.calling.client import Client
from engine.control.publisher import Publisher
from engine.seam.channel import ChannelClosed
from engine.seam.control_messages import Applied, AtRest, Publish, Subscribe
from engine.seam.messages import Cancel, Control
from engine.seam.snapshot import RoutingSnapshot
from engine.testing.fakes import FakeAdapter, FakeChannel

LONG_S = 1000.0
BACKENDS = {"b": backend_entry("b", ["r1"])}


class World:
    def __init__(self) -> None:
        self.client = Client("engine", FakeAdapter())
        self.publisher = Publisher(self.client)

    def connect(self, *, ingress: bool | None = False) -> FakeChannel:
        """A party that subscribed, or with None one that has not."""
        channel = FakeChannel("subscriber")
        channel.listener = self.publisher.connected(channel)
        if ingress is not None:
            channel.answer(Control(Subscribe(ingress)))
        return channel

    def publish(self) -> int:
        return self.publisher.publish({}, BACKENDS)


def on_loop(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            await asyncio.wait_for(test(World()), 20)

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


def pushed(channel: FakeChannel) -> list[int]:
    """The versions that were pushed to a subscriber."""
    return [message.body.snapshot.version for message in channel.of_type(Control) if isinstance(message.body, Publish)]


@on_loop
async def test_the_own_process_has_a_snapshot_before_anybody_asks(world: World) -> None:
    assert world.client.snapshot == world.publisher.snapshot == RoutingSnapshot()
    version = world.publish()
    assert version == 1
    assert world.client.snapshot is world.publisher.snapshot
    assert world.client.snapshot.backends == BACKENDS


@on_loop
async def test_a_subscriber_gets_the_ruling_snapshot_and_all_that_follow(world: World) -> None:
    world.publish()
    channel = world.connect()
    silent = world.connect(ingress=None)
    assert pushed(channel) == [1]
    world.publish()
    world.publish()
    assert pushed(channel) == [1, 2, 3]
    assert pushed(silent) == []


@on_loop
async def test_what_is_published_during_a_shutdown_takes_nothing_of_it_back(world: World) -> None:
    version = world.publisher.publish_drain()
    world.publish()
    late = world.connect()  # gets the newest alone: would it not drain, it would never be at rest
    assert world.publisher.snapshot.draining and world.publisher.snapshot.backends == BACKENDS
    late.answer(Control(Applied(world.publisher.version)))
    assert not world.publisher.at_rest(version)
    late.answer(Control(AtRest(world.publisher.version)))
    assert world.publisher.at_rest(version)
    world.publisher.publish_end()
    end = world.publisher.snapshot
    assert world.publish() == end.version
    assert world.publisher.snapshot is end


@on_loop
async def test_a_broken_subscriber_is_dropped(world: World) -> None:
    channel, other = world.connect(), world.connect()
    channel.raises = ChannelClosed("gone")
    world.publish()
    world.publish()
    assert pushed(channel) == [0]
    assert pushed(other) == [0, 1, 2]


@on_loop
async def test_a_subscriber_that_breaks_as_it_subscribes(world: World) -> None:
    channel = world.connect(ingress=None)
    channel.raises = ChannelClosed("gone")
    channel.answer(Control(Subscribe(True)))
    assert await world.publisher.applied(world.publish(), LONG_S, ingress_only=True)


@on_loop
async def test_nobody_need_be_waited_for(world: World) -> None:
    assert await world.publisher.applied(world.publish(), LONG_S, ingress_only=False)
    world.connect(ingress=None)
    assert await world.publisher.applied(world.publish(), LONG_S, ingress_only=False)
    world.connect(ingress=False)
    assert await world.publisher.applied(world.publish(), LONG_S, ingress_only=True)


@on_loop
async def test_waiting_until_every_ingress_has_applied_it(world: World) -> None:
    ingresses = [world.connect(ingress=True) for _ in range(2)]
    version = world.publish()
    waiting = asyncio.ensure_future(world.publisher.applied(version, LONG_S, ingress_only=True))
    for channel, body in [
        (ingresses[0], Applied(version)),
        (ingresses[1], Applied(version - 1)),  # not yet
    ]:
        channel.answer(Control(body))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
    ingresses[1].answer(Control(Applied(version)))
    assert await waiting


@on_loop
async def test_an_ingress_that_dies_is_not_waited_for(world: World) -> None:
    ingress = world.connect(ingress=True)
    waiting = asyncio.ensure_future(world.publisher.applied(world.publish(), LONG_S, ingress_only=True))
    await asyncio.sleep(0)
    ingress.break_off()
    assert await waiting


@on_loop
async def test_other_subscribers_are_waited_for_on_request(world: World) -> None:
    channel = world.connect(ingress=False)
    version = world.publish()
    assert not await world.publisher.applied(version, 0.001, ingress_only=False)
    channel.answer(Control(Applied(version)))
    assert await world.publisher.applied(version, LONG_S, ingress_only=False)


@on_loop
async def test_what_is_said_out_of_place_is_passed_over(world: World) -> None:
    channel = world.connect()
    channel.answer(Cancel(1))
    channel.answer(Control("nonsense"))
    channel.break_off()
    channel.answer(Control(Subscribe(True)))  # it is nobody any more
    assert pushed(channel) == [0]
    assert await world.publisher.applied(world.publish(), LONG_S, ingress_only=True)
