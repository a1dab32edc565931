"""Nothing of a call is kept in memory when it is over: no cycle of references waits for the collector.

Bodies, arguments and results may be large, and a process that serves makes too few objects for the collector to run
often. So each process of an engine is asked, with its collector off, what there is to collect after calls of each kind.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from engine import Engine, accept_batch, errors


def forget() -> None:
    """Collect what there is, and then leave all garbage where it is.

    What is there now is no garbage of what follows. It is put aside, since looking through it takes long where much is
    imported.
    """
    gc.disable()
    gc.collect()
    gc.freeze()


def garbage() -> list[str]:
    """What the collector finds, and would have had to find: the kinds of the objects, the most frequent first."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        kinds = [
            f"{type(found).__module__}.{getattr(found, '__qualname__', type(found).__qualname__)}"
            for found in gc.garbage
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()
    return [f"{kind} x{count}" for kind, count in collections.Counter(kinds).most_common()]


class TellsGarbage:
    """A middleware that answers for the ingress's own process."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        ask = {"/forget": forget, "/garbage": garbage}.get(scope.get("path", ""))
        if ask is None:
            await self.app(scope, receive, send)
        else:
            await JSONResponse(ask())(scope, receive, send)


def parts(fail: bool = False) -> Iterator[str]:
    yield "part"
    if fail:
        raise ValueError("in the middle")


async def async_parts(fail: bool = False) -> AsyncIterator[str]:
    for part in parts(fail):
        yield part


def endless() -> Iterator[bytes]:
    while True:
        yield b"x" * 10_000


async def fails_later() -> None:
    raise ValueError("later")


ACTS: dict[str, Callable[[], Any]] = {
    "forget": forget,
    "garbage": garbage,
    "text": lambda: "text",
    "large": lambda: "x" * 500_000,
    "response": lambda: JSONResponse({"a": 1}),
    "iterator": parts,
    "async iterator": async_parts,
    "streaming response": lambda: StreamingResponse(async_parts()),
    "broken iterator": lambda: parts(fail=True),
    "broken async iterator": lambda: async_parts(fail=True),
    "background": lambda: PlainTextResponse("text", background=BackgroundTask(fails_later)),
    "endless": endless,
}


def act(request: Any) -> Any:
    kind = request.query_params["kind"]
    if kind == "failure":
        raise ValueError("of the backend")
    if kind == "exception":
        raise HTTPException(404, "not here")
    if kind == "slow":
        time.sleep(0.1)
        return "slow"
    if kind == "unpicklable":
        return (part for part in "x"), 1
    return ACTS[kind]()


def plain(request: Any) -> Any:
    return act(request)


async def asynchronous(request: Any) -> Any:
    if request.query_params["kind"] == "slow":
        await asyncio.sleep(0.1)
        return "slow"
    if request.query_params["kind"] == "form":
        return str(len(await request.form()))
    return act(request)


@accept_batch
def batched(requests: list[Any]) -> list[Any]:
    if any(request.query_params["kind"] == "failure" for request in requests):
        raise ValueError("of the batch")
    return [act(request) for request in requests]


BACKENDS = {"plain": plain, "async": asynchronous, "batched": batched}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    options = {"port": 0, "middlewares": [TellsGarbage], "request_timeout_s": 20}
    with Engine(backend="local", http_options=options) as engine:
        for name, backend in BACKENDS.items():
            # one call at a time: when the next one is served, the one before is over
            config = {"max_concurrent_queries": 1} | ({"max_batch_size": 4} if name == "batched" else {})
            engine.create_backend(name, backend, config=config)
            engine.create_endpoint(name, backend=name, route=f"/{name}", methods=["GET", "POST"])
        yield engine


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


TIMES = 2


def over_http(engine: Engine, name: str, kind: str, **options: Any) -> None:
    with httpx.Client(**{key: options.pop(key) for key in ("http1", "http2") if key in options}) as client:
        for _ in range(TIMES):
            method = "POST" if options else "GET"
            sent = {key: value() if callable(value) else value for key, value in options.items()}
            with contextlib.suppress(httpx.HTTPError):
                client.request(method, f"{engine.http_url}/{name}", params={"kind": kind}, **sent)


def left(engine: Engine, name: str, kind: str, **options: Any) -> None:
    """The client leaves in the middle of the answer, or while it waits."""
    for _ in range(TIMES):
        with contextlib.suppress(httpx.HTTPError), httpx.Client(timeout=0.08, **options) as client:
            with client.stream("GET", f"{engine.http_url}/{name}", params={"kind": kind}) as response:
                next(response.iter_raw())


def body(size: int) -> Callable[[], Iterator[bytes]]:
    def chunks() -> Iterator[bytes]:
        yield from [b"x" * 1000] * (size // 1000)

    return chunks


HTTP2 = {"http1": False, "http2": True}
OVER_HTTP: dict[str, Callable[[Engine, str], None]] = {
    **{
        kind: lambda engine, name, kind=kind: over_http(engine, name, kind)  # type: ignore[misc]
        for kind in (*ACTS, "failure", "exception", "unpicklable", "slow")
        if kind not in ("forget", "garbage", "endless")
    },
    "post": lambda engine, name: over_http(engine, name, "text", content=b"x" * 300_000),
    "slow post": lambda engine, name: over_http(engine, name, "slow", content=b"x" * 300_000),
    "failed post": lambda engine, name: over_http(engine, name, "failure", content=b"x" * 300_000),
    "post in chunks": lambda engine, name: over_http(engine, name, "slow", content=body(300_000)),
    "upload": lambda engine, name: over_http(
        engine, name, "form" if name == "async" else "text", files={"file": b"x" * 3000}
    ),
    "http/2": lambda engine, name: over_http(engine, name, "text", **HTTP2),
    "http/2 post": lambda engine, name: over_http(engine, name, "slow", content=b"x" * 300_000, **HTTP2),
    "http/2 stream": lambda engine, name: over_http(engine, name, "iterator", **HTTP2),
    "left early": lambda engine, name: left(engine, name, "slow"),
    "left in a stream": lambda engine, name: left(engine, name, "endless"),
    "left in a stream of http/2": lambda engine, name: left(engine, name, "endless", **HTTP2),
    "not found": lambda engine, name: over_http(engine, f"{name}/not/there", "text", content=b"x" * 300_000),
}


@pytest.mark.parametrize("what", OVER_HTTP)
@pytest.mark.parametrize("name", ["plain", "async"])
def test_over_http(engine: Engine, name: str, what: str) -> None:
    handle = engine.get_handle(name)
    step = OVER_HTTP[what]
    step(engine, name)  # what is made once, is not made for a call
    handle.call(kind="forget")
    httpx.get(f"{engine.http_url}/forget")
    step(engine, name)
    assert handle.call(kind="garbage") == []
    left_over = httpx.get(f"{engine.http_url}/garbage").json()
    if "http/2" in what:  # its library leaves itself behind with each connection, but nothing of a request
        left_over = [kind for kind in left_over if kind.startswith(("engine", "hypercorn"))]
    assert left_over == []


def by_call(engine: Engine, name: str, kind: str, **options: Any) -> None:
    handle = engine.get_handle(name).options(**options)
    for _ in range(TIMES):
        with contextlib.suppress(Exception):
            handle.call("x" * 100_000, kind=kind)


def by_ref(engine: Engine, name: str, kind: str, **options: Any) -> None:
    handle = engine.get_handle(name).options(**options)
    refs = [handle.remote("x" * 100_000, kind=kind) for _ in range(TIMES)]
    refs.append(handle.remote(refs[0], kind=kind))
    with contextlib.suppress(Exception):
        engine.get(refs)
    for ref in refs:
        with contextlib.suppress(Exception):
            ref.result()
        with contextlib.suppress(Exception):
            ref.future().result()


def cancelled(engine: Engine, name: str) -> None:
    for _ in range(TIMES):
        ref = engine.get_handle(name).remote("x" * 100_000, kind="slow")
        ref.cancel()
        with contextlib.suppress(errors.CallError):
            ref.result()


BY_HANDLE: dict[str, Callable[[Engine, str], None]] = {
    **{
        f"{how.__name__} {kind}": lambda engine, name, how=how, kind=kind: how(engine, name, kind)  # type: ignore[misc]
        for how in (by_call, by_ref)
        for kind in ("text", "large", "failure", "unpicklable", "iterator")
    },
    "by_call too late": lambda engine, name: by_call(engine, name, "slow", timeout_s=0.02),
    "by_ref too late": lambda engine, name: by_ref(engine, name, "slow", timeout_s=0.02),
    "by_call of a missing method": lambda engine, name: by_call(engine, name, "text", method_name="missing"),
    "cancelled": cancelled,
}


def test_by_handle(engine: Engine, name: str) -> None:
    handle = engine.get_handle(name)
    for what, step in BY_HANDLE.items():
        step(engine, name)
        handle.call(kind="forget")
        forget()
        step(engine, name)
        assert garbage() == [], what
        assert handle.call(kind="garbage") == [], what


async def awaited(engine: Engine, name: str, kind: str, **options: Any) -> None:
    handle = engine.get_handle(name, sync=False).options(**options)
    for _ in range(TIMES):
        with contextlib.suppress(Exception):
            await handle.call("x" * 100_000, kind=kind)
        with contextlib.suppress(Exception):
            await handle.remote("x" * 100_000, kind=kind)
        task = asyncio.ensure_future(handle.call("x" * 100_000, kind=kind))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(BaseException):
            await task
        del task


def test_by_async_handle(engine: Engine, name: str) -> None:
    handle = engine.get_handle(name)

    async def run() -> None:
        for kind in ("text", "large", "failure", "unpicklable", "late"):
            options = {"timeout_s": 0.02} if kind == "late" else {}
            act = "slow" if kind == "late" else kind
            await awaited(engine, name, act, **options)
            await asyncio.to_thread(handle.call, kind="forget")
            forget()
            await awaited(engine, name, act, **options)
            assert garbage() == [], kind
            assert await asyncio.to_thread(lambda: handle.call(kind="garbage")) == [], kind

    asyncio.run(run())
