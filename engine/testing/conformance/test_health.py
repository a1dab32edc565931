"""``check_health``: what a backend says of itself, before it takes calls and from time to time."""

from __future__ import annotations

import asyncio
import os

import pytest

from engine import get_replica_context
from engine.testing.instruments import eventually

OFTEN = {"health_check_period_s": 0.05, "health_check_threshold": 2}


class Checked:
    """Its first replica fails while there is a file; others are well."""

    def __init__(self, broken):
        self.broken = broken

    def check_health(self):
        if self.broken.exists() and self.number() == 1:
            raise LookupError("lost the GPU")

    def number(self):
        return int(get_replica_context().replica_tag.rpartition("#")[2])

    def __call__(self, request):
        return self.number()


class AsyncChecked(Checked):
    async def check_health(self):
        super().check_health()

    async def __call__(self, request):
        return self.number()


class AsyncCheckedPlainly(Checked):
    async def __call__(self, request):
        return self.number()


@pytest.fixture
def broken(tmp_path):
    return tmp_path / "broken"


@pytest.mark.parametrize("backend", [Checked, AsyncChecked, AsyncCheckedPlainly])
def test_a_replica_that_says_it_is_ill_is_replaced(engine, serve, caplog, broken, backend):
    """It serves until another one is there, so that nobody is left without."""
    served = serve(backend, broken, config=OFTEN, route=None)
    assert served.call() == 1
    broken.touch()
    answers = eventually(lambda: (answer := served.call()) != 1 and [answer])
    assert answers == [2]
    # A thread of its own hands on what the controller logs.
    eventually(lambda: "is unhealthy: LookupError: lost the GPU; replacing it" in caplog.text)
    logged = [record.getMessage() for record in caplog.records]
    assert any("check_health() of replica" in text and "failed (1 in a row" in text for text in logged), logged
    eventually(lambda: list(engine.statistics()["backends"][served.tag]["replicas"].values()) == ["ready"])
    assert "lost the GPU" in engine.statistics()["backends"][served.tag]["last_error"]


@pytest.mark.parametrize("backend", [Checked, AsyncChecked])
def test_who_is_ill_from_the_start_does_not_begin(engine, broken, backend):
    broken.touch()
    with pytest.raises(LookupError, match="lost the GPU"):
        engine.create_backend("ill", backend, broken)
    assert "ill" not in engine.list_backends()


def test_a_new_version_that_is_ill_replaces_nothing(engine, serve, broken):
    class Ill(Checked):
        def number(self):
            return 1

    served = serve(Checked, broken, route=None)
    assert served.call() == 1
    broken.touch()
    with pytest.raises(LookupError, match="lost the GPU"):
        engine.update_backend(served.tag, Ill, broken)
    assert served.call() == 1


class Hangs(Checked):
    def __init__(self, broken, gate):
        super().__init__(broken)
        self.gate = gate

    def check_health(self):
        if self.broken.exists() and self.number() == 1:
            self.gate.pass_through()


class AsyncHangs(AsyncChecked):
    def __init__(self, broken, gate):
        super().__init__(broken)

    async def check_health(self):
        if self.broken.exists() and self.number() == 1:
            await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        (Hangs, "has not returned from check_health within 0.2 s; replacing it"),  # it can do nothing else, so at once
        (AsyncHangs, "check_health has not returned within health_check_timeout_s=0.2; replacing it"),
    ],
)
def test_a_check_that_does_not_return_counts_as_one_that_failed(serve, caplog, gate, broken, backend, told):
    served = serve(backend, broken, gate, config={**OFTEN, "health_check_timeout_s": 0.2}, route=None)
    assert served.call() == 1
    broken.touch()
    eventually(lambda: served.call() == 2)  # those that wait for the check to return are served elsewhere
    assert any(told in record.getMessage() for record in caplog.records)


def test_it_can_be_checked_before_the_first_call_alone(serve, journal):
    class Once:
        def check_health(self):
            journal.add(os.getpid())

        def __call__(self, request):
            return "fine"

    served = serve(Once, config={"health_check_period_s": None}, route=None)
    assert served.call() == "fine"
    assert len(journal.lines()) == 1
