"""``create_backend(..., replace=True)``: other code under the same tag, and no call lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from engine import errors, get_replica_context
from engine.testing.conformance.load import Load
from engine.testing.instruments import eventually


def old(request):
    return "old"


async def new(request):
    return "new"


class Configured:
    def __init__(self, name):
        self.name = name

    def reconfigure(self, config):
        self.config = config

    def __call__(self, request):
        return self.name, self.config, get_replica_context().replica_tag


class Broken:
    def __init__(self):
        raise LookupError("no model")


def test_no_call_is_lost(engine, serve):
    served = serve(old, config={"num_replicas": 2})
    served.handle.call()
    with Load(served.handle.call) as load:
        eventually(lambda: len(load.answers) > 20)
        engine.create_backend(served.tag, new, config={"max_queued_requests": 77}, replace=True)
        told = len(load.answers)
        eventually(lambda: len(load.answers) > told + 20)
        assert load.failures == []
    assert load.failures == []
    assert set(load.answers) == {"old", "new"}
    assert load.answers[-1] == served.call() == served.http_text() == "new"
    config = engine.get_backend_config(served.tag)
    assert (config.num_replicas, config.max_queued_requests) == (1, 77)
    assert list(engine.statistics()["backends"][served.tag]["replicas"].values()) == ["ready"]


def _replicas(engine, tag):
    return engine.statistics()["backends"][tag]["replicas"]


def test_what_is_held_is_finished_by_the_old_code(engine, serve, gate):
    def held(request):
        gate.pass_through()
        return "old"

    served = serve(held, route=None)
    ref = served.handle.remote()
    gate.wait_for_arrivals(1)
    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(engine.create_backend, served.tag, new, replace=True)
        shown = partial(_replicas, engine, served.tag)
        eventually(lambda: shown().get(f"{served.tag}#2") == "ready")  # before that, calls queue up behind the first
        assert served.call() == "new"
        gate.open()
        replacing.result(60)
    assert engine.get(ref, timeout=20) == "old"


def test_arguments_and_configuration_are_those_given_anew(engine, serve):
    served = serve(Configured, "first", config={"user_config": 1}, route=None)
    assert served.call() == ("first", 1, f"{served.tag}#1")
    engine.create_backend(served.tag, Configured, "second", config={"user_config": 2}, replace=True)
    assert served.call() == ("second", 2, f"{served.tag}#2")
    engine.update_backend_config(served.tag, {"user_config": 3})
    assert served.call() == ("second", 3, f"{served.tag}#2")


def test_what_does_not_start_replaces_nothing(engine, serve):
    served = serve(old, config={"max_queued_requests": 7}, route=None)
    with pytest.raises(LookupError, match="no model"):
        engine.create_backend(served.tag, Broken, replace=True)
    assert served.call() == "old"
    assert engine.get_backend_config(served.tag).max_queued_requests == 7
    with pytest.raises(errors.InvalidArgument, match="pass replace=True"):
        engine.create_backend(served.tag, new)
    with pytest.raises(errors.InvalidArgument, match="replace must be True or False"):
        engine.create_backend(served.tag, new, replace="yes")


def test_without_one_to_replace_it_is_created(engine):
    engine.create_backend("fresh", old, replace=True)
    assert "fresh" in engine.list_backends()
    engine.delete_backend("fresh")


def test_an_engine_stays_where_it_was_created(engine, serve):
    """The error says what works in its stead."""

    def calls_back(request):
        return engine.get_handle("other").call()

    with pytest.raises(errors.NotSerializable, match=r"get_replica_context\(\)\.get_handle\(name\)"):
        engine.create_backend("calls-back", calls_back)

    def controls(request):
        try:
            get_replica_context().create_backend("other", old)
        except AttributeError as error:
            return str(error)

    assert "in the program that has the engine" in serve(controls, route=None).call()
