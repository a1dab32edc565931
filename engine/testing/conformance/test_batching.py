"""`accept_batch`: many calls at once for backends that prefer it.

A batch of these tests either fills up, and then nobody waits, or its wait is over soon.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from itertools import count

import numpy as np
import pytest
from starlette.requests import Request

from engine import accept_batch, errors

FULL_OR_NEVER = {"max_batch_size": 4, "batch_wait_timeout": 50.0}


def value_of(item):
    return getattr(item, "data", item)


@accept_batch
def sync_function(requests):
    return [(len(requests), request.data) for request in requests]


@accept_batch
async def async_function(requests):
    return [(len(requests), request.data) for request in requests]


class SyncClass:
    @accept_batch
    def __call__(self, requests):
        return sync_function(requests)


class AsyncClass:
    @accept_batch
    async def __call__(self, requests):
        return sync_function(requests)


@pytest.mark.parametrize("backend", [sync_function, async_function, SyncClass, AsyncClass])
def test_a_full_batch_does_not_wait(serve, engine, backend):
    handle = serve(backend, route=None, config=FULL_OR_NEVER).handle
    for start in (0, 10):
        refs = [handle.remote(number) for number in range(start, start + 4)]
        assert engine.get(refs, timeout=20) == [(4, number) for number in range(start, start + 4)]


@pytest.mark.parametrize("backend", [sync_function, async_function])
def test_the_wait_ends(serve, engine, backend):
    handle = serve(backend, route=None, config={"max_batch_size": 100, "batch_wait_timeout": 0.2}).handle
    assert handle.call("alone") == (1, "alone")
    refs = [handle.remote(number) for number in range(5)]
    sizes = [size for size, _ in engine.get(refs, timeout=20)]
    assert sizes == [5] * 5


@pytest.mark.parametrize("config", [None, {"max_batch_size": 1}, {"batch_wait_timeout": 50.0}])
def test_a_batch_of_one(serve, config):
    assert serve(sync_function, route=None, config=config).call("x") == (1, "x")


def test_without_a_wait_a_batch_is_what_came_meanwhile(serve, engine, gate):
    @accept_batch
    async def backend(requests):
        if not gate.is_open():
            await gate.apass_through()
        return sync_function(requests)

    config = {"max_batch_size": 3, "max_concurrent_queries": 3}
    handle = serve(backend, route=None, config=config).handle
    refs = [handle.remote(number) for number in range(9)]
    gate.wait_for_arrivals(1)
    gate.open()
    results = engine.get(refs, timeout=20)
    assert [number for _, number in results] == list(range(9))
    assert all(1 <= size <= 3 for size, _ in results)


def test_http_and_handle_share_a_batch(serve, engine):
    @accept_batch
    def kinds(requests):
        return [[len(requests), isinstance(request, Request)] for request in requests]

    served = serve(kinds, config={"max_batch_size": 3, "batch_wait_timeout": 50.0})
    answers = []
    thread = threading.Thread(target=lambda: answers.append(served.http_json()))
    thread.start()
    refs = [served.handle.remote() for _ in range(2)]
    assert engine.get(refs, timeout=20) == [[3, False]] * 2
    thread.join()
    assert answers == [[3, True]]


def test_mixed_methods_are_grouped(serve, engine):
    class Backend:
        @accept_batch
        def __call__(self, requests):
            return [["call", [value_of(item) for item in requests]] for _ in requests]

        @accept_batch
        def other(self, requests):
            return [["other", [value_of(item) for item in requests]] for _ in requests]

    handle = serve(Backend, route=None, config={"max_batch_size": 4, "batch_wait_timeout": 1.0}).handle
    other = handle.options(method_name="other")
    refs = [handle.remote(1), other.remote(2), handle.remote(3), other.remote(4)]
    assert engine.get(refs, timeout=20) == [
        ["call", [1, 3]],
        ["other", [2, 4]],
        ["call", [1, 3]],
        ["other", [2, 4]],
    ]


def test_plain_methods_beside_batched_ones(serve, engine):
    class Backend:
        @accept_batch
        def __call__(self, requests):
            return sync_function(requests)

        def plain(self, value):
            return ["plain", value]

    served = serve(Backend, route=None, config={"max_batch_size": 2, "batch_wait_timeout": 50.0})
    assert served.call(5, method_name="plain") == ["plain", 5]
    assert engine.get([served.handle.remote(number) for number in range(2)], timeout=20) == [(2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("result", "message"),
    [(["one"], r"1\b.*4|4\b.*1\b"), (["one"] * 5, r"5\b.*4|4\b.*5\b"), (7, "list"), (None, "list")],
    ids=["too few", "too many", "a number", "nothing"],
)
def test_results_must_match_the_requests(serve, result, message):
    @accept_batch
    def backend(requests):
        return result if requests[0].data == "wrong" else sync_function(requests)

    handle = serve(backend, route=None, config=FULL_OR_NEVER).handle
    for ref in [handle.remote("wrong") for _ in range(4)]:
        with pytest.raises(errors.BackendError, match=message):
            ref.future().result(20)
    assert [ref.future().result(20) for ref in [handle.remote("right") for _ in range(4)]] == [(4, "right")] * 4


def _items(requests):
    return (request.data * 2 for request in requests)


@accept_batch
def returns(requests):
    kind = requests[0].data
    if kind == "array":
        return np.arange(3)
    if kind == "rows":
        return np.arange(6).reshape(3, 2)
    return {"tuple": tuple, "generator": iter, "deque": deque}[kind](list(_items(requests)))


@accept_batch
async def returns_in_time(requests):
    for item in _items(requests):
        await asyncio.sleep(0)
        yield item


@accept_batch
async def fails_in_time(requests):
    yield 1
    raise KeyError("batch")


@accept_batch
def fails_in_a_generator(requests):
    return (1 // (number - 1) for number in range(3))


THREE = {"max_batch_size": 3, "batch_wait_timeout": 50.0}


def test_results_in_any_order_there_is(serve, engine):
    handle = serve(returns, route=None, config=THREE).handle
    for kind, expected in [
        *[(kind, [kind * 2] * 3) for kind in ("tuple", "generator", "deque")],
        ("array", [0, 1, 2]),
        ("rows", [[0, 1], [2, 3], [4, 5]]),
    ]:
        results = engine.get([handle.remote(kind) for _ in range(3)], timeout=20)
        assert [getattr(result, "tolist", lambda result=result: result)() for result in results] == expected
    handle = serve(returns_in_time, route=None, config=THREE).handle
    assert engine.get([handle.remote(number) for number in range(3)], timeout=20) == [0, 2, 4]


@pytest.mark.parametrize(("backend", "kind"), [(fails_in_time, KeyError), (fails_in_a_generator, ZeroDivisionError)])
def test_a_generator_of_results_that_fails(serve, backend, kind):
    handle = serve(backend, route=None, config=THREE).handle
    for ref in [handle.remote() for _ in range(3)]:
        with pytest.raises(kind):
            ref.future().result(20)


def test_what_has_no_order_is_no_batch_of_results(serve):
    @accept_batch
    def backend(requests):
        kinds = {"text": "abc", "bytes": b"abc", "dict": {1: 1, 2: 2, 3: 3}, "set": {1, 2, 3}, "endless": count()}
        return kinds[requests[0].data]

    handle = serve(backend, route=None, config=THREE).handle
    for kind in ("text", "bytes", "dict", "set", "endless"):
        for ref in [handle.remote(kind) for _ in range(3)]:
            with pytest.raises(errors.BackendError, match="must return a list"):
                ref.future().result(20)


def test_a_class_is_not_marked_but_its_method_is(serve, engine):
    class Backend:
        @accept_batch
        @staticmethod
        def many(requests):
            return [len(requests)] * len(requests)

    with pytest.raises(errors.InvalidArgument, match="put it on the method of Backend"):
        accept_batch(Backend)
    with pytest.raises(errors.InvalidArgument, match="not an object: put it on the method of Backend"):
        accept_batch(Backend())
    with pytest.raises(errors.InvalidArgument, match="cannot mark"):
        accept_batch(Backend().many.__call__)
    handle = serve(Backend, route=None, config=THREE).handle.options(method_name="many")
    assert engine.get([handle.remote(number) for number in range(3)], timeout=20) == [3, 3, 3]


def test_batches_of_one_need_no_mark(serve, engine):
    served = serve(lambda request: request.data, route=None, config={"max_batch_size": 1})
    assert served.call("x") == "x"
    with pytest.raises(errors.InvalidArgument, match="accept_batch"):
        engine.update_backend_config(served.tag, {"max_batch_size": 2})


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_error_reaches_every_caller_of_the_batch(serve, kind):
    @accept_batch
    def sync(requests):
        raise KeyError("batch")

    @accept_batch
    async def asynchronous(requests):
        raise KeyError("batch")

    backend = sync if kind == "sync" else asynchronous
    handle = serve(backend, route=None, config=FULL_OR_NEVER).handle
    for ref in [handle.remote(number) for number in range(4)]:
        with pytest.raises(KeyError, match="batch"):
            ref.future().result(20)


def test_each_http_client_gets_its_own_kind_of_answer(serve):
    from starlette.responses import Response

    @accept_batch
    def backend(requests):
        return [Response(request.query_params["n"], status_code=200 + int(request.query_params["n"]))
                for request in requests]  # fmt: skip

    served = serve(backend, config={"max_batch_size": 2, "batch_wait_timeout": 50.0})
    answers = {}

    def ask(number):
        response = served.http(params={"n": number})
        answers[number] = (response.status_code, response.text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {1: (201, "1"), 2: (202, "2")}


def test_batch_size_can_be_updated(serve, engine):
    served = serve(sync_function, route=None, config={"max_batch_size": 2, "batch_wait_timeout": 50.0})
    assert engine.get([served.handle.remote(number) for number in range(2)], timeout=20) == [(2, 0), (2, 1)]
    engine.update_backend_config(served.tag, {"max_batch_size": 3})
    assert engine.get([served.handle.remote(number) for number in range(3)], timeout=20) == [(3, 0), (3, 1), (3, 2)]


def test_a_call_with_more_than_one_argument_is_refused_alone(serve):
    class Backend:
        @accept_batch
        def many(self, items):
            return [item * 2 for item in items]

    handle = serve(Backend, route=None, config={"max_batch_size": 4, "batch_wait_timeout": 0.2}).handle.options(
        method_name="many"
    )
    good, two, named = handle.remote(1), handle.remote(1, 2), handle.remote(1, k=2)
    assert good.future().result(20) == 2
    for bad in (two, named):
        with pytest.raises(errors.InvalidArgument, match="one argument"):
            bad.future().result(20)
