"""What is larger than one message may be fails its call, on either side, and nothing else.

The limit is a gigabyte. Here it is lowered, in the replicas and in this process, so that the tests cost little.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from engine import Engine, errors
from engine.testing.instruments import eventually
from engine_wire import protocol

LIMIT = 2_500_000
LARGE = "x" * 3_000_000


def parts(*given: str) -> Iterator[str]:
    yield from given


def act(what: str) -> Any:
    if what == "result":
        return LARGE
    if what == "error":
        raise ValueError(LARGE)
    if what == "detail":
        raise HTTPException(422, detail=LARGE)
    if what == "first part":
        return parts(LARGE)
    if what == "later part":
        return parts("small", LARGE, "never")
    if what == "response":
        return StreamingResponse(parts("small", LARGE, "never"))
    if what == "log":
        logging.getLogger("of.the.backend").error("begins %s ends", LARGE)
    return "fine"


class Plain:
    def __init__(self, fail: bool = False) -> None:
        protocol.MAX_FRAME_BYTES = LIMIT
        if fail:
            raise ValueError(LARGE)

    def __call__(self, request: Any) -> Any:
        return act(request.query_params["what"])

    def reconfigure(self, user_config: Any) -> None:
        if user_config == "fail":
            raise ValueError(LARGE)


class Async(Plain):
    async def __call__(self, request: Any) -> Any:
        return act(request.query_params["what"])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(backend="local", http_options={"port": 0, "h11_max_incomplete_size": 100_000}) as engine:
        for name, backend in (("plain", Plain), ("async", Async)):
            engine.create_backend(name, backend, config={"max_concurrent_queries": 1})
            engine.create_endpoint(name, backend=name, route=f"/{name}")
        yield engine


@pytest.fixture(params=["plain", "async"])
def name(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


def test_by_handle(engine: Engine, name: str) -> None:
    handle = engine.get_handle(name)
    with pytest.raises(errors.ResultNotSerializable, match=f"the result of backend '{name}' cannot be sent: .* bytes"):
        handle.call(what="result")
    assert handle.call(what="nothing") == "fine"
    with pytest.raises(errors.RemoteError, match=r"ValueError: x+\.\.\. \(\d+ characters left out\) \.\.\.x+ \(short"):
        handle.call(what="error")
    assert handle.call(what="nothing") == "fine"


LOGGED = {
    "result": "the result of backend '{name}' cannot be sent: the message is",
    "error": "ValueError: xxx",
    "detail": "the failure of backend '{name}' cannot be sent: the message is",
    "first part": "a part of the stream of backend '{name}' cannot be sent: the message is",
    "later part": "a part of the stream of backend '{name}' cannot be sent: the message is",
    "response": "a part of the stream of backend '{name}' cannot be sent: the message is",
}


@pytest.mark.parametrize("what", LOGGED)
def test_over_http(engine: Engine, name: str, what: str, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{engine.http_url}/{name}"
    if what in ("later part", "response"):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(url, params={"what": what})
    else:
        response = httpx.get(url, params={"what": what})
        assert (response.status_code, response.text) == (500, "Internal Server Error")
    eventually(lambda: LOGGED[what].format(name=name) in caplog.text)
    assert engine.get_handle(name).call(what="nothing") == "fine"


def test_a_log_line(engine: Engine, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert engine.get_handle(name).call(what="log") == "fine"
    eventually(lambda: "characters left out" in caplog.text)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("begins")]
    assert line.endswith("xxx ends")
    assert len(line) < LIMIT


def test_errors_of_the_constructor_and_of_reconfigure(engine: Engine, name: str) -> None:
    backend = {"plain": Plain, "async": Async}[name]
    with pytest.raises(errors.RemoteError, match="ValueError: xxx"):
        engine.create_backend("fails", backend, True)
    with pytest.raises(errors.RemoteError, match="ValueError: xxx"):
        engine.update_backend_config(name, {"user_config": "fail"})
    assert engine.get_handle(name).call(what="nothing") == "fine"


def test_on_the_calling_side(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", LIMIT)
    handle = engine.get_handle(name)
    with pytest.raises(errors.InvalidArgument, match=r"the message is \d+ bytes, more than .* split the data"):
        handle.call(LARGE)
    with pytest.raises(errors.InvalidArgument, match=r"the message is \d+ bytes"):
        handle.remote(LARGE).result()

    async def call() -> None:
        await engine.get_handle(name, sync=False).call(LARGE)

    with pytest.raises(errors.InvalidArgument, match=r"the message is \d+ bytes"):
        asyncio.run(call())
    with pytest.raises(errors.InvalidArgument, match="the method's name"):
        handle.options(method_name="x" * 70_000).call()
    with pytest.raises(errors.InvalidArgument, match=r"the message is \d+ bytes"):
        engine.update_backend_config(name, {"user_config": LARGE})
    assert handle.call(what="nothing") == "fine"
    assert engine.statistics()["backends"][name]["in_flight"] == 0
    url = f"{engine.http_url}/{name}"
    assert httpx.get(url, headers={"X-SERVE-CALL-METHOD": "\u00e9".encode("latin-1") * 40_000}).status_code == 413
    assert handle.call(what="nothing") == "fine"
