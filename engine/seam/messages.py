"""What crosses a channel.

Immutable tuples of bytes, ids and deadlines: no loop, no callback, no live object. A `Call` travels from a caller to
a replica and is answered by exactly one `Reply` or `Failure`, or by any number of `Item` messages and one `End`.
`Cancel` and `Credit` travel the way the call did, but for those that belong to none (`ANY_CALL`). `Control` belongs to
the channels between the controller and its workers and callers; calls never share a channel with it.

Deadlines are absolute seconds of this process's ``time.monotonic()``; to where other clocks
are, a transport carries them as time remaining.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias

__all__ = [
    "ANY_CALL",
    "AS_CONFIGURED",
    "AS_CONFIGURED_FOR_POSTS",
    "HTTP",
    "INITIAL_CREDIT",
    "LOW",
    "NORMAL",
    "PYTHON",
    "Call",
    "Cancel",
    "Control",
    "Credit",
    "End",
    "Failure",
    "FailureKind",
    "Item",
    "Message",
    "Reply",
    "credit_of",
]

PYTHON: Final = 0
"""`Call.kind` of a handle's call: ``payload`` is the pickled ``(args, kwargs)``, the result comes back pickled."""
HTTP: Final = 1
"""`Call.kind` of an HTTP request: ``head`` is the pickled scope, ``payload`` the body; the result comes encoded."""

AS_CONFIGURED: Final = -1
"""`Call.retries`: as often as its backend says."""
AS_CONFIGURED_FOR_POSTS: Final = -2
"""The same of an HTTP request by POST or PATCH, which is taken to do something each time."""

NORMAL: Final = 0
"""`Call.priority` of most calls."""
LOW: Final = 1
"""The same of background work, which yields to all others."""

ANY_CALL: Final = 0
"""In the place of a call's number: a `Credit` from a replica says that it has a place for a call of whom it refused one
before; a `Cancel` from a caller, that it has none for it."""

INITIAL_CREDIT: Final = 16
"""What a replica may send ahead of the consumer before it must wait for `Credit`: so many items, if they are small."""
_SMALL_BITS = 16  # 64 KiB


class FailureKind:
    """Why a call failed, as one byte on the wire."""

    USER: Final = 0  # user code raised; `payload` is the packed exception
    REFUSED: Final = 1  # the replica is full: the router may place the call again
    DRAINING: Final = 2  # the replica takes no more calls: the router must place the call elsewhere
    ENGINE: Final = 3  # the engine itself failed the call; `payload` is the packed `EngineError`
    BUSY: Final = 4  # the replica is at a long call and has not begun this one: the router may know of an idle replica
    REPEATABLE: Final = 5  # as USER or ENGINE; the backend's ``retry_on`` has it, so the caller may repeat the call


class Call(NamedTuple):
    """A request to run one method of a replica.

    ``id`` is the caller's number for it while one replica has it; 0 as long as none does. ``retries`` is how often its
    caller may repeat it though it may have begun, and does not travel. ``informed`` says that its caller, when it sent
    this, had heard that calls of the replica's take long (`FailureKind.BUSY`), and knew of no idle one.
    """

    id: int
    kind: int
    method: str
    deadline: float | None
    request_id: str
    head: bytes
    payload: bytes
    retries: int = AS_CONFIGURED
    priority: int = NORMAL
    informed: bool = False


class Reply(NamedTuple):
    """The whole answer to a call.

    ``head`` is empty for `PYTHON` calls and, for `HTTP` ones, the JSON array ``[status, [[name, value], ...]]``.
    ``load`` is what the replica still holds, queued and running.
    """

    id: int
    load: int
    head: bytes
    payload: bytes


class Failure(NamedTuple):
    """The call failed; see `FailureKind`.

    ``head`` is what an HTTP client is told, in the form of `Reply.head`, so that the ingress unpickles nothing; it is
    empty for `PYTHON` calls. ``cause`` is what that client is not told of it, in a line for the log of the ingress.
    """

    id: int
    load: int
    kind: int
    head: bytes
    payload: bytes
    cause: str = ""


class Item(NamedTuple):
    """One part of a streamed answer; the first one of an HTTP answer carries its head."""

    id: int
    head: bytes
    payload: bytes


class End(NamedTuple):
    """The end of a streamed answer; ``failed`` when it broke off and the consumer must not take it for complete."""

    id: int
    load: int
    failed: bool


class Cancel(NamedTuple):
    """The caller no longer waits for this call."""

    id: int


def credit_of(payload: bytes) -> int:
    """How much credit an item takes: one, or one for each 64 KiB, so that large ones cannot fill the consumer's memory.

    Who sends one needs no more than some credit, and then may owe the rest.
    """
    return len(payload) >> _SMALL_BITS or 1


class Credit(NamedTuple):
    """The consumer has room for ``amount`` more, in the measure of `credit_of`."""

    id: int
    amount: int


class Control(NamedTuple):
    """A message of the control plane; see `engine.seam.control_messages`. Pickled on the wire."""

    body: Any


Message: TypeAlias = Call | Reply | Failure | Item | End | Cancel | Credit | Control
