"""How long calls may take: by an option of their own, and by what is left to the call whose user code makes them.

The budget of the call that runs is a context variable: coroutines, tasks and what is started with a copy of the context
have it, other threads have none. It is taken away when the call is answered, from whatever has it by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from ..errors import DeadlineExceeded

__all__ = [
    "NO_LIMIT",
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


class Budget:
    """What user code runs within: ``with Budget(deadline): ...`` in its own context.

    Args:
        deadline: When the call is over, or None if it never is.
    """

    __slots__ = ("deadline",)

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline

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
    """How long one call may take.

    Attributes:
        timeout_s: Seconds, for those who are told that it took longer; a `Remainder` if no option says so.
        deadline: When they are over.
    """

    timeout_s: float | None
    deadline: float | None


NO_LIMIT: Final = Limit(None, None)


def limit_of(timeout_s: float | None, *, inherits: bool = True) -> Limit:
    """The limit of a call that begins now.

    Args:
        timeout_s: The option, if it is set.
        inherits: Whether it may take no longer than is left to the call that makes it.
    """
    now = time.monotonic()
    budget = _running.get() if inherits else None
    until = None if budget is None else budget.deadline
    if timeout_s is not None and (until is None or now + timeout_s <= until):
        return Limit(timeout_s, now + timeout_s)
    return NO_LIMIT if until is None else Limit(Remainder(max(0.0, until - now)), until)


def deadline_error(endpoint: str, timeout_s: float) -> DeadlineExceeded:
    """What a caller is told whose call took too long."""
    inherited = isinstance(timeout_s, Remainder)
    within = f"the {timeout_s:g} s that were left to the call that made this one" if inherited else f"{timeout_s=:g}"
    return DeadlineExceeded(f"endpoint {endpoint!r} did not answer within {within}")
