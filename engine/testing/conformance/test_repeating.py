"""Calls that have begun are repeated where that is allowed, and nowhere else."""

from __future__ import annotations

import asyncio
import os

import httpx
import pytest

from engine import errors
from engine.testing.instruments import PATIENCE_S


class Flaky(Exception):
    """What a backend raises that is worth another try."""


class Flakier(Flaky):
    pass


def name_of(request):
    return request.query_params.get("name") or request.data


class Backend:
    """Fails a call as often as its name says, and notes each time that it runs."""

    def __init__(self, journal):
        self.journal = journal

    def runs(self, name):
        self.journal.add(name)
        return self.journal.lines().count(name)

    def __call__(self, request):
        name = name_of(request)
        times, _, how = name.partition("-")
        if self.runs(name) <= int(times):
            raise ValueError(name) if how.startswith("other") else Flakier(name)
        return "fine"

    def stream(self, request):
        name = name_of(request)
        if self.runs(name) == 1 and name == "early":
            raise Flaky(name)
        yield "first,"
        if self.runs(name) == 2:
            raise Flaky(name)
        yield "second"


class OnLoop(Backend):
    async def __call__(self, request):
        return super().__call__(request)


@pytest.mark.parametrize("backend", [Backend, OnLoop])
def test_what_a_backend_raises_and_names_is_repeated(serve, engine, journal, backend):
    config = {"max_retries": 2, "retry_on": [Flaky]}
    served = serve(backend, journal, config=config, methods=("GET", "POST"))
    assert served.call("2-by-handle") == "fine"
    assert asyncio.run(served.ahandle.call("1-by-task")) == "fine"
    assert engine.get(served.handle.remote("1-by-ref"), timeout=PATIENCE_S) == "fine"
    assert served.http_text(params={"name": "1-by-get"}) == "fine"
    willing = served.handle.options(idempotent=True, max_retries=3)
    assert willing.call("3-by-handle") == "fine"
    assert engine.get(willing.remote("3-by-ref"), timeout=PATIENCE_S) == "fine"
    expected = ["2-by-handle"] * 3 + ["1-by-task", "1-by-ref", "1-by-get"] * 2 + ["3-by-handle", "3-by-ref"] * 4
    assert sorted(journal.lines()) == sorted(expected)


def test_what_is_not_repeated(serve, engine, journal):
    """Too often; another error; a call that says so; a POST, until the backend says that it may be."""
    served = serve(Backend, journal, config={"max_retries": 1, "retry_on": [Flaky]}, methods=("GET", "POST"))
    with pytest.raises(Flakier):
        served.call("2-too-often")
    with pytest.raises(ValueError, match="1-other"):
        served.call("1-other")
    with pytest.raises(Flakier):
        served.call("1-unwilling", idempotent=False)
    assert served.http("POST", params={"name": "1-post"}).status_code == 500
    assert sorted(journal.lines()) == ["1-other", "1-post", "1-unwilling", "2-too-often", "2-too-often"]
    engine.update_backend_config(served.tag, {"retry_posts": True, "retry_on": [ValueError]})
    assert served.http_text("POST", params={"name": "1-other-posted"}) == "fine"
    with pytest.raises(Flakier):
        served.call("1-no-more")
    engine.update_backend_config(served.tag, {"max_retries": 0})
    with pytest.raises(ValueError, match="1-other-off"):
        served.call("1-other-off")


def test_a_stream_is_repeated_only_before_its_first_item(serve, journal):
    served = serve(Backend, journal, config={"max_retries": 1, "retry_on": [Flaky]})
    method = {"X-SERVE-CALL-METHOD": "stream"}
    assert served.http_text(params={"name": "early"}, headers=method) == "first,second"
    assert journal.lines() == ["early", "early", "early"]
    with pytest.raises(httpx.RemoteProtocolError):
        served.http(params={"name": "late"}, headers=method)
    assert journal.lines().count("late") == 2  # at its begin and after its first item, and no more


class Mortal(Backend):
    """Dies of a call as often as its name says."""

    def __call__(self, request):
        name = name_of(request)
        if self.runs(name) <= int(name.partition("-")[0]):
            os._exit(3)
        return "fine"


class MortalOnLoop(Mortal):
    async def __call__(self, request):
        return super().__call__(request)


@pytest.mark.parametrize("backend", [Mortal, MortalOnLoop])
def test_what_a_replica_died_of_is_repeated_once(serve, adapter, journal, backend):
    if not adapter.processes:
        pytest.skip("replicas of this adapter live in the calling process and cannot die alone")
    served = serve(backend, journal, config={"num_replicas": 2, "max_retries": 1})
    if backend is Mortal:
        assert served.http_text(params={"name": "1-by-get"}) == "fine"
    else:
        with pytest.raises(errors.ReplicaDied, match="2 have died with this call, so it is given to no other"):
            served.call("9-poison", idempotent=True, max_retries=9)
        assert journal.lines() == ["9-poison"] * 2
    assert served.call("0-good") == "fine"
