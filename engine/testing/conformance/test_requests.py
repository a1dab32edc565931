"""What a backend reads of a request, row by row, over HTTP and from a handle."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
from starlette.requests import Request

from engine import ServeRequest

LONG_TEXT = "a long string, ÿ and ☃, " * 10_000


async def read_headers(request: Any) -> Any:
    headers = request.headers
    return [headers["x-token"], headers["X-TOKEN"], headers.get("X-Token"), "x-token" in headers, "x-absent" in headers]


async def read_method(request: Any) -> Any:
    return [request.method]


async def read_json(request: Any) -> Any:
    return await request.json()


async def read_form(request: Any) -> Any:
    form = await request.form()
    return {key: form[key] for key in form}


async def read_query(request: Any) -> Any:
    return dict(request.query_params)


async def read_number(request: Any) -> Any:
    return {"n": int(request.query_params["n"])}


async def read_list(request: Any) -> Any:
    return {"n": request.query_params.getlist("n")}


async def read_body(request: Any) -> Any:
    body = await request.body()
    return [type(body).__name__, body.decode()]


async def read_body_twice(request: Any) -> Any:
    return [(await request.body()).decode(), (await request.body()).decode()]


async def read_stream(request: Any) -> Any:
    return [b"".join([chunk async for chunk in request.stream()]).decode()]


@dataclass(frozen=True)
class Row:
    """One row of the table: how an HTTP client and a handle's user say the same, and what the backend reads."""

    name: str
    read: Callable[[Any], Any]
    reads: Any
    verb: str = "GET"
    http: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    data: tuple[Any, ...] = ()
    query: dict[str, Any] = field(default_factory=dict)


NESTED = {"a": [1, 2.5, None, True], "ÿ": {"deep": "☃"}}
NESTED_TEXT = '{"a": [1, 2.5, null, true], "ÿ": {"deep": "☃"}}'
ROWS = [
    Row(
        "headers",
        read_headers,
        ["abc", "abc", "abc", True, False],
        http={"headers": {"X-Token": "abc"}},
        options={"http_headers": {"X-Token": "abc"}},
    ),
    Row("method-default", read_method, ["GET"]),
    Row("method-post", read_method, ["POST"], verb="POST", options={"http_method": "POST"}),
    Row("method-in-lower-case", read_method, ["POST"], verb="POST", options={"http_method": "post"}),
    Row("method-delete", read_method, ["DELETE"], verb="DELETE", options={"http_method": "DELETE"}),
    Row("json-object", read_json, NESTED, verb="POST", http={"json": NESTED}, data=(NESTED,)),
    Row("json-array", read_json, [1, [2]], verb="POST", http={"json": [1, [2]]}, data=([1, [2]],)),
    Row("json-text", read_json, NESTED, verb="POST", http={"content": NESTED_TEXT}, data=(NESTED_TEXT,)),
    Row("form", read_form, {"a": "1", "b": "ÿ &="}, verb="POST", http={"data": {"a": "1", "b": "ÿ &="}},
        data=({"a": "1", "b": "ÿ &="},)),
    Row("query", read_query, {"a": "b", "c": "ÿ &="}, http={"params": {"a": "b", "c": "ÿ &="}},
        query={"a": "b", "c": "ÿ &="}),
    Row("query-number", read_number, {"n": 5}, http={"params": {"n": 5}}, query={"n": 5}),
    Row("query-list", read_list, {"n": ["a", "b"]}, http={"params": {"n": ["a", "b"]}}, query={"n": ["a", "b"]}),
    Row("query-and-data", read_query, {"a": "b"}, verb="POST", http={"params": {"a": "b"}, "json": [1]}, data=([1],),
        query={"a": "b"}),
    Row("body-text", read_body, ["bytes", LONG_TEXT], verb="POST", http={"content": LONG_TEXT}, data=(LONG_TEXT,)),
    Row("body-bytes", read_body, ["bytes", "raw"], verb="POST", http={"content": b"raw"}, data=(b"raw",)),
    Row("body-empty", read_body, ["bytes", ""]),
    Row("body-twice", read_body_twice, ["x", "x"], verb="POST", http={"content": b"x"}, data=("x",)),
    Row("body-stream", read_stream, [LONG_TEXT], verb="POST", http={"content": LONG_TEXT}, data=(LONG_TEXT,)),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_http_and_handle_read_alike(serve_once, row):
    served = serve_once(row.read, methods=["GET", "POST", "DELETE"])
    assert served.http_json(row.verb, **row.http) == row.reads
    assert served.handle.options(**row.options).call(*row.data, **row.query) == row.reads


def test_multipart_form(serve):
    async def read(request):
        async with request.form() as form:
            upload = form["file"]
            return [form["text"], upload.filename, upload.content_type, (await upload.read()).decode()]

    served = serve(read)
    answer = served.http_json(
        "POST", data={"text": "hello"}, files={"file": ("name.txt", b"its content", "text/x-special")}
    )
    assert answer == ["hello", "name.txt", "text/x-special", "its content"]


def test_a_form_needs_a_mapping(serve):
    served = serve(read_form)
    with pytest.raises(Exception, match=r"form"):
        served.call(5)
    assert served.call({"a": "1"}) == {"a": "1"}


def test_request_types_are_told_apart(serve):
    def kind(request):
        return [isinstance(request, Request), isinstance(request, ServeRequest)]

    served = serve(kind)
    assert served.http_json() == [True, False]
    assert served.call("data") == [False, True]


class Colour(enum.Enum):
    RED = 1


def give_back_with_type(request):
    return [type(request.data).__name__, request.data]


@pytest.mark.parametrize(
    "data",
    [None, 5, "text", b"bytes", {"a": {1, 2}}, (1, (2,)), 1j, Colour.RED, range(3), ValueError("as data")],
    ids=lambda data: type(data).__name__,
)
def test_data_is_the_python_object(serve_once, data):
    name, returned = serve_once(give_back_with_type, route=None).call(data)
    assert name == type(data).__name__
    assert repr(returned) == repr(data)


def test_query_parameters_are_the_python_objects(serve):
    def give_back(request):
        again = dict(request.query_params)  # as often as wanted
        return request.query_params["x"], request.query_params.get("array"), again

    class Local:
        value = 5

    served = serve(give_back, route=None)
    x, array, again = served.handle.call(x=333, array=numpy.ones(2000), many=[1, None], of=Local())
    assert (x, array.sum()) == (333, 2000.0)
    assert sorted(again) == ["array", "many", "of", "x"]
    assert (again["x"], again["many"], again["of"].value) == (333, [1, None], 5)


def test_a_named_method_that_takes_a_request_reads_them_too(serve):
    class Backend:
        def other(self, request):
            return request.data, request.query_params["x"]

    assert serve(Backend, route=None).handle.options(method_name="other").call("data", x={1}) == ("data", {1})


@pytest.mark.anyio
async def test_query_parameters_of_an_async_handle(serve):
    async def give_back(request):
        return request.query_params["x"]

    served = serve(give_back, route=None)
    assert await served.ahandle.call(x=1j) == 1j
    assert await (await served.ahandle.remote(x=range(3))) == range(3)


def test_data_may_be_an_array(serve):
    def double(request):
        return request.data * 2

    array = numpy.arange(12.0).reshape(3, 4)
    result = serve(double, route=None).call(array)
    assert isinstance(result, numpy.ndarray)
    assert numpy.array_equal(result, array * 2)


def test_data_may_be_of_a_class_the_replica_has_never_seen(serve):
    class Local:
        def __init__(self, value):
            self.value = value

    def read(request):
        return type(request.data).__name__, request.data.value

    assert serve(read, route=None).call(Local(7)) == ("Local", 7)


def test_data_is_a_copy(serve):
    def change(request):
        request.data.append("changed there")
        return request.data

    data = ["mine"]
    assert serve(change, route=None).call(data) == ["mine", "changed there"]
    assert data == ["mine"], "the caller and the replica must not share an object in any mode"


def test_several_megabytes_pass_both_ways(serve):
    def reverse(request):
        return request.data[::-1]

    data = bytes(range(256)) * 40_000
    assert serve(reverse, route=None).call(data) == data[::-1]


def test_several_megabytes_pass_over_http(serve):
    async def reverse(request):
        return (await request.body())[::-1]

    data = bytes(range(256)) * 40_000
    assert serve(reverse).http("POST", content=data).content == data[::-1]
