"""Sync handles and the refs they give."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import pickle
import sys
import threading

import pytest

from engine import errors
from engine.seam import may_block
from engine.testing.instruments import eventually, interrupting


def double(request):
    return request.data * 2


def divides_by_zero(request):
    return 1 / 0


def give_back(request):
    return request.data


@pytest.fixture
def doubled(serve_once):
    return serve_once(double, route=None).handle


@pytest.fixture
def held(serve, gate):
    """A backend that answers once the gate is open."""

    async def backend(request):
        await gate.apass_through()
        return request.data

    return serve(backend, route=None).handle


def test_get_one_and_many(engine, doubled):
    assert engine.get(doubled.remote(4)) == 8
    refs = [doubled.remote(number) for number in range(20)]
    assert engine.get(refs) == [number * 2 for number in range(20)]
    assert engine.get(refs) == [number * 2 for number in range(20)], "a ref may be read again"
    assert engine.get([]) == []


def test_get_times_out_and_the_call_goes_on(engine, held, gate):
    ref = held.remote(5)
    with pytest.raises(errors.DeadlineExceeded) as caught:
        engine.get(ref, timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(errors.DeadlineExceeded):
        engine.get([ref], timeout=0)
    gate.open()
    assert engine.get(ref, timeout=20) == 5


def test_wait(engine, held, doubled, gate):
    slow, fast = held.remote(1), doubled.remote(2)
    assert engine.wait([slow, fast], timeout=20) == ([fast], [slow])
    assert engine.wait([slow, fast], num_returns=2, timeout=0.05) == ([fast], [slow])
    assert engine.wait([slow], timeout=0) == ([], [slow])
    gate.open()
    assert engine.wait([slow, fast], num_returns=2, timeout=20) == ([slow, fast], [])


def test_wait_gives_no_more_than_it_was_asked_for(engine, doubled):
    refs = [doubled.remote(number) for number in range(3)]
    engine.get(refs)
    ready, not_ready = engine.wait(refs, num_returns=2)
    assert (ready, not_ready) == (refs[:2], refs[2:])


def test_wait_counts_a_failed_call_as_ready(engine, serve_once):
    ref = serve_once(divides_by_zero, route=None).handle.remote()
    assert engine.wait([ref], timeout=20) == ([ref], [])
    with pytest.raises(ZeroDivisionError):
        engine.get(ref)


def test_result(adapter, doubled, held, gate):
    if not adapter.own_refs:
        pytest.skip("refs of this adapter are those of its platform")
    assert doubled.remote(4).result() == 8
    assert doubled.remote(4).result(float("inf")) == 8
    ref = held.remote(5)
    with pytest.raises(errors.DeadlineExceeded):
        ref.result(0.05)
    with pytest.raises(errors.DeadlineExceeded):
        ref.result(timeout=0)
    gate.open()
    assert ref.result(20) == 5


def test_future(doubled, held, gate):
    future = doubled.remote(4).future()
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(20) == 8
    pending = held.remote(1).future()
    heard = threading.Event()
    pending.add_done_callback(lambda _: heard.set())
    assert not pending.done()
    gate.open()
    assert heard.wait(20)
    assert pending.result() == 1


def test_futures_wait_together(doubled, held, gate):
    futures = {held.remote(1).future(), doubled.remote(2).future()}
    done, pending = concurrent.futures.wait(futures, timeout=20, return_when="FIRST_COMPLETED")
    assert [future.result() for future in done] == [4]
    gate.open()
    assert [future.result(20) for future in pending] == [1]


def test_future_carries_the_error(serve_once):
    future = serve_once(divides_by_zero, route=None).handle.remote().future()
    assert isinstance(future.exception(20), ZeroDivisionError)


@pytest.mark.anyio
async def test_refs_can_be_awaited(doubled):
    assert await doubled.remote(4) == 8


def test_call(doubled, serve_once):
    assert doubled.call(4) == 8
    with pytest.raises(ZeroDivisionError):
        serve_once(divides_by_zero, route=None).handle.call()


def test_refs_as_arguments(engine, doubled):
    first = doubled.remote(1)
    second = doubled.remote(first)
    assert engine.get(doubled.remote(second)) == 8
    assert engine.get(first) == 2


def test_refs_as_plain_arguments(serve):
    class Adder:
        def __call__(self, request):
            return request.data

        def add(self, left, right):
            return left + right

    handle = serve(Adder, route=None).handle
    add = handle.options(method_name="add")
    assert add.call(handle.remote(1), handle.remote(2)) == 3
    assert add.call(handle.remote(1), right=handle.remote(5)) == 6


def test_a_ref_that_is_not_ready_yet(engine, doubled, held, gate):
    ref = doubled.remote(held.remote(3))
    assert engine.wait([ref], timeout=0.05) == ([], [ref])
    gate.open()
    assert engine.get(ref, timeout=20) == 6


def test_failing_dependency_fails_the_call(engine, doubled, serve, journal):
    def fails(request):
        raise KeyError("of the dependency")

    def dependent(request):
        journal.add("ran")

    dependency = serve(fails, route=None).handle.remote()
    with pytest.raises(KeyError, match="of the dependency"):
        engine.get(serve(dependent, route=None).handle.remote(dependency), timeout=20)
    assert journal.lines() == []


def test_timeout_option(held, gate):
    with pytest.raises(errors.DeadlineExceeded):
        held.options(timeout_s=0.1).call(1)
    gate.open()
    assert held.call(2) == 2
    assert held.options(timeout_s=20).call(3) == 3


def test_a_method_called_by_name_may_have_parameters_with_the_names_of_options(serve):
    class Backend:
        def wait(self, *, timeout_s, method_name):
            return timeout_s, method_name

    handle = serve(Backend, route=None).handle.options(method_name="wait")
    assert handle.call(timeout_s=2, method_name="m") == (2, "m")


def test_a_call_that_was_given_up(engine, adapter, held, gate):
    if not adapter.own_refs:
        pytest.skip("refs are the platform's own")
    waiting, settled = held.remote(1), held.remote(2)
    future = waiting.future()
    gate.wait_for_arrivals(2)
    assert waiting.cancel() is True
    assert waiting.cancel() is False
    for result in (waiting.result, lambda: engine.get(waiting), future.result, lambda: held.remote(waiting).result()):
        with pytest.raises(errors.Cancelled, match=r"ref\.cancel"):
            result()
    gate.open()
    assert settled.result(20) == 2
    assert settled.cancel() is False
    assert settled.result() == 2


def test_the_public_face_of_a_ref(adapter, doubled):
    if not adapter.own_refs:
        pytest.skip("refs are the platform's own")
    public = {name for name in dir(doubled.remote(1)) if not name.startswith("_")}
    assert public == {"add_done_callback", "cancel", "done", "future", "result"}


def test_a_handle_is_asked_for_what_it_does_not_have(doubled):
    assert not hasattr(doubled, "absent")
    assert not hasattr(doubled, "_repr_html_")
    assert copy.copy(doubled).call(2) == 4
    assert copy.deepcopy(doubled).call(2) == 4


def test_a_call_that_blocks_an_event_loop_is_told_of_once(doubled, engine, monkeypatch):
    monkeypatch.setattr(may_block, "_warned", False)

    async def calls():
        ref = doubled.remote(3)
        with pytest.warns(RuntimeWarning, match="sync=False") as caught:
            assert doubled.call(2) == 4
        assert caught[0].filename == __file__
        assert (doubled.call(2), engine.get(ref)) == (4, 6)

    asyncio.run(calls())
    monkeypatch.setattr(may_block, "_warned", False)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)

    async def cell():
        assert doubled.call(2) == 4

    asyncio.run(cell())


def test_waiting_for_a_ref_on_an_event_loop_is_told_of_as_well(serve, engine, gate, monkeypatch):
    monkeypatch.setattr(may_block, "_warned", False)

    def backend(request):
        gate.pass_through()

    async def wait(ref):
        with pytest.warns(RuntimeWarning, match="waiting for a ref"), pytest.raises(errors.DeadlineExceeded):
            engine.get(ref, timeout=0.01)

    asyncio.run(wait(serve(backend, route=None).handle.remote()))
    gate.open()


def test_a_timeout_covers_the_arguments_that_are_on_their_way(serve_once, held, gate):
    late = held.remote(1)
    waiting = serve_once(give_back, route=None)
    for arguments in ([late], [[1], late]):
        method = {} if len(arguments) == 1 else {"method_name": "several"}
        with pytest.raises(errors.DeadlineExceeded, match=rf"{waiting.name}.*timeout_s=0\.1"):
            waiting.handle.options(timeout_s=0.1, **method).call(*arguments)
    with pytest.raises(errors.DeadlineExceeded):
        waiting.handle.options(timeout_s=0.1).remote(late).future().result(20)
    assert not gate.is_open()
    gate.open()
    assert waiting.handle.options(timeout_s=20).call(late) == 1


def test_timeout_while_queued(serve, gate, journal):
    def backend(request):
        journal.add(request.data)
        gate.pass_through()

    handle = serve(backend, route=None, config={"max_concurrent_queries": 1}).handle
    first = handle.remote("first")
    gate.wait_for_arrivals(1)
    with pytest.raises(errors.DeadlineExceeded):
        handle.options(timeout_s=0.1).call("too late")
    gate.open()
    first.future().result(20)
    handle.call("next")
    assert journal.lines() == ["first", "next"], "a call nobody waits for any more must not run"


def test_an_interrupted_call_leaves_the_others_alone(engine, held, gate):
    """Ctrl-C in a notebook ends the call it meets, not those that other cells and threads wait for."""
    other = held.remote(1)
    gate.wait_for_arrivals(1)
    with interrupting(lambda: gate.arrivals() >= 2), pytest.raises(KeyboardInterrupt):
        held.call(2)
    gate.open()
    assert engine.get(other, timeout=20) == 1
    assert held.call(3) == 3


def test_options_make_a_new_handle(serve):
    def backend(request):
        return [request.method, dict(request.headers).get("x-a")]

    plain = serve(backend, route=None).handle
    changed = plain.options(http_method="PUT").options(http_headers={"X-A": "1"})
    assert changed.call() == ["PUT", "1"], "options add up"
    assert plain.call() == ["GET", None]
    assert changed.options(http_method="POST").call() == ["POST", "1"]


def test_handles_pickle_with_their_options(serve):
    handle = serve(lambda request: [request.method, request.data], route=None).handle.options(http_method="PUT")
    again = pickle.loads(pickle.dumps(handle))
    assert again.call(1) == ["PUT", 1]


def test_handles_show_their_endpoint(serve_once):
    served = serve_once(double, route=None)
    assert served.name in repr(served.handle)
    assert served.name in repr(served.ahandle)


def test_one_handle_in_many_threads(doubled):
    def work(start):
        return [doubled.call(number) for number in range(start, start + 30)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(0, 800, 100)))
    assert results == [[number * 2 for number in range(start, start + 30)] for start in range(0, 800, 100)]


def test_abandoned_refs_do_no_harm(doubled, serve, journal):
    handle = serve(lambda request: journal.add("ran"), route=None).handle
    for _ in range(20):
        handle.remote()
    eventually(lambda: len(journal.lines()) == 20)
    assert doubled.call(1) == 2


def test_calls_keep_their_order(serve, journal):
    handle = serve(lambda request: journal.add(request.data), route=None).handle
    refs = [handle.remote(number) for number in range(50)]
    for ref in refs:
        ref.future().result(20)
    assert journal.lines() == [str(number) for number in range(50)]


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:.* blocks the event loop:RuntimeWarning")
async def test_blocking_calls_work_in_a_running_loop_of_the_main_program(engine, doubled):
    """As in a notebook cell: nothing but the caller waits on this loop."""
    assert doubled.call(4) == 8
    assert engine.get(doubled.remote(4)) == 8
    assert doubled.remote(4).future().result(20) == 8


def test_long_timeouts_are_timeouts_like_any_other(serve_once, engine):
    served = serve_once(give_back, route=None)
    month = 31 * 86400.0
    assert served.call(1, timeout_s=month) == 1
    assert served.handle.options(timeout_s=month).remote(2).future().result(month) == 2
    assert engine.get([served.handle.remote(3)], timeout=float("inf")) == [3]
