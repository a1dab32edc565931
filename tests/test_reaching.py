"""How a handle finds its engine in a process that is new to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from fakes import backend_entry, snapshot

from engine.calling.client import Client
from engine.calling.connectors import register_connector, unregister_connector
from engine.calling.handle import AsyncHandle, CallOptions
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
