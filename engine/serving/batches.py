"""How long a batch may take, and what it returned, as one result for each call.

Runs user code only where that iterates.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping, Set
from itertools import islice
from typing import Any

__all__ = ["last_of", "listed"]

_NOT_RESULTS = (list, str, bytes, bytearray, memoryview, Mapping, Set)


def last_of(deadlines: Iterable[float | None]) -> float | None:
    """When nobody waits for a batch any more; None if somebody waits for as long as it takes."""
    latest = 0.0
    for deadline in deadlines:
        if deadline is None:
            return None
        latest = max(latest, deadline)
    return latest


def listed(results: Any, count: int) -> Any:
    """Results in a list if they come in some other order: a tuple, an array, a generator, an async generator.

    Args:
        results: What the callable returned.
        count: How many there should be. Not many more are asked for.

    Returns:
        A list, or an awaitable of one; whatever is one value, or has no order, as it is.
    """
    if isinstance(results, _NOT_RESULTS):
        return results
    if isinstance(results, AsyncIterable):
        return _listed_in_time(results, count)
    try:
        ordered = iter(results)
    except TypeError:
        return results
    return list(ordered if hasattr(results, "__len__") else islice(ordered, count + 1))


async def _listed_in_time(results: AsyncIterable[Any], count: int) -> list[Any]:
    found: list[Any] = []
    async for result in results:
        found.append(result)
        if len(found) > count:
            break
    return found
