"""Other code under the same tag, by `update_backend` or ``create_backend(..., replace=True)``, and no call lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from engine import errors, get_replica_context
from engine.testing.conformance.load import Load
from engine.testing.instruments import eventually, interrupting


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


class Ill:
    def __call__(self, request):
        return "ill"

    def check_health(self):
        raise LookupError("no model")


class Sync:
    def __init__(self, version, fails=False):
        self.version = version
        if fails:
            raise LookupError("no model")

    def __call__(self, request):
        return self.version


class Async(Sync):
    async def __call__(self, request):
        return self.version


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
    waiting = [served.handle.remote() for _ in range(3)]
    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(engine.create_backend, served.tag, new, replace=True)
        shown = partial(_replicas, engine, served.tag)
        eventually(lambda: shown().get(f"{served.tag}#2") == "ready")  # before that, calls queue up behind the first
        assert served.call() == "new"
        assert engine.get(waiting, timeout=20) == ["new"] * 3, "the old one hands back what it has not begun"
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
    for broken in (Broken, Ill):
        with pytest.raises(LookupError, match="no model"):
            engine.create_backend(served.tag, broken, replace=True)
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


# -- update_backend --------------------------------------------------------------------------------------------------


def test_versions_follow_each_other_under_load(engine, serve):
    """Sync and async ones, in steps of either kind, with other limits, and a broken one: no call fails of it.

    Nor does one go back to a former version.
    """
    served = serve(Sync, 1, config={"num_replicas": 2, "max_surge": 1}, route=None)
    in_place = {"max_surge": 0, "max_unavailable": 1}
    with Load(served.handle.call) as load:
        eventually(lambda: len(load.answers) > 10)
        engine.update_backend(served.tag, Async, 2)
        second = len(load.answers)
        assert served.call() == 2
        with pytest.raises(LookupError, match="no model"):
            engine.update_backend(served.tag, Sync, 3, fails=True, config=in_place)
        broken = len(load.answers)
        eventually(lambda: len(load.answers) > broken + 10)
        engine.update_backend(served.tag, Sync, version=4, config={"max_concurrent_queries": 1, **in_place})
        fourth = len(load.answers)
        assert served.call() == 4
        eventually(lambda: len(load.answers) > fourth + 10)
    assert load.failures == []
    for since, until, version in [(second, broken, 2), (fourth, None, 4)]:
        others = [answer for answer in load.answers[since:until] if answer != version]
        assert len(others) <= Load.THREADS, others  # each had asked before
    there = engine.statistics()["backends"][served.tag]
    assert (there["state"], there["version"]) == ("ready", 3)
    assert [one["version"] for one in there["details"].values()] == [3, 3]


class Held:
    def __init__(self, gate):
        gate.pass_through()

    def __call__(self, request):
        return "new"


IN_PLACE = {"num_replicas": 2, "max_surge": 0, "max_unavailable": 1}


def test_an_update_that_is_interrupted_half_way_is_taken_back(engine, serve, gate):
    """One of the old replicas has made room, and is started again."""
    served = serve(old, config=IN_PLACE, route=None)
    with interrupting(gate.arrivals), pytest.raises(KeyboardInterrupt):
        engine.update_backend(served.tag, Held, gate)
    engine.update_backend_config(served.tag, {"max_queued_requests": 7})  # whatever comes next finds it so
    there = engine.statistics()["backends"][served.tag]
    assert [there["version"], *(one["version"] for one in there["details"].values())] == [1, 1, 1]
    assert {served.call() for _ in range(5)} == {"old"}


def test_a_deletion_by_force_ends_an_update(engine, serve, gate):
    served = serve(old, config=IN_PLACE, route=None)
    engine.delete_endpoint(served.name)
    with ThreadPoolExecutor(1) as pool:
        updating = pool.submit(engine.update_backend, served.tag, Held, gate)
        gate.wait_for_arrivals(1)
        engine.delete_backend(served.tag, force=True)
        with pytest.raises(errors.InvalidArgument, match="was deleted meanwhile"):
            updating.result(20)
    engine.create_backend(served.tag, old)  # nothing is left of it
    engine.delete_backend(served.tag)


def test_an_update_keeps_the_configuration_but_for_what_it_changes(engine, serve):
    served = serve(Configured, "first", config={"user_config": 1, "max_queued_requests": 7}, route=None)
    engine.update_backend(served.tag, Configured, "second")
    assert served.call() == ("second", 1, f"{served.tag}#2")
    engine.update_backend(served.tag, Configured, name="third", config={"user_config": 2, "num_replicas": 2})
    assert served.call()[:2] == ("third", 2)
    config = engine.get_backend_config(served.tag)
    assert (config.max_queued_requests, config.num_replicas, config.user_config) == (7, 2, 2)
    engine.update_backend_config(served.tag, {"user_config": 3})
    assert served.call()[:2] == ("third", 3)


def test_what_does_not_fit_is_refused_and_changes_nothing(engine, serve):
    served = serve(Configured, "first", config={"user_config": 1}, route=None)
    for arguments, options, message in [
        (("unknown", old), {}, "there is no backend 'unknown'"),
        ((served.tag, old), {}, "user_config.* needs a class with a reconfigure"),
        ((served.tag, old, 1), {}, "only a class takes init arguments"),
        ((served.tag, Configured, 1), {"config": {"max_batch_size": 2}}, "needs a callable that takes a list"),
        ((served.tag, Configured, 1), {"config": {"max_surge": "half"}}, 'max_surge must be .* such as "25%"'),
        ((served.tag, Configured, 1), {"config": {"max_surge": 0}}, "leave no way to exchange a replica"),
        ((served.tag, Configured, 1), {"num_replicas": 2}, "num_replicas is no argument of Configured, but belongs"),
    ]:
        with pytest.raises(errors.InvalidArgument, match=message):
            engine.update_backend(*arguments, **options)
    with pytest.raises(errors.NotSerializable, match="init argument 0"):
        engine.update_backend(served.tag, Configured, (one for one in "generator"))
    assert served.call() == ("first", 1, f"{served.tag}#1")
    engine.update_backend(served.tag, old, config={"user_config": None})
    assert served.call() == "old"
