"""A call's arguments, from what the user passed to what is pickled: refs become results, requests become envelopes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import DeadlineExceeded
from ..seam.connector import PlatformRefs
from ..seam.http_request import envelope_of, envelope_of_async, is_starlette_request
from .answers import settled
from .budget import seconds_until
from .ref import Ref

__all__ = [
    "PLAIN",
    "Arguments",
    "enveloped",
    "prepared",
    "prepared_async",
    "refs_in",
    "resolved",
    "when_all_done",
]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional ones, and those by name."""

PLAIN = frozenset((type(None), bool, int, float, str, bytes, list, tuple, dict))
"""Types that are neither refs nor requests; what they hold does not matter."""


def prepared(
    args: tuple[Any, ...], kwargs: dict[str, Any], platform: PlatformRefs | None, deadline: float | None
) -> Arguments:
    """What to pickle; waits for the results of refs.

    Args:
        args: As the user passed them.
        kwargs: As the user passed them.
        platform: Knows the refs that are not the engine's own; None to leave those alone.
        deadline: Until when to wait, or None for as long as it takes.

    Raises:
        errors.DeadlineExceeded: The deadline passed.
        BaseException: What the call raised that a ref stands for.
    """
    refs = refs_in(args, kwargs)
    for ref in refs:
        ref.result(seconds_until(deadline))
    if refs:
        args, kwargs = resolved(args, kwargs)
    if platform is not None and (refs := refs_in(args, kwargs, platform.is_ref)):
        results = platform.results(refs, seconds_until(deadline))
        args, kwargs = _filled(args, kwargs, platform.is_ref, results)
    return enveloped(args), kwargs


async def prepared_async(
    args: tuple[Any, ...], kwargs: dict[str, Any], platform: PlatformRefs | None, deadline: float | None
) -> Arguments:
    """As `prepared`, on an event loop."""
    refs = refs_in(args, kwargs)
    if refs:
        for ref in refs:
            await (ref if deadline is None else _result_by(ref, deadline))
        args, kwargs = resolved(args, kwargs)
    if platform is not None and (refs := refs_in(args, kwargs, platform.is_ref)):
        results = [await platform.result(ref, seconds_until(deadline)) for ref in refs]
        args, kwargs = _filled(args, kwargs, platform.is_ref, results)
    if args and _passes_request(args):
        args = tuple([await envelope_of_async(arg) if is_starlette_request(arg) else arg for arg in args])
    return args, kwargs


async def _result_by(ref: Ref, deadline: float) -> Any:
    if not ref.done():
        import anyio

        with anyio.move_on_after(deadline - time.monotonic()):
            await settled(ref)
        if not ref.done():
            raise DeadlineExceeded("an argument did not come in time")
    return ref.result(0)


# -- requests ----------------------------------------------------------------------------------------------------------


def _passes_request(args: tuple[Any, ...]) -> bool:
    return any(is_starlette_request(arg) for arg in args)


def enveloped(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with Starlette requests, whose bodies are in memory, made fit for the way."""
    if not _passes_request(args):
        return args
    return tuple(envelope_of(arg) if is_starlette_request(arg) else arg for arg in args)


# -- refs --------------------------------------------------------------------------------------------------------------


def _is_own_ref(value: Any) -> bool:
    return isinstance(value, Ref)


def refs_in(args: tuple[Any, ...], kwargs: dict[str, Any], is_ref: Callable[[Any], bool] = _is_own_ref) -> list[Any]:
    """The refs among the arguments, by default the engine's own."""
    return [value for value in (*args, *kwargs.values()) if is_ref(value)]


def _filled(
    args: tuple[Any, ...], kwargs: dict[str, Any], is_ref: Callable[[Any], bool], results: Iterable[Any]
) -> Arguments:
    """Replace refs by their results, which come in the order of `refs_in`."""
    coming = iter(results)
    return (
        tuple(next(coming) if is_ref(arg) else arg for arg in args),
        {name: next(coming) if is_ref(value) else value for name, value in kwargs.items()},
    )


def resolved(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments with the engine's own refs, which are done, replaced by their results."""
    return _filled(args, kwargs, _is_own_ref, (ref.result(0) for ref in refs_in(args, kwargs)))


def when_all_done(refs: list[Ref], action: Callable[[], object]) -> Callable[[], None]:
    """Do something once all refs are done, in the thread that learns of the last one.

    Returns:
        What makes the refs forget it (idempotent).
    """
    lock = threading.Lock()
    missing = len(refs)

    def one_done(_: Ref) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            last = missing == 0
        if last:
            action()

    def forget() -> None:
        for ref in refs:
            ref.drop_done_callback(one_done)

    for ref in refs:
        ref.add_done_callback(one_done)
    return forget
