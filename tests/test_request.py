"""The request objects that backends get, and Starlette requests on their way through a handle."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
from starlette.authentication import AuthCredentials, SimpleUser
from starlette.requests import Request

from engine.errors import InvalidArgument
from engine.request import ServeRequest
from engine.seam import scope_extras
from engine.seam.http_request import (
    RequestEnvelope,
    build_http_request,
    envelope_of,
    envelope_of_async,
    is_starlette_request,
    trim_scope,
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def scope(**changes: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/a/b",
        "raw_path": b"/a/b",
        "query_string": b"x=1&x=2",
        "root_path": "",
        "headers": [(b"host", b"here"), (b"cookie", b"k=v")],
        "client": ("1.2.3.4", 5),
        "server": ("127.0.0.1", 80),
        "state": {"unpicklable": lambda: None},
        "extensions": {},
        "app": object(),
        **changes,
    }


def test_what_reads_data_over_http_is_told_what_to_read_instead() -> None:
    request = build_http_request(pickle.dumps(trim_scope(scope())), b"")
    with pytest.raises(AttributeError, match=r"exists for calls by handle only: read await request\.json\(\)"):
        _ = request.data
    assert not hasattr(request, "data")


def foreign(body: bytes | None = b"", **changes: Any) -> Request:
    messages = [{"type": "http.request", "body": body or b"", "more_body": False}]

    async def receive() -> Any:
        return messages.pop(0)

    return Request(scope(**changes), receive)


# -- ServeRequest --------------------------------------------------------------------------------------------------


def test_reads_like_a_request() -> None:
    request = ServeRequest(
        {"n": 1}, kwargs={"a": "b", "n": 3, "many": [1, 2]}, method="PUT", headers=[("X-Name", "v"), ("Cookie", "k=w")]
    )
    assert request.method == "PUT"
    assert request.headers["x-name"] == request.headers["X-NAME"] == "v"
    assert request.query_params["a"] == "b"
    assert request.query_params["n"] == 3
    assert request.query_params["many"] == [1, 2]
    assert request.cookies == {"k": "w"}
    assert request.path_params == {}
    assert request.client is None
    assert str(request.url) == "/?a=b&n=3&many=1&many=2"
    assert request.base_url.path == "/"
    assert request.scope["method"] == "PUT"
    request.state.note = 1
    assert request.state.note == 1
    assert not isinstance(request, Request)
    assert not is_starlette_request(request)
    assert "PUT" in repr(request)


def test_query_parameters_are_the_very_objects_and_read_like_starlettes() -> None:
    array = object()
    params = ServeRequest(None, kwargs={"x": array, "many": (1, "b"), "none": None, "empty": []}).query_params
    assert params["x"] is params.get("x") is array
    assert [params.getlist(name) for name in ("x", "many", "none", "empty", "absent")] == (
        [[array], [1, "b"], [None], [], []]
    )
    assert params.multi_items() == [("x", array), ("many", 1), ("many", "b"), ("none", None)]
    assert dict(params) == dict(**params) == {"x": array, "many": (1, "b"), "none": None, "empty": []}
    assert "many" in params and "absent" not in params and params.get("absent", 5) == 5
    with pytest.raises(KeyError, match="absent"):
        params["absent"]
    assert str(ServeRequest(None, kwargs={"a": "b c", "n": [1, 2]}).query_params) == "a=b+c&n=1&n=2"


def test_only_what_needs_the_query_as_text_makes_it() -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise AssertionError("made into text")

    request = ServeRequest(None, kwargs={"x": Unprintable()}, headers=[("Cookie", "a=b")])
    assert request.headers["cookie"] == "a=b" and request.cookies == {"a": "b"} and request.base_url.path == "/"
    assert list(request.query_params) == ["x"] and request.query_params is request.query_params
    with pytest.raises(AssertionError, match="made into text"):
        _ = request.url


def test_data_is_the_very_object() -> None:
    data = object()
    assert ServeRequest(data, kwargs={}).data is data


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("data", "body"),
    [
        ("ü", "ü".encode()),
        (b"\xff", b"\xff"),
        (bytearray(b"ab"), b"ab"),
        (None, b""),
        ({"a": [1, None]}, b'{"a":[1,null]}'),
        (3, b"3"),
    ],
)
async def test_body(data: Any, body: bytes) -> None:
    request = ServeRequest(data, kwargs={})
    assert await request.body() == body
    assert [part async for part in request.stream()] == [body, b""]


@pytest.mark.anyio
async def test_json() -> None:
    data = {"a": 1}
    assert await ServeRequest(data, kwargs={}).json() is data
    assert await ServeRequest('{"a": 1}', kwargs={}).json() == data
    assert await ServeRequest(b'{"a": 1}', kwargs={}).json() == data
    with pytest.raises(json.JSONDecodeError):
        await ServeRequest("{", kwargs={}).json()


@pytest.mark.anyio
async def test_form() -> None:
    from starlette.datastructures import FormData, UploadFile

    upload = UploadFile(file=None)  # type: ignore[arg-type]
    request = ServeRequest({"a": "1", "n": 2, "b": b"x", "many": ["p", "q"], "file": upload}, kwargs={})
    form = await request.form()
    assert isinstance(form, FormData)
    assert (form["a"], form["n"], form["b"], form.getlist("many")) == ("1", "2", "x", ["p", "q"])
    assert form["file"] is upload
    async with request.form(max_files=3) as again:
        assert again == form
    assert await ServeRequest(form, kwargs={}).form() is form
    with pytest.raises(InvalidArgument, match="passed an int"):
        await ServeRequest(3, kwargs={}).form()


@pytest.mark.anyio
async def test_there_is_no_connection() -> None:
    request = ServeRequest(None, kwargs={})
    assert not await request.is_disconnected()
    await request.close()


def test_a_header_that_http_cannot_carry() -> None:
    with pytest.raises(InvalidArgument, match="http_headers"):
        assert ServeRequest(None, kwargs={}, headers=[("a", "\u4e2d")]).headers


def test_pickles_with_what_it_was_made_of() -> None:
    request = ServeRequest([1], kwargs={"a": "b"}, method="POST", headers=[("h", "v")])
    assert request.headers["h"] == "v"
    again = pickle.loads(pickle.dumps(request))
    assert (again.data, again.method, dict(again.query_params), again.headers["H"]) == ([1], "POST", {"a": "b"}, "v")


def test_costs_no_import_until_it_is_needed() -> None:
    program = (
        "import sys, asyncio, engine.request as r, engine.seam.http_request as h, engine.http.routes, "
        "engine.http.ingress, engine.http.results, engine.http.failures\n"
        "q = r.ServeRequest({'a': 1}, kwargs={'b': 'c'})\n"
        "assert asyncio.run(q.json()) == {'a': 1} and q.method == 'GET' and not h.is_starlette_request(q)\n"
        "engine.http.results.encode_result({'a': 1}); engine.http.failures.failure_head(ValueError())\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('starlette', 'hypercorn', 'anyio', 'h11', 'h2')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- HTTP requests -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_an_http_request_arrives_whole() -> None:
    original = scope(path_params={"id": 7})
    request = build_http_request(pickle.dumps(trim_scope(original)), b'{"a": 1}')
    assert isinstance(request, Request)
    assert is_starlette_request(request)
    assert request.method == "POST"
    assert request.url.path == "/a/b"
    assert request.query_params.getlist("x") == ["1", "2"]
    assert request.headers["HOST"] == "here"
    assert request.cookies == {"k": "v"}
    assert request.client is not None and request.client.host == "1.2.3.4"
    assert request.path_params == {"id": 7}
    assert await request.json() == {"a": 1}
    assert await request.body() == request.buffered_body == b'{"a": 1}'
    assert [part async for part in request.stream()] == [b'{"a": 1}', b""]
    request.state.x = 1
    assert request.state.x == 1


@pytest.mark.anyio
async def test_forms_can_be_read_as_often_as_wanted() -> None:
    headers = [(b"content-type", b"application/x-www-form-urlencoded")]
    request = build_http_request(pickle.dumps(trim_scope(scope(headers=headers))), b"a=1&b=2")
    assert dict(await request.form()) == {"a": "1", "b": "2"}
    assert await request.body() == b"a=1&b=2"


@pytest.mark.anyio
async def test_files_of_a_form_are_closed_when_the_call_is_over() -> None:
    body = b'--x\r\ncontent-disposition: form-data; name="f"; filename="n"\r\n\r\nabc\r\n--x\r\n'
    body += b'content-disposition: form-data; name="t"\r\n\r\ntext\r\n--x--\r\n'
    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = build_http_request(pickle.dumps(trim_scope(scope(headers=headers))), body)
    request.release()
    form = await request.form()
    upload = form["f"]
    assert not isinstance(upload, str)
    assert (await upload.read(), form["t"]) == (b"abc", "text")
    request.release()
    assert upload.file.closed


@pytest.mark.anyio
async def test_receive_is_a_servers() -> None:
    import anyio

    request = build_http_request(pickle.dumps(trim_scope(scope())), b"abc")
    assert await request.receive() == {"type": "http.request", "body": b"abc", "more_body": False}
    assert not await request.is_disconnected()
    with anyio.move_on_after(0.01) as waiting:  # for as long as the call is not cancelled
        await request.receive()
    assert waiting.cancelled_caught


def test_trimmed_scopes_pickle() -> None:
    trimmed = trim_scope(scope(headers=[[b"a", b"b"]]))
    assert "app" not in trimmed and "state" not in trimmed
    assert trimmed["headers"] == [(b"a", b"b")]
    assert pickle.loads(pickle.dumps(trimmed)) == trimmed


# -- through a handle ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_request_passed_on_arrives_as_one() -> None:
    request = build_http_request(pickle.dumps(trim_scope(scope(path_params={"id": 7}))), b"abc")
    envelope = pickle.loads(pickle.dumps(envelope_of(request)))
    assert isinstance(envelope, RequestEnvelope)
    again = build_http_request(envelope.head, envelope.body)
    assert isinstance(again, Request)
    assert await again.body() == b"abc"
    assert (again.path_params, again.query_params, again.headers) == (
        request.path_params,
        request.query_params,
        request.headers,
    )


@pytest.mark.anyio
async def test_a_foreign_request_must_have_been_read() -> None:
    request = foreign(b"abc", headers=[(b"content-length", b"3")])
    with pytest.raises(InvalidArgument, match=r"await request\.body"):
        envelope_of(request)
    await request.body()
    assert envelope_of(request).body == b"abc"


@pytest.mark.anyio
async def test_an_async_handle_reads_it_itself() -> None:
    assert (await envelope_of_async(foreign(b"abc"))).body == b"abc"


def test_a_request_without_a_body_needs_no_reading() -> None:
    assert envelope_of(foreign(method="GET")).body == b""
    with pytest.raises(InvalidArgument, match=r"await request\.body"):
        envelope_of(foreign(method="GET", http_version="2"))


@pytest.mark.anyio
async def test_a_consumed_request_cannot_be_passed_on() -> None:
    request = foreign(b"abc", headers=[(b"transfer-encoding", b"chunked")])
    async for _ in request.stream():
        pass
    with pytest.raises(InvalidArgument, match="consumed"):
        envelope_of(request)
    with pytest.raises(InvalidArgument, match="consumed"):
        await envelope_of_async(request)


def test_a_scope_that_cannot_be_pickled() -> None:
    with pytest.raises(InvalidArgument, match="cannot be pickled"):
        envelope_of(foreign(path_params={"f": lambda: None}))


# -- what middlewares leave ----------------------------------------------------------------------------------------


def arrived(extras: dict[str, Any]) -> Any:
    """The request that a backend gets of such a scope."""
    return build_http_request(pickle.dumps(trim_scope({**scope(), **extras})), b"")


class Ill:
    """Breaks whoever touches it, in one of several ways."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        if self.how == "packing":
            raise ZeroDivisionError("cannot be packed")
        if self.how == "size":
            return bytes, (2_000_000,), bytes(2_000_000)
        return divmod, (1, 0)


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope_extras, "_refused", set())


def test_what_middlewares_leave_arrives(refusals: None, caplog: pytest.LogCaptureFixture) -> None:
    left = {
        "user": SimpleUser("Ada"),
        "auth": AuthCredentials(["read"]),
        "session": {"cart": [1, 2]},
        "state": {"tenant": "acme", "lock": threading.Lock()},
        "own": {"deep": (1, b"2")},
        # what frameworks and servers leave for themselves is not missed
        "app": threading.Lock(),
        "router": threading.Lock(),
        "starlette.exception_handlers": threading.Lock(),
        "extensions": {"x": threading.Lock()},
        "asgi": {"version": "3.0"},
    }
    for _ in range(2):
        request = arrived(left)
        assert request.user.display_name == "Ada"
        assert request.auth.scopes == ["read"]
        assert request.session == {"cart": [1, 2]}
        assert request.state.tenant == "acme"
        assert not hasattr(request.state, "lock")
        assert request.scope["own"] == {"deep": (1, b"2")}
        assert "app" not in request.scope
    assert [record.getMessage() for record in caplog.records] == [
        "a part of a request does not reach its backend: request.state.lock cannot be pickled: "
        f"a lock, {left['state']['lock']!r} (TypeError: cannot pickle '_thread.lock' object)"  # type: ignore[index]
    ]
    again = build_http_request(pickle.dumps(trim_scope(arrived(left).scope)), b"")  # a backend passes it on
    assert (again.user.display_name, again.state.tenant) == ("Ada", "acme")


@pytest.mark.parametrize("how", ["packing", "size", "unpacking"])
def test_what_cannot_travel_is_left_out_and_named_once(
    how: str, refusals: None, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        request = arrived({"ill": Ill(how), "well": 1})
        assert request.scope["well"] == 1
        assert "ill" not in request.scope
    (record,) = caplog.records
    assert "request.scope['ill']" in record.getMessage()


def test_names_that_never_end_are_forgotten(refusals: None) -> None:
    for number in range(3000):
        arrived({f"ill-{number}": Ill("size")} if number < 3 else {"state": {f"{number}": threading.Lock()}})
    assert len(scope_extras._refused) <= 1000


def test_a_plain_request_has_nothing_of_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope_extras, "pack_extras", None)
    plain = {key: value for key, value in scope().items() if key in trim_scope.__globals__["_PLAIN_KEYS"]}
    trim_scope({**plain, "headers": [], "state": {}, "extensions": {}, "asgi": {}})
    trim_scope(plain | {"headers": []})
