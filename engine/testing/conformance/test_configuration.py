"""`BackendConfig`: given, read, updated, and passed to ``reconfigure``."""

from __future__ import annotations

import pytest

from engine import BackendConfig, errors, get_replica_context
from engine.testing.instruments import eventually


class Configured:
    def __init__(self):
        self.configs = []

    def reconfigure(self, config):
        self.configs.append(config)

    def __call__(self, request):
        return self.configs


class AsyncConfigured:
    def __init__(self):
        self.configs = []

    async def reconfigure(self, config):
        self.configs.append(config)

    async def __call__(self, request):
        return self.configs


@pytest.mark.parametrize("backend", [Configured, AsyncConfigured])
def test_reconfigure_at_construction_and_on_update(serve, engine, backend):
    served = serve(backend, route=None, config={"user_config": {"n": 1}})
    assert served.call() == [{"n": 1}]
    engine.update_backend_config(served.tag, {"user_config": {"n": 2}})
    assert served.call() == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("backend", [Configured, AsyncConfigured])
def test_reconfigure_knows_its_replica(serve, engine, backend):
    class Backend(backend):
        def reconfigure(self, config):
            return super().reconfigure(get_replica_context().replica_tag)

    served = serve(Backend, route=None, config={"user_config": 1})
    engine.update_backend_config(served.tag, {"user_config": 2})
    assert served.call() == [f"{served.tag}#1"] * 2


def test_reconfigure_is_not_called_without_a_user_config(serve):
    assert serve(Configured, route=None).call() == []


def test_reconfigure_is_only_called_for_a_change(serve, engine):
    served = serve(Configured, route=None, config={"user_config": 1})
    engine.update_backend_config(served.tag, {"max_queued_requests": 5})
    engine.update_backend_config(served.tag, {"user_config": 1})
    assert served.call() == [1]


def test_reconfigure_reaches_every_replica_present_and_future(serve, engine):
    class Backend(Configured):
        def __call__(self, request):
            return get_replica_context().replica_tag, self.configs

    served = serve(Backend, route=None, config={"num_replicas": 2, "user_config": 1})
    engine.update_backend_config(served.tag, {"user_config": 2})
    engine.update_backend_config(served.tag, {"num_replicas": 3})

    seen = {}

    def all_seen():
        tag, configs = served.call()
        seen[tag] = configs
        return len(seen) == 3

    eventually(all_seen)
    assert sorted(seen.values()) == [[1, 2], [1, 2], [2]]


def test_reconfigure_that_raises_on_update(serve, engine):
    class Picky(Configured):
        def reconfigure(self, config):
            if config == "bad":
                raise KeyError("of reconfigure")
            super().reconfigure(config)

    served = serve(Picky, route=None, config={"user_config": "good"})
    with pytest.raises(KeyError, match="of reconfigure") as caught:
        engine.update_backend_config(served.tag, {"user_config": "bad"})
    assert isinstance(caught.value.__cause__, errors.RemoteTraceback)
    assert served.call() == ["good"]
    assert engine.get_backend_config(served.tag).user_config == "good"
    engine.update_backend_config(served.tag, {"user_config": "better"})
    assert served.call() == ["good", "better"]


def test_reconfigure_that_raises_at_construction(engine):
    class Picky:
        def reconfigure(self, config):
            raise KeyError("of reconfigure")

        def __call__(self, request):
            return "never"

    with pytest.raises(KeyError, match="of reconfigure"):
        engine.create_backend("picky", Picky, config={"user_config": 1})
    assert "picky" not in engine.list_backends()


@pytest.mark.parametrize(
    "given", [{"max_queued_requests": 7}, BackendConfig(max_queued_requests=7)], ids=["dict", "object"]
)
def test_config_can_be_read(serve, engine, given):
    served = serve(Configured, route=None, config=given)
    config = engine.get_backend_config(served.tag)
    assert isinstance(config, BackendConfig)
    assert config == BackendConfig(max_queued_requests=7)
    assert engine.list_backends()[served.tag] == config


def test_updates_add_up(serve, engine):
    served = serve(Configured, route=None)
    engine.update_backend_config(served.tag, {"max_queued_requests": 7})
    engine.update_backend_config(served.tag, {"max_concurrent_queries": 3})
    expected = BackendConfig(max_queued_requests=7, max_concurrent_queries=3)
    assert engine.get_backend_config(served.tag) == expected
    engine.update_backend_config(served.tag, BackendConfig(max_queued_requests=8))
    assert engine.get_backend_config(served.tag) == BackendConfig(max_queued_requests=8, max_concurrent_queries=3)
    engine.update_backend_config(served.tag, BackendConfig())
    assert engine.get_backend_config(served.tag) == BackendConfig(max_queued_requests=8, max_concurrent_queries=3)


def test_a_config_object_can_be_filled_in_and_stays_the_users(serve, engine):
    config = BackendConfig()
    config.user_config = {"n": 1}
    served = serve(Configured, route=None, config=config)
    config.max_queued_requests = 7  # not said to the engine
    config.user_config["n"] = 2
    assert engine.get_backend_config(served.tag) == BackendConfig(user_config={"n": 1})
    assert engine.list_backends()[served.tag] == BackendConfig(user_config={"n": 1})

    read = engine.get_backend_config(served.tag)
    read.user_config["n"] = 3
    assert engine.get_backend_config(served.tag).user_config == {"n": 1}
    engine.update_backend_config(served.tag, read)
    assert served.call() == [{"n": 1}, {"n": 3}]


def test_a_bad_update_changes_nothing(serve, engine):
    served = serve(Configured, route=None, config={"user_config": 1})
    before = engine.get_backend_config(served.tag)
    with pytest.raises(errors.InvalidArgument, match="max_batch_size"):
        engine.update_backend_config(served.tag, {"user_config": 2, "max_batch_size": 0})
    assert engine.get_backend_config(served.tag) == before
    assert served.call() == [1]
