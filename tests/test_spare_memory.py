"""Whether a worker gives back the memory that its allocator keeps."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pytest

from engine.seam.control_messages import Drain, Ping
from engine.seam.messages import Control
from engine.testing.fakes import FakeChannel
from engine_wire import spare_memory
from engine_wire.spare_memory import SpareMemory
from engine_wire.worker_host import WireWorkerHost

MB = 1 << 20


class Process:
    """A process with so much memory, of which so much is not needed."""

    def __init__(self) -> None:
        self.has = 30 * MB
        self.spare = 0
        self.asked = 0
        self.now = 1000.0
        self.memory = SpareMemory(lambda: self.has, self.trim, lambda: self.now)
        self.looks(3)

    def trim(self) -> None:
        self.asked += 1
        self.has -= self.spare
        self.spare = 0

    def looks(self, times: int = 2) -> int:
        """Let it look so often, every second; returns how often the allocator was asked meanwhile."""
        before = self.asked
        for _ in range(times):
            self.now += 1.0
            self.memory.look()
        return self.asked - before


def test_what_a_flood_has_left_is_given_back_once() -> None:
    process = Process()
    process.has, process.spare = 200 * MB, 170 * MB
    assert process.looks() == 1
    assert process.has == 30 * MB
    assert process.looks(100) == 0


def test_little_is_kept() -> None:
    process = Process()
    process.has, process.spare = 45 * MB, 15 * MB
    assert process.looks(100) == 0


def test_nothing_is_asked_while_memory_comes_and_goes() -> None:
    process = Process()
    for step in range(100):
        process.has, process.spare = (200 + 10 * (step % 2)) * MB, 50 * MB
        assert process.looks(1) == 0


def test_memory_that_is_needed_is_asked_for_less_and_less() -> None:
    process = Process()
    process.has = 500 * MB
    assert process.looks(100) in range(4, 7)
    assert process.looks(4000) in range(6, 12)


def test_memory_that_is_needed_now_and_then_is_asked_for_less_and_less() -> None:
    process = Process()
    for _ in range(100):
        process.has = 300 * MB
        process.looks(10)
        process.has = 200 * MB
        process.looks(10)
    assert process.asked < 20


def test_what_is_freed_without_a_sign_is_given_back_later() -> None:
    process = Process()
    process.has = 200 * MB
    assert process.looks() == 1, "in vain: it is in use"
    process.spare = 170 * MB
    assert process.looks(10) == 1
    assert process.has == 30 * MB


def test_after_a_change_it_is_asked_soon_again() -> None:
    process = Process()
    process.has = 300 * MB
    process.looks(1000)
    process.has, process.spare = 500 * MB, 470 * MB
    assert process.looks(5) == 1
    assert process.has == 30 * MB


def test_a_worker_looks_when_it_is_asked_whether_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    monkeypatch.setattr(SpareMemory, "look", lambda memory: looks.append("look"))
    channel: Any = FakeChannel("fake:controller")
    host = WireWorkerHost("w", lambda listener: channel)
    host.on_control(lambda body: looks.append(type(body).__name__))
    host.received(channel, Control(Drain(1.0)))
    host.received(channel, Control(Ping(1)))
    assert looks == ["Drain", "Ping", "look"], "it answers first"


def test_where_it_is_not_known_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "other")
    assert spare_memory._resident() == 0
    process = Process()
    process.has = 0
    assert process.looks(100) == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc can be asked")
def test_glibc_gives_back_what_lies_between_things_that_live() -> None:
    blocks, lives = [], []
    for _ in range(1000):
        blocks.append(bytes(100_000))
        lives.append(bytes(2_000))
    full = spare_memory._resident()
    blocks.clear()
    spare_memory._trim()
    assert full - spare_memory._resident() > 50 * MB
    assert lives
