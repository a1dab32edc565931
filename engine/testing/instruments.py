"""Instruments of tests: waiting for conditions, holding calls back, and looking at what a process leaves behind.

Replicas import this module too, because a `Gate` or a `Journal` travels into backends: it needs nothing but the
standard library, and of that no more than it must. What looks at processes and open files reads ``/proc``: on Linux.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

__all__ = [
    "PATIENCE_S",
    "Footprint",
    "Gate",
    "Journal",
    "descendants",
    "disown",
    "eventually",
    "interrupting",
    "is_running",
    "open_files",
]

_T = TypeVar("_T")

PATIENCE_S = 20.0
"""How long a condition may take to come true on a busy machine. Only failing tests wait that long."""
_POLL_S = 0.005
_LIBRARY_THREADS = ("Trio thread",)
"""Threads that a library keeps for a while in case it needs them again."""


def eventually(condition: Callable[[], _T], timeout_s: float = PATIENCE_S) -> _T:
    """Wait until a condition holds.

    Args:
        condition: Asked again and again; holds when what it returns is true.
        timeout_s: Seconds until the wait is given up.

    Returns:
        What the condition returned.

    Raises:
        AssertionError: It never held.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still {value!r} after {timeout_s} s: {condition}")
        time.sleep(_POLL_S)
    return value


@contextlib.contextmanager
def interrupting(condition: Callable[[], object]) -> Iterator[None]:
    """Press Ctrl-C, as far as this process can tell, once a condition holds. To be used in the main thread.

    Args:
        condition: Asked again and again, in another thread.

    Raises:
        KeyboardInterrupt: Wherever the body is when the condition comes to hold.
        AssertionError: The body ended before that.
    """
    main = threading.get_ident()
    pressed = threading.Event()

    def press() -> None:
        eventually(condition)
        pressed.set()
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    try:
        yield
        assert pressed.is_set(), "it ended before it could be interrupted"
    finally:
        signal.signal(signal.SIGINT, before)


class Gate:
    """Holds calls back inside a backend until the test lets them go. Made of files, so it works across processes.

    Args:
        directory: Of its own; made here. Its parent must exist, and be the same for the test and its replicas.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()

    def open(self) -> None:
        """Let everybody pass, now and later."""
        (self._directory / "open").touch()

    def is_open(self) -> bool:
        """Whether everybody may pass."""
        return (self._directory / "open").exists()

    def arrivals(self) -> int:
        """How many calls have come to the gate so far."""
        return len(list(self._directory.glob("arrived-*")))

    def wait_for_arrivals(self, count: int) -> None:
        """Wait until this many calls have come to the gate.

        Raises:
            AssertionError: They did not come within `PATIENCE_S`.
        """
        eventually(lambda: self.arrivals() >= count)

    def arrive(self) -> None:
        """Come to the gate, without waiting there."""
        (self._directory / f"arrived-{os.urandom(16).hex()}").touch()

    def pass_through(self) -> None:
        """Come to the gate and wait until it is open: what a sync backend calls.

        Raises:
            AssertionError: Nobody opened it within `PATIENCE_S`.
        """
        self.arrive()
        eventually(self.is_open)

    async def apass_through(self) -> None:
        """As `pass_through`, for async backends."""
        import asyncio  # most replicas do without

        self.arrive()
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_open():
            assert time.monotonic() < deadline, "nobody opened the gate"
            await asyncio.sleep(_POLL_S)


class Journal:
    """A list of lines that backends append to and the test reads. Works across processes.

    Args:
        path: Of the file that keeps them; made here.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def add(self, line: object) -> None:
        """Append a line."""
        with self._path.open("a") as file:
            file.write(f"{line}\n")

    def lines(self) -> list[str]:
        """All lines so far."""
        return self._path.read_text().splitlines()


def _parents() -> dict[int, int]:
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text()
        except OSError:
            continue
        state, parent = stat.rpartition(")")[2].split()[:2]
        if state != "Z" or int(parent) == os.getpid():  # an unreaped child of ours is a leftover, too
            parents[int(entry)] = int(parent)
    return parents


_disowned: set[int] = set()


def disown(pid: int) -> None:
    """Take a process and all that descends from it for no descendants of this one any more."""
    _disowned.add(pid)


def descendants(pid: int | None = None) -> set[int]:
    """The children of a process (this one by default), their children, and so on."""
    parents = _parents()
    found: set[int] = set()
    ring = {os.getpid() if pid is None else pid}
    while ring:
        ring = {child for child, parent in parents.items() if parent in ring} - found - _disowned
        found |= ring
    return found


def _command_of(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            or "a zombie"
        )
    except OSError:
        return "gone meanwhile"


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def open_files() -> dict[int, str]:
    """What this process has open, by descriptor; without the TCP connections that Ray keeps once it is used."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
    if "ray" in sys.modules:
        tcp = _tcp_sockets()
        found = {descriptor: target for descriptor, target in found.items() if target not in tcp}
    return found


def _tcp_sockets() -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            inodes.add(f"socket:[{line.split()[9]}]")
    return inodes


@dataclass(frozen=True)
class Footprint:
    """What a process holds of the operating system at a moment.

    Attributes:
        children: Process ids of its children, their children, and so on.
        threads: Those that run.
        files: What it has open: descriptors, and what they lead to.
    """

    children: frozenset[int]
    threads: frozenset[threading.Thread]
    files: frozenset[tuple[int, str]]

    @classmethod
    def now(cls) -> Footprint:
        """That of this process, now."""
        threads = frozenset(
            # A thread that Python did not start stays in its list once it has asked which thread it is.
            thread
            for thread in threading.enumerate()
            if not isinstance(thread, threading._DummyThread)
        )
        return cls(frozenset(descendants()), threads, frozenset(open_files().items()))

    def leftovers(self) -> str:
        """What there is now that was not there at this moment, in words; empty if nothing is."""
        now = Footprint.now()
        return "\n".join(
            [f"child {pid}: {_command_of(pid)}" for pid in now.children - self.children]
            + [
                f"thread {thread}"
                for thread in now.threads - self.threads
                if not thread.name.startswith(_LIBRARY_THREADS)
            ]
            + [f"descriptor {fd}: {target}" for fd, target in now.files - self.files]
        )

    def check_unchanged(self) -> None:
        """Wait until nothing is left behind. The kernel may take a moment to bury the dead, but not longer.

        Raises:
            AssertionError: Something was left behind; the message says what.
        """
        deadline = time.monotonic() + 2
        while left := self.leftovers():
            if time.monotonic() > deadline:
                raise AssertionError(f"left behind:\n{left}")
            time.sleep(_POLL_S)
