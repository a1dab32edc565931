"""What backends return and raise, as HTTP."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import json
import pathlib
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy
import pytest
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from engine import errors
from engine.http.failures import failure_head
from engine.http.heads import decode_head, encode_head
from engine.http.results import Encoded, encode_result
from engine.http.streams import Streamed
from engine.seam.jsonable import to_json


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: float
    tags: set[str]


SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.4"}}


def whole(result: Any) -> tuple[int, dict[bytes, bytes], bytes]:
    encoded = encode_result(result)
    assert isinstance(encoded, Encoded)
    status, headers = decode_head(encoded.head)
    return status, dict(headers), encoded.body


def streamed(result: Any) -> Streamed:
    encoded = encode_result(result)
    assert isinstance(encoded, Streamed)
    return encoded


async def collect(stream: Streamed, **options: Any) -> tuple[int, dict[bytes, bytes], list[bytes]]:
    parts = [part async for part in stream.parts(SCOPE, **options)]
    status, headers = decode_head(parts[0][0])
    assert all(head == b"" for head, _ in parts[1:])
    return status, dict(headers), [chunk for _, chunk in parts]


# -- heads ---------------------------------------------------------------------------------------------------------


def test_heads_survive_the_way() -> None:
    headers = [(b"a", b"1"), (b"a", b"2"), (b"x", b'\xe4"\\')]
    for _ in range(2):  # read, and read again from memory
        status, again = decode_head(encode_head(404, headers))
        assert (status, again) == (404, headers)
        again.append((b"mine", b"only"))


def test_read_heads_do_not_pile_up() -> None:
    for number in range(2000):
        assert decode_head(encode_head(200, [(b"n", b"%d" % number)]))[1] == [(b"n", b"%d" % number)]


# -- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "content_type", "body"),
    [
        ("hü", b"text/plain; charset=utf-8", "hü".encode()),
        (numpy.str_("s"), b"text/plain; charset=utf-8", b"s"),
        (b"\xff", b"application/octet-stream", b"\xff"),
        (bytearray(b"a"), b"application/octet-stream", b"a"),
        (memoryview(b"ab"), b"application/octet-stream", b"ab"),
        ({"a": [1, 2.5, None, True, "ü"]}, b"application/json", '{"a":[1,2.5,null,true,"ü"]}'.encode()),
        ([], b"application/json", b"[]"),
        (7, b"application/json", b"7"),
        (True, b"application/json", b"true"),
        ((1, 2), b"application/json", b"[1,2]"),
        (Colour.RED, b"application/json", b'"red"'),
        (Point(1.5, {"t"}), b"application/json", b'{"x":1.5,"tags":["t"]}'),
        (numpy.arange(4).reshape(2, 2), b"application/json", b"[[0,1],[2,3]]"),
        (numpy.float32(0.5), b"application/json", b"0.5"),
    ],
)
def test_whole_results(result: Any, content_type: bytes, body: bytes) -> None:
    status, headers, sent = whole(result)
    assert status == 200
    assert sent == body
    assert headers == {b"content-length": b"%d" % len(body), b"content-type": content_type}


def test_nothing() -> None:
    assert whole(None) == (200, {b"content-length": b"0"}, b"")


def test_json_of_everything() -> None:
    from pydantic import BaseModel

    class Model(BaseModel):
        when: datetime.date
        inner: list[Point]

    value = {
        "model": Model(when=datetime.date(2024, 2, 29), inner=[Point(1, set())]),
        "many": [Point(2, {"a"}), Model(when=datetime.date(2000, 1, 1), inner=[])],
        "time": datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
        "clock": datetime.time(1, 2),
        "span": datetime.timedelta(seconds=1.5),
        "uuid": uuid.UUID(int=1),
        "error": ValueError("no luck"),
        "decimal": decimal.Decimal("1.250"),
        "level": Level.HIGH,
        "path": pathlib.PurePosixPath("/a/b"),
        "deque": collections.deque([1, 2]),
        "keys": {"a": 1}.keys(),
        "range": range(3),
        "array": numpy.array([[True]]),
        "bytes": b"text",
        "proxy": type.__dict__.__class__({"k": numpy.int64(4)}),
        "chain": collections.ChainMap({"c": 1}),
    }
    assert json.loads(to_json(value)) == {
        "model": {"when": "2024-02-29", "inner": [{"x": 1.0, "tags": []}]},
        "many": [{"x": 2, "tags": ["a"]}, {"when": "2000-01-01", "inner": []}],
        "time": "2024-01-02T03:04:05+00:00",
        "clock": "01:02:00",
        "span": 1.5,
        "uuid": "00000000-0000-0000-0000-000000000001",
        "error": "no luck",
        "decimal": "1.250",
        "level": 3,
        "path": "/a/b",
        "deque": [1, 2],
        "keys": ["a"],
        "range": [0, 1, 2],
        "array": [[True]],
        "bytes": "text",
        "proxy": {"k": 4},
        "chain": {"c": 1},
    }


def test_keys_that_are_no_strings() -> None:
    keyed = {numpy.int64(3): "a", uuid.UUID(int=0): [Point(0, set())], Colour.RED: (1,), None: 1}
    assert json.loads(to_json(keyed)) == {
        "3": "a",
        "00000000-0000-0000-0000-000000000000": [{"x": 0, "tags": []}],
        "red": [1],
        "null": 1,
    }


def test_a_lone_surrogate_is_escaped() -> None:
    assert to_json({"a": "\ud800"}) == b'{"a":"\\ud800"}'


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": [1, object()]}, r"the result\['a'\]\[1\] is an object"),
        ({"a": int}, r"the result\['a'\] is a type"),
        ([b"\xff"], r"the result\[0\] is a bytes"),
        ({"a": {(1, 2): 3}}, r"the result\['a'\] has the key \(1, 2\), a tuple"),
    ],
)
def test_what_has_no_form_in_json(value: Any, says: str) -> None:
    with pytest.raises(errors.ResultNotSerializable, match=says):
        encode_result(value)


def test_what_is_not_a_number_or_contains_itself() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_result([float("nan")])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match=r"[Cc]ircular"):
        encode_result(loop)
    loop.append({(): 1})
    with pytest.raises((ValueError, errors.ResultNotSerializable)):
        encode_result(loop)


@pytest.mark.parametrize(
    ("response", "status", "body"),
    [
        (Response(b"x", status_code=201, headers={"a": "b"}), 201, b"x"),
        (PlainTextResponse("ü"), 200, "ü".encode()),
        (JSONResponse({"a": 1}, status_code=418), 418, b'{"a":1}'),
        (Response(status_code=204), 204, b""),
    ],
)
def test_plain_responses_go_as_they_are(response: Response, status: int, body: bytes) -> None:
    encoded = encode_result(response)
    assert isinstance(encoded, Encoded)
    assert decode_head(encoded.head) == (status, response.raw_headers)
    assert encoded.body == body
    assert encoded.background is None


@pytest.mark.parametrize("length", ["4", "6", "0", "", "-5", "five", "\u00b2"])
def test_a_response_is_as_long_as_it_says(length: str) -> None:
    with pytest.raises(ValueError, match="content-length"):
        encode_result(Response(b"hello", headers={"content-length": length}))
    with pytest.raises(ValueError, match="content-length"):
        encode_result(Response(b"hello", headers={"Content-Length": length}))


@pytest.mark.parametrize(
    ("response", "method"),
    [
        (Response(b"", headers={"content-length": "1000"}), "HEAD"),
        (Response(b"", status_code=304, headers={"content-length": "1000"}), "GET"),
        (Response(b"", status_code=204, headers={"content-length": "1000"}), "GET"),
        (Response(b"hello", headers={"content-length": "5"}), "GET"),
    ],
)
def test_lengths_that_are_right_or_of_no_body(response: Response, method: str) -> None:
    encoded = encode_result(response, Request({"type": "http", "method": method}))
    assert isinstance(encoded, Encoded)
    assert decode_head(encoded.head) == (response.status_code, response.raw_headers)


@pytest.mark.anyio
async def test_a_background_task_is_handed_over() -> None:
    ran: list[int] = []
    encoded = encode_result(Response(b"", background=BackgroundTask(ran.append, 1)))
    assert isinstance(encoded, Encoded) and encoded.background is not None
    assert ran == []
    await encoded.background()
    assert ran == [1]


# -- streams -------------------------------------------------------------------------------------------------------


def numbers(closed: list[bool], *items: Any) -> Iterator[Any]:
    try:
        yield from items
    finally:
        closed.append(True)


async def async_numbers(closed: list[bool], *items: Any) -> AsyncIterator[Any]:
    try:
        for item in items:
            yield item
    finally:
        closed.append(True)


@pytest.mark.anyio
@pytest.mark.parametrize("make", [numbers, async_numbers])
@pytest.mark.parametrize("on_loop", [False, True])
@pytest.mark.parametrize(
    ("items", "content_type", "chunks"),
    [
        (("a", "ü"), b"text/plain; charset=utf-8", [b"a", "ü".encode()]),
        ((b"a", bytearray(b"b")), b"application/octet-stream", [b"a", b"b"]),
        (({"a": 1}, [2]), b"application/x-ndjson", [b'{"a":1}\n', b"[2]\n"]),
    ],
)
async def test_generators(make: Any, on_loop: bool, items: Any, content_type: bytes, chunks: list[bytes]) -> None:
    closed: list[bool] = []
    status, headers, got = await collect(streamed(make(closed, *items)), on_loop=on_loop)
    assert (status, headers, got) == (200, {b"content-type": content_type}, chunks)
    assert closed == [True]


@pytest.mark.anyio
@pytest.mark.parametrize("make", [numbers, async_numbers])
async def test_an_empty_generator_is_an_empty_answer(make: Any) -> None:
    assert await collect(streamed(make([]))) == (200, {b"content-length": b"0"}, [b""])


@pytest.mark.anyio
async def test_any_iterator_streams() -> None:
    assert (await collect(streamed(map(str, [1, 2]))))[2] == [b"1", b"2"]


@pytest.mark.anyio
@pytest.mark.parametrize("make", [numbers, async_numbers])
@pytest.mark.parametrize("on_loop", [False, True])
async def test_closing_the_parts_closes_the_generator(make: Any, on_loop: bool) -> None:
    closed: list[bool] = []
    parts = streamed(make(closed, 1, 2, 3)).parts(SCOPE, on_loop=on_loop)
    assert (await parts.__anext__())[1] == b"1\n"
    assert closed == []
    await parts.aclose()
    assert closed == [True]


@pytest.mark.anyio
@pytest.mark.parametrize("make", [numbers, async_numbers])
async def test_a_stream_that_is_not_wanted_can_be_closed(make: Any) -> None:
    closed: list[bool] = []
    source = make(closed, 1)
    await streamed(source).close()
    with pytest.raises((StopIteration, StopAsyncIteration)):
        next(source) if make is numbers else await source.__anext__()


@pytest.mark.anyio
async def test_no_item_is_asked_for_before_the_one_before_it_was_taken() -> None:
    asked: list[int] = []

    def source() -> Iterator[str]:
        for number in range(3):
            asked.append(number)
            yield str(number)

    parts = streamed(source()).parts(SCOPE)
    await parts.__anext__()
    await asyncio.sleep(0)
    assert asked == [0]
    await parts.aclose()


@pytest.mark.anyio
async def test_a_cancelled_thread_is_waited_for_before_its_generator_is_closed() -> None:
    entered, leave, closed = threading.Event(), threading.Event(), threading.Event()

    def source() -> Iterator[str]:
        try:
            entered.set()
            leave.wait(10)
            yield "late"
        finally:
            closed.set()

    async def consume() -> None:
        async for _ in streamed(source()).parts(SCOPE, on_loop=True):
            raise AssertionError

    task = asyncio.ensure_future(consume())
    await asyncio.get_running_loop().run_in_executor(None, entered.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    assert not closed.is_set()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()


@pytest.mark.anyio
async def test_an_error_in_the_middle_arrives_in_the_middle() -> None:
    def source() -> Iterator[str]:
        yield "a"
        raise ZeroDivisionError

    parts = streamed(source()).parts(SCOPE)
    assert (await parts.__anext__())[1] == b"a"
    with pytest.raises(ZeroDivisionError):
        await parts.__anext__()


@pytest.mark.anyio
async def test_a_streaming_response_goes_as_it_is() -> None:
    ran: list[int] = []
    closed: list[bool] = []
    response = StreamingResponse(
        async_numbers(closed, "a", b"b"),
        status_code=203,
        media_type="text/x",
        headers={"h": "v"},
        background=BackgroundTask(ran.append, 1),
    )
    stream = streamed(response)
    status, headers, chunks = await collect(stream)
    assert status == 203
    assert headers == {b"h": b"v", b"content-type": b"text/x; charset=utf-8"}
    assert b"".join(chunks) == b"ab"
    assert closed == [True]
    assert stream.background is not None
    await stream.background()
    assert ran == [1]


@pytest.mark.anyio
async def test_the_background_task_does_not_hold_up_the_end() -> None:
    may_end = asyncio.Event()
    stream = streamed(StreamingResponse(async_numbers([], "a"), background=BackgroundTask(may_end.wait)))
    await collect(stream)
    assert stream.background is not None
    may_end.set()
    await stream.background()


@pytest.mark.anyio
async def test_closing_closes_what_a_streaming_response_streams() -> None:
    closed: list[bool] = []
    ran: list[int] = []
    response = StreamingResponse(async_numbers(closed, "a", "b"), background=BackgroundTask(ran.append, 1))
    stream = streamed(response)
    parts = stream.parts(SCOPE)
    assert (await parts.__anext__())[1] == b"a"
    await parts.aclose()
    assert closed == [True]
    assert ran == [] and stream.background is None


@pytest.mark.anyio
async def test_a_streaming_response_of_a_plain_iterator() -> None:
    closed: list[bool] = []
    assert b"".join((await collect(streamed(StreamingResponse(numbers(closed, "a", "b")))))[2]) == b"ab"
    assert closed == [True]


@pytest.mark.anyio
@pytest.mark.parametrize(("length", "fits"), [("0", 0), ("1", 1), ("3", 2), ("2, 2", 0), ("2", 3)])
async def test_a_streaming_response_is_as_long_as_it_says(length: str, fits: int) -> None:
    closed: list[bool] = []
    ran: list[int] = []
    background = BackgroundTask(ran.append, 1)
    response = StreamingResponse(
        async_numbers(closed, "a", "b"), headers={"content-length": length}, background=background
    )
    stream = streamed(response)
    got: list[bytes] = []
    with pytest.raises(ValueError, match="content-length") if fits < 3 else contextlib.nullcontext():
        async for _, chunk in stream.parts(SCOPE):
            got += [chunk]
    assert got == [b"a", b"b", b""][:fits]
    assert (stream.background is None) == (fits < 3)


@pytest.mark.anyio
async def test_a_stream_without_a_body_may_have_any_length() -> None:
    length = {"content-length": "1000"}
    response = StreamingResponse(iter(()), status_code=304, headers=length)
    assert (await collect(streamed(response)))[1] == {b"content-length": b"1000"}
    parts = streamed(StreamingResponse(iter(()), headers=length)).parts(SCOPE | {"method": "HEAD"})
    assert [chunk async for _, chunk in parts] == [b""]


@pytest.mark.anyio
async def test_lengths_that_contradict_each_other() -> None:
    response = StreamingResponse(iter(["ab"]))
    response.raw_headers += [(b"content-length", b"2"), (b"Content-Length", b"3")]
    with pytest.raises(ValueError, match="more than one"):
        await collect(streamed(response))


@pytest.mark.anyio
async def test_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "big.bin"
    path.write_bytes(b"0123456789" * 20_000)
    status, headers, chunks = await collect(streamed(FileResponse(path)))
    assert status == 200
    assert headers[b"content-length"] == b"200000"
    assert b"".join(chunks) == path.read_bytes()
    with pytest.raises(RuntimeError, match="does not exist"):
        await collect(streamed(FileResponse(tmp_path / "missing")))


@pytest.mark.anyio
async def test_home_made_responses() -> None:
    class Own(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
            await send({"type": "http.response.other"})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await send({"type": "http.response.body"})

    class Silent(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            pass

    class Waiting(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await receive()

    assert await collect(streamed(Own())) == (200, {b"a": b"b"}, [b"x", b""])
    with pytest.raises(RuntimeError, match="before its answer was complete"):
        await collect(streamed(Silent()))
    parts = streamed(Waiting()).parts(SCOPE)
    assert (await parts.__anext__())[1] == b"x"
    await parts.aclose()


# -- failures ------------------------------------------------------------------------------------------------------


def failed(error: BaseException, **options: Any) -> tuple[int, dict[bytes, bytes], bytes]:
    head, body = failure_head(error, **options)
    status, headers = decode_head(head)
    return status, dict(headers), body


@pytest.mark.parametrize(
    ("error", "status", "later"),
    [
        (ValueError("secret"), 500, False),
        (errors.MethodNotFound("secret"), 400, False),
        (errors.EndpointNotFound("secret"), 404, False),
        (errors.Overloaded("secret"), 503, True),
        (errors.NoReplica("secret"), 503, True),
        (errors.ResourcesUnavailable("secret"), 503, True),
        (errors.ReplicaDied("secret"), 502, False),
        (errors.DeadlineExceeded("secret"), 504, False),
        (errors.EngineClosed("secret"), 503, False),
        (errors.ResultNotSerializable("secret"), 500, False),
        (TimeoutError("secret"), 500, False),
        (asyncio.CancelledError(), 500, False),
        (SystemExit(3), 500, False),
    ],
)
def test_failures(error: BaseException, status: int, later: bool) -> None:
    got, headers, body = failed(error)
    assert got == status
    assert headers[b"content-type"] == b"text/plain; charset=utf-8"
    assert headers[b"content-length"] == b"%d" % len(body)
    assert (b"retry-after" in headers) == later
    assert body and b"secret" not in body and b"Traceback" not in body


def test_debug_shows_the_traceback() -> None:
    try:
        raise ValueError("secret")
    except ValueError as error:
        status, _, body = failed(error, debug=True)
    assert status == 500
    assert body.startswith(b"Traceback") and b"ValueError: secret" in body
    status, headers, body = failed(errors.NoReplica("the last one because of OSError: no model"), debug=True)
    assert status == 503
    assert body.startswith(b"Nothing can serve this request") and body.endswith(b"OSError: no model")
    assert headers[b"content-length"] == b"%d" % len(body)


def test_http_exceptions() -> None:
    assert failed(HTTPException(404, "gone", {"X-A": "b"})) == (
        404,
        {b"content-length": b"4", b"content-type": b"text/plain; charset=utf-8", b"x-a": b"b"},
        b"gone",
    )
    assert failed(HTTPException(204)) == (204, {}, b"")
    assert failed(HTTPException(304, headers={"Content-Length": "7"})) == (304, {b"content-length": b"7"}, b"")
    assert failed(HTTPException(205, headers={"Content-Length": "7"}))[0] == 500
    assert failed(HTTPException(304, headers={"Content-Length": "seven"}))[0] == 500
    status, headers, body = failed(HTTPException(409, {"why": "x"}))  # type: ignore[arg-type]
    assert (status, headers[b"content-type"], body) == (409, b"application/json", b'{"detail":{"why":"x"}}')
    headers = failed(HTTPException(418, "<p>", {"Content-Type": "text/html", "Content-Length": "99"}))[1]
    assert headers == {b"content-length": b"3", b"content-type": b"text/html"}


def test_fastapi_exceptions_answer_in_json() -> None:
    from fastapi import HTTPException as FastAPIException

    class Own(FastAPIException):
        pass

    for error in (FastAPIException(403, "no"), Own(403, "no")):
        status, headers, body = failed(error)
        assert (status, headers[b"content-type"], body) == (403, b"application/json", b'{"detail":"no"}')


def test_an_unreadable_form_is_the_clients_fault() -> None:
    assert failed(MultiPartException("no boundary"))[::2] == (400, b"no boundary")


def test_nothing_is_a_response_where_starlette_was_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("starlette.responses", "starlette.exceptions", "starlette.formparsers"):
        monkeypatch.delitem(sys.modules, name)
    assert whole({"a": 1})[2] == b'{"a":1}'
    with pytest.raises(errors.ResultNotSerializable):
        encode_result(PlainTextResponse("x"))
    assert failed(HTTPException(404))[0] == 500
