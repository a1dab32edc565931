"""What the unit tests of the core need beside `engine.testing.fakes`: a fake loop for services, and messages."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.seam.messages import HTTP, PYTHON, Call, Failure, Message, Reply
from engine.seam.serialization import dumps, loads, unpack_exception
from engine.seam.snapshot import BackendEntry, EndpointEntry, ReplicaEntry, RoutingSnapshot
from engine.testing.fakes import FakeChannel
from engine.testing.instruments import eventually
from engine_wire.protocol import Decoder

# -- what crosses the seams ------------------------------------------------------------------------------------------


def a_call(*args: Any, method: str = "__call__", **kwargs: Any) -> Call:
    """A Python call that no replica was chosen for yet."""
    return Call(0, PYTHON, method, None, "", b"", dumps((args, kwargs), "the argument"))


def backend_entry(
    tag: str,
    replicas: Sequence[str],
    *,
    limit: int = 1,
    max_queued: int | None = None,
    expecting: bool = True,
    failures: int = 0,
    dead: Sequence[str] = (),
    max_queue_wait_s: float | None = None,
    max_queued_bytes: int | None = None,
) -> BackendEntry:
    """A backend whose replicas live at ``fake:ID``."""
    entries = tuple(ReplicaEntry(replica, f"fake:{replica}") for replica in replicas)
    return BackendEntry(
        tag,
        entries,
        limit,
        max_queued,
        expecting,
        failures,
        tuple(dead),
        max_queue_wait_s=max_queue_wait_s,
        max_queued_bytes=max_queued_bytes,
    )


def snapshot(
    version: int,
    *backends: BackendEntry,
    endpoints: Mapping[str, Mapping[str, float]] | None = None,
    shadows: tuple[tuple[str, float], ...] = (),
) -> RoutingSnapshot:
    """A picture of these backends; by default the endpoint "e" sends everything to the first of them."""
    if endpoints is None:
        endpoints = {"e": {backends[0].tag: 1.0}} if backends else {}
    return RoutingSnapshot(
        version,
        {
            name: EndpointEntry(name, None, ("GET",), tuple(sorted(weights.items())), shadows)
            for name, weights in endpoints.items()
        },
        {entry.tag: entry for entry in backends},
    )


# -- service loops ---------------------------------------------------------------------------------------------------


class FakeServiceLoop:
    """What runs a replica, with its thread replaced by the test."""

    def __init__(self) -> None:
        self.wakes = 0
        self.channels = 0  # how many callers are connected
        self.steps: list[str] = []  # "out" and "in", around user code
        self.script: list[Callable[[], object]] = []  # what happens in the next polls
        self.polls: list[float | None] = []

    def wake(self) -> None:
        self.wakes += 1

    def poll(self, timeout_s: float | None) -> None:
        self.polls.append(timeout_s)
        if self.script:
            self.script.pop(0)()
        else:
            assert timeout_s is not None, "nothing more will come, and the replica waits for ever"

    def step_out(self) -> None:
        self.steps.append("out")

    def step_in(self) -> None:
        self.steps.append("in")

    def open_channels(self) -> int:
        return self.channels


async def until(condition: Callable[[], object]) -> None:
    """`engine.testing.instruments.eventually` for coroutines."""
    await asyncio.to_thread(eventually, condition)


# -- what replicas are asked -----------------------------------------------------------------------------------------

_SCOPE = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}


class Telling:
    """An argument that tells, whenever it is rebuilt, which calls of a channel have begun: in `told`."""

    def __init__(self, channel: FakeChannel) -> None:
        self.told: list[list[int]] = []
        Telling._newest = lambda: self.told.append(list(channel.began))

    _newest: Callable[[], object]

    def __reduce__(self) -> Any:
        return _tell, ()


def _tell() -> None:
    Telling._newest()


def python_call(
    number: int, *args: Any, method: str = "__call__", deadline: float | None = None, **kwargs: Any
) -> Call:
    """A handle's call, as a replica gets it."""
    return Call(number, PYTHON, method, deadline, "", b"", dumps((args, kwargs), "the argument"))


def http_call(number: int, body: bytes = b"", *, method: str = "__call__") -> Call:
    """An HTTP request, as a replica gets it."""
    return Call(number, HTTP, method, None, f"request-{number}", pickle.dumps(_SCOPE), body)


def outcome(message: Any) -> Any:
    """What the caller makes of a replica's answer: the result, or the exception."""
    assert isinstance(message, (Reply, Failure))
    return loads(message.payload) if isinstance(message, Reply) else unpack_exception(message.payload)


# -- on the wire -----------------------------------------------------------------------------------------------------


def decoded(decoder: Decoder, data: bytes) -> list[Message]:
    """Let a decoder take bytes as a channel does, into the large frame while there is one; returns the messages."""
    while data:
        if decoder.large is None:
            decoder.arrived, data = data[:65536], data[65536:]
        else:
            with decoder.spare as spare:
                count = min(len(spare), len(data))
                spare[:count] = data[:count]
            decoder.filled += count
            data = data[count:]
        decoder.cut()
    messages = list(decoder.messages)
    decoder.messages.clear()
    return messages
