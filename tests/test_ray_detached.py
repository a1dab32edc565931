"""Engines that outlive their creator: whoever dies, calls and configuration go on, and `shutdown` leaves nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from ray_cluster import RayCluster, why_not
from ray_drivers import Actor, Driver, actors, keys

from engine import Engine, errors
from engine.testing.instruments import PATIENCE_S, Gate, Journal, eventually, is_running

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.usefixtures("ray_cluster"),
]
if why_not() is None:
    import ray

    from engine_ray import RayAdapter

HTTP = {"port": 0}
_numbers = itertools.count(1)


class Versioned:
    """Says what it was configured with, and who it is."""

    def reconfigure(self, user_config: Any) -> None:
        self.config = user_config

    def __call__(self, request: Any) -> Any:
        return self.config

    def pid(self, request: Any) -> int:
        return os.getpid()


@pytest.fixture
def name(ray_cluster: RayCluster) -> Iterator[str]:
    """Of the test's engine, of which nothing may be left in the end."""
    before, rows = actors(), keys()
    name = f"engine{next(_numbers)}"
    yield name
    if name in names():  # the test failed
        Engine.connect(name).shutdown(0)
    eventually(lambda: actors() <= before)
    assert keys() <= rows


def names() -> list[str]:
    try:
        Engine.connect("no such engine")
    except errors.InvalidArgument as error:
        listed = str(error).partition("; there are: ")[2]
        return [name.strip("'") for name in listed.split(", ")] if listed else []
    raise AssertionError("there is one")


@pytest.fixture
def engine(name: str) -> Iterator[Engine]:
    """A detached engine with a backend, a route and two replicas; shut down in the end."""
    engine = Engine(backend="ray", name=name, detached=True, http_options=HTTP)
    engine.create_backend("b", Versioned, config={"num_replicas": 2, "user_config": "first"})
    engine.create_endpoint("e", backend="b", route="/e")
    yield engine
    engine.shutdown()


def controller() -> Actor:
    [actor] = actors("ControllerActor")
    return actor


def kill_controller() -> None:
    """SIGKILL; returns when it is dead."""
    actor = controller()
    actor.kill()
    eventually(actor.gone)


def replicas(engine: Engine, tag: str = "b") -> dict[str, str]:
    found: dict[str, str] = engine.statistics()["backends"][tag]["replicas"]
    return found


# -- creators leave --------------------------------------------------------------------------------------------------

CREATOR = """
    engine = Engine(backend=RayAdapter(address=ADDRESS), name=hear(), detached=True, http_options=HTTP)
    engine.create_backend("b", pid, config={"num_replicas": 2})
    engine.create_endpoint("e", backend="b", route="/e")
    say([engine.http_url, engine.get_handle("e").call(), engine.get(engine.get_handle("e").remote())])
    hear()
"""


@pytest.mark.parametrize("way", ["returns", "SIGKILL"])
def test_an_engine_goes_on_without_its_creator(
    ray_cluster: RayCluster, name: str, client: httpx.Client, way: str
) -> None:
    others = actors("Courier")
    with Driver(CREATOR, ray_cluster.address) as creator:
        creator.tell(name)
        url, *pids = creator.hear()
        [courier] = actors("Courier") - others
        if way == "SIGKILL":
            creator.kill_now()
        else:
            creator.tell("leave")
            assert creator.wait() == 0
    assert int(client.get(f"{url}/e").text) > 0
    assert all(is_running(pid) for pid in pids)
    with Engine.connect(name) as engine:
        assert (engine.name, engine.http_url) == (name, url)
        assert list(engine.list_backends()) == ["b"]
        assert engine.list_endpoints()["e"]["route"] == "/e"
        handle = engine.get_handle("e")
        assert is_running(handle.call())
        assert is_running(engine.get(handle.remote()))
        assert courier in actors()
        engine.update_backend_config("b", {"num_replicas": 1})
        engine.update_backend("b", Versioned, config={"user_config": 2})
        assert handle.call() == 2
        engine.create_backend("c", Versioned, config={"user_config": 1})
        engine.set_traffic("e", {"c": 1.0})
        assert handle.call() == 1
        assert client.get(f"{url}/e").text == "1"
    assert client.get(f"{url}/e").text == "1"  # the end of `with` lets go of it
    with pytest.raises(errors.EngineClosed):
        handle.call()
    again = Engine.connect(name)
    assert again.get_handle("e").call() == 1
    again.shutdown()
    with pytest.raises(httpx.ConnectError):
        client.get(f"{url}/e")


def test_a_creator_that_leaves_its_block_lets_go(name: str) -> None:
    with Engine(backend="ray", name=name, detached=True, http_options=HTTP) as engine:
        engine.create_backend("b", Versioned, config={"user_config": "on"})
        engine.create_endpoint("e", backend="b")
        handle = engine.get_handle("e")
        assert handle.call() == "on"
    for late in (handle.call, handle.remote, engine.list_backends):
        with pytest.raises(errors.EngineClosed, match=r"let go of the detached engine, which goes on.*Engine\.connect"):
            late()
    assert name in names()
    with pytest.raises(ZeroDivisionError), Engine.connect(name):
        raise ZeroDivisionError
    with Engine.connect(name) as engine:
        assert list(engine.list_backends()) == ["b"]
        engine.shutdown()
        engine.shutdown()
    assert name not in names()


# -- names -----------------------------------------------------------------------------------------------------------


def test_names(name: str) -> None:
    with pytest.raises(
        errors.InvalidArgument, match=f"there is no detached engine '{name}' on the Ray cluster at .*; there are"
    ):
        Engine.connect(name)
    engine = Engine(backend="ray", name=name, detached=True, http_options=HTTP)
    with pytest.raises(errors.InvalidArgument, match=f"name='{name}': there is a detached engine of this name already"):
        Engine(backend="ray", name=name, detached=True)
    with pytest.raises(errors.InvalidArgument, match=f"there are: .*'{name}'"):
        Engine.connect("another")
    with pytest.raises(errors.InvalidArgument, match=r"; there are none$"):
        Engine.connect(name, backend=RayAdapter(namespace="elsewhere"))
    elsewhere = Engine(backend=RayAdapter(namespace="elsewhere"), name=name, detached=True, http_options=HTTP)
    assert elsewhere.list_backends() == engine.list_backends() == {}
    elsewhere.shutdown()
    with Engine.connect(name, backend="ray") as connected:
        assert connected.list_endpoints() == {}
    engine.shutdown()
    with Engine(backend="ray", name=name, detached=True, http_options=HTTP) as engine:  # the name is free again
        engine.shutdown()


def refused(attempt: Callable[[], Any]) -> bool:
    """Whether it is told that the engine is over, and not only that a replica is."""
    try:
        attempt()
    except errors.EngineClosed:
        return True
    except errors.RetryLater:
        return False
    return False


def test_everybody_learns_of_the_end(engine: Engine) -> None:
    other = Engine.connect(str(engine.name))
    handle = other.get_handle("e")
    ref = handle.remote()
    assert other.get(ref) == "first"
    engine.shutdown()
    for attempt in (handle.call, other.list_backends, lambda: other.create_backend("c", Versioned)):
        eventually(lambda attempt=attempt: refused(attempt))
    other.shutdown()  # it is
    assert ray.is_initialized()


# -- controllers die -------------------------------------------------------------------------------------------------


class Load:
    """Callers by handle, by ref and over HTTP that never stop."""

    def __init__(self, engine: Engine, client: httpx.Client) -> None:
        self._engine = engine
        self._client = client
        self._url = f"{engine.http_url}/e"
        self._stop = threading.Event()
        self.answers: Counter[tuple[str, str]] = Counter()
        self.failures: list[Any] = []
        self._pool = ThreadPoolExecutor(3)

    def __enter__(self) -> Load:
        handle = self._engine.get_handle("e").options(timeout_s=PATIENCE_S)
        ways: dict[str, Callable[[], Any]] = {
            "call": handle.call,
            "ref": lambda: self._engine.get(handle.remote()),
            "http": lambda: self._client.get(self._url, timeout=PATIENCE_S).raise_for_status().text,
        }
        self._running = [self._pool.submit(self._go_on, way, call) for way, call in ways.items()]
        self.progress(3)
        return self

    def _go_on(self, way: str, call: Callable[[], Any]) -> None:
        while not self._stop.is_set():
            try:
                self.answers[way, call()] += 1
            except BaseException as failure:
                self.failures.append(failure)

    def progress(self, more: int) -> None:
        """Wait until every way has had so many more answers."""
        before = self._counts()
        eventually(
            lambda: all(self._counts()[way] >= before[way] + more for way in ("call", "ref", "http")) or self.failures
        )

    def _counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for (way, _), count in list(self.answers.items()):
            counts[way] += count
        return counts

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for running in self._running:
            running.result(PATIENCE_S)
        self._pool.shutdown()


def test_nobody_notices_the_death_of_the_controller(engine: Engine, client: httpx.Client) -> None:
    url = engine.http_url
    before = actors("RayWorker")
    engine.create_endpoint("f", backend="b", route="/f")
    with Load(engine, client) as load:
        kill_controller()
        load.progress(5)  # with the old picture
        engine.list_backends()  # waits for the new controller
        load.progress(5)
        engine.update_backend_config("b", {"user_config": "second"})
        load.progress(5)
        kill_controller()
        assert engine.get_backend_config("b").user_config == "second"
        load.progress(5)
    assert load.failures == []
    assert {answer for _, answer in load.answers} == {"first", "second"}
    assert actors("RayWorker") == before  # all of them came back
    assert engine.http_url == url
    assert list(engine.list_endpoints()) == ["e", "f"]
    assert client.get(f"{url}/f").text == "second"
    engine.delete_endpoint("f")
    assert client.get(f"{url}/f").status_code == 404
    with Engine.connect(str(engine.name)) as other:
        assert list(other.list_endpoints()) == ["e"]
        assert other.get_handle("e").call() == "second"


def test_a_stopped_controller_is_killed_by_its_workers(engine: Engine) -> None:
    """Ray itself would wait for it; and nobody else asks it whether it is there."""
    before, handle = actors("RayWorker"), engine.get_handle("e")
    former = controller()
    os.kill(former.pid, signal.SIGSTOP)
    answers, until = 0, time.monotonic() + PATIENCE_S
    try:
        while not former.gone() and time.monotonic() < until:
            assert handle.call() == "first"
            answers += 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(former.pid, signal.SIGCONT)
    assert answers
    assert former.gone()
    assert engine.list_backends()["b"].user_config == "first"  # by the next one
    assert actors("RayWorker") == before


def test_who_comes_while_there_is_no_controller_waits_for_the_next(engine: Engine) -> None:
    kill_controller()
    assert ray.get(called_from_a_task(engine.get_handle("e"))) == "first"


def called_from_a_task(handle: Any) -> Any:
    return ray.remote(num_cpus=0)(lambda: handle.call()).remote()


def test_a_controller_and_a_replica_die_at_once(engine: Engine, client: httpx.Client) -> None:
    pid = engine.get_handle("e").options(method_name="pid").call(None)
    [victim] = [actor for actor in actors("RayWorker") if actor.pid == pid]
    actor = controller()
    actor.kill()
    victim.kill()
    eventually(lambda: actor.gone() and victim.gone())
    assert sorted(replicas(engine).values()) in (["ready"], ["ready", "starting"], ["ready", "ready"])
    eventually(lambda: list(replicas(engine).values()) == ["ready", "ready"])
    assert victim not in actors("RayWorker")
    assert engine.get_handle("e").call() == "first"
    assert client.get(f"{engine.http_url}/e").text == "first"


def test_replicas_that_die_after_a_controller_are_replaced_by_the_next(engine: Engine) -> None:
    kill_controller()
    assert list(replicas(engine).values()) == ["ready", "ready"]
    pids: set[int] = set()
    read = engine.get_handle("e").options(method_name="pid")
    eventually(lambda: pids.add(read.call(None)) or len(pids) == 2)
    for pid in pids:
        [victim] = [actor for actor in actors("RayWorker") if actor.pid == pid]
        victim.kill()
        eventually(victim.gone)
    eventually(lambda: replicas(engine) == {"b#3": "ready", "b#4": "ready"})
    assert engine.get_handle("e").options(timeout_s=PATIENCE_S).call() == "first"


class Slow:
    """Is not ready before the gate is open."""

    def __init__(self, gate: Gate, journal: Journal) -> None:
        journal.add(os.getpid())
        gate.pass_through()

    def __call__(self, request: Any) -> str:
        return "slow"


def test_a_backend_that_is_created_while_the_controller_dies(engine: Engine, gate: Gate, tmp_path: Any) -> None:
    journal = Journal(tmp_path / "journal")
    before = actors("RayWorker")
    with ThreadPoolExecutor(1) as pool:
        creating = pool.submit(engine.create_backend, "slow", Slow, gate, journal)
        gate.wait_for_arrivals(1)
        kill_controller()
        with pytest.raises(errors.RetryLater, match="'create_backend', and may have done it"):
            creating.result(PATIENCE_S)
    assert list(engine.list_backends()) == ["b"]
    gate.open()
    eventually(lambda: not is_running(int(journal.lines()[0])))
    eventually(lambda: actors("RayWorker") == before)
    engine.create_backend("slow", Slow, gate, journal)
    engine.create_endpoint("slow", backend="slow")
    assert engine.get_handle("slow").call() == "slow"


def test_a_backend_that_is_updated_while_the_controller_dies(engine: Engine, gate: Gate, tmp_path: Any) -> None:
    """One replica has made room, none of the new version is ready: the next controller returns to the former one."""
    handle = engine.get_handle("e")
    before = replicas(engine)
    in_place = {"user_config": None, "max_surge": 0, "max_unavailable": 1}
    with ThreadPoolExecutor(1) as pool:
        updating = pool.submit(engine.update_backend, "b", Slow, gate, Journal(tmp_path / "journal"), config=in_place)
        gate.wait_for_arrivals(1)
        kill_controller()
        with pytest.raises(errors.RetryLater, match="'update_backend', and may have done it"):
            updating.result(PATIENCE_S)
    eventually(lambda: list(replicas(engine).values()) == ["ready"] * 2)
    there = engine.statistics()["backends"]["b"]
    assert [there["version"], *(one["version"] for one in there["details"].values())] == [1, 1, 1]
    assert len(before.keys() & there["replicas"].keys()) == 1
    assert {handle.call() for _ in range(10)} == {"first"}
    gate.open()


def test_the_controller_and_the_courier_die_at_once(engine: Engine) -> None:
    others = actors("Courier")
    handle = engine.get_handle("e")
    assert engine.get(handle.remote()) == "first"
    victims = [controller(), *actors("Courier") - others]
    for victim in victims:
        victim.kill()
    eventually(lambda: all(victim.gone() for victim in victims))

    def answered() -> bool:
        try:
            return bool(engine.get(handle.remote(), timeout=PATIENCE_S) == "first")
        except errors.ReplicaDied:  # sent before Ray noticed the death
            return False

    eventually(answered)


def test_a_start_that_the_death_of_the_controller_cut_short_is_forgotten(engine: Engine) -> None:
    """Its actor waited for room then: it would take its place some day, and nobody would tell it what to do."""

    def waiting() -> list[str]:
        return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "waiting#" in one["name"]]

    needs = {"num_cpus": 1000}
    with ThreadPoolExecutor(1) as pool:
        creating = pool.submit(engine.create_backend, "waiting", Versioned, ray_actor_options=needs)
        eventually(waiting)
        kill_controller()
        with pytest.raises(errors.RetryLater):
            creating.result(PATIENCE_S)
    engine.list_backends()  # waits for the new controller
    engine.create_backend("waiting", Versioned, config={"user_config": "at last"})
    engine.create_endpoint("waiting", backend="waiting")
    assert engine.get_handle("waiting").call() == "at last"
    engine.shutdown()
    eventually(lambda: not waiting())


def test_a_controller_that_is_killed_for_good(name: str, engine: Engine) -> None:
    handle = engine.get_handle("e")
    victim = controller()
    ray.kill(ray.get_actor(f"engine-controller-{name}", namespace="engineroom"), no_restart=True)
    eventually(victim.gone)
    with pytest.raises(errors.EngineClosed, match="killed for good"):
        engine.list_backends()
    assert handle.call() == "first", "calls go on"
    engine.shutdown()
