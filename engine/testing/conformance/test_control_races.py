"""Control calls that meet: with each other, with a shutdown, and with replicas that die or refuse in between."""

from __future__ import annotations

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine import errors, get_replica_context
from engine.testing.instruments import Footprint, eventually, interrupting


def ok(request):
    return "ok"


def outcome(function, *args, **kwargs):
    """What a call raised, or None."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def gated(gate):
    """A backend whose constructor waits at the gate."""

    class Gated:
        def __init__(self, fails=False):
            gate.pass_through()
            if fails:
                raise ValueError("not after all")

        def __call__(self, request):
            return "ok"

    return Gated


def test_shutdown_while_a_backend_starts(adapter, gate, gated, pool, leaves_nothing):
    engine = adapter.engine()
    creating = pool.submit(outcome, engine.create_backend, "b", gated, config={"num_replicas": 2})
    gate.wait_for_arrivals(2)
    engine.shutdown()
    error = creating.result(10)
    assert isinstance(error, errors.EngineClosed), error
    gate.open()
    pool.shutdown()


def test_control_calls_until_the_very_end(adapter, pool):
    """Whatever a shutdown cuts off says that the engine was shut down."""
    for _ in range(5):
        engine = adapter.engine()
        engine.create_backend("b", ok)
        stop = threading.Event()

        def control(engine=engine, stop=stop):
            while not stop.is_set():
                try:
                    engine.list_backends()
                    engine.create_endpoint("e", backend="b")
                    engine.delete_endpoint("e")
                except errors.EngineClosed:
                    return True
            return False

        running = pool.submit(control)
        eventually(lambda engine=engine: engine.statistics())
        engine.shutdown()
        assert running.result(10) is True
        stop.set()


def test_shutdown_in_a_signal_handler_during_shutdown(adapter, leaves_nothing):
    engine = adapter.engine()
    engine.create_backend("b", ok)
    stop = engine._runner.stop

    def interrupted(grace_s):
        signal.raise_signal(signal.SIGUSR1)
        stop(grace_s)

    engine._runner.stop = interrupted
    before = signal.signal(signal.SIGUSR1, lambda *_: engine.shutdown())
    try:
        engine.shutdown()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_loop_that_ended_with_calls_pending_harms_nobody(adapter, gate, leaves_nothing):
    def held(request):
        gate.pass_through()

    engine = adapter.engine()
    engine.create_backend("b", held)
    engine.create_endpoint("b", backend="b")
    handle = engine.get_handle("b", sync=False)
    loop = asyncio.new_event_loop()

    async def leave():
        call = asyncio.ensure_future(handle.call())
        await asyncio.to_thread(gate.wait_for_arrivals, 1)
        return call

    call = loop.run_until_complete(leave())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.open()
    engine.create_backend("c", ok)
    engine.shutdown()
    call._log_destroy_pending = False


def test_a_loop_that_does_not_run_is_hung_up_on(adapter):
    loop = asyncio.new_event_loop()
    before = Footprint.now()
    engine = adapter.engine()
    engine.create_backend("b", ok)
    engine.create_endpoint("b", backend="b")
    handle = engine.get_handle("b", sync=False)
    assert loop.run_until_complete(handle.call()) == "ok"
    engine.shutdown()
    before.check_unchanged()
    with pytest.raises(errors.EngineClosed):
        loop.run_until_complete(handle.call())
    loop.close()


def test_no_endpoint_on_a_backend_that_does_not_exist_yet(engine, serve, gate, gated, pool):
    served = serve(ok, route=None)
    creating = pool.submit(outcome, engine.create_backend, "late", gated, True)
    gate.wait_for_arrivals(1)
    for attempt in (
        lambda: engine.create_endpoint("early", backend="late"),
        lambda: engine.set_traffic(served.name, {"late": 1.0}),
        lambda: engine.shadow_traffic(served.name, "late", 1.0),
        lambda: engine.delete_backend("late"),
    ):
        with pytest.raises(errors.InvalidArgument, match="there is no backend 'late'"):
            attempt()
    gate.open()
    assert isinstance(creating.result(20), ValueError)
    assert "early" not in engine.list_endpoints()
    assert serve(ok).call() == "ok"


def test_no_traffic_to_a_backend_that_is_being_deleted(engine, serve, gate, pool):
    """Nor can it be configured: both would bring back what nobody owns any more."""

    class Slow:
        def reconfigure(self, config):
            gate.pass_through()

        def __call__(self, request):
            return "ok"

    served = serve(ok, route=None)
    engine.create_backend("leaving", Slow)
    configuring = pool.submit(outcome, engine.update_backend_config, "leaving", {"user_config": 1})
    gate.wait_for_arrivals(1)
    deleting = pool.submit(outcome, engine.delete_backend, "leaving")
    eventually(lambda: isinstance(outcome(engine.get_backend_config, "leaving"), errors.InvalidArgument))
    with pytest.raises(errors.InvalidArgument, match="there is no backend 'leaving'"):
        engine.set_traffic(served.name, {"leaving": 1.0})
    gate.open()
    assert configuring.result(20) is None
    assert deleting.result(20) is None
    assert served.call() == "ok"


def test_configuring_waits_behind_a_deletion_in_vain(engine, gate, pool):
    class Held:
        def __call__(self, request):
            gate.pass_through()

    engine.create_backend("leaving", Held)
    engine.create_endpoint("held", backend="leaving")
    ref = engine.get_handle("held").remote()
    gate.wait_for_arrivals(1)
    engine.delete_endpoint("held")
    deleting = pool.submit(outcome, engine.delete_backend, "leaving")
    eventually(lambda: "leaving" not in engine.list_backends())
    assert isinstance(outcome(engine.update_backend_config, "leaving", {"num_replicas": 2}), errors.InvalidArgument)
    gate.open()
    assert deleting.result(20) is None
    engine.get(ref, timeout=20)
    assert not [name for name in engine.statistics()["backends"] if name == "leaving"]


def test_a_tag_is_free_once_the_deletion_is_done(engine, gate, pool):
    """Before that its replicas still have the names that the next ones would get."""

    class Held:
        def __call__(self, request):
            gate.pass_through()
            return "old"

    engine.create_backend("leaving", Held)
    engine.create_endpoint("held", backend="leaving")
    ref = engine.get_handle("held").remote()
    gate.wait_for_arrivals(1)
    engine.delete_endpoint("held")
    deleting = pool.submit(outcome, engine.delete_backend, "leaving")
    eventually(lambda: "leaving" not in engine.list_backends())
    with pytest.raises(errors.InvalidArgument, match="backend 'leaving' is still being deleted"):
        engine.create_backend("leaving", ok)
    gate.open()
    assert engine.get(ref, timeout=20) == "old"
    assert deleting.result(20) is None
    engine.create_backend("leaving", ok)
    engine.create_endpoint("held", backend="leaving")
    assert engine.get_handle("held").call() == "ok"
    engine.delete_endpoint("held")
    engine.delete_backend("leaving")


def test_a_failed_reconfigure_waits_for_the_others(engine, serve, journal, gate, tmp_path):
    """The next operation begins when every replica has answered, not when the first one has failed.

    Those that took it have returned to the former configuration then.
    """

    class Configured:
        def reconfigure(self, config):
            try:
                (tmp_path / "taken").mkdir()
            except FileExistsError:
                gate.pass_through()
                journal.add(config)
            else:
                gate.wait_for_arrivals(1)
                raise ValueError("refused")

        def __call__(self, request):
            return "ok"

    served = serve(Configured, config={"num_replicas": 2}, route=None)
    threading.Timer(0.3, gate.open).start()
    with pytest.raises(ValueError, match="refused"):
        engine.update_backend_config(served.tag, {"user_config": 1})
    assert journal.lines() == ["1", "None"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_reconfigure_that_gives_up_is_heard(engine, serve, kind):
    """What is no `Exception` is an answer, too: nobody waits for ever."""

    class Sync:
        def reconfigure(self, config):
            raise asyncio.CancelledError

        def __call__(self, request):
            return "ok"

    class Async(Sync):
        async def __call__(self, request):
            return "ok"

    served = serve({"sync": Sync, "async": Async}[kind], route=None)
    with pytest.raises(errors.RemoteError, match="CancelledError"):
        engine.update_backend_config(served.tag, {"user_config": 1})
    assert served.call() == "ok"


class StuckOnce:
    """Whoever is the first to be configured anew stays in it until the gate opens; the others do as ``then`` says."""

    def __init__(self, stuck, gate, then=None):
        self.stuck, self.gate, self.then, self.config = stuck, gate, then, None

    def first(self, config):
        if config == "old":
            return False
        try:
            self.stuck.mkdir()
        except FileExistsError:
            if self.then is not None:
                raise ValueError(self.then) from None
            return False
        return True

    def reconfigure(self, config):
        if self.first(config):
            self.gate.pass_through()
        self.config = config

    def __call__(self, request):
        return get_replica_context().replica_tag, self.config


class AsyncStuckOnce(StuckOnce):
    async def reconfigure(self, config):
        if self.first(config):
            await self.gate.apass_through()
        self.config = config

    async def __call__(self, request):
        return get_replica_context().replica_tag, self.config


STUCK = {"user_config": "old", "reconfigure_timeout_s": 0.1, "graceful_shutdown_timeout_s": 0.1}


@pytest.mark.parametrize("kind", [StuckOnce, AsyncStuckOnce])
def test_a_replica_that_is_late_to_take_its_configuration_is_replaced(engine, serve, gate, tmp_path, kind):
    served = serve(kind, tmp_path / "stuck", gate, config=STUCK, route=None)
    engine.update_backend_config(served.tag, {"user_config": "new"})
    assert served.call() == (f"{served.tag}#2", "new")
    assert engine.get_backend_config(served.tag).user_config == "new"
    assert not gate.is_open()


def test_a_configuration_that_no_replica_takes_does_not_rule(engine, serve, gate, tmp_path):
    served = serve(StuckOnce, tmp_path / "stuck", gate, "no such model", config=STUCK, route=None)
    with pytest.raises(ValueError, match="no such model"):
        engine.update_backend_config(served.tag, {"user_config": "new"})
    assert engine.get_backend_config(served.tag).user_config == "old"
    assert served.call() == (f"{served.tag}#3", "old")


def test_a_deletion_by_force_waits_for_nobody(engine, serve, gate, pool, tmp_path):
    """Neither for a replica that is stuck, nor for who waits for that: a change, and an orderly deletion behind it."""
    served = serve(StuckOnce, tmp_path / "stuck", gate, config={"user_config": "old"}, route=None)
    engine.delete_endpoint(served.name)
    configuring = pool.submit(outcome, engine.update_backend_config, served.tag, {"user_config": "new"})
    gate.wait_for_arrivals(1)
    deleting = pool.submit(outcome, engine.delete_backend, served.tag)
    eventually(lambda: served.tag not in engine.list_backends())
    engine.delete_backend(served.tag, force=True)
    error = configuring.result(20)
    assert isinstance(error, errors.InvalidArgument), error
    assert "was deleted meanwhile" in str(error)
    assert deleting.result(20) is None
    assert not gate.is_open()
    engine.create_backend(served.tag, ok)  # nothing is left of it
    engine.delete_backend(served.tag)


def test_an_interrupted_creation_is_taken_back(engine, gate, gated):
    with interrupting(gate.arrivals), pytest.raises(KeyboardInterrupt):
        engine.create_backend("interrupted", gated)
    gate.open()
    engine.create_backend("interrupted", ok)  # at once, though the first one may take a moment to end
    engine.create_endpoint("interrupted", backend="interrupted")
    assert engine.get_handle("interrupted").call() == "ok"
    with pytest.raises(errors.InvalidArgument, match="exists already"):
        engine.create_backend("interrupted", ok)
    engine.delete_endpoint("interrupted")
    engine.delete_backend("interrupted")


def test_an_interrupted_change_is_taken_back(engine, serve, gate, tmp_path):
    served = serve(StuckOnce, tmp_path / "stuck", gate, config={"user_config": "old"}, route=None)
    with interrupting(gate.arrivals), pytest.raises(KeyboardInterrupt):
        engine.update_backend_config(served.tag, {"user_config": "new"})
    gate.open()
    assert engine.get_backend_config(served.tag).user_config == "old"
    engine.update_backend_config(served.tag, {"max_queued_requests": 3})  # waits for the way back
    assert served.call() == (f"{served.tag}#1", "old")
    engine.update_backend_config(served.tag, {"user_config": "new"})
    assert served.call() == (f"{served.tag}#1", "new")


class StartsOnce:
    """Whoever is not the first to be constructed stays in that until the gate opens."""

    def __init__(self, first, gate):
        self.config = None
        try:
            first.mkdir()
        except FileExistsError:
            gate.pass_through()

    def reconfigure(self, config):
        self.config = config

    def __call__(self, request):
        return get_replica_context().replica_tag, self.config


def test_a_change_is_taken_back_that_was_interrupted_while_replicas_start(engine, serve, gate, tmp_path):
    served = serve(StartsOnce, tmp_path / "first", gate, config={"user_config": "old"}, route=None)
    before = engine.get_backend_config(served.tag)
    with interrupting(gate.arrivals), pytest.raises(KeyboardInterrupt):
        engine.update_backend_config(served.tag, {"user_config": "new", "max_queued_requests": 3, "num_replicas": 2})
    gate.open()
    engine.update_backend_config(served.tag, {})  # waits for the way back
    assert engine.get_backend_config(served.tag) == before
    assert served.call() == (f"{served.tag}#1", "old")


def test_an_interrupted_deletion_is_seen_through(engine, serve, gate):
    def held(request):
        gate.pass_through()
        return "held"

    served = serve(held, route=None)
    ref = served.handle.remote()
    gate.wait_for_arrivals(1)
    engine.delete_endpoint(served.name)
    with interrupting(lambda: served.tag not in engine.list_backends()), pytest.raises(KeyboardInterrupt):
        engine.delete_backend(served.tag)
    threading.Timer(0.05, gate.open).start()
    engine.delete_backend(served.tag)  # at once, and waits for the end
    assert engine.get(ref, timeout=20) == "held"
    with pytest.raises(errors.InvalidArgument, match="there is no backend"):
        engine.delete_backend(served.tag)


def test_two_that_create_the_same(engine, gate, gated, pool):
    """The second one hears what became of the first one's."""
    creating = [pool.submit(outcome, engine.create_backend, "same", gated) for _ in range(2)]
    gate.wait_for_arrivals(1)
    gate.open()
    results = sorted((creation.result(20) for creation in creating), key=repr)
    assert isinstance(results[0], errors.InvalidArgument), results
    assert results[1] is None
    engine.delete_backend("same")


def test_what_replicas_need_not_know_waits_for_no_call(engine, serve, gate):
    """Nor do their limits, which they take at once."""

    def held(request):
        gate.pass_through()
        return "held"

    served = serve(held, config={"max_concurrent_queries": 2}, route=None)
    refs = [served.handle.remote() for _ in range(2)]
    gate.wait_for_arrivals(1)
    engine.update_backend_config(served.tag, {"max_queued_requests": 0, "graceful_shutdown_timeout_s": 1.0})
    engine.update_backend_config(served.tag, {"max_concurrent_queries": 3})
    refs.append(served.handle.remote())
    with pytest.raises(errors.Overloaded):
        engine.get(served.handle.remote(), timeout=20)
    assert not gate.is_open()
    gate.open()
    assert engine.get(refs, timeout=20) == ["held"] * 3


def test_a_config_that_cannot_be_compared(engine, serve):
    """Arrays do not say in one word whether they are equal."""

    class Array:
        def __eq__(self, other):
            raise ValueError("the truth value is ambiguous")

        __hash__ = None

    class Configured:
        def reconfigure(self, config):
            self.config = config

        def __call__(self, request):
            return type(self.config).__name__

    served = serve(Configured, config={"user_config": 1}, route=None)
    for _ in range(2):
        engine.update_backend_config(served.tag, {"user_config": Array()})
        assert served.call() == "Array"


def test_limits_rule_although_scaling_failed(engine, serve, journal):
    class Once:
        def __init__(self):
            journal.add("made")
            if len(journal.lines()) > 1:
                raise ValueError("one is enough")

        def __call__(self, request):
            return "ok"

    served = serve(Once, route=None)
    with pytest.raises(ValueError, match="one is enough"):
        engine.update_backend_config(served.tag, {"num_replicas": 2, "max_queued_requests": 7})
    assert engine.get_backend_config(served.tag).max_queued_requests == 7
    assert engine._client.snapshot.backends[served.tag].max_queued_requests == 7
