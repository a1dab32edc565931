"""Backends and endpoints: listed, created, deleted, and made again."""

from __future__ import annotations

import threading

import pytest

from engine import errors
from engine.testing.instruments import eventually, is_running


def process_id(request):
    import os

    return os.getpid()


def answer(request):
    return "ok"


def test_listing(serve, engine):
    served = serve(answer, methods=["PUT", "GET"])
    assert served.tag in engine.list_backends()
    entry = engine.list_endpoints()[served.name]
    assert entry["route"] == served.route
    assert sorted(entry["methods"]) == ["GET", "PUT"]
    assert entry["traffic"] == {served.tag: 1.0}


def test_an_endpoint_without_a_route(serve, engine):
    served = serve(answer, route=None)
    assert engine.list_endpoints()[served.name]["route"] is None
    assert served.call() == "ok"


def test_verbs_may_be_lower_case(serve):
    assert serve(answer, methods=["post"]).http("POST").text == "ok"


def test_lists_are_copies(serve, engine):
    served = serve(answer)
    engine.list_backends().clear()
    engine.list_endpoints().clear()
    assert served.tag in engine.list_backends()
    assert served.name in engine.list_endpoints()


def test_deleting_an_endpoint(serve, engine):
    served = serve(answer)
    assert served.handle.call() == "ok"
    engine.delete_endpoint(served.name)
    assert served.name not in engine.list_endpoints()
    assert served.http().status_code == 404
    with pytest.raises(errors.EndpointNotFound, match=served.name):
        served.handle.call()
    engine.create_endpoint(served.name, backend=served.tag, route=served.route)
    assert served.http().text == "ok"
    assert served.handle.call() == "ok", "a handle is a name: it works again with its endpoint"


class TakesATag:
    def __init__(self, backend_tag=None):
        self.tag = backend_tag

    def __call__(self, request):
        return self.tag


def test_the_names_of_arguments_in_ray_serve(engine):
    engine.create_backend(backend_tag="former", func_or_class=TakesATag, config={"max_queued_requests": 5})
    engine.create_backend("twin", TakesATag, backend_tag="the constructor's own")
    engine.update_backend_config(backend_tag="former", config_options={"max_queued_requests": 6})
    assert engine.get_backend_config(backend_tag="former").max_queued_requests == 6
    engine.create_endpoint(endpoint_name="former", backend="former")
    assert engine.get_handle(endpoint_name="former", sync=True).call() is None
    engine.shadow_traffic(endpoint_name="former", backend_tag="twin", proportion=0.5)
    engine.shadow_traffic("former", backend_tag="twin", proportion=0)
    engine.set_traffic("former", traffic_policy_dictionary={"twin": 1})
    assert engine.get_handle("former").call() == "the constructor's own"
    with pytest.raises(TypeError, match=r"got 'weights' twice: 'traffic_policy_dictionary' is another name of it"):
        engine.set_traffic("former", {"former": 1}, traffic_policy_dictionary={"twin": 1})
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'weights'"):
        engine.set_traffic(endpoint_name="former")
    assert engine.list_endpoints()["former"]["traffic"] == {"twin": 1.0}
    engine.delete_endpoint(endpoint="former")
    engine.delete_backend(backend_tag="former", force=True)
    engine.delete_backend(backend_tag="twin")


def test_a_handle_to_an_endpoint_to_come(serve, engine):
    handle = engine.get_handle("to-come", missing_ok=True)
    with pytest.raises(KeyError) as caught:
        handle.call()
    assert isinstance(caught.value, errors.EndpointNotFound)
    assert str(caught.value).startswith("there is no endpoint 'to-come'")
    engine.create_endpoint("to-come", backend=serve(answer, route=None).tag)
    assert handle.call() == "ok"
    engine.delete_endpoint("to-come")


def test_deleting_a_backend_ends_its_replicas(serve, engine, adapter):
    served = serve(process_id, route=None, config={"num_replicas": 2})
    pid = served.call()
    engine.delete_endpoint(served.name)
    engine.delete_backend(served.tag)
    assert served.tag not in engine.list_backends()
    if adapter.processes:
        assert eventually(lambda: not is_running(pid))


def test_a_tag_can_be_used_again(serve, engine):
    served = serve(lambda request: "first", route=None)
    assert served.call() == "first"
    engine.delete_endpoint(served.name)
    engine.delete_backend(served.tag)
    engine.create_backend(served.tag, lambda request: "second")
    engine.create_endpoint(served.name, backend=served.tag)
    assert served.call() == "second"


def test_deleting_waits_for_calls_in_flight(serve, engine, gate):
    def backend(request):
        gate.pass_through()
        return "finished"

    served = serve(backend, route=None)
    ref = served.handle.remote()
    gate.wait_for_arrivals(1)
    engine.delete_endpoint(served.name)
    deleting = threading.Thread(target=engine.delete_backend, args=(served.tag,))
    deleting.start()
    assert engine.wait([ref], timeout=0.1) == ([], [ref])
    assert deleting.is_alive()
    gate.open()
    assert engine.get(ref, timeout=20) == "finished"
    deleting.join(20)
    assert not deleting.is_alive()


def test_forced_deletion_does_not_wait(serve, engine, gate, adapter):
    if not adapter.processes:
        pytest.skip("a call inside the calling process cannot be ended from outside")

    def backend(request):
        gate.pass_through()

    served = serve(backend, route=None)
    ref = served.handle.remote()
    gate.wait_for_arrivals(1)
    engine.delete_endpoint(served.name)
    engine.delete_backend(served.tag, force=True)
    assert not gate.is_open()
    with pytest.raises(errors.RetryLater):
        engine.get(ref, timeout=20)


def test_a_drain_has_an_end(serve, engine, gate, adapter):
    if not adapter.processes:
        pytest.skip("a call inside the calling process cannot be ended from outside")

    def backend(request):
        gate.pass_through()

    served = serve(backend, route=None, config={"graceful_shutdown_timeout_s": 0.1})
    ref = served.handle.remote()
    gate.wait_for_arrivals(1)
    engine.delete_endpoint(served.name)
    engine.delete_backend(served.tag)
    assert not gate.is_open()
    with pytest.raises(errors.RetryLater):
        engine.get(ref, timeout=20)


def test_control_calls_from_many_threads(engine):
    failures = []

    def cycle(name):
        try:
            for _ in range(3):
                engine.create_backend(name, lambda request: name)
                engine.create_endpoint(name, backend=name, route=f"/{name}")
                assert engine.get_handle(name).call() == name
                engine.update_backend_config(name, {"num_replicas": 2})
                engine.delete_endpoint(name)
                engine.delete_backend(name)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=cycle, args=(f"cycle-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not [name for name in engine.list_backends() if name.startswith("cycle-")]


def test_one_of_many_creators_of_a_name_wins(engine, serve):
    outcomes = []

    def create():
        try:
            engine.create_backend("contested", answer)
            outcomes.append("created")
        except errors.InvalidArgument:
            outcomes.append("refused")

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.delete_backend("contested")
    assert sorted(outcomes) == ["created", "refused", "refused", "refused"]
