"""All scenarios by name, each with the seconds that it usually goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from .bodies import bodies
from .drift import calls, cycles
from .endings import endings
from .interrupts import interrupts
from .kills import kills, poison
from .outcome import Outcome
from .overload import overload
from .stops import stops
from .versions import versions

SCENARIOS: Final[dict[str, tuple[Callable[[str, float], Iterator[Outcome]], float]]] = {
    "kills": (kills, 60.0),
    "poison": (poison, 20.0),
    "stops": (stops, 10.0),
    "versions": (versions, 10.0),
    "overload": (overload, 30.0),
    "bodies": (bodies, 0.0),
    "interrupts": (interrupts, 60.0),
    "endings": (endings, 60.0),
    "calls": (calls, 300.0),
    "cycles": (cycles, 300.0),
}
