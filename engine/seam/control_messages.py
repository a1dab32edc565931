"""The control plane's messages: bodies of `engine.seam.messages.Control`.

None of them is on the path of a call. Workers speak with the controller over a channel of their own; callers in other
processes subscribe to routing snapshots at `Adapter.control_address`.
"""

from __future__ import annotations

from typing import NamedTuple

from .snapshot import RoutingSnapshot

__all__ = [
    "Answered",
    "Applied",
    "AtRest",
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
    "Started",
    "Subscribe",
    "Unhealthy",
]


class Started(NamedTuple):
    """Worker: I run as the process ``pid`` of my machine. Said before anything of the user's is touched."""

    pid: int


class Ready(NamedTuple):
    """Worker: I accept calls at ``address`` (empty for a worker that takes no calls)."""

    address: str


class Answered(NamedTuple):
    """Worker: I have answered a call. Said once, of the first one."""


class StartFailed(NamedTuple):
    """Worker: I cannot start. ``error`` is a packed exception (`engine.seam.serialization.pack_exception`)."""

    error: bytes


class LogLine(NamedTuple):
    """Worker: user code or the engine logged, or wrote to a standard stream, there.

    Attributes:
        level: As in `logging`.
        logger: The logger's name in the worker, or "stdout" / "stderr".
        text: The formatted message.
    """

    level: int
    logger: str
    text: str


class Ping(NamedTuple):
    """Controller: are you there?"""

    token: int


class Pong(NamedTuple):
    """Worker: I am. ``load`` is what it holds, queued and running."""

    token: int
    load: int


class Reconfigure(NamedTuple):
    """Controller: take this configuration. ``config`` is a pickled `BackendConfig`.

    It lacks the ``user_config`` unless that changed: to take a limit, a replica need not unpickle what is the user's.
    """

    token: int
    config: bytes
    user_config_changed: bool


class Reconfigured(NamedTuple):
    """Worker: done, or the packed exception that ``reconfigure`` raised."""

    token: int
    error: bytes | None


class Drain(NamedTuple):
    """Controller: take no more work, finish what you hold within ``timeout_s`` seconds and leave.

    Attributes:
        others: There are others like you, or will be: hand back to them what you have not begun.
    """

    timeout_s: float
    others: bool = False


class Drained(NamedTuple):
    """Worker: I hold nothing any more and am about to leave."""


class Unhealthy(NamedTuple):
    """Worker: have another one take my place, because I ``reason``, a phrase for people.

    Attributes:
        reason: Follows the worker's name, e.g. "has been in one call for 12 s".
        hung: I am of no use any more. Otherwise I go on until the other one is there.
        worn: I am as good as ever, but have done my share: others that say so may go first.
        from_start: So it was when I had hardly begun, and will be with the other one.
    """

    reason: str
    hung: bool
    worn: bool = False
    from_start: bool = False


class Subscribe(NamedTuple):
    """Caller: send me snapshots. An ``ingress`` is waited for when routes change."""

    ingress: bool
    worker_id: str = ""


class Publish(NamedTuple):
    """Controller: the picture as of now."""

    snapshot: RoutingSnapshot


class Applied(NamedTuple):
    """Caller: this version of the snapshot rules here now."""

    version: int


class AtRest(NamedTuple):
    """Caller: the engine drains as of this version of the snapshot, and I hold no calls that it should wait for."""

    version: int
