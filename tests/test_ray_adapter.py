"""What is peculiar to the Ray adapter: object refs, placement, Ray's ways to die, other users of the same cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray_hosts
from harness import run_python
from ray_cluster import ENVIRONMENT, RayCluster, why_not
from ray_drivers import Driver, actors, keys, program_of
from ray_hosts import Hosts

from engine import Engine, errors, get_replica_context
from engine.seam.scribe import scribe
from engine.testing.instruments import PATIENCE_S, Footprint, eventually, is_running
from engine_wire import vitals

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.usefixtures("ray_cluster"),
]
if why_not() is None:
    import ray

    from engine_ray import RayAdapter
    from engine_ray.link.registry import Registry

NO_HTTP = {"location": None}


class Mishap(Exception):
    """A user's own."""

    def __init__(self, code: int) -> None:
        super().__init__(f"it went wrong: {code}")
        self.code = code


class Kit:
    """Does what a test asks for."""

    def __call__(self, request: Any) -> Any:
        return request.data

    def pid(self) -> int:
        return os.getpid()

    def actor(self) -> str:
        return str(ray.get_runtime_context().get_actor_id())

    def fail(self, code: int) -> None:
        raise Mishap(code)

    def add(self, first: Any, second: Any = 0) -> Any:
        return first + second

    def numbers(self, count: int) -> Any:
        return np.arange(count)

    def time_out(self) -> None:
        raise ray.exceptions.GetTimeoutError("of the backend")

    def parse(self, text: str) -> int:
        return int(text)

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def put(self, value: Any, inside: bool = False) -> Any:
        ref = ray.put(value)
        return [ref] if inside else ref

    def hold(self, gate: Any) -> str:
        gate.pass_through()
        return "held"

    def leave(self, code: int) -> None:
        os._exit(code)

    def speak(self) -> None:
        print("printed in the replica")  # noqa: T201
        logging.getLogger("my.model").warning("logged in the replica")

    def ask(self, name: str, value: Any) -> Any:
        handle = get_replica_context().get_handle(name, sync=True)
        return ray.get(handle.remote(value))


if why_not() is None:

    @ray.remote(num_cpus=0)
    def doubled(value: Any) -> Any:
        return value * 2

    @ray.remote(num_cpus=0)
    def broken() -> None:
        raise ZeroDivisionError("in a task")

    @ray.remote(num_cpus=0, max_retries=0)
    def dying() -> None:
        os._exit(3)

    @ray.remote(num_cpus=0)
    def calling(handle: Any, value: Any) -> Any:
        """In a process that is no worker of the engine."""
        return handle.call(value), ray.get(handle.remote(value)), os.getpid()

    # Ray's own workers, other than the engine's, cannot import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def engine(ray_cluster: RayCluster) -> Iterator[Engine]:
    before, rows = actors(), keys()
    with Engine(backend="ray", name="shared", http_options=NO_HTTP) as engine:
        engine.create_backend("kit", Kit)
        engine.create_endpoint("kit", backend="kit")
        yield engine
    eventually(lambda: actors() == before)
    assert keys() == rows


@pytest.fixture
def kit(engine: Engine) -> Any:
    """Starts a method of a replica: ``kit("add", 1, 2)`` is a ref."""
    handle = engine.get_handle("kit")

    def start(method: str, *args: Any, **kwargs: Any) -> Any:
        return handle.options(method_name=method).remote(*args, **kwargs)

    return start


# -- its secret ------------------------------------------------------------------------------------------------------


def test_the_secret_of_an_engine_is_shown_nowhere(engine: Engine, kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    pid = ray.get(kit("pid"))
    for fails in (kit("fail", 3), kit("leave", 3)):
        with pytest.raises((Mishap, errors.ReplicaDied)):
            engine.get(fails)
    eventually(lambda: ray.get(kit("pid")) != pid)
    entry = Registry(engine._id).get()
    assert entry is not None
    parts = (engine, vars(engine), vars(engine._client), vars(engine._adapter), engine.get_handle("kit"), entry)
    shown = [repr(one) for one in parts]
    shown += [f"{record.getMessage()} {vars(record)!r}" for record in caplog.records]
    secret = bytes(entry.secret)
    assert not any(text in one for text in (repr(secret)[2:-1], secret.hex()) for one in shown)
    for of_process in ("environ", "cmdline"):
        seen = Path(f"/proc/{ray.get(kit('pid'))}/{of_process}").read_bytes()
        assert secret not in seen and secret.hex().encode() not in seen


# -- refs ------------------------------------------------------------------------------------------------------------


def test_a_ref_is_rays(engine: Engine, kit: Any) -> None:
    ref = kit("add", 1, second=2)
    assert isinstance(ref, ray.ObjectRef)
    assert ray.get(ref) == engine.get(ref) == 3
    assert ray.get([kit("add", n) for n in range(50)]) == list(range(50))
    assert asyncio.run(awaited(ref)) == 3


async def awaited(ref: Any) -> Any:
    return await ref


def test_async_handles_give_the_same_refs(engine: Engine) -> None:
    async def main() -> None:
        handle = engine.get_handle("kit", sync=False)
        ref = await handle.remote("data")
        assert isinstance(ref, ray.ObjectRef)
        assert await ref == "data"
        assert await handle.call(ref) == "data"

    asyncio.run(main())


def test_waiting_by_rays_own_means(engine: Engine, kit: Any, gate: Any) -> None:
    held, quick = kit("hold", gate), kit("add", 1)
    gate.wait_for_arrivals(1)
    # One call at a time: what was sent after it to the same replica waits behind it.
    for wait in (ray.wait, engine.wait):
        assert wait([held, quick], timeout=0) == ([], [held, quick])
    with pytest.raises(errors.DeadlineExceeded, match=r"timeout=0\.01 s"):
        engine.get(held, timeout=0.01)
    gate.open()
    for wait in (ray.wait, engine.wait):
        ready, not_ready = wait([held, quick], num_returns=2, timeout=20)
        assert (set(ready), not_ready) == ({held, quick}, [])


def test_refs_pass_between_tasks_and_handles(engine: Engine, kit: Any) -> None:
    ref = kit("add", 2)
    task = doubled.remote(ref)
    assert ray.get(task) == 4
    assert ray.get(kit("add", task, second=ref)) == 6
    assert engine.get_handle("kit").call(task) == 4
    assert ray.get(kit("add", kit("add", kit("add", ray.put(1), 1), 1), 1)) == 4


def test_a_ref_inside_another_object_is_refused(engine: Engine, kit: Any) -> None:
    """Pickled by anybody but Ray it forgets its owner, and whoever waits for it waits for ever."""
    ref = kit("add", 1)
    handle = engine.get_handle("kit").options(method_name="add")
    for start in (handle.call, handle.remote):
        with pytest.raises(
            errors.NotSerializable, match=r"argument cannot be pickled: \[0\] is an ObjectRef.*on its own"
        ):
            start([ref])
    assert handle.call("a mention of ObjectRef is none", "") == "a mention of ObjectRef is none"
    with pytest.raises(errors.NotSerializable, match=r"init argument 0 .*on its own, as in handle\.remote"):
        engine.create_backend("heavy", Kit, ray.put(1))


def test_a_ref_inside_a_result_is_refused(engine: Engine, kit: Any) -> None:
    handle = engine.get_handle("kit").options(method_name="put")
    assert handle.call(5) == 5, "a ref on its own is resolved, as everything that can be awaited"
    for make in (handle.call, lambda *args: engine.get(handle.remote(*args))):
        with pytest.raises(errors.ResultNotSerializable, match=r"\[0\] is an ObjectRef.*ray.get"):
            make(5, True)
    nested = ray.put([ray.put(1)])
    with pytest.raises(errors.NotSerializable, match=r"what a ref .* stands for .*\[0\] is an ObjectRef"):
        engine.get(kit("add", nested), timeout=PATIENCE_S)


def test_errors_of_ray_that_a_backend_raises_are_its_own(engine: Engine, kit: Any) -> None:
    with pytest.raises(ray.exceptions.GetTimeoutError, match="of the backend"):
        engine.get(kit("time_out"), timeout=PATIENCE_S)


def test_a_deadline_holds_while_a_call_waits_for_its_arguments(engine: Engine, kit: Any, gate: Any) -> None:
    never = kit("hold", gate)
    gate.wait_for_arrivals(1)
    late = engine.get_handle("kit").options(method_name="add", timeout_s=0.2).remote(1, never)
    with pytest.raises(errors.DeadlineExceeded, match="timeout_s"):
        engine.get(late, timeout=PATIENCE_S)


def test_large_arrays_come_through(engine: Engine, kit: Any) -> None:
    ref = kit("numbers", 1_000_000)
    array = ray.get(ref)
    assert (array.dtype, array.shape, int(array[-1])) == (np.dtype(int), (1_000_000,), 999_999)
    assert int(ray.get(kit("add", ref, ref))[-1]) == 2 * 999_999
    assert int(ray.get(doubled.remote(ref))[-1]) == 2 * 999_999


def test_errors_arrive_as_the_users_own_type(engine: Engine, kit: Any) -> None:
    ref = kit("fail", 3)
    with pytest.raises(Mishap, match="it went wrong: 3") as caught:
        engine.get(ref)
    assert type(caught.value) is Mishap
    assert caught.value.code == 3
    assert isinstance(caught.value.__cause__, errors.RemoteTraceback)
    assert "in fail" in caught.value.__cause__.text
    with pytest.raises(Mishap) as wrapped:
        ray.get(ref)
    assert isinstance(wrapped.value, ray.exceptions.RayTaskError)
    with pytest.raises(Mishap):
        asyncio.run(awaited(ref))


@pytest.mark.parametrize("by", ["engine.get", "call"])
def test_an_error_of_an_argument_is_that_of_the_call(engine: Engine, kit: Any, by: str) -> None:
    handle = engine.get_handle("kit")
    with pytest.raises(ZeroDivisionError, match="in a task"):
        engine.get(handle.remote(broken.remote())) if by == "engine.get" else handle.call(broken.remote())
    with pytest.raises(ValueError, match="invalid literal"):
        argument = kit("parse", "seven")
        engine.get(handle.remote(argument)) if by == "engine.get" else handle.call(argument)


def test_an_argument_that_is_lost_with_its_task(engine: Engine) -> None:
    handle = engine.get_handle("kit")
    with pytest.raises(errors.RetryLater):
        engine.get(dying.remote())
    with pytest.raises((errors.RetryLater, ray.exceptions.RayError)):
        engine.get(handle.remote(dying.remote()))


def test_bad_calls_say_so_through_the_ref(engine: Engine, kit: Any) -> None:
    with pytest.raises(errors.MethodNotFound, match="'no_such_method'"):
        engine.get(kit("no_such_method"))
    with pytest.raises(errors.NotSerializable, match="lock"):
        kit("add", threading.Lock())
    with pytest.raises(errors.DeadlineExceeded):
        engine.get(engine.get_handle("kit").options(timeout_s=0.0).remote(1))


def test_handles_work_in_any_process_of_the_cluster(engine: Engine) -> None:
    handle = pickle.loads(pickle.dumps(engine.get_handle("kit")))
    called, got, pid = ray.get(calling.remote(engine.get_handle("kit"), "data"))
    assert (called, got) == ("data", "data")
    assert pid != os.getpid()
    assert handle.call("data") == "data"


def test_an_engine_of_a_module(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Its replicas import the module, too: see `test_engines_of_modules`."""
    (tmp_path / "of_a_module.py").write_text(
        """
import os, pathlib, sys
from engine import Engine
from engine_ray import RayAdapter

imports = pathlib.Path(__file__).with_suffix(".imports")
with imports.open("a") as file:
    file.write("once\\n")
if len(imports.read_text().split()) > 5:
    os._exit(9)

def double(request):
    return 2 * request.data

class Front:
    def __call__(self, request):
        return engine.get([handle.remote(request.data)]), engine.get_handle("double").call(request.data)

engine = Engine(RayAdapter(address=sys.argv[1]), http_options={"location": None})
engine.create_backend("double", double)
engine.create_endpoint("double", backend="double")
handle = engine.get_handle("double")
engine.create_backend("front", Front)
engine.create_endpoint("front", backend="front")
"""
    )
    program = "import of_a_module as m; print(m.engine.get_handle('front').call(4)); m.engine.shutdown()"
    environment = {**os.environ, **ENVIRONMENT}
    output = run_python("-c", program, ray_cluster.address, cwd=tmp_path, env=environment)
    assert output.splitlines()[-1] == "([8], 8)"
    assert len((tmp_path / "of_a_module.imports").read_text().split()) == 3


def test_what_a_script_defines_stands_in_the_main_module(ray_cluster: RayCluster) -> None:
    """Which is that of Ray's own program otherwise: see `test_what_scripts_hold`."""
    program = """
import pickle, sys
from engine import Engine
from engine_ray import RayAdapter

class Thing:
    __slots__ = ("number",)

class Loading:
    def __init__(self, pickled):
        self.thing = pickle.loads(pickled)

    def __call__(self, request):
        assert type(self.thing) is Thing
        return pickle.loads(pickle.dumps(self.thing))

thing = Thing()
thing.number = 4
with Engine(RayAdapter(address=sys.argv[1]), http_options={"location": None}) as engine:
    engine.create_backend("loading", Loading, pickle.dumps(thing))
    engine.create_endpoint("loading", backend="loading")
    result = engine.get_handle("loading").call()
assert type(result) is Thing and result.number == 4
"""
    run_python("-c", program, ray_cluster.address, env={**os.environ, **ENVIRONMENT})


def test_handles_work_in_replicas(engine: Engine) -> None:
    engine.create_backend("asking", Kit)
    engine.create_endpoint("asking", backend="asking")
    assert engine.get_handle("asking").options(method_name="ask").call("kit", "data") == "data"
    engine.delete_endpoint("asking")
    engine.delete_backend("asking")


# -- placement -------------------------------------------------------------------------------------------------------

_SHORT = {
    "a gpu": ({"num_gpus": 1}, r"GPU 1"),
    "too many processors": ({"num_cpus": 9}, r"CPU 9"),
    "a resource": ({"resources": {"tpu": 2}}, r"tpu 2"),
}


@pytest.mark.parametrize(("options", "asked"), _SHORT.values(), ids=_SHORT)
def test_what_no_node_has(engine: Engine, options: dict[str, Any], asked: str) -> None:
    with pytest.raises(errors.ResourcesUnavailable) as caught:
        engine.create_backend("short", Kit, ray_actor_options=options, config={"start_timeout_s": 0.5})
    assert caught.match(rf"start_timeout_s=0\.5: it asked for {asked}; the Ray cluster at .* has free: .*CPU \d+ of 8")
    assert "short" not in engine.list_backends()
    engine.create_backend("short", Kit)  # the tag is free again
    engine.delete_backend("short")


def test_the_environment_of_a_replica(ray_cluster: RayCluster) -> None:
    engine_wide = {"env_vars": {"OF_THE_ENGINE": "1", "OF_BOTH": "engine"}}
    with Engine(backend=RayAdapter(runtime_env=engine_wide), http_options=NO_HTTP) as engine:
        own = {"env_vars": {"OF_THE_REPLICA": "2", "OF_BOTH": "replica"}}
        engine.create_backend("kit", Kit, ray_actor_options={"runtime_env": own, "num_cpus": 1})
        engine.create_endpoint("kit", backend="kit")
        read = engine.get_handle("kit").options(method_name="environment")
        found = [read.call(name) for name in ("OF_THE_ENGINE", "OF_THE_REPLICA", "OF_BOTH")]
        assert found == ["1", "2", "replica"]


def test_options_that_ray_refuses(engine: Engine) -> None:
    with pytest.raises(errors.InvalidArgument, match="ray_actor_options: Ray refused them"):
        engine.create_backend("bad", Kit, ray_actor_options={"resources": {"CPU": 1}})
    assert "bad" not in engine.list_backends()


def test_options_that_the_engine_decides_on_are_mentioned_once(engine: Engine, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "engine.ray"):
        for tag in ("named", "named2"):
            engine.create_backend(tag, Kit, ray_actor_options={"max_restarts": 3})
            engine.delete_backend(tag, force=True)
    scribe().flush(PATIENCE_S)
    mentioned = [record for record in caplog.records if "the engine itself decides on max_restarts" in record.message]
    assert len(mentioned) == 1


# -- connecting ------------------------------------------------------------------------------------------------------


def test_another_cluster_than_the_connected_one(ray_cluster: RayCluster) -> None:
    with (
        pytest.raises(errors.InvalidArgument, match=r"address='127\.0\.0\.1:1': this process is connected to the Ray"),
        Engine(backend=RayAdapter(address="127.0.0.1:1")),
    ):
        pass
    with Engine(backend=RayAdapter(address=ray_cluster.address), http_options=NO_HTTP):
        pass
    assert ray.is_initialized()


def test_an_adapter_serves_one_engine(ray_cluster: RayCluster) -> None:
    adapter = RayAdapter()
    with Engine(backend=adapter, http_options=NO_HTTP) as engine:
        with (
            pytest.raises(errors.InvalidArgument, match="already serves an engine"),
            Engine(backend=adapter, http_options=NO_HTTP),
        ):
            pass
        with pytest.raises(errors.InvalidArgument, match="already serves an engine"):
            Engine(backend=adapter, name="n", detached=True)
        assert engine.list_backends() == {}  # and goes on doing so


def test_an_adapter_that_found_no_engine_can_look_again(ray_cluster: RayCluster) -> None:
    adapter, name = RayAdapter(), uuid.uuid4().hex
    with pytest.raises(errors.InvalidArgument, match="there is no detached engine"):
        Engine.connect(name, backend=adapter)
    with Engine(backend="ray", name=name, detached=True, http_options=NO_HTTP):
        Engine.connect(name, backend=adapter).shutdown()


def test_a_detached_engine_wants_no_ray_of_its_own() -> None:
    with pytest.raises(errors.InvalidArgument, match=r"'local' .*needs a Ray cluster that outlives the program"):
        Engine(backend=RayAdapter(address="local"), name="n", detached=True)


def test_what_the_application_connected_stays_connected(ray_cluster: RayCluster) -> None:
    before = Footprint.now()
    rows = keys()
    with Engine(backend="ray", http_options=NO_HTTP) as engine:
        engine.create_backend("kit", Kit)
        assert len(keys()) == len(rows) + 1
    assert ray.is_initialized()
    assert ray.get(doubled.remote(2)) == 4
    assert keys() == rows
    before.check_unchanged()


def test_ray_that_the_application_shut_down_too_early_stays_so(ray_cluster: RayCluster) -> None:
    program = """
        import ray
        ray.init(address=ADDRESS, log_to_driver=False, configure_logging=False)
        engine = Engine(backend="ray", http_options=NO_HTTP)
        engine.create_backend("b", pid)
        engine.create_endpoint("b", backend="b")
        handle = engine.get_handle("b")
        handle.call()
        ray.shutdown()
        for attempt in (lambda: engine.create_backend("c", pid), handle.remote):
            try:
                attempt()
            except errors.EngineClosed as error:
                assert "ray.shutdown()" in str(error), error
            else:
                raise AssertionError("it connected anew")
        engine.shutdown()
        say(ray.is_initialized())
    """
    with Driver(program, ray_cluster.address) as driver:
        assert driver.hear() is False


def test_engines_share_the_connection_that_the_first_one_made(ray_cluster: RayCluster) -> None:
    program = """
        import ray
        one = Engine(backend=RayAdapter(address=ADDRESS), http_options=NO_HTTP)
        one.create_backend("b", pid)
        one.create_endpoint("b", backend="b")
        two = Engine(backend="ray", http_options=NO_HTTP)
        two.create_backend("b", pid)
        two.create_endpoint("b", backend="b")
        refs = [engine.get_handle("b").remote() for engine in (one, two)]
        first, second = ray.get(refs)
        assert first != second
        one.shutdown()
        assert ray.is_initialized()
        assert two.get_handle("b").call() == second
        two.shutdown()
        assert not ray.is_initialized()
        with Engine(backend=RayAdapter(address=ADDRESS), http_options=NO_HTTP) as three:
            three.create_backend("b", pid)
            assert ray.is_initialized()
        assert not ray.is_initialized()
        left = [thread.name for thread in threading.enumerate() if "engine" in thread.name]
        assert not left, left
        try:
            with Engine(backend=RayAdapter(address="127.0.0.1:1")):
                pass
        except errors.InvalidArgument as error:
            say(str(error))
        assert not ray.is_initialized()
        say("done")
    """
    before = actors()
    with Driver(program, ray_cluster.address) as driver:
        assert driver.hear().startswith("address='127.0.0.1:1': cannot connect to a Ray cluster there: ")
        assert driver.hear() == "done"
    assert driver.returncode == 0
    eventually(lambda: actors() == before)


ALONE = """
    import ray
    engine = Engine(backend=RayAdapter(address=ADDRESS), http_options=NO_HTTP)
    engine.create_backend("b", pid)
    engine.create_endpoint("b", backend="b")
    ref = engine.get_handle("b").remote()
    assert engine.get(ref) != os.getpid()
    assert ray.is_initialized()
"""
SHUT_DOWN = """
    try:
        Engine(backend=RayAdapter(), http_options=NO_HTTP, name="lasting", detached=True)
    except errors.InvalidArgument as error:
        assert "needs a Ray cluster that outlives the program" in str(error)
    else:
        raise AssertionError("it would not last")
    engine.shutdown()
    assert not ray.is_initialized()
    for late in (lambda: engine.get(ref), lambda: engine.wait([ref])):
        try:
            late()
        except errors.EngineClosed as error:
            assert "not connected to the Ray cluster at" in str(error) and "any more" in str(error)
        else:
            raise AssertionError("a ref outlived its Ray")
    assert not ray.is_initialized(), "Ray was started again"
    say("shut down")
    hear()
"""


def marked(mark: str) -> set[int]:
    """The processes whose environment has this mark."""
    found = set()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environment.read_bytes():
                found.add(int(environment.parent.name))
        except OSError:  # it is gone, or another user's
            continue
    return {pid for pid in found if is_running(pid)}


def test_a_cluster_that_the_engine_started_ends_with_it() -> None:
    mark = uuid.uuid4().hex
    with Driver(ALONE + SHUT_DOWN, "local", MARK=mark) as driver:
        assert driver.hear() == "shut down"
        eventually(lambda: marked(mark) == {driver.pid})
        driver.tell("go")
    assert driver.returncode == 0


@pytest.mark.skipif(ray_hosts.why_not() is not None, reason=str(ray_hosts.why_not()))
def test_a_cluster_that_the_engine_started_ends_with_the_program(tmp_path: Path) -> None:
    """Where no cluster is found: on a host of its own, since this machine has several."""
    with Hosts() as hosts:
        host = hosts.add()
        host.run(*program_of(ALONE), timeout_s=50)
        eventually(lambda: host.run("sh", "-c", "ps ax -o comm").count("raylet") == 0)


# -- deaths ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mortal(engine: Engine) -> Iterator[Any]:
    """A backend of the test's own: one that dies several times in a row is given up for a while."""
    engine.create_backend("mortal", Kit)
    engine.create_endpoint("mortal", backend="mortal")
    yield engine.get_handle("mortal")
    engine.delete_endpoint("mortal")
    engine.delete_backend("mortal", force=True)


def by_ray_kill(pid: int, actor_id: str) -> None:
    from ray._raylet import ActorID

    ray._private.worker.global_worker.core_worker.kill_actor(ActorID.from_hex(actor_id), True)


def by_sigkill(pid: int, actor_id: str) -> None:
    os.kill(pid, signal.SIGKILL)


def replicas(engine: Engine, tag: str) -> list[str]:
    return list(engine.statistics()["backends"][tag]["replicas"])


@pytest.mark.parametrize(
    ("kill", "reason"),
    [(by_ray_kill, "was killed by ray.kill"), (by_sigkill, "died (killed by a signal"), (None, "exited with code 3")],
    ids=["ray.kill", "SIGKILL", "os._exit"],
)
def test_a_replica_that_dies_is_replaced(
    engine: Engine, mortal: Any, gate: Any, caplog: Any, kill: Any, reason: str
) -> None:
    pid = mortal.options(method_name="pid").call()
    actor_id = mortal.options(method_name="actor").call()
    before = replicas(engine, "mortal")
    refs = []
    if kill is None:
        refs = [mortal.options(method_name="leave").remote(3)]
    else:
        refs = [mortal.options(method_name="hold").remote(gate)]
        gate.wait_for_arrivals(1)
        kill(pid, actor_id)
    with pytest.raises(errors.ReplicaDied):
        engine.get(refs, timeout=20)
    with pytest.raises(errors.ReplicaDied):
        ray.get(refs, timeout=20)
    # This process has a channel of its own to the replica, and may learn of its death later than the refs' courier.
    eventually(lambda: replicas(engine, "mortal") and replicas(engine, "mortal") != before)
    assert mortal.options(method_name="pid").call() != pid
    eventually(lambda: not is_running(pid))
    scribe().flush(PATIENCE_S)
    assert [record for record in caplog.records if reason in record.getMessage()], caplog.text


def test_a_constructor_that_leaves(engine: Engine) -> None:
    class Leaving:
        def __init__(self, code: int) -> None:
            os._exit(code)

        def __call__(self, request: Any) -> None: ...

    with pytest.raises(errors.BackendStartError, match="code 5"):
        engine.create_backend("leaving", Leaving, 5)


def test_the_courier_is_killed(engine: Engine, mortal: Any, gate: Any) -> None:
    name = f"engine-{engine._id}-courier"
    engine.get(mortal.remote(0))
    courier = ray.get_actor(name, namespace="engineroom")
    [pid] = [one.pid for one in actors("Courier") if one.actor_id == courier._actor_id.hex()]
    refs = [mortal.options(method_name="hold").remote(gate) for _ in range(3)]
    gate.wait_for_arrivals(1)
    eventually(lambda: engine.statistics()["endpoints"]["mortal"]["calls"] == 4)
    os.kill(pid, signal.SIGKILL)
    assert engine.statistics()["endpoints"]["mortal"]["calls"] == 0, "they are gone with who counted them"
    for ref in refs:
        with pytest.raises(errors.RetryLater, match="may have run"):
            engine.get(ref, timeout=20)
    gate.open()

    def answered() -> bool:
        try:
            return bool(engine.get([mortal.remote(number) for number in range(20)], timeout=20) == list(range(20)))
        except errors.ReplicaDied:  # sent before Ray's client in this process noticed the death
            return False

    eventually(answered)
    assert ray.get(calling.remote(mortal, "data"))[:2] == ("data", "data")


def test_the_courier_is_stopped(engine: Engine, mortal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(vitals, "STOPPED_S", 0.1)
    engine.get(mortal.remote(0))
    courier = ray.get_actor(f"engine-{engine._id}-courier", namespace="engineroom")
    [pid] = [one.pid for one in actors("Courier") if one.actor_id == courier._actor_id.hex()]
    os.kill(pid, signal.SIGSTOP)
    with suppress(errors.RetryLater):  # it may have run
        engine.get(mortal.remote(1), timeout=PATIENCE_S)
    eventually(lambda: not is_running(pid))


def test_output_arrives_on_loggers_of_the_application(engine: Engine, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        engine.get_handle("kit").options(method_name="speak").call()
        wanted = {("INFO", "printed in the replica"), ("WARNING", "logged in the replica")}

        def arrived() -> bool:
            lines = [record for record in caplog.records if record.name.startswith("engine.replica.kit.")]
            return wanted <= {(record.levelname, record.getMessage()) for record in lines}

        eventually(arrived)
    origins = {getattr(record, "worker_logger", None) for record in caplog.records}
    assert {"stdout", "my.model"} <= origins


def test_the_application_is_killed(ray_cluster: RayCluster, engine: Engine) -> None:
    program = """
        engine = Engine(backend=RayAdapter(address=ADDRESS), http_options=HTTP)
        engine.create_backend("b", pid)
        engine.create_endpoint("b", backend="b", route="/b")
        say(engine.get(engine.get_handle("b").remote()))
        hear()
    """
    before, rows = actors(), keys()
    with Driver(program, ray_cluster.address) as driver:
        replica = driver.hear()
        started = actors() - before
        assert {actor.kind for actor in started} == {"RayWorker", "Courier"}
        assert len(started) == 3
        assert replica in {actor.pid for actor in started}
        driver.kill_now()
        eventually(lambda: all(actor.gone() for actor in started))
    eventually(lambda: actors() == before)
    assert engine.get(engine.get_handle("kit").remote("data")) == "data"
    with Engine(backend="ray", http_options=NO_HTTP) as next_one:  # sweeps what the dead one left
        next_one.create_backend("kit", Kit)
        assert len(keys() - rows) == 1
    assert keys() <= rows
