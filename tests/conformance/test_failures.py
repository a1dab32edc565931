"""Errors of user code, errors that do not travel, constructors that fail, and replicas that die."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import eventually, is_running

from engine import errors


class OwnError(Exception):
    def __init__(self, code, detail):
        super().__init__(code, detail)
        self.code = code


class CannotBeRebuilt(Exception):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")


class CannotBePickled(Exception):
    def __init__(self, message):
        super().__init__(message)
        self.lock = threading.Lock()


def raises_own(request):
    raise OwnError(7, "the detail")  # the line that raises


async def raises_own_async(request):
    raise OwnError(7, "the detail")  # the line that raises


class Raising:
    def __call__(self, request):
        return self.inner()

    def inner(self):
        raise OwnError(7, "the detail")  # the line that raises


@pytest.mark.parametrize("backend", [raises_own, raises_own_async, Raising])
def test_user_errors_arrive_as_their_own_type(serve, engine, backend):
    served = serve(backend, route=None)
    for attempt in (served.handle.call, lambda: engine.get(served.handle.remote())):
        with pytest.raises(OwnError) as caught:
            attempt()
        assert caught.value.code == 7
        assert caught.value.args == (7, "the detail")
        cause = caught.value.__cause__
        assert isinstance(cause, errors.RemoteTraceback)
        assert "# the line that raises" in str(cause)
        assert __file__.rpartition("/")[2] in str(cause)


def test_an_errors_own_cause_is_in_the_traceback(serve):
    def backend(request):
        try:
            raise KeyError("the first one")
        except KeyError as error:
            raise ValueError("the second one") from error

    with pytest.raises(ValueError, match="the second one") as caught:
        serve(backend, route=None).call()
    assert "the first one" in str(caught.value.__cause__)


def test_an_error_of_a_local_class(serve):
    class LocalError(ValueError):
        pass

    def backend(request):
        raise LocalError("local")

    with pytest.raises(LocalError, match="local"):
        serve(backend, route=None).call()


@pytest.mark.parametrize("error", [lambda: CannotBeRebuilt(7, "the detail"), lambda: CannotBePickled("7: the detail")],
                         ids=["cannot be rebuilt", "cannot be pickled"])  # fmt: skip
def test_errors_that_do_not_travel(serve, error):
    def backend(request):
        raise error()  # the line that raises

    served = serve(backend)
    with pytest.raises(errors.RemoteError) as caught:
        served.call()
    assert caught.value.type_name.rpartition(".")[2] in ("CannotBeRebuilt", "CannotBePickled")
    assert caught.value.message == "7: the detail"
    assert "# the line that raises" in caught.value.remote_traceback
    assert "7: the detail" in str(caught.value)
    assert served.http().status_code == 500


class CannotBeShown(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


def test_an_error_that_cannot_be_shown(serve):
    def backend(request):
        raise CannotBeShown("hidden")

    served = serve(backend)
    with pytest.raises(CannotBeShown):
        served.call()
    assert served.http().status_code == 500


ODD = [StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError, SystemExit, KeyboardInterrupt]


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
def test_odd_exceptions_are_answered(serve, odd, kind):
    """What means something to Python itself must neither hang the caller nor stop the replica for good."""

    def sync(request):
        if request.data == "raise":
            raise odd
        return "fine"

    async def asynchronous(request):
        return sync(request)

    served = serve(sync if kind == "sync" else asynchronous, route=None)
    with pytest.raises(BaseException) as caught:
        served.call("raise", timeout_s=10)
    assert not isinstance(caught.value, errors.DeadlineExceeded)
    assert isinstance(caught.value, (odd, RuntimeError, errors.RemoteError, errors.ReplicaDied))
    assert eventually(lambda: served.call("pass", timeout_s=10)) == "fine"


class Broken:
    def __init__(self):
        raise OwnError(7, "of the constructor")  # the line that raises

    def __call__(self, request):
        return "never"


def test_a_constructor_that_raises(engine, adapter):
    before = time.monotonic()
    with pytest.raises(OwnError) as caught:
        engine.create_backend("broken", Broken)
    assert time.monotonic() - before < 5, "it must not be tried over and over"
    assert caught.value.args == (7, "of the constructor")
    assert isinstance(caught.value.__cause__, errors.RemoteTraceback)
    assert "# the line that raises" in str(caught.value.__cause__)
    assert "broken" not in engine.list_backends()
    engine.create_backend("broken", raises_own)
    engine.delete_backend("broken")


def test_one_of_many_constructors_raises(engine, journal):
    class SometimesBroken:
        def __init__(self):
            journal.add("made")
            if len(journal.lines()) > 1:  # at least the last one to come
                raise OwnError(7, "not the first")

        def __call__(self, request):
            return "never"

    with pytest.raises(OwnError):
        engine.create_backend("sometimes", SometimesBroken, config={"num_replicas": 3})
    assert "sometimes" not in engine.list_backends()


def test_a_constructor_with_wrong_arguments(engine):
    class Backend:
        def __init__(self, needed):
            pass

        def __call__(self, request):
            return "never"

    with pytest.raises(TypeError, match="needed"):
        engine.create_backend("arguments", Backend)
    assert "arguments" not in engine.list_backends()


def test_scaling_up_that_fails_keeps_what_there_is(serve, engine, journal):
    class OnlyOne:
        def __init__(self):
            journal.add("made")
            if len(journal.lines()) > 1:
                raise OwnError(7, "only one")

        def __call__(self, request):
            return "served"

    served = serve(OnlyOne, route=None)
    with pytest.raises(OwnError):
        engine.update_backend_config(served.tag, {"num_replicas": 2})
    assert served.call() == "served"
    assert engine.get_backend_config(served.tag).num_replicas == 1


# -- replicas that die ---------------------------------------------------------------------------------------------


@pytest.fixture
def processes(adapter):
    if not adapter.processes:
        pytest.skip("replicas of this adapter live in the calling process and cannot die alone")


def exits(request):
    os._exit(3)


def kills_itself(request):
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(request):
    os.kill(os.getpid(), signal.SIGSEGV)


class Mortal:
    """Dies as it is told, or tells which process it is."""

    def __init__(self, gate=None):
        self.gate = gate

    def __call__(self, request):
        order = getattr(request, "data", None)
        if order == "hold":
            self.gate.pass_through()
        elif order is not None:
            order(request)
        return os.getpid()


class AsyncMortal(Mortal):
    async def __call__(self, request):
        return super().__call__(request)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("death", [exits, kills_itself, crashes])
@pytest.mark.parametrize("backend", [Mortal, AsyncMortal])
def test_a_death_fails_the_call_in_flight_and_is_mended(serve, backend, death):
    served, other = serve(backend, route=None), serve(Mortal, route=None)
    pid, other_pid = served.call(), other.call()
    with pytest.raises(errors.ReplicaDied):
        served.call(death)
    assert served.call() != pid
    assert other.call() == other_pid


@pytest.mark.usefixtures("processes")
def test_a_death_while_idle_is_not_noticed_by_callers(serve):
    served = serve(Mortal, route=None)
    pid = served.call()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_running(pid))

    def replaced():
        try:
            return served.call() != pid
        except errors.ReplicaDied:  # the call was sent before the news of the death came
            return False

    eventually(replaced)


@pytest.mark.usefixtures("processes")
def test_calls_that_wait_survive_a_death(serve, engine, gate):
    served = serve(Mortal, gate, route=None, config={"max_concurrent_queries": 1})
    pid = served.call()
    held = served.handle.remote("hold")
    gate.wait_for_arrivals(1)
    waiting = [served.handle.remote() for _ in range(5)]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(errors.ReplicaDied):
        engine.get(held, timeout=20)
    answers = set(engine.get(waiting, timeout=20))
    assert len(answers) == 1
    assert pid not in answers


@pytest.mark.usefixtures("processes")
def test_a_death_leaves_the_other_replica_serving(serve, gate):
    served = serve(Mortal, gate, route=None, config={"num_replicas": 2})
    pids = set()
    eventually(lambda: pids.add(served.call()) or len(pids) == 2)
    with pytest.raises(errors.ReplicaDied):
        served.call(exits)
    assert [served.call() for _ in range(10)]
    now = set()
    eventually(lambda: now.add(served.call()) or len(now) == 2)
    assert len(now & pids) == 1


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("backend", [Mortal, AsyncMortal])
def test_deaths_under_load_leave_nobody_waiting(serve, backend):
    """Every call ends, with its result or with an error that says why, and the last word is a result."""
    served = serve(backend, config={"num_replicas": 2})
    stop = threading.Event()
    pids: set[int] = set()
    answers: Counter[tuple[int, str]] = Counter()
    unexpected = []

    def by_handle():
        patient = served.handle.options(timeout_s=20)
        while not stop.is_set():
            try:
                pids.add(patient.call())
            except (errors.ReplicaDied, errors.NoReplica):
                continue
            except BaseException as failure:
                unexpected.append(failure)

    def by_http():
        while not stop.is_set():
            answer = served.http(timeout=20)
            answers[answer.status_code, "" if answer.status_code == 200 else answer.text] += 1

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(by_handle), pool.submit(by_handle), pool.submit(by_http)]
        try:
            for _ in range(5):
                pid = eventually(lambda: next((pid for pid in list(pids) if is_running(pid)), None))
                os.kill(pid, signal.SIGKILL)
                known = len(pids)
                eventually(lambda known=known: len(pids) > known or unexpected)
        finally:
            stop.set()
        for future in running:
            future.result(30)
    assert unexpected == []
    assert {status for status, _ in answers} <= {200, 502, 503}, answers
    assert eventually(lambda: served.http().status_code == 200)


@pytest.mark.usefixtures("processes")
def test_a_death_during_an_http_request(serve):
    async def backend(request):
        if request.query_params:
            os._exit(1)
        return "fine"

    served = serve(backend)
    assert served.http(params={"die": "1"}).status_code == 502
    assert eventually(lambda: served.http().text == "fine")


@pytest.mark.usefixtures("processes")
def test_a_replacement_has_the_newest_configuration(serve, engine):
    class Configured(Mortal):
        def reconfigure(self, config):
            self.config = config

        def __call__(self, request):
            super().__call__(request)
            return self.config

    served = serve(Configured, route=None, config={"user_config": 1})
    engine.update_backend_config(served.tag, {"user_config": 2})
    with pytest.raises(errors.ReplicaDied):
        served.call(exits)
    assert served.call() == 2


@pytest.mark.usefixtures("processes")
def test_a_constructor_that_dies(engine):
    class Backend:
        def __init__(self):
            os._exit(5)

        def __call__(self, request):
            return "never"

    with pytest.raises(errors.BackendStartError, match="code 5"):
        engine.create_backend("dies", Backend)
    assert "dies" not in engine.list_backends()


@pytest.mark.usefixtures("processes")
def test_a_constructor_that_never_ends(engine, gate):
    class Backend:
        def __init__(self):
            gate.pass_through()

        def __call__(self, request):
            return "never"

    with pytest.raises(errors.BackendStartError, match=r"start_timeout_s"):
        engine.create_backend("slow", Backend, config={"start_timeout_s": 0.5})
    assert not gate.is_open()
    assert "slow" not in engine.list_backends()
