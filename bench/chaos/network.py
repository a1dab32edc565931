"""Nodes that lose their power, their cable, or the quality of it, while a program on another node calls.

The hosts are namespaces of this machine (`tests/ray_hosts.py`), with a Ray of their own: nothing else is touched.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from .on_a_host import REPLICAS
from .outcome import Outcome

TOLD_WITHIN_S = 12.0
CUT_S = 5.0
DELAY_S = 0.1
LOSS = 0.02
NO_ANSWER_S = 1.0
"""So long nobody may be answered at all."""
_REPEATED = ("handle, idempotent", "HTTP GET")
_BEFORE_S = 2.0
_ROOT = Path(__file__).parents[2]
_HEALTH_CHECKS = 10
"""Of Ray, a second each, that a node may miss: it is to be the engine that notices. By default it is minutes."""


def network(backend: str, seconds: float) -> Iterator[Outcome]:
    """Half of the replicas are on a node to which something happens; the program and the others are elsewhere."""
    sys.path.append(str(_ROOT / "tests"))
    ray_hosts: Any = importlib.import_module("ray_hosts")
    if ray_hosts.why_not() is not None:
        yield Outcome("network namespaces", "several nodes on this machine", ray_hosts.why_not(), False)
        return

    def power_fails(victim: Any) -> None:
        victim.cut()
        victim.kill()

    def cable_is_cut(victim: Any) -> None:
        victim.cut()
        time.sleep(CUT_S)
        victim.mend()

    faults: dict[str, Callable[[Any], None]] = {
        "a node crashes": lambda victim: victim.kill(),
        "a node loses its power": power_fails,
        f"a node is cut off for {CUT_S:g} s": cable_is_cut,
        f"{DELAY_S * 1000:g} ms more each way to a node, {LOSS:.0%} lost": lambda victim: victim.slow_down(
            DELAY_S, LOSS
        ),
    }
    with ray_hosts.Hosts() as hosts, tempfile.TemporaryDirectory() as directory:
        one, two = hosts.add(), hosts.add()
        one.start_head(missed_health_checks=_HEALTH_CHECKS)
        # each time others: Ray may not know yet that the last one is gone
        seats = [f"seat{number}" for number in range(len(faults))]
        two.join(one, resources=dict.fromkeys([*seats, two.name], REPLICAS))
        for number, (name, fault) in enumerate(faults.items()):
            victim = hosts.add()
            victim.join(one, resources={seats[number]: REPLICAS // 2})
            log = Path(directory, f"log-{number}")
            with log.open("w") as stderr:
                program = one.popen(
                    *(sys.executable, "-m", "bench.chaos.on_a_host"),
                    *(one.ray_address, str(Path(directory, f"marks-{number}")), two.name, seats[number]),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd=_ROOT,
                )
                with program:
                    try:
                        began, accounts = _around(program, lambda fault=fault, victim=victim: fault(victim), seconds)
                    except Exception:
                        print(log.read_text(), file=sys.stderr)
                        raise
            yield from _outcomes(name, began, accounts)
            victim.kill()


def _around(program: Any, fault: Callable[[], None], seconds: float) -> tuple[float, list[dict[str, Any]]]:
    """When it happened, and what became of all calls around it."""
    json.loads(program.stdout.readline())
    time.sleep(_BEFORE_S)
    began = time.monotonic()
    fault()
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    program.stdin.write("end\n")
    program.stdin.flush()
    return began, json.loads(program.stdout.readline())


def _outcomes(name: str, began: float, accounts: list[dict[str, Any]]) -> Iterator[Outcome]:
    for account in accounts:
        records = account["records"]
        failed = [
            (ended - max(began, ended - took_s), outcome) for ended, took_s, outcome in records if outcome != "ok"
        ]
        told_s = max((waited_s for waited_s, _ in failed), default=0.0)
        longest_s = max(took_s for _, took_s, _ in records)
        slow = sum(took_s > NO_ANSWER_S for _, took_s, _ in records)
        found = f"{account['text']}, {account['failed_unbegun']} of which had not begun; {slow} took longer than 1 s"
        if account["name"] in _REPEATED:
            aim, held = "0 failures", not failed
        else:
            aim = f"who cannot be sure is told within {TOLD_WITHIN_S:g} s; none runs twice"
            told = {outcome for _, outcome in failed} <= {"ReplicaDied", "502"} and told_s <= TOLD_WITHIN_S
            held = told and not account["began_twice"]
        yield Outcome(
            f"{name}: {account['name']}", aim, f"{found}; longest {longest_s:.1f} s, told after {told_s:.1f} s", held
        )
    answered = sorted(ended for account in accounts for ended, _, outcome in account["records"] if outcome == "ok")
    gap_s = max(later - earlier for earlier, later in pairwise(answered))
    yield Outcome(
        f"{name}: the others",
        f"answer all the while: never {NO_ANSWER_S:g} s without any answer",
        f"{gap_s:.2f} s at most",
        gap_s < NO_ANSWER_S,
    )
