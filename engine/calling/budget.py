"""How long calls may take, and what they yield to: by options of their own, and by the call whose user code makes them.

The budget of the call that runs is a context variable: coroutines, tasks and what is started with a copy of the context
have it, other threads have none. It is taken away when the call is answered, from whatever has it by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from ..errors import DeadlineExceeded
from ..seam.messages import LOW, NORMAL

__all__ = [
    "NO_LIMIT",
    "PRIORITIES",
    "Budget",
    "Limit",
    "Remainder",
    "deadline_error",
    "limit_of",
    "outside",
    "remaining_s",
    "running_budget",
    "seconds_until",
]


PRIORITIES: Final = {"normal": NORMAL, "low": LOW}
"""`engine.seam.messages.Call.priority` by the names that users have for it."""


class Budget:
    """What user code runs within: ``with Budget(deadline): ...`` in its own context.

    Args:
        deadline: When the call is over, or None if it never is.
        priority: Of the call, and of what goes on once it is answered.
    """

    __slots__ = ("deadline", "priority")

    def __init__(self, deadline: float | None, priority: int = NORMAL) -> None:
        self.deadline = deadline
        self.priority = priority

    def __enter__(self) -> Budget:
        _running.set(self)
        return self

    def __exit__(self, *raised: object) -> None:
        self.deadline = None
        _running.set(None)

    def end(self) -> None:
        """The answer is on its way: what goes on has as long as it takes, also where the context was copied to."""
        self.deadline = None


_running: ContextVar[Budget | None] = ContextVar("engine_budget", default=None)
running_budget: Final = _running.get
"""The budget of the call whose user code asks, if there is one."""


def outside(function: Callable[..., None], *args: Any) -> None:
    """Run what belongs to no call, in a thread that happens to be at one."""
    token = _running.set(None)
    try:
        function(*args)
    finally:
        _running.reset(token)


def remaining_s() -> float | None:
    """How many seconds the call that runs here has left: at least 0.0, or None if it has no deadline.

    A call's deadline is that of its caller: the ``timeout_s`` of the handle, what was left to the call that made it,
    or over HTTP ``request_timeout_s`` and ``x-request-timeout-ms``. It is known to the code of the call, to its
    coroutines and tasks and to threads that are started with a copy of its context, such as those of
    ``asyncio.to_thread``. Once the call is answered, there is none any more; nor is there outside of a call.
    """
    budget = _running.get()
    return None if budget is None else seconds_until(budget.deadline)


def seconds_until(deadline: float | None) -> float | None:
    """Seconds until a deadline, at least 0."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class Remainder(float):
    """Seconds that were left to the call which makes another one, and which that one may take."""

    __slots__ = ()


class Limit(NamedTuple):
    """How long one call may take, and what it yields to.

    Attributes:
        timeout_s: Seconds, for those who are told that it took longer; a `Remainder` if no option says so.
        deadline: When they are over.
        priority: `engine.seam.messages.Call.priority`.
    """

    timeout_s: float | None
    deadline: float | None
    priority: int = NORMAL


NO_LIMIT: Final = Limit(None, None)


def limit_of(timeout_s: float | None, *, inherits: bool = True, priority: int | None = None) -> Limit:
    """The limit of a call that begins now.

    Args:
        timeout_s: The option, if it is set.
        inherits: Whether it may take no longer than is left to the call that makes it.
        priority: That of the call; None for that of the call that makes it.
    """
    now = time.monotonic()
    budget = _running.get()
    if priority is None:
        priority = NORMAL if budget is None else budget.priority
    until = budget.deadline if budget is not None and inherits else None
    if timeout_s is not None and (until is None or now + timeout_s <= until):
        return Limit(timeout_s, now + timeout_s, priority)
    if until is None:
        return Limit(None, None, priority)
    return Limit(Remainder(max(0.0, until - now)), until, priority)


def deadline_error(endpoint: str, timeout_s: float) -> DeadlineExceeded:
    """What a caller is told whose call took too long."""
    inherited = isinstance(timeout_s, Remainder)
    within = f"the {timeout_s:g} s that were left to the call that made this one" if inherited else f"{timeout_s=:g}"
    return DeadlineExceeded(f"endpoint {endpoint!r} did not answer within {within}")
