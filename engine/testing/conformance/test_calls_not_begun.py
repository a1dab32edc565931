"""A replica that dies takes those calls with it that had begun there; all others are placed again, and run once."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine import accept_batch, errors
from engine.testing.instruments import PATIENCE_S, eventually

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def processes(adapter):
    if not adapter.processes:
        pytest.skip("replicas of this adapter live in the calling process and cannot die alone")
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memory that callers and replicas could share")


def name_of(request):
    return request.query_params.get("name") or request.data


class Plain:
    """Notes what runs; some calls stay at the gate."""

    def __init__(self, gate, journal):
        self.gate = gate
        self.journal = journal

    def note(self, request):
        self.journal.add(name_of(request))
        return name_of(request) == "hold" and not self.gate.is_open()

    def __call__(self, request):
        if self.note(request):
            self.gate.pass_through()
        return f"{os.getpid()}"

    def pid(self):
        return os.getpid()


class OnLoop(Plain):
    async def __call__(self, request):
        if self.note(request):
            await self.gate.apass_through()
        return f"{os.getpid()}"


class Batched(Plain):
    @accept_batch
    def __call__(self, requests):
        if any([self.note(request) for request in requests]):
            self.gate.pass_through()
        return [f"{os.getpid()}" for _ in requests]


@pytest.mark.parametrize("backend", [Plain, OnLoop, Batched])
def test_calls_that_had_not_begun_run_elsewhere_and_once(serve, engine, gate, journal, backend):
    """Whoever makes them: refs, threads, tasks and HTTP clients; a batch that had begun fails as a whole."""
    batches = {"max_batch_size": 2, "batch_wait_timeout": 0.5} if backend is Batched else {}
    served = serve(backend, gate, journal, config={"max_concurrent_queries": 20, **batches})
    pid = served.call(method_name="pid")
    held = [served.handle.remote("hold") for _ in range(2 if backend is Batched else 1)]
    eventually(gate.arrivals)
    os.kill(pid, signal.SIGSTOP)  # what comes from now on waits in its socket
    by_ref = [served.handle.remote(f"ref-{number}") for number in range(3)]
    by_ref.append(served.handle.options(timeout_s=PATIENCE_S).remote("ref-with-time"))

    in_tasks: list[int] = []

    async def tasks():
        calls = [asyncio.ensure_future(served.ahandle.call(f"task-{number}")) for number in range(2)]
        await asyncio.sleep(0)  # both are on their way
        in_tasks.append(len(calls))
        return await asyncio.gather(*calls)

    with ThreadPoolExecutor(5) as pool:
        by_thread = [pool.submit(served.call, f"thread-{number}") for number in range(2)]
        by_task = pool.submit(asyncio.run, tasks())
        by_http = [pool.submit(served.http, method, params={"name": f"http-{method}"}) for method in ("GET", "POST")]
        in_flight = len(held) + len(by_ref) + 4
        eventually(lambda: in_tasks and engine.statistics()["backends"][served.tag]["in_flight"] >= in_flight)
        served.http("PUT")  # refused by the ingress itself, which has most likely passed on what came before
        os.kill(pid, signal.SIGKILL)
        for ref in held:
            with pytest.raises(errors.ReplicaDied, match="may have run"):
                engine.get(ref, timeout=PATIENCE_S)
        answers = engine.get(by_ref, timeout=PATIENCE_S)
        answers += [future.result(PATIENCE_S) for future in by_thread]
        answers += by_task.result(PATIENCE_S)
        responses = [future.result(PATIENCE_S) for future in by_http]
    assert [response.status_code for response in responses] == [200, 200]
    assert f"{pid}" not in [*answers, *(response.text for response in responses)]
    begun = ["hold"] * len(held)
    refs = ["ref-0", "ref-1", "ref-2", "ref-with-time"]
    others = ["http-GET", "http-POST", "task-0", "task-1", "thread-0", "thread-1"]
    assert sorted(journal.lines()) == sorted(begun + refs + others)
    if backend is Plain:
        assert [line for line in journal.lines() if line in refs] == refs  # each keeps its place
