"""Wrong input: one clear error each, raised by the call that is wrong, after which the engine serves on."""

from __future__ import annotations

import math
import threading
from importlib import metadata

import pytest

from engine import BackendConfig, Engine, ServeRequest, errors


def ok(request):
    return "ok"


class Backend:
    def __call__(self, request):
        return "ok"

    def method(self, value):
        return value

    def _private(self, value):
        return value


class HoldsLock:
    lock_of_the_class = threading.Lock()

    def __call__(self, request):
        return "never"


def closure_over_lock():
    lock_in_closure = threading.Lock()

    def backend(request):
        return lock_in_closure

    return backend


class LockAttribute:
    def __init__(self):
        self.lock_attribute = threading.Lock()

    def __call__(self, request):
        return "never"


def never_awaited(handle):
    coroutine = handle.remote(1)
    coroutine.close()  # or Python complains, rightly
    return coroutine


BAD_CALLS = {
    "duplicate tag": (lambda e, s: e.create_backend(s.tag, ok), ValueError, "{tag}.*exists"),
    "duplicate endpoint": (lambda e, s: e.create_endpoint(s.name, backend=s.tag), ValueError, "{tag}.*exists"),
    "tag is no string": (lambda e, s: e.create_backend(5, ok), ValueError, "tag.*5"),
    "tag is empty": (lambda e, s: e.create_backend("", ok), ValueError, "tag"),
    "endpoint is no string": (lambda e, s: e.create_endpoint(5, backend=s.tag), ValueError, "name.*5"),
    "backend is not callable": (lambda e, s: e.create_backend("new", 5), ValueError, "5"),
    "endpoint of unknown backend": (lambda e, s: e.create_endpoint("new", backend="absent"), ValueError, "'absent'"),
    "update of unknown backend": (lambda e, s: e.update_backend_config("absent", {}), ValueError, "'absent'"),
    "config of unknown backend": (lambda e, s: e.get_backend_config("absent"), ValueError, "'absent'"),
    "delete unknown backend": (lambda e, s: e.delete_backend("absent"), ValueError, "'absent'"),
    "config of what is no tag": (lambda e, s: e.get_backend_config({}), ValueError, "tag must be.*{{}}"),
    "update of what is no tag": (lambda e, s: e.update_backend_config([], {}), ValueError, r"tag must be.*\[\]"),
    "delete what is no tag": (lambda e, s: e.delete_backend([]), ValueError, r"tag must be.*\[\]"),
    "delete by an odd force": (lambda e, s: e.delete_backend(s.tag, force="no"), ValueError, "force.*'no'"),
    "delete what is no endpoint": (lambda e, s: e.delete_endpoint([]), ValueError, r"name must be.*\[\]"),
    "traffic of what is no endpoint": (lambda e, s: e.set_traffic([], {s.tag: 1}), ValueError, r"name must be.*\[\]"),
    "shadow to what is no tag": (lambda e, s: e.shadow_traffic(s.name, [], 1), ValueError, r"tag must be.*\[\]"),
    "shadow of what is no endpoint": (lambda e, s: e.shadow_traffic({}, s.tag, 1), ValueError, "name must be.*{{}}"),
    "delete backend in use": (lambda e, s: e.delete_backend(s.tag), ValueError, "{tag}.*endpoint"),
    "delete unknown endpoint": (lambda e, s: e.delete_endpoint("absent"), errors.CallError, "'absent'"),
    "traffic of unknown endpoint": (
        lambda e, s: e.set_traffic("absent", {s.tag: 1}), errors.CallError, "'absent'",
    ),
    "traffic to unknown backend": (lambda e, s: e.set_traffic(s.name, {"absent": 1}), ValueError, "'absent'"),
    "shadow of unknown endpoint": (
        lambda e, s: e.shadow_traffic("absent", s.tag, 1), errors.CallError, "'absent'",
    ),
    "shadow to unknown backend": (lambda e, s: e.shadow_traffic(s.name, "absent", 1), ValueError, "'absent'"),
    "shadow proportion above 1": (lambda e, s: e.shadow_traffic(s.name, s.tag, 1.5), ValueError, r"1\.5"),
    "shadow proportion negative": (lambda e, s: e.shadow_traffic(s.name, s.tag, -1), ValueError, "-1"),
    "shadow proportion nan": (lambda e, s: e.shadow_traffic(s.name, s.tag, math.nan), ValueError, "nan"),
    "route without slash": (
        lambda e, s: e.create_endpoint("new", backend=s.tag, route="x"), ValueError, "'x'.*/|/.*'x'",
    ),
    "route is no string": (lambda e, s: e.create_endpoint("new", backend=s.tag, route=5), ValueError, "route.*5"),
    "route of the engine": (
        lambda e, s: e.create_endpoint("new", backend=s.tag, route="/-/healthz"), ValueError, "/-/",
    ),
    "route with open brace": (
        lambda e, s: e.create_endpoint("new", backend=s.tag, route="/a/{b"), ValueError, r"/a/\{{b",
    ),
    "taken route": (
        lambda e, s: e.create_endpoint("new", backend=s.tag, route=s.route), ValueError, "'{route}'.*'{name}'",
    ),
    "methods is a string": (
        lambda e, s: e.create_endpoint("new", backend=s.tag, route="/n", methods="GET"), ValueError, "methods.*'GET'",
    ),
    "methods of numbers": (
        lambda e, s: e.create_endpoint("new", backend=s.tag, route="/n", methods=[1]), ValueError, "methods.*1",
    ),
    "methods empty": (
        lambda e, s: e.create_endpoint("new", backend=s.tag, route="/n", methods=[]), ValueError, "methods",
    ),
    "methods unknown": (
        lambda e, s: e.create_endpoint("new", backend=s.tag, route="/n", methods=["FETCH IT"]), ValueError, "FETCH IT",
    ),
    "negative weight": (lambda e, s: e.set_traffic(s.name, {s.tag: -1, "x": 2}), ValueError, "{tag}.*-1"),
    "weight is nan": (lambda e, s: e.set_traffic(s.name, {s.tag: math.nan}), ValueError, "{tag}.*nan"),
    "weight is infinite": (lambda e, s: e.set_traffic(s.name, {s.tag: math.inf}), ValueError, "{tag}.*inf"),
    "weight is a string": (lambda e, s: e.set_traffic(s.name, {s.tag: "1"}), ValueError, "{tag}.*'1'"),
    "no weights": (lambda e, s: e.set_traffic(s.name, {}), ValueError, "at least one"),
    "weights are no dict": (lambda e, s: e.set_traffic(s.name, [s.tag]), ValueError, "dict"),
    "weights sum to a half": (lambda e, s: e.set_traffic(s.name, {s.tag: 0.5}), ValueError, r"sum.*0\.5"),
    "handle to missing endpoint": (lambda e, s: e.get_handle("absent"), errors.EndpointNotFound, "'absent'"),
    "async handle to missing endpoint": (
        lambda e, s: e.get_handle("absent", sync=False), errors.EndpointNotFound, "'absent'",
    ),
    "missing method": (lambda e, s: s.call(1, method_name="absent"), errors.MethodNotFound, "'absent'"),
    "private method": (lambda e, s: s.call(1, method_name="_private"), errors.MethodNotFound, "'_private'"),
    "method name of wrong type": (lambda e, s: s.handle.options(method_name=5), ValueError, "method_name.*5"),
    "unknown option": (lambda e, s: s.handle.options(method="x"), ValueError, "'method'.*method_name"),
    "negative timeout": (lambda e, s: s.handle.options(timeout_s=-1), ValueError, "timeout_s.*-1"),
    "timeout is infinite": (lambda e, s: s.handle.options(timeout_s=math.inf), ValueError, "timeout_s.*inf"),
    "timeout of a century": (lambda e, s: s.handle.options(timeout_s=4e9), ValueError, "timeout_s.*a year"),
    "timeout is nan": (lambda e, s: s.handle.options(timeout_s=math.nan), ValueError, "timeout_s.*nan"),
    "shard key is no string": (lambda e, s: s.handle.options(shard_key=5), ValueError, "shard_key.*5"),
    "header is no string": (lambda e, s: s.handle.options(http_headers={"a": 5}), ValueError, "http_headers.*5"),
    "headers are no dict": (lambda e, s: s.handle.options(http_headers=5), ValueError, "http_headers.*5"),
    "verb is unknown": (lambda e, s: s.handle.options(http_method="FETCH"), ValueError, "http_method.*FETCH"),
    "two arguments without a method": (lambda e, s: s.call(1, 2), ValueError, "one argument"),
    "option in the place of a query parameter": (
        lambda e, s: s.handle.call(1, timeout_s=0.5),
        ValueError, r"timeout_s is an option.*handle\.options\(timeout_s=0\.5\)\.call",
    ),
    "options in the place of query parameters": (
        lambda e, s: s.handle.remote(1, x=1, method_name="m", shard_key="k"),
        ValueError, r"options\(method_name='m', shard_key='k'\)",
    ),
    "call of the handle itself": (lambda e, s: s.handle(1), ValueError, r"handle\.call\(x\).*handle\.remote\(x\)"),
    "call of the async handle itself": (lambda e, s: s.ahandle(1), ValueError, r"handle\.call\(x\)"),
    "method as an attribute of the handle": (
        lambda e, s: s.handle.add.remote(1), AttributeError, r"'add'.*options\(method_name='add'\)",
    ),
    "get of a coroutine": (lambda e, s: e.get(never_awaited(s.ahandle)), ValueError, "coroutine.*await it"),
    "get of a list of coroutines": (lambda e, s: e.get([never_awaited(s.ahandle)]), ValueError, "coroutine.*await it"),
    "get of no ref": (lambda e, s: e.get(5), ValueError, "5"),
    "get of a list with no ref": (lambda e, s: e.get([s.handle.remote(), 5]), ValueError, r"\b5\b"),
    "wait for too many": (lambda e, s: e.wait([s.handle.remote()], num_returns=2), ValueError, "num_returns.*2"),
    "wait for none": (lambda e, s: e.wait([s.handle.remote()], num_returns=0), ValueError, "num_returns.*0"),
    "unpicklable closure": (
        lambda e, s: e.create_backend("new", closure_over_lock()), errors.NotSerializable, "lock_in_closure",
    ),
    "unpicklable argument of the constructor": (
        lambda e, s: e.create_backend("new", Backend, threading.Lock()), errors.NotSerializable, "lock",
    ),
    "unpicklable attribute": (
        lambda e, s: e.create_backend("new", LockAttribute()), errors.NotSerializable, "lock_attribute",
    ),
    "unpicklable argument": (lambda e, s: s.call(threading.Lock()), errors.NotSerializable, "argument.*lock"),
    "unpicklable part of an argument": (
        lambda e, s: s.call({"fine": 1, "bad": [threading.Lock()]}), errors.NotSerializable, r"\['bad'\]\[0\]",
    ),
    "unpicklable attribute of an argument": (lambda e, s: s.call(LockAttribute()), TypeError, "lock_attribute"),
    "actor options are no dict": (
        lambda e, s: e.create_backend("new", ok, ray_actor_options=5), ValueError, "ray_actor_options.*5",
    ),
    "field of the config as an init argument of a function": (
        lambda e, s: e.create_backend("new", ok, num_replicas=2), ValueError, r"config=\{{'num_replicas': 2\}}",
    ),
    "field of the config as an init argument of a class": (
        lambda e, s: e.create_backend("new", Backend, max_batch_size=2),
        ValueError, r"config=\{{'max_batch_size': 2\}}",
    ),
    "actor option as an init argument": (
        lambda e, s: e.create_backend("new", Backend, num_gpus=1), ValueError, r"ray_actor_options=\{{'num_gpus': 1\}}",
    ),
    "route as an init argument": (
        lambda e, s: e.create_backend("new", ok, route="/new"), ValueError, r"create_endpoint\(\.\.\., route='/new'\)",
    ),
    "tag twice": (
        lambda e, s: e.create_backend("new", ok, backend_tag="other"), ValueError, "function: only a class takes init",
    ),
    "actor option in the config": (
        lambda e, s: e.create_backend("new", ok, config={"num_cpus": 1}),
        ValueError, r"ray_actor_options=\{{'num_cpus': 1\}}",
    ),
    "actor option in an update": (
        lambda e, s: e.update_backend_config(s.tag, {"num_cpus": 1}),
        ValueError, r"ray_actor_options=\{{'num_cpus': 1\}}",
    ),
    "field of the config among the actor options": (
        lambda e, s: e.create_backend("new", ok, ray_actor_options={"num_replicas": 2}),
        ValueError, r"config=\{{'num_replicas': \.\.\.\}}",
    ),
    "handle to no name": (lambda e, s: e.get_handle(5, missing_ok=True), ValueError, "name.*5"),
    "negative cpus": (
        lambda e, s: e.create_backend("new", ok, ray_actor_options={"num_cpus": -1}), ValueError, "num_cpus.*-1",
    ),
    "env_vars of numbers": (
        lambda e, s: e.create_backend("new", ok, ray_actor_options={"runtime_env": {"env_vars": {"A": 1}}}),
        ValueError, "env_vars.*1",
    ),
}  # fmt: skip


@pytest.fixture
def served(serve_once):
    return serve_once(Backend)


def check_serves_on(served):
    assert served.call() == "ok"
    assert served.http().text == "ok"
    assert "new" not in served.engine.list_backends()
    assert "new" not in served.engine.list_endpoints()


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(engine, served, name):
    action, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message.format(tag=served.tag, name=served.name, route=served.route)) as caught:
        action(engine, served)
    assert isinstance(caught.value, errors.EngineError)
    check_serves_on(served)


def test_a_class_that_holds_something_unpicklable(engine, served):
    class LocalHoldsLock:
        lock_of_the_class = threading.Lock()

        def __call__(self, request):
            return "never"

    with pytest.raises(errors.NotSerializable, match="lock_of_the_class"):
        engine.create_backend("new", LocalHoldsLock)
    check_serves_on(served)


def test_a_class_that_can_be_imported_need_not_be_pickled(serve):
    class Local(HoldsLock):
        def __call__(self, request):
            return "served"

    assert serve(Local, route=None).call() == "served"


BAD_CONFIGS = {
    "unknown field": ({"replicas": 2}, "'replicas'.*num_replicas"),
    "no dict": (5, "dict"),
    "replicas zero": ({"num_replicas": 0}, "num_replicas.*0"),
    "replicas as text": ({"num_replicas": "2"}, "num_replicas.*'2'"),
    "replicas as bool": ({"num_replicas": True}, "num_replicas.*True"),
    "replicas as float": ({"num_replicas": 1.5}, r"num_replicas.*1\.5"),
    "concurrency zero": ({"max_concurrent_queries": 0}, "max_concurrent_queries.*0"),
    "queue negative": ({"max_queued_requests": -1}, "max_queued_requests.*-1"),
    "batch zero": ({"max_batch_size": 0}, "max_batch_size.*0"),
    "wait negative": ({"batch_wait_timeout": -0.1}, r"batch_wait_timeout.*-0\.1"),
    "wait nan": ({"batch_wait_timeout": math.nan}, "batch_wait_timeout.*nan"),
    "wait as text": ({"batch_wait_timeout": "1"}, "batch_wait_timeout.*'1'"),
    "batch wait for ever": ({"batch_wait_timeout": math.inf}, "batch_wait_timeout.*inf"),
    "start timeout negative": ({"start_timeout_s": -1}, "start_timeout_s.*-1"),
    "shutdown timeout as text": ({"graceful_shutdown_timeout_s": "x"}, "graceful_shutdown_timeout_s.*'x'"),
    "user_config without reconfigure": ({"user_config": 1}, "reconfigure"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config(engine, served, name):
    config, message = BAD_CONFIGS[name]
    before = engine.get_backend_config(served.tag)
    with pytest.raises((errors.InvalidArgument, errors.NotSerializable), match=message):
        engine.create_backend("new", ok, config=config)
    with pytest.raises((errors.InvalidArgument, errors.NotSerializable), match=message):
        engine.update_backend_config(served.tag, config)
    assert engine.get_backend_config(served.tag) == before
    check_serves_on(served)


def test_user_config_that_cannot_be_pickled(engine, serve):
    class Configured(Backend):
        def reconfigure(self, config):
            self.config = config

    served = serve(Configured)
    bad = {"user_config": {"fine": 1, "bad": threading.Lock()}}
    with pytest.raises(errors.NotSerializable, match=r"user_config.*'bad'"):
        engine.create_backend("new", Configured, config=bad)
    with pytest.raises(errors.NotSerializable, match=r"user_config.*'bad'"):
        engine.update_backend_config(served.tag, bad)
    assert engine.get_backend_config(served.tag).user_config is None
    check_serves_on(served)


def test_config_is_validated_at_construction():
    with pytest.raises(errors.InvalidArgument, match="num_replicas"):
        BackendConfig(num_replicas=0)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_result_that_cannot_be_pickled(serve, kind):
    def sync(request):
        return {"fine": 1, "bad": threading.Lock()} if request.data == "bad" else "ok"

    async def asynchronous(request):
        return sync(request)

    served = serve(sync if kind == "sync" else asynchronous, route=None)
    with pytest.raises(errors.ResultNotSerializable, match="'bad'"):
        served.call("bad")
    assert served.call() == "ok"


def test_a_result_that_cannot_be_rebuilt(serve):
    def backend(request):
        class Bad:
            def __reduce__(self):
                return int, ("no number",)

        return Bad() if request.data == "bad" else "ok"

    served = serve(backend, route=None)
    with pytest.raises(errors.BackendError, match="rebuilt"):
        served.call("bad")
    assert served.call() == "ok"


def test_an_argument_that_cannot_be_rebuilt(serve):
    class Bad:
        def __reduce__(self):
            return int, ("no number",)

    served = serve(ok, route=None)
    with pytest.raises(errors.NotSerializable, match="argument"):
        served.call(Bad())
    assert served.call() == "ok"


@pytest.mark.parametrize("wrong", [5, None, object(), "", ServeRequest])
def test_backend_of_an_engine_is_wrong(wrong):
    with pytest.raises(errors.InvalidArgument, match="backend"):
        Engine(backend=wrong).shutdown()


def test_unknown_adapter_names_those_there_are():
    with pytest.raises(errors.InvalidArgument, match=r"'lokal'.*inline.*local"):
        Engine(backend="lokal").shutdown()


def test_adapter_that_is_not_installed_says_what_to_install():
    installed = {entry.name for entry in metadata.entry_points(group="engine.adapters")}
    if "ray" in installed:
        pytest.skip("the adapter is installed here")
    with pytest.raises(errors.InvalidArgument, match=r"pip install.*\[ray\]"):
        Engine(backend="ray").shutdown()


class Named:
    def __init__(self, *values, **options):
        pass

    def many(self, *values, **options):
        return "never"


def test_the_argument_that_cannot_be_pickled_is_named(serve, engine):
    lock = threading.Lock()
    handle = serve(Named, route=None).handle.options(method_name="many")
    with pytest.raises(errors.NotSerializable, match="the argument 1 cannot be pickled: a lock"):
        handle.call(1, lock)
    with pytest.raises(errors.NotSerializable, match=r"the argument 'key' cannot be pickled: \['a'\] is a lock"):
        handle.call(key={"a": lock})
    with pytest.raises(errors.NotSerializable, match="init argument 1 of backend 'new' cannot be pickled: a lock"):
        engine.create_backend("new", Named, 0, lock)
    with pytest.raises(errors.NotSerializable, match="init argument 'key' of backend 'new' cannot be pickled: a lock"):
        engine.create_backend("new", Named, key=lock)
