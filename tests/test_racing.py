"""Calls of every kind race faults and changes of an engine: see `bench.chaos.racing`, which also runs for longer."""

from __future__ import annotations

import logging

import pytest

from bench.chaos.stateful import run


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("backend", "races"), [("inline", 5), ("local", 3)])
def test_whatever_happens_every_call_ends_once_and_nothing_is_left(
    backend: str, races: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # what goes wrong here is what is wanted
    assert run(backend, examples=races, steps=15, derandomize=True) > 50
