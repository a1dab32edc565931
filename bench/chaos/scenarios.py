"""All scenarios by name, each with the seconds that it usually goes on, and where it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from .bodies import bodies
from .drift import calls, cycles
from .endings import endings
from .fuzz import fuzz
from .interrupts import interrupts
from .kills import kills, poison
from .network import network
from .outcome import Outcome
from .overload import overload
from .stateful import stateful
from .stops import stops
from .versions import versions

_LOCAL = ("local",)
_BOTH = ("local", "ray")


class Scenario(NamedTuple):
    """A fault, or some of a kind.

    Attributes:
        run: Takes the adapter and the seconds to go on for.
        usual_s: How long it goes on unless told otherwise.
        short_s: How long where it is only to show that nothing is broken; what comes in numbers is fewer then.
        backends: The adapters on which it says more than on another: on Ray it is what Ray has a part in.
    """

    run: Callable[[str, float], Iterator[Outcome]]
    usual_s: float
    short_s: float
    backends: tuple[str, ...]


SCENARIOS: Final = {
    "kills": Scenario(kills, 60.0, 4.0, _BOTH),
    "poison": Scenario(poison, 20.0, 3.0, _BOTH),
    "stops": Scenario(stops, 10.0, 0.5, _BOTH),
    "versions": Scenario(versions, 10.0, 1.0, _BOTH),
    "overload": Scenario(overload, 30.0, 0.5, _LOCAL),
    "bodies": Scenario(bodies, 60.0, 6.0, _LOCAL),
    "fuzz": Scenario(fuzz, 300.0, 5.0, _LOCAL),
    "interrupts": Scenario(interrupts, 60.0, 5.0, _LOCAL),
    "stateful": Scenario(stateful, 60.0, 5.0, _BOTH),
    "endings": Scenario(endings, 60.0, 5.0, _BOTH),
    "network": Scenario(network, 20.0, 8.0, ("ray",)),
    "calls": Scenario(calls, 300.0, 3.0, _LOCAL),
    "cycles": Scenario(cycles, 300.0, 0.0, _LOCAL),
}
