"""`python -m bench.chaos [SCENARIO...] [--backend local] [--seconds S | --short]`"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext

from .outcome import Outcome, table
from .own_cluster import own_cluster
from .scenarios import SCENARIOS


def main() -> int:
    """Run scenarios one after the other; 1 if a promise was broken."""
    options = argparse.ArgumentParser(prog="python -m bench.chaos", description=sys.modules["bench.chaos"].__doc__)
    options.add_argument(
        "scenario",
        nargs="*",
        type=_scenario,
        metavar="SCENARIO",
        help=f"by default all that the adapter has a part in: {', '.join(SCENARIOS)}",
    )
    options.add_argument("--backend", default="local", choices=["local", "ray"])
    options.add_argument("--seconds", type=float, help="how long each goes on")
    options.add_argument(
        "--short", action="store_true", help="a few seconds each, and no figure that depends on the machine counts"
    )
    given = options.parse_args()
    outcomes: list[Outcome] = []
    broken = False
    usual = [name for name, scenario in SCENARIOS.items() if given.backend in scenario.backends]
    with own_cluster() if given.backend == "ray" else nullcontext():
        for name in given.scenario or usual:
            scenario = SCENARIOS[name]
            began = time.monotonic()
            seconds = given.seconds or (scenario.short_s if given.short else scenario.usual_s)
            found = list(scenario.run(given.backend, seconds))
            outcomes += found
            kept = all(one.held or (given.short and one.timed) for one in found)
            broken |= not kept
            print(f"{name}: {'kept' if kept else 'BROKEN'} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
    print(table(outcomes))
    return 1 if broken else 0


def _scenario(given: str) -> str:
    """Not as ``choices``: then Python 3.10 and 3.11 want the empty list, which is the default, among them."""
    if given not in SCENARIOS:
        raise argparse.ArgumentTypeError(f"there is no scenario {given!r}; there are: {', '.join(SCENARIOS)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
