"""How a handle finds its engine in a process that is new to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from fakes import backend_entry, snapshot

from engine.calling.client import Client
from engine.calling.connectors import register_connector, unregister_connector
from engine.calling.handle import AsyncHandle, CallOptions, Handle
from engine.errors import DeadlineExceeded, EngineClosed
from engine.seam.control_messages import Publish
from engine.seam.messages import Call, Control, Reply
from engine.seam.serialization import dumps
from engine.testing.fakes import FakeAdapter, FakeChannel
from engine.testing.instruments import PATIENCE_S, eventually

pytestmark = pytest.mark.anyio


class Distant(FakeAdapter):
    """The controller is far away: it answers when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.may_answer = threading.Event()

    def open_channel(self, address: str, listener: Any, *, on_loop: bool) -> FakeChannel:
        channel = super().open_channel(address, listener, on_loop=on_loop)
        if address == self.control_address:
            self.asked.set()
            assert self.may_answer.wait(PATIENCE_S), "who waits for the controller keeps it from answering"
            channel.answer(Control(Publish(snapshot(1, backend_entry("b", ["b#1"])))))
        return channel

    def calls(self) -> list[Call]:
        """All that have been sent to replicas."""
        return [message for channel in self.channels for message in channel.sent if isinstance(message, Call)]


@pytest.fixture
def adapter() -> Iterator[Distant]:
    adapter = Distant()
    register_connector("distant", adapter)
    yield adapter
    client = Client.find("distant")
    if client is not None:
        client.close()
    unregister_connector("distant")


@pytest.mark.parametrize("way", ["call", "remote"])
async def test_the_event_loop_goes_on_meanwhile(adapter: Distant, way: str) -> None:
    handle = AsyncHandle("distant", "fake", adapter.control_address, "e", CallOptions())

    async def answer() -> None:
        await anyio.to_thread.run_sync(adapter.asked.wait, PATIENCE_S)
        adapter.may_answer.set()

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer)
            tasks.start_soon(getattr(handle, way), "data")
            (call,) = await anyio.to_thread.run_sync(eventually, adapter.calls)
            adapter.channel("b#1").answer(Reply(call.id, 0, b"", dumps("answer", "it")))


def test_an_engine_that_does_not_answer_delays_nobody_who_calls_another_one(adapter: Distant) -> None:
    prompt = Distant()
    prompt.may_answer.set()
    register_connector("prompt", prompt)
    try:
        with ThreadPoolExecutor(2) as pool:
            stuck = pool.submit(Handle("distant", "fake", adapter.control_address, "e", CallOptions()).remote, 1)
            assert adapter.asked.wait(PATIENCE_S)
            Handle("prompt", "fake", prompt.control_address, "e", CallOptions()).remote(1)
            assert len(prompt.calls()) == 1
            assert not stuck.done()
            adapter.may_answer.set()
            stuck.result(PATIENCE_S)
    finally:
        unregister_connector("prompt")
        client = Client.find("prompt")
        assert client is not None
        client.close()


@pytest.mark.parametrize("way", ["call", "remote"])
def test_a_timeout_covers_the_way_to_the_engine(adapter: Distant, way: str) -> None:
    handle = Handle("distant", "fake", adapter.control_address, "e", CallOptions())
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match=r"'e' did not answer within timeout_s=0\.02"):
            getattr(handle.options(timeout_s=0.02), way)(1)
    assert not adapter.may_answer.is_set()
    adapter.may_answer.set()
    handle.remote(1)
    assert len(adapter.calls()) == 1
    controllers = [channel for channel in adapter.channels if channel.address == adapter.control_address]
    assert len(controllers) == 1, "the way that was begun was gone on with"


async def test_a_timeout_covers_the_way_to_the_engine_from_a_loop(adapter: Distant) -> None:
    handle = AsyncHandle("distant", "fake", adapter.control_address, "e", CallOptions(timeout_s=0.02))
    with pytest.raises(DeadlineExceeded):
        await handle.call(1)
    adapter.may_answer.set()
    eventually(lambda: Client.find("distant"))


def test_all_who_wait_hear_that_an_engine_cannot_be_reached(adapter: Distant) -> None:
    adapter.unreachable = {"controller"}
    for _ in range(2):
        with pytest.raises(EngineClosed, match="cannot be reached"):
            Handle("distant", "fake", adapter.control_address, "e", CallOptions()).call(1)
    adapter.unreachable = set()
    adapter.may_answer.set()
    Handle("distant", "fake", adapter.control_address, "e", CallOptions()).remote(1)
    assert len(adapter.calls()) == 1
