"""The control plane's messages: bodies of `engine.messages.Control`.

None of them is on the path of a call. Workers speak with the controller over a channel of their own; callers in other
processes subscribe to routing snapshots at `Adapter.control_address`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .snapshot import RoutingSnapshot

__all__ = [
    "Applied",
    "Drain",
    "Drained",
    "LogLine",
    "Ping",
    "Pong",
    "Publish",
    "Ready",
    "Reconfigure",
    "Reconfigured",
    "StartFailed",
    "Subscribe",
]


@dataclass(frozen=True)
class Ready:
    """Worker: I accept calls at ``address`` (empty for a worker that takes no calls)."""

    address: str


@dataclass(frozen=True)
class StartFailed:
    """Worker: I cannot start. ``error`` is a packed exception (`engine.serialization.pack_exception`)."""

    error: bytes


@dataclass(frozen=True)
class LogLine:
    """Worker: user code or the engine logged, or wrote to a standard stream, there.

    Attributes:
        level: As in `logging`.
        logger: The logger's name in the worker, or "stdout" / "stderr".
        text: The formatted message.
    """

    level: int
    logger: str
    text: str


@dataclass(frozen=True)
class Ping:
    """Controller: are you there?"""

    token: int


@dataclass(frozen=True)
class Pong:
    """Worker: I am. ``load`` is what it holds, queued and running."""

    token: int
    load: int


@dataclass(frozen=True)
class Reconfigure:
    """Controller: take this configuration. ``config`` is a pickled `BackendConfig`; ``user_config`` changed or not."""

    token: int
    config: bytes
    user_config_changed: bool


@dataclass(frozen=True)
class Reconfigured:
    """Worker: done, or the packed exception that ``reconfigure`` raised."""

    token: int
    error: bytes | None


@dataclass(frozen=True)
class Drain:
    """Controller: take no more work, finish what you hold within ``timeout_s`` seconds and leave."""

    timeout_s: float


@dataclass(frozen=True)
class Drained:
    """Worker: I hold nothing any more and am about to leave."""


@dataclass(frozen=True)
class Subscribe:
    """Caller: send me snapshots. An ``ingress`` is waited for when routes change."""

    ingress: bool
    worker_id: str = ""


@dataclass(frozen=True)
class Publish:
    """Controller: the picture as of now."""

    snapshot: RoutingSnapshot


@dataclass(frozen=True)
class Applied:
    """Caller: this version of the snapshot rules here now."""

    version: int
