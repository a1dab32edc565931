"""What the engine's process and a fork server say to each other, and its framing.

Each frame is a length and a pickled tuple; the descriptors that belong to a `Spawn` travel beside its first byte. Both
ends are processes of one user that inherited the socket from each other, so the pickles are trusted.
"""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

__all__ = ["Exited", "ForkFailed", "Forked", "Frames", "Kill", "PreloadDone", "PreloadFailed", "Spawn", "pack"]


class Spawn(NamedTuple):
    """Fork a worker.

    Attributes:
        worker_id: Unique among those of this engine.
        name: For ``ps``.
        entry: ``"module:function"``.
        payload: For the entry function; None when it is in the last descriptor, a file.
        address: Path of the Unix socket the worker may serve.
        control_address: Where the worker's own handles reach the controller.
        preload: Modules to import before forking; what they raise is left for the worker to meet.
        sys_path: The engine's, as it is now.
        argv: The engine's ``sys.argv``.
        cwd: The engine's working directory; None when it has none.
        environ: The engine's environment.
        extra_environ: What is different for this worker.
        threads: How many threads numeric libraries may use; None for as many as they like.
        log_level: Of the root logger.
        descriptors: How many travel along: control socket, stdout, stderr, listening sockets, payload.
    """

    worker_id: str
    name: str
    entry: str
    payload: bytes | None
    address: str
    control_address: str
    preload: tuple[str, ...]
    sys_path: list[str]
    argv: list[str]
    cwd: str | None
    environ: dict[str, str]
    extra_environ: dict[str, str]
    threads: int | None
    log_level: int
    descriptors: int


class Kill(NamedTuple):
    """Kill a worker; nothing happens if it is gone."""

    worker_id: str


class Forked(NamedTuple):
    """The worker exists."""

    worker_id: str
    pid: int


class ForkFailed(NamedTuple):
    """The worker will never exist."""

    worker_id: str
    reason: str


class Exited(NamedTuple):
    """The worker is gone; ``status`` is what `os.waitpid` gave."""

    worker_id: str
    status: int


class PreloadDone(NamedTuple):
    """The modules of the user's ``preload`` are imported."""


class PreloadFailed(NamedTuple):
    """One of them could not be; the fork server ends. ``error`` is a packed exception."""

    module: str
    error: bytes


def pack(order: NamedTuple) -> bytes:
    """Turn an order or a report into a frame."""
    data = pickle.dumps(order, 5)
    return len(data).to_bytes(4, "little") + data


class Frames:
    """Cuts a stream of bytes back into orders or reports."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> list[Any]:
        """Take bytes as they came; returns what they complete."""
        self._data += data
        complete = []
        while len(self._data) >= 4:
            end = 4 + int.from_bytes(self._data[:4], "little")
            if len(self._data) < end:
                break
            complete.append(pickle.loads(self._data[4:end]))
            self._data = self._data[end:]
        return complete
