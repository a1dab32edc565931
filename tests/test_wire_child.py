"""Both ends of the control channel between the engine's process and a child of it, in one process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fakes import until

from engine.testing.instruments import Footprint
from engine_wire import ChildHost, ControlChannel, WireConnector

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Connector(WireConnector):
    name = "test"


class Host(ChildHost):
    """Ends nothing when the engine is gone."""

    ends = 0

    def control_lost(self, reason: str) -> None:
        self.ends += 1


class Ends(NamedTuple):
    control: ControlChannel
    host: Host
    said: asyncio.Queue[Any]  # by the worker; at last an exception with the reason of the end


@pytest.fixture
def public() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
async def ends(tmp_path: Path, public: socket.socket, leaves_nothing: Footprint) -> AsyncIterator[Ends]:
    ours, theirs = socket.socketpair()
    said: asyncio.Queue[Any] = asyncio.Queue()
    control = ControlChannel(
        ours, said.put_nowait, lambda why: said.put_nowait(EOFError(why)), asyncio.get_running_loop()
    )
    host = Host("w", theirs.detach(), [public.detach()], str(tmp_path / "w.sock"), Connector("unix:/nowhere"))
    yield Ends(control, host, said)
    control.close()
    host._channel.close()
    for sock in host.listen_sockets():
        sock.close()


async def test_each_hears_the_other(ends: Ends) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    ends.host.start()
    ends.host.on_control(lambda body: loop.call_soon_threadsafe(heard.put_nowait, body))
    ends.control.tell("from the engine")
    assert await heard.get() == "from the engine"
    ends.host.tell("from the worker")
    assert await ends.said.get() == "from the worker"


async def test_a_worker_has_what_it_inherited(ends: Ends) -> None:
    (sock,) = ends.host.listen_sockets()
    assert sock.getsockname()[0] == "127.0.0.1"
    assert ends.host.connector() is ends.host.connector()
    assert ends.host.connector().control_address == "unix:/nowhere"


async def test_the_last_words_of_a_worker_come_before_its_end(ends: Ends) -> None:
    for number in range(100):
        ends.host.tell(number)
    ends.host._channel.close()
    assert [await ends.said.get() for _ in range(100)] == list(range(100))
    assert str(await ends.said.get()) == "the peer closed the connection"
    ends.control.tell("too late, and harmless")
    assert ends.said.empty()


async def test_what_has_arrived_can_be_read_at_once(ends: Ends) -> None:
    ends.host.tell("the last word")
    ends.host._channel.close()
    ends.control.read_rest()
    assert ends.said.get_nowait() == "the last word"
    assert isinstance(ends.said.get_nowait(), EOFError)


async def test_the_worker_hears_that_the_engine_is_gone(ends: Ends) -> None:
    ends.host.start()
    ends.control.close()
    await until(lambda: ends.host.ends)
    assert ends.said.empty(), "who closes a channel is not told that it is lost"
