"""Whatever user code raises or returns is answered, and the replica serves on: failing a call cannot fail.

A replica here holds one call at a time, so that the next call is served only if the one before left no slot taken.
"""

from __future__ import annotations

import asyncio
import builtins
import concurrent.futures
import dataclasses
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, StreamingResponse

from engine import accept_batch, errors


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit("no text")

    __repr__ = __str__


class StrangeText(str):
    def __reduce__(self):
        raise ValueError("strange text does not travel")


class StrangelyPrinted(Exception):
    def __str__(self):
        return StrangeText("strange")


class Unpicklable(Exception):
    def __reduce__(self):
        raise KeyboardInterrupt


class NotRebuilt(Exception):
    def __init__(self, first, second):
        super().__init__(first)

    def __setstate__(self, state):
        raise SystemExit(3)


class Disguised(Exception):
    @property
    def __class__(self):
        raise RuntimeError("no class")


class Secretive(Exception):
    def __getattribute__(self, name):
        raise SystemExit(f"no {name}")


class OwnBase(BaseException):
    pass


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class NoCause(Exception):
    __cause__ = property(lambda self: 1 / 0)  # type: ignore[assignment]


class Misnamed(type):
    def __getattribute__(cls, name):
        if name in ("__qualname__", "__name__", "__module__"):
            raise KeyboardInterrupt
        return super().__getattribute__(name)


def misnamed():
    return Misnamed("Misnamed", (Exception,), {})("of a misnamed type")


def nowhere():
    return type("Nowhere", (Exception,), {"__module__": "a_module_that_is_nowhere"})("nowhere")


def chained():
    error = Unprintable()
    error.__cause__ = Secretive()
    error.__context__ = OwnBase()
    return error


def ring():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


def group():
    kind = getattr(builtins, "BaseExceptionGroup", lambda message, errors: ValueError(message, errors))
    return kind("many", [Unprintable(), OwnBase(), Unpicklable(), nowhere()])


ZOO: dict[str, Callable[[], BaseException]] = {
    "unprintable": Unprintable,
    "strangely printed": StrangelyPrinted,
    "unpicklable": Unpicklable,
    "not rebuilt": lambda: NotRebuilt(1, 2),
    "disguised": Disguised,
    "secretive": Secretive,
    "own base": OwnBase,
    "frozen": lambda: Frozen(7),
    "no cause": NoCause,
    "misnamed": misnamed,
    "nowhere": nowhere,
    "chained": chained,
    "a ring": ring,
    "a group": group,
    "holds anything": lambda: ValueError(object(), lambda: None, sys),
    "large": lambda: ValueError("x" * 3_000_000),
    "surrogate": lambda: ValueError("\udc80\x00"),
    "SystemExit": lambda: SystemExit(0),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "StopIteration": lambda: StopIteration(1),
    "StopAsyncIteration": StopAsyncIteration,
    "CancelledError": asyncio.CancelledError,
    "CancelledError of a thread": concurrent.futures.CancelledError,
    "RecursionError": RecursionError,
    "MemoryError": MemoryError,
    "an error of the engine": lambda: errors.ReplicaDied("it did not"),
}

HTTP_ZOO: dict[str, Callable[[], BaseException]] = {
    "detail is no JSON": lambda: HTTPException(422, detail=object()),
    "detail is endless": lambda: HTTPException(422, detail=endless()),
    "header is not Latin-1": lambda: HTTPException(422, headers={"x-name": "\u20ac"}),
    "header with lines": lambda: HTTPException(422, headers={"x-name": "a\r\nset-cookie: b=c"}),
    "header name with lines": lambda: HTTPException(422, headers={"x\r\ny": "a"}),
    "headers are no mapping": lambda: HTTPException(422, headers=5),
    "header is unprintable": lambda: HTTPException(422, headers={"x-name": Unprintable()}),
    "content type with lines": lambda: HTTPException(422, headers={"content-type": "a\nb"}),
    "status is text": lambda: with_status("bad"),
    "status is negative": lambda: with_status(-1),
    "status is 99": lambda: with_status(99),
    "status is 101": lambda: with_status(101),
    "status is 1000": lambda: with_status(1000),
    "status is none": lambda: with_status(None),
}


def endless():
    value = []
    value.append(value)
    return value


def with_status(status):
    error = HTTPException(422, detail="with a status of its own")
    error.status_code = status
    return error


def with_raw_headers(*pairs):
    response = PlainTextResponse("never")
    response.raw_headers = list(pairs)
    return response


def broken_status(status):
    response = PlainTextResponse("never")
    response.status_code = status
    return response


class Reluctant:
    def __reduce__(self):
        raise SystemExit("no way")

    @property
    def __dict__(self):
        raise SystemExit("no way")

    def model_dump(self, mode):
        raise KeyboardInterrupt


RESULTS: dict[str, Callable[[], Any]] = {
    "reluctant": Reluctant,
    "in a list": lambda: [Reluctant()],
    "endless": endless,
    "a surrogate": lambda: "\udc80",
    "response with text headers": lambda: with_raw_headers(("x-name", "text")),
    "response with lines": lambda: with_raw_headers((b"x-name", b"a\r\nb")),
    "response with headers of nothing": lambda: with_raw_headers(None),
    "response with status text": lambda: broken_status("200"),
    "response with status -1": lambda: broken_status(-1),
    "response with status 100": lambda: broken_status(100),
    "response with status 1000": lambda: broken_status(1000),
    "response with status none": lambda: broken_status(None),
    "response longer than it says": lambda: PlainTextResponse("never", headers={"content-length": "1"}),
    "response shorter than it says": lambda: PlainTextResponse("never", headers={"content-length": "9"}),
    "response whose length is no number": lambda: PlainTextResponse("never", headers={"content-length": "five"}),
    "streaming response longer than it says": lambda: StreamingResponse(
        iter(["never"]), headers={"content-length": "1"}
    ),
    "empty streaming response with a length": lambda: StreamingResponse(iter(()), headers={"content-length": "1"}),
    "streaming response with status 99": lambda: StreamingResponse(iter(["never"]), status_code=99),
    "streaming response with lines": lambda: StreamingResponse(iter(["never"]), headers={"x": "a\r\nb"}),
}


def numbers_then(error: BaseException | None, count: int) -> Iterator[str]:
    for number in range(count):
        yield str(number)
    if error is not None:
        raise error


async def async_numbers_then(error, count):
    for number in range(count):
        yield str(number)
    raise error


async def fails_later_async(name):
    raise ZOO[name]()


class ClosesBadly:
    """An iterator that raises when it is closed, as it is at its end."""

    def __init__(self, error):
        self._error = error
        self._left = 1

    def __iter__(self):
        return self

    def __next__(self):
        if not self._left:
            raise StopIteration
        self._left -= 1
        return "0"

    def close(self):
        raise self._error


def act(kind: str, name: str) -> Any:
    """What the backends do, told by the caller."""
    if kind == "raise":
        raise (ZOO | HTTP_ZOO)[name]()
    if kind == "return":
        return RESULTS[name]()
    if kind == "stream":
        return numbers_then(ZOO[name](), 2)
    if kind == "stream at once":
        return numbers_then(ZOO[name](), 0)
    if kind == "async stream":
        return async_numbers_then(ZOO[name](), 2)
    if kind == "response":
        return StreamingResponse(async_numbers_then(ZOO[name](), 2))
    if kind == "close":
        return ClosesBadly(ZOO[name]())
    if kind == "background":
        return PlainTextResponse("answered", background=BackgroundTask(fails_later_async, name))
    if kind == "background of a stream":
        return StreamingResponse(numbers_then(None, 2), background=BackgroundTask(fails_later_async, name))
    return os.getpid()


def told(request: Any) -> tuple[str, str]:
    text = request.buffered_body.decode() if hasattr(request, "buffered_body") else request.data
    kind, _, name = text.partition(":")
    return kind, name


def plain(request):
    return act(*told(request))


async def asynchronous(request):
    return act(*told(request))


@accept_batch
def plain_batched(requests):
    return [act(*told(request)) for request in requests]


@accept_batch
async def async_batched(requests):
    return [act(*told(request)) for request in requests]


BACKENDS = {"plain": plain, "async": asynchronous, "plain batched": plain_batched, "async batched": async_batched}


@pytest.fixture(autouse=True)
def unheard():
    """Log nothing: the reports of tests cannot carry such texts from one process to another."""
    logger = logging.getLogger("engine")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(before)


@pytest.fixture(params=BACKENDS)
def served(serve_once, request):
    config = {"max_concurrent_queries": 1} | ({"max_batch_size": 4} if "batched" in request.param else {})
    return serve_once(BACKENDS[request.param], config=config)


def failure_of(served, what):
    """The type of what the caller gets; never the exception itself, which a failing test could not show."""
    try:
        served.call(what, timeout_s=20)
    except Exception as error:
        return type(error)
    return None


def check_rests(served, pid):
    assert served.call("pid:", timeout_s=20) == pid


def test_whatever_is_raised_by_handle(served):
    pid = served.call("pid:")
    for name in (*ZOO, *HTTP_ZOO):
        assert failure_of(served, f"raise:{name}") not in (None, errors.DeadlineExceeded), name
        check_rests(served, pid)


def test_whatever_is_raised_over_http(served):
    pid = served.call("pid:")
    for name in ZOO:
        expected = 502 if name == "an error of the engine" else 500
        assert served.http("POST", content=f"raise:{name}").status_code == expected, name
        check_rests(served, pid)
    for name in HTTP_ZOO:
        response = served.http("POST", content=f"raise:{name}")
        assert (response.status_code, response.text) == (500, "Internal Server Error"), name
        assert "set-cookie" not in response.headers
        check_rests(served, pid)


def test_whatever_is_returned(served):
    pid = served.call("pid:")
    for name in RESULTS:
        response = served.http("POST", content=f"return:{name}")
        assert (response.status_code, response.text) == (500, "Internal Server Error"), name
        assert "x-request-id" in response.headers, name
        check_rests(served, pid)
    for name in ("reluctant", "in a list"):
        assert failure_of(served, f"return:{name}") in (errors.ResultNotSerializable, errors.RemoteError)
        check_rests(served, pid)


def test_whatever_breaks_a_stream_off(served):
    pid = served.call("pid:")
    for kind, name in itertools.product(("stream", "async stream", "response", "close"), ZOO):
        if kind == "response" and name in ("disguised", "secretive"):
            continue  # anyio, which runs such a response, asks for their class in the middle of a callback
        try:
            status = served.http("POST", content=f"{kind}:{name}").status_code
        except httpx.RemoteProtocolError:
            status = 0
        # the task group of such a response is so startled by this one that nothing of the stream comes out
        expected = (0, 500) if (kind, name) == ("response", "GeneratorExit") else (0,)
        assert status in expected, (kind, name)
        check_rests(served, pid)


def test_whatever_fails_before_a_stream_or_after_an_answer(served):
    pid = served.call("pid:")
    for name in ZOO:
        expected = 502 if name == "an error of the engine" else 500
        assert served.http("POST", content=f"stream at once:{name}").status_code == expected, name
        check_rests(served, pid)
        assert served.http("POST", content=f"background:{name}").text == "answered", name
        assert served.http("POST", content=f"background of a stream:{name}").text == "01", name
        check_rests(served, pid)
