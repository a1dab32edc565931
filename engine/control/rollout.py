"""How one version of a backend takes the place of another: what is started and what is let go next. Pure.

A step starts replicas before it lets any go, where there is room, so that the new version has shown that it can start
before anything of the old one is given up.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import BackendConfig

__all__ = ["Room"]


@dataclass(frozen=True)
class Room:
    """What there may be while replicas are exchanged.

    Attributes:
        wanted: Replicas that are to run in the end.
        most: Replicas that there may be at a time, those included that still finish what they hold.
        least: Replicas that are to be in service at any time.
    """

    wanted: int
    most: int
    least: int

    @classmethod
    def between(cls, before: BackendConfig, after: BackendConfig) -> Room:
        """The room that a change from one configuration to another has; the latter's limits hold."""
        wanted = after.num_replicas
        surge, unavailable = _allowed(after)
        return cls(
            wanted,
            max(before.num_replicas, wanted) + surge,
            max(min(before.num_replicas, wanted) - unavailable, 0),
        )

    @classmethod
    def for_few(cls, config: BackendConfig) -> Room:
        """The room to exchange replicas of one version: of as many at a time as may be missing, or of one."""
        surge, unavailable = _allowed(config)
        return cls(
            config.num_replicas,
            config.num_replicas + min(surge, max(unavailable, 1)),
            max(config.num_replicas - unavailable, 0),
        )

    @property
    def at_a_time(self) -> int:
        """How many there is room to exchange at a time."""
        return max(self.most - self.wanted, self.wanted - self.least)

    def to_start(self, old: int, new: int, leaving: int) -> int:
        """How many new replicas to start now.

        Args:
            old: Replicas in service that are to be exchanged.
            new: Those in service that stay.
            leaving: Those out of service that have not ended yet.
        """
        return max(min(self.wanted - new, self.most - old - new - leaving), 0)

    def to_let_go(self, old: int, new: int) -> int:
        """How many old replicas to take out of service now, after those were started that could be."""
        return old if new >= self.wanted else max(min(old, old + new - self.least), 0)


def _allowed(config: BackendConfig) -> tuple[int, int]:
    """How many there may be too many and too few."""
    surge = _count(config.max_surge, config.num_replicas, up=True)
    unavailable = _count(config.max_unavailable, config.num_replicas, up=False)
    if not surge and not unavailable:
        unavailable = 1  # a small share of few replicas: nothing could ever be exchanged
    return surge, unavailable


def _count(share: int | str, of: int, *, up: bool) -> int:
    """A number of replicas, from itself or a percentage."""
    if isinstance(share, int):
        return share
    percent = int(share[:-1]) * of
    return -(-percent // 100) if up else percent // 100
