"""What workers print and log while the engine's process reads none of it."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import decoded

from engine.seam.control_messages import LogLine
from engine.seam.messages import Control
from engine.testing.instruments import PATIENCE_S
from engine_local.printing import _Pipe
from engine_wire import SocketChannel, Undriven, WireWorkerHost
from engine_wire.logs import LogToEngine
from engine_wire.protocol import Decoder

LINES = 50_000


class Reader(threading.Thread):
    """Reads a descriptor to its end once it is told to."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.data = b""

    def run(self) -> None:
        while part := os.read(self.descriptor, 1 << 16):
            self.data += part


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


def printer(descriptor: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(_Pipe(descriptor), encoding="utf-8", line_buffering=True)  # type: ignore[type-var]


def test_what_nobody_reads_is_dropped_by_whole_lines_and_counted(pipe: tuple[int, int]) -> None:
    stream = printer(pipe[1])
    for number in range(LINES):  # it would wait for ever, were this a common stream
        stream.write(f"line {number}\n")
    reader = Reader(pipe[0])
    reader.start()
    while stream.write("once more\n") and b"once more" not in reader.data:
        pass  # it may still be full
    os.close(pipe[1])
    reader.join(PATIENCE_S)
    lines = reader.data.decode().splitlines()
    kept = [line for line in lines if re.fullmatch(r"line \d+", line)]
    dropped = [re.fullmatch(r"\[(\d+) lines were dropped here, because .*\]", line) for line in lines]
    more = lines.count("once more")
    assert 0 < len(kept) < LINES
    assert kept == [f"line {number}" for number in range(len(kept))]
    assert len(lines) == len(kept) + more + sum(map(bool, dropped))
    assert sum(int(found[1]) for found in dropped if found) >= LINES - len(kept)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_process_that_is_forked_off_while_another_thread_prints_can_print(pipe: tuple[int, int]) -> None:
    raw = _Pipe(pipe[1])
    prints, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with raw._lock:
            prints.set()
            may_end.wait(PATIENCE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert prints.wait(PATIENCE_S)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(int(PATIENCE_S))
            raw.write(b"from the child\n")
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    may_end.set()
    thread.join()
    assert status == 0
    assert os.read(pipe[0], 100) == b"from the child\n"


def test_a_slow_reader_gets_everything(pipe: tuple[int, int]) -> None:
    fcntl.fcntl(pipe[1], getattr(fcntl, "F_SETPIPE_SZ", 1031), 4096)
    stream = printer(pipe[1])
    reader = Reader(pipe[0])
    text = "x" * 100_000
    stream.write("begins ")  # no line yet
    reader.start()
    stream.write(f"{text}\n")
    stream.buffer.write(b"bytes\n")
    os.close(pipe[1])
    reader.join(PATIENCE_S)
    assert reader.data.decode() == f"begins {text}\nbytes\n"
    assert (stream.fileno(), stream.isatty(), stream.writable(), stream.readable()) == (pipe[1], False, True, False)


class Host(WireWorkerHost):
    log_name = "engine.test"

    def control_lost(self, reason: str) -> None:
        pass


def heard(sock: socket.socket) -> list[Any]:
    decoder = Decoder(greeting=False)
    bodies: list[Any] = []
    sock.settimeout(PATIENCE_S)
    while not bodies or bodies[-1].text != "the last one":
        bodies += [message.body for message in decoded(decoder, sock.recv(1 << 16)) if isinstance(message, Control)]
    return bodies


def test_log_records_that_nobody_reads_are_dropped_and_counted() -> None:
    ours, theirs = socket.socketpair()
    host = Host("w", lambda listener: SocketChannel(theirs, listener, Undriven(), greet=False))
    logger = logging.Logger("of.the.backend")
    logger.addHandler(LogToEngine(host))
    with ours, theirs:
        for number in range(LINES):
            logger.warning("record %d", number)

        def say_the_last() -> None:
            while host._unsaid:
                host.say(LogLine(logging.INFO, "stdout", "more"))
            host.say(LogLine(logging.INFO, "stdout", "the last one"))

        saying = threading.Thread(target=say_the_last)
        saying.start()
        bodies = heard(ours)
        saying.join()
    kept = [body for body in bodies if body.logger == "of.the.backend"]
    (dropped,) = [body for body in bodies if body.logger == "engine.test"]
    assert [body.text for body in kept] == [f"record {number}" for number in range(len(kept))]
    assert 0 < len(kept) < LINES
    match = re.fullmatch(r"(\d+) lines of this worker were dropped here, because .*", dropped.text)
    assert match is not None
    assert int(match[1]) >= LINES - len(kept)
