"""One line of the table: what was promised, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What one promise came to.

    Attributes:
        what: the fault, and who was looked at.
        aim: what was promised.
        found: what happened.
        held: whether the promise was kept.
        timed: whether that depends on how fast the machine is, and on what else it does.
    """

    what: str
    aim: str
    found: str
    held: bool
    timed: bool = False


def table(outcomes: Iterable[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    rows = [f"| {one.what} | {one.aim} | {one.found} | {'yes' if one.held else '**no**'} |" for one in outcomes]
    return "\n".join(["| what | aim | found | kept |", "|---|---|---|---|", *rows])
