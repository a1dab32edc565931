"""Which backend a call goes to: weighted, random or fixed by a shard key. Pure."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from ..errors import InvalidArgument

__all__ = ["TrafficPolicy", "hash_fraction", "validate_proportion", "validate_weights"]

_TOLERANCE = 1e-6
_LARGEST = sys.float_info.max


class TrafficPolicy:
    """Picks a backend's tag for a number in [0, 1).

    Tags are in sorted order, so that equal weights give equal picks in every process.
    """

    __slots__ = ("_bounds", "_tags")

    def __init__(self, weights: tuple[tuple[str, float], ...]) -> None:
        positive = [(tag, weight) for tag, weight in weights if weight > 0]
        self._tags = [tag for tag, _ in positive]
        self._bounds = list(accumulate(weight for _, weight in positive))

    @property
    def single(self) -> str | None:
        """The tag that gets everything, if there is one."""
        return self._tags[0] if len(self._tags) == 1 else None

    def pick(self, fraction: float) -> str:
        """The tag whose share of [0, 1) holds ``fraction``."""
        position = bisect_right(self._bounds, fraction)
        return self._tags[min(position, len(self._tags) - 1)]


def hash_fraction(shard_key: str) -> float:
    """Map a shard key to [0, 1), the same in every process and on every machine."""
    import hashlib

    digest = hashlib.blake2b(shard_key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def validate_weights(weights: Any) -> dict[str, float]:
    """Check the argument of ``set_traffic``.

    Raises:
        errors.InvalidArgument: It is no dict of tag to weight, or a weight is negative or not finite, or they do not
            sum to 1.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise InvalidArgument(f"traffic must be a dict of backend tag to weight, at least one, not {weights!r}")
    checked: dict[str, float] = {}
    for tag, weight in weights.items():
        if not isinstance(tag, str):
            raise InvalidArgument(f"traffic: a backend tag must be a str, not {tag!r}")
        checked[tag] = _number(weight, f"traffic: the weight of {tag!r}", "a finite number of at least 0")
        if checked[tag] < 0:
            raise InvalidArgument(f"traffic: the weight of {tag!r} must be at least 0, not {weight!r}")
    total = sum(checked.values())  # fsum() refuses what is too large for it
    if abs(total - 1) > _TOLERANCE:
        raise InvalidArgument(f"traffic: the weights must sum to 1, but {dict(weights)!r} sums to {total:g}")
    return checked


def validate_proportion(proportion: Any) -> float:
    """Check the proportion of ``shadow_traffic``.

    Raises:
        errors.InvalidArgument: It is no number from 0 to 1.
    """
    value = _number(proportion, "shadow traffic: the proportion", "a number from 0 to 1")
    if not 0 <= value <= 1:
        raise InvalidArgument(f"shadow traffic: the proportion must be a number from 0 to 1, not {proportion!r}")
    return value


def _number(value: Any, what: str, allowed: str) -> float:
    # no question of isfinite(): an integer may be too large to be asked as a float
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
        raise InvalidArgument(f"{what} must be {allowed}, not {value!r}")
    return float(value)
