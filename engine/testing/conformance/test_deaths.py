"""Replicas that die: their calls are told, they are replaced, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from engine import errors
from engine.testing.instruments import PATIENCE_S, eventually, is_running

pytestmark = pytest.mark.usefixtures("processes")


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


@pytest.mark.parametrize("death", [exits, kills_itself, crashes])
@pytest.mark.parametrize("backend", [Mortal, AsyncMortal])
def test_a_death_fails_the_call_in_flight_and_is_mended(serve, backend, death):
    served, other = serve(backend, route=None), serve(Mortal, route=None)
    pid, other_pid = served.call(), other.call()
    with pytest.raises(errors.ReplicaDied):
        served.call(death)
    assert served.call() != pid
    assert other.call() == other_pid


def test_how_a_replica_ended_is_shown(serve, engine):
    served = serve(Mortal, route=None)
    with pytest.raises(errors.ReplicaDied, match=r"last_error in engine\.statistics"):
        served.call(exits)
    assert served.call()
    assert "exited with code 3" in engine.statistics()["backends"][served.tag]["last_error"]


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


def test_calls_that_wait_learn_that_replicas_fail_one_after_another(serve, engine, gate, tmp_path):
    """They would else wait for ever; and the engine keeps trying, so that later calls are served again."""
    broken = tmp_path / "broken"

    class Backend(Mortal):
        def __init__(self, gate):
            super().__init__(gate)
            if broken.exists():
                raise ValueError("broken for now")

    served = serve(Backend, gate, route=None, config={"max_concurrent_queries": 1})
    pid = served.call()
    held = served.handle.remote("hold")
    gate.wait_for_arrivals(1)
    waiting = [served.handle.remote() for _ in range(3)]
    broken.touch()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(errors.ReplicaDied):
        engine.get(held, timeout=20)
    told = (
        r"backend '.*' has no replica: the last \d+ tries to start one failed, the last one because of ValueError: "
        r"broken for now\. The engine keeps trying"
    )
    for ref in waiting:
        with pytest.raises(errors.NoReplica, match=told):
            engine.get(ref, timeout=20)
    with pytest.raises(errors.NoReplica, match=told):
        served.call()
    broken.unlink()

    def served_again():
        try:
            return served.call() != pid
        except errors.NoReplica:
            return False

    eventually(served_again)


def test_an_update_heals_what_does_not_start(serve, engine, tmp_path):
    """Until then callers are told why, and strangers only that it is so."""
    broken = tmp_path / "broken"

    class Configured(Mortal):
        def reconfigure(self, config):
            if config == "old" and broken.exists():
                raise ValueError("no model: old")

    served = serve(Configured, config={"user_config": "old"})
    broken.touch()
    with pytest.raises(errors.ReplicaDied):
        served.call(exits)
    eventually(lambda: engine.statistics()["backends"][served.tag]["state"] == "unhealthy")
    with pytest.raises(errors.NoReplica, match="ValueError: no model: old"):
        served.call()
    told = served.http()
    ready = httpx.get(f"{engine.http_url}/-/readyz", params={"backend": served.tag})
    assert (told.status_code, ready.status_code) == (503, 503)
    assert "unhealthy" in ready.json()["backends"][served.tag]["reason"]
    assert "model" not in told.text + ready.text
    engine.update_backend_config(served.tag, {"user_config": "new"})
    assert served.call()
    assert served.http().status_code == 200


@pytest.mark.parametrize("backend", [Mortal, AsyncMortal])
def test_a_call_that_a_replica_died_before_it_heard_goes_to_the_next(serve, engine, backend):
    """A caller of its own connects to a replica that does not accept it any more."""
    served = serve(backend, route=None)
    pid = served.call()
    os.kill(pid, signal.SIGSTOP)

    async def call():
        return await served.ahandle.call()

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asyncio.run, call())
        eventually(lambda: engine.statistics()["backends"][served.tag]["in_flight"])
        os.kill(pid, signal.SIGKILL)
        assert answer.result(PATIENCE_S) != pid


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


@pytest.mark.parametrize("backend", [Mortal, AsyncMortal])
def test_deaths_under_load_leave_nobody_waiting(serve, backend):
    """Calls that a replica held are told so; all others wait for the next one, however young those die."""
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
            except errors.ReplicaDied:
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
    assert {status for status, _ in answers} <= {200, 502}, answers
    assert eventually(lambda: served.http().status_code == 200)


def test_a_death_during_an_http_request(serve):
    async def backend(request):
        if request.query_params:
            os._exit(1)
        return "fine"

    served = serve(backend)
    assert served.http(params={"die": "1"}).status_code == 502
    assert eventually(lambda: served.http().text == "fine")


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


def test_a_constructor_that_dies(engine):
    class Backend:
        def __init__(self):
            os._exit(5)

        def __call__(self, request):
            return "never"

    with pytest.raises(errors.BackendStartError, match="code 5"):
        engine.create_backend("dies", Backend)
    assert "dies" not in engine.list_backends()


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


def test_a_death_while_the_others_still_start(serve, engine, journal, gate):
    """The first of two replicas dies before the second one is ready: there are two in the end."""

    class Early:
        def __init__(self):
            journal.add(os.getpid())
            starters = journal.lines()  # both may have come by now
            if starters[0] == str(os.getpid()):
                threading.Thread(target=self.die).start()
            elif starters[1] == str(os.getpid()):
                gate.pass_through()

        def die(self):
            gate.wait_for_arrivals(1)
            threading.Timer(0.3, os._exit, (3,)).start()

        def __call__(self, request):
            return os.getpid()

    def open_once_it_is_dead():
        eventually(journal.lines)
        first = int(journal.lines()[0])
        eventually(lambda: not is_running(first))
        gate.open()

    threading.Thread(target=open_once_it_is_dead).start()
    served = serve(Early, config={"num_replicas": 2}, route=None)
    eventually(lambda: list(engine.statistics()["backends"][served.tag]["replicas"].values()) == ["ready"] * 2)
    pids = set()
    eventually(lambda: pids.add(served.call()) or len(pids) == 2)
