"""Every scenario of `bench.chaos` for a few seconds, as a program: what does not depend on time must hold.

But for those on Ray alone: `network` needs the right to make namespaces, and minutes of a machine that is not busy.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.chaos.scenarios import SCENARIOS

ROOT = Path(__file__).parent.parent
_LOCAL = [name for name, scenario in SCENARIOS.items() if "local" in scenario.backends]
TESTED_ELSEWHERE = {"fuzz", "stateful"}  # test_fuzz_*.py, test_racing.py


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scenario", sorted(set(_LOCAL) - TESTED_ELSEWHERE))
def test_a_scenario_in_short(scenario: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.chaos", scenario, "--short"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout


def test_its_help_names_the_scenarios() -> None:
    command = [sys.executable, "-m", "bench.chaos"]
    told = subprocess.run(
        [*command, "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=True
    ).stdout
    assert "[SCENARIO ...]" in told
    assert "[]" not in told
    assert all(name in told for name in SCENARIOS)
    wrong = subprocess.run([*command, "x"], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "there is no scenario 'x'; there are: kills" in wrong.stderr
