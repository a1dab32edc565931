"""What is started and let go next while one version of a backend takes the place of another."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from engine.config import BackendConfig
from engine.control.rollout import Room

SHARES = (0, 1, 3, "25%", "100%")


def config(count: int, surge: int | str = "100%", unavailable: int | str = 0) -> BackendConfig:
    return BackendConfig(num_replicas=count, max_surge=surge, max_unavailable=unavailable)


def exchanged(before: BackendConfig, after: BackendConfig, ending: Callable[[int], int]) -> list[tuple[int, int, int]]:
    """Every (old, new, leaving) there is on the way, if so many of those that leave end when they must."""
    room = Room.between(before, after)
    old, new, leaving = before.num_replicas, 0, 0
    seen = [(old, new, leaving)]
    while old or new < after.num_replicas:
        started = room.to_start(old, new, leaving)
        seen.append((old, new + started, leaving))
        new += started
        going = room.to_let_go(old, new)
        old, leaving = old - going, leaving + going
        seen.append((old, new, leaving))
        if not started and not going:
            assert leaving, f"nothing moves at {old} old, {new} new"
            leaving -= ending(leaving)
    return [step for step, _ in itertools.groupby(seen)]


@pytest.mark.parametrize(("surge", "unavailable"), list(itertools.product(SHARES, SHARES)))
def test_there_are_never_too_many_and_never_too_few(surge: int | str, unavailable: int | str) -> None:
    for count_before, count_after, seed in itertools.product((1, 2, 4, 7), (1, 2, 4, 7), range(3)):
        before, after = config(count_before), config(count_after, surge, unavailable)
        room = Room.between(before, after)
        chance = random.Random(seed)
        seen = exchanged(before, after, lambda leaving, chance=chance: chance.randint(1, leaving))
        assert all(old + new + leaving <= room.most for old, new, leaving in seen)
        assert all(old + new >= room.least for old, new, _ in seen)
        assert seen[-1][:2] == (0, count_after)


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        # All new ones first, whatever the numbers.
        (config(2), config(2), [(2, 0, 0), (2, 2, 0), (0, 2, 2)]),
        (config(1), config(3), [(1, 0, 0), (1, 3, 0), (0, 3, 1)]),
        (config(3), config(1), [(3, 0, 0), (3, 1, 0), (0, 1, 3)]),
        # No room for another one: an old one ends, and its place is taken.
        (config(1), config(1, 0, 1), [(1, 0, 0), (0, 0, 1), (0, 1, 0)]),
        # The first new one proves itself before any old one goes.
        (config(2), config(2, 1, 1), [(2, 0, 0), (2, 1, 0), (0, 1, 2), (0, 2, 0)]),
    ],
)
def test_the_way(before: BackendConfig, after: BackendConfig, steps: list[tuple[int, int, int]]) -> None:
    assert exchanged(before, after, lambda leaving: leaving) == steps


@pytest.mark.parametrize(
    ("count", "surge", "unavailable", "most", "least"),
    [
        (4, "25%", 0, 5, 4),
        (3, "25%", 0, 4, 3),  # rounded up
        (3, 0, "50%", 3, 2),  # rounded down
        (3, 0, "25%", 3, 2),  # but not to nothing, where nothing could be exchanged then
        (2, 5, 5, 7, 0),
    ],
)
def test_shares_become_numbers(count: int, surge: int | str, unavailable: int | str, most: int, least: int) -> None:
    assert Room.between(config(count), config(count, surge, unavailable)) == Room(count, most, least)


@pytest.mark.parametrize(
    ("surge", "unavailable", "most", "least", "at_a_time"),
    [("100%", 0, 5, 4, 1), (0, 1, 4, 3, 1), (0, 2, 4, 2, 2), (3, 2, 6, 2, 2), (1, 3, 5, 1, 3)],
)
def test_few_of_one_version_are_exchanged_at_a_time(
    surge: int | str, unavailable: int, most: int, least: int, at_a_time: int
) -> None:
    room = Room.for_few(config(4, surge, unavailable))
    assert (room, room.at_a_time) == (Room(4, most, least), at_a_time)
